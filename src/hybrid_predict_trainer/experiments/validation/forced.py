"""Runs in which a given share of the steps is predicted, whatever that does, and their controls."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ...observe.loss_features import NUM_LOSS_FEATURES
from ...propose.corrector import NoCorrection, ResidualCorrector, apply
from ...propose.residuals import extract
from ...records import PhasePrediction, Window
from ...tasks.base import Task
from .loop import WIDE, WINDOW, Loop
from .plain import Scale

Kind = Literal["hybrid", "uncorrected", "jump of zero"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForcedRun:
    """A run with forced jumps.

    Attributes:
        share: of all steps that are to be predicted, from 0 to 1.
        horizon: Y.
        kind: what a jump does; "uncorrected" leaves out what the residuals of earlier forecasts say.
        every: real steps between two jumps, at least.
        predictor: name.
        least_confidence: jumps of less are left out.
    """

    share: float
    horizon: int
    kind: Kind = "hybrid"
    every: int = WINDOW
    predictor: str = "linear"
    least_confidence: float = 0.0


@dataclass(slots=True)
class Outcome:
    """What a run came to.

    Attributes:
        loss: validation loss at the end; NaN where it was not finite.
        real, claimed: steps.
        seconds: of the processor.
        jumps: number.
    """

    loss: float
    real: int
    claimed: int
    seconds: float
    jumps: int = 0
    task_metrics: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; perplexity as well."""
        return {
            "loss": self.loss, "perplexity": math.exp(min(self.loss, 700.0)) if self.loss == self.loss else math.nan,
            "real_steps": self.real, "claimed_steps": self.claimed,
            "predicted_share": self.claimed / max(1, self.real + self.claimed),
            "cpu_seconds": self.seconds, "jumps": self.jumps, **self.task_metrics,
        }  # fmt: skip


class Forecasts:
    """The forecast of one predictor for the next window, made at every close, and what the corrector learns from it."""

    def __init__(self, loop: Loop, name: str, *, corrects: bool) -> None:
        """Args: loop: watched by ``name``.  corrects: residuals are learnt and applied."""
        self._loop, self._name = loop, name
        self.corrector: ResidualCorrector | NoCorrection = NoCorrection()
        if corrects:
            self.corrector = ResidualCorrector(WIDE, loop.groups.num_groups, NUM_LOSS_FEATURES)
        self._last: tuple[Window, PhasePrediction] | None = None

    def close(self, window: Window) -> tuple[PhasePrediction, PhasePrediction, Window] | None:
        """Learn from the window that closed; returns the forecast made for it, as told and as corrected, if there is
        one and no jump lies in between."""
        seen = None
        if self._last is not None and window.hindsight is not None:
            before, told = self._last
            corrected = self.corrected(told, before)
            self.corrector.observe(extract(window.hindsight, told, before.features, window.loss))
            seen = told, corrected, before
        told_next = self._loop.predict(self._name, WINDOW)
        self._last = None if told_next is None else (window, told_next)
        return seen

    def corrected(self, told: PhasePrediction, window: Window) -> PhasePrediction:
        """A forecast with what similar ones got wrong."""
        return apply(told, self.corrector.correct(told, window.features, window.products.BB))

    def forget(self) -> None:
        """A jump was made: the forecast for the next window says nothing about it."""
        self._last = None


def plain(scale: Scale, seed: int, task: Task, steps: int | None = None) -> tuple[Loop, Outcome]:
    """A plain run with a schedule of its own, ``steps`` long."""
    began = time.process_time()
    loop = Loop(scale, seed, steps=steps, task=task)
    for _ in range(loop.total):
        loop.step()
    return loop, Outcome(_finite(loop.evaluate()), loop.num_real, 0, time.process_time() - began)


def forced(
    scale: Scale, seed: int, task: Task, plan: ForcedRun, after_jump: Callable[[Loop, int], None] | None = None,
    before_jump: Callable[[Loop], None] | None = None,
) -> tuple[Loop, Outcome]:  # fmt: skip
    """A run whose jumps are all made.

    Args:
        scale: Sizes.
        seed: Of weights and data.
        task: Of the scale.
        plan: Share, horizon, kind.
        after_jump: Called with the loop after every jump and each of the real steps up to the next one, and with how
            many of these there were.
        before_jump: Called with the loop before every jump.
    """
    began = time.process_time()
    loop = Loop(scale, seed, (plan.predictor,), task=task)
    forecasts = Forecasts(loop, plan.predictor, corrects=plan.kind == "hybrid")
    since, jumps = plan.every, 0
    while loop.position < loop.total:
        loop.step()
        since += 1
        if jumps and after_jump is not None:
            after_jump(loop, since)
        if loop.window is None:
            continue
        forecasts.close(loop.window)
        if since >= plan.every and _due(loop, scale, plan):
            told = loop.predict(plan.predictor, plan.horizon)
            if told is None or told.confidence < plan.least_confidence:
                continue
            if before_jump is not None:
                before_jump(loop)
            told = forecasts.corrected(told, loop.window)
            deltas = None if plan.kind == "jump of zero" else loop.basis.combine(told.coefficients)
            loop.jump(deltas, plan.horizon)
            forecasts.forget()
            since, jumps = 0, jumps + 1
            if after_jump is not None:
                after_jump(loop, 0)
    loss = _finite(loop.evaluate())
    return loop, Outcome(loss, loop.num_real, loop.num_claimed, time.process_time() - began, jumps)


def _due(loop: Loop, scale: Scale, plan: ForcedRun) -> bool:
    if loop.position < scale.warmup * loop.total or loop.position + plan.horizon > loop.total:
        return False
    return loop.num_claimed + plan.horizon <= plan.share * (loop.position + plan.horizon)


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.nan


def zero_of(plan: ForcedRun) -> ForcedRun:
    """The same jumps, going nowhere: the schedule alone moves."""
    return replace(plan, kind="jump of zero")
