"""One run of one arm: the bare loop, the bare loop with another data order, the same with the trainer."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, get_args

import torch
from torch import nn

from ...config.settings import HybridTrainerConfig
from ...config.toml import with_values
from ...cost import STEP_UNITS
from ...records import DivergenceError
from ...trainer import HybridTrainer
from .models import build_model
from .problems import Problem, build_problem
from .recipes import build_optimizer, build_schedule
from .settings import Setting

Arm = Literal["plain", "other-order", "ours"]
ARMS: tuple[Arm, ...] = get_args(Arm)

#: Data orders of the second plain run are those of no seed.
OTHER_ORDER = 100_000
#: A run with the trainer is stopped this many times for a few steps of the bare loop, so that the times of both are
#: taken under the same conditions; these steps are this share of the run.
NUM_STOPS, STOP_SHARE = 10, 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a run came to.

    Attributes:
        loss: final validation loss; NaN where the run was lost.
        cost: in plain steps, as the trainer counts it.
        seconds: of the training loop.
        time_ratio: of a step of ours to one of the bare loop, measured in turns; None for the bare loop.
        error: what ended the run; None if nothing did.
        source: of the data.
        notes: of the trainer: learned scale, jumps, warnings.
    """

    loss: float
    cost: float
    seconds: float
    time_ratio: float | None = None
    error: str | None = None
    source: str = ""
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Parts:
    """What a training loop holds."""

    problem: Problem
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Any
    batches: Iterator[Any]

    @classmethod
    def build(cls, setting: Setting, seed: int, arm: Arm) -> Parts:
        """Everything new; initial weights and dropout follow from the seed, batches from seed and arm."""
        problem = build_problem(setting)
        model = build_model(setting, seed)
        optimizer = build_optimizer(setting, model)
        order = seed + (OTHER_ORDER if arm == "other-order" else 0)
        schedule = build_schedule(setting, optimizer)
        _mode(optimizer, "train")
        model.train()
        return cls(problem, model, optimizer, schedule, problem.batches(order))


def _mode(optimizer: torch.optim.Optimizer, mode: Literal["train", "eval"]) -> None:
    """Schedule-Free keeps two sets of weights: those to train and those to use."""
    switch = getattr(optimizer, mode, None)
    if switch is not None:
        switch()


def run(setting: Setting, seed: int, arm: Arm, changes: Mapping[str, Any] | None = None) -> Result:
    """Train once and validate; an exception of the loop is the run's result and not the program's.

    Args:
        setting: What is trained.
        seed: Of weights and order.
        arm: Which loop.
        changes: Of the trainer's default configuration, by dotted TOML key; to see what a part of it does.

    Raises:
        ConfigError: a key or value of ``changes`` is wrong.
        ValueError: the setting's data are not there.
        ModuleNotFoundError: its package is not there.
    """
    torch.set_num_threads(1)
    parts = Parts.build(setting, seed, arm)
    return _ours(setting, parts, seed, changes or {}) if arm == "ours" else _plain(setting, parts)


# ---- the bare loop ------------------------------------------------------------------------------------------


def plain_steps(setting: Setting, parts: Parts, count: int) -> None:
    """Steps of the loop that a user writes without any library."""
    loss_fn, model, optimizer = parts.problem.loss, parts.model, parts.optimizer
    for batch in islice(parts.batches, count):
        optimizer.zero_grad(set_to_none=True)
        loss_fn(model, batch).backward()
        if setting.clip > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), setting.clip)
        optimizer.step()
        if parts.schedule is not None:
            parts.schedule.step()


def _plain(setting: Setting, parts: Parts) -> Result:
    began = time.perf_counter()
    plain_steps(setting, parts, setting.steps)
    seconds = time.perf_counter() - began
    return _judged(parts, cost=float(setting.steps), seconds=seconds)


def _judged(parts: Parts, **rest: Any) -> Result:
    """The run's result with its validation loss."""
    _mode(parts.optimizer, "eval")
    loss = parts.problem.validate(parts.model)
    error = None if math.isfinite(loss) else "the final validation loss is not finite"
    return Result(loss=loss, error=error, source=parts.problem.source, **rest)


# ---- with the trainer -----------------------------------------------------------------------------------------


class Clock:
    """Seconds of the run and of a plain companion that takes a few steps at every stop.

    Args:
        setting: of both.
        seed: of both.
    """

    def __init__(self, setting: Setting, seed: int) -> None:
        """Build the companion without touching the run's random numbers."""
        self._setting = setting
        with torch.random.fork_rng(devices=[]):
            self._companion = Parts.build(setting, seed, "other-order")
        self._every = max(setting.steps // NUM_STOPS, 1)
        self._count = max(math.ceil(STOP_SHARE * self._every), 1)
        self._num_calls = 0
        self.plain_seconds, self.num_plain, self.away = 0.0, 0, 0.0

    def __call__(self, _result: object = None) -> None:
        """After every step of the run."""
        self._num_calls += 1
        if self._num_calls % self._every:
            return
        entered = time.perf_counter()
        with torch.random.fork_rng(devices=[]):  # its dropout draws what the run goes on to draw
            began = time.perf_counter()
            plain_steps(self._setting, self._companion, self._count)
            self.plain_seconds += time.perf_counter() - began
            self.num_plain += self._count
        self.away += time.perf_counter() - entered


def build_trainer(setting: Setting, parts: Parts, changes: Mapping[str, Any]) -> HybridTrainer:
    """The default configuration; of its settings only the clipping, where the bare loop clips, and ``changes``."""
    config = HybridTrainerConfig(gradient_clip_norm=setting.clip) if setting.clip > 0 else HybridTrainerConfig()
    config = with_values(config, changes) if changes else config
    return HybridTrainer(
        parts.model, parts.optimizer, config, loss_fn=parts.problem.loss, lr_scheduler=parts.schedule,
        residual_fn=parts.problem.residuals,
    )  # fmt: skip


def _ours(setting: Setting, parts: Parts, seed: int, changes: Mapping[str, Any]) -> Result:
    clock = Clock(setting, seed)
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        began = time.perf_counter()
        trainer = build_trainer(setting, parts, changes)
        error: str | None = None
        try:
            trainer.fit(parts.batches, total_steps=setting.steps, progress_callback=clock)
        except (DivergenceError, Exception) as raised:  # whatever a user would have seen instead of a trained model
            error = f"{type(raised).__name__}: {' '.join(str(raised).split())}"
        seconds = time.perf_counter() - began - clock.away
        said = list(dict.fromkeys(" ".join(str(w.message).split()) for w in caught))[:5]
    cost = trainer.run.meter.cost_units / STEP_UNITS
    ratio = seconds / setting.steps / (clock.plain_seconds / clock.num_plain) if clock.num_plain else None
    rest: dict[str, Any] = {"cost": cost, "seconds": seconds, "time_ratio": ratio, "notes": _notes(trainer, said)}
    if error is not None:
        return Result(loss=math.nan, error=error, source=parts.problem.source, **rest)
    return _judged(parts, **rest)


def _notes(trainer: HybridTrainer, said: list[str]) -> dict[str, Any]:
    """What the trainer did, as far as it says."""
    with contextlib.suppress(Exception):  # a fault of the summary is not one of the training
        counts = trainer.statistics()
        told = ("num_real_steps", "learned_scale", "num_early_cuts", "num_jumps_accepted", "num_rollbacks")
        return {**{name: counts.get(name) for name in told}, "warnings": said}
    return {"warnings": said}
