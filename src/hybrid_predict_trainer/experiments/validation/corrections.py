"""Experiment 5: does correction take back what predictions got wrong?

Two things bear the name.  After a jump CORRECT makes real steps: their control is the same real steps from the same
state without the jump.  Before a jump the residuals of earlier forecasts are taken off the next one: their control is
the run with the same jumps and steps and without residuals, and of the forecasts themselves a prediction of no change.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...records import Hindsight
from .criteria import Criterion
from .forced import ForcedRun, Forecasts, forced, plain
from .loop import Loop, task_of
from .plain import Scale

FALL_BAR, HELPED_BAR, ERROR_BAR, LEVEL = 0.05, 0.5, 0.5, 0.05
NUM_PROBES, NUM_SHUFFLES = 4, 500
#: A loss so many times that of before the jump is no longer training that goes on.
UNSTABLE = 2.0


@dataclass(slots=True)
class _Watch:
    """Losses around every jump of a run, on batches that it does not train on."""

    probes: list[Any]
    steps: int
    events: list[dict[str, Any]]
    before: float = math.nan

    def before_jump(self, loop: Loop) -> None:
        """Note the loss, and what the same real steps do without the jump."""
        self.before = loop.loss_on(self.probes)
        twin = loop.twin()
        for _ in range(self.steps):
            twin.step()
        self.events.append({"step": loop.position, "before": self.before, "control": twin.loss_on(self.probes)})

    def after_jump(self, loop: Loop, since: int) -> None:
        """Note the loss after the jump, and step by step until it is back."""
        event = self.events[-1]
        if since > self.steps:
            return
        loss = loop.loss_on(self.probes)
        if since == 0:
            event["jumped"] = loss
        elif since <= self.steps:
            event["corrected"] = loss
            if loss <= event["before"] and "needed" not in event:
                event["needed"] = since


def measure(scale: Scale, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """One run with half of its steps predicted, watched; the same without residuals; forecasts along a plain run."""
    task = task_of(scale)
    horizon = dict(scale.jump_steps)[50]
    plan = ForcedRun(share=0.5, horizon=horizon, predictor=scale.forced)
    uncorrected = ForcedRun(share=0.5, horizon=horizon, predictor=scale.forced, kind="uncorrected")
    baseline = plain(scale, seed, task)[1]
    probes = Loop(scale, seed, task=task, steps=1).probe_batches(NUM_PROBES)
    watch = _Watch(probes, scale.correct_steps, [])
    with_, without = (
        forced(scale, seed, task, plan, watch.after_jump, watch.before_jump)[1],
        forced(scale, seed, task, uncorrected)[1],
    )
    events = [e for e in watch.events if "corrected" in e]
    for event in events:
        event.setdefault("needed", scale.correct_steps + 1)
    tell(f"seed {seed}: {len(events)} jumps watched; final loss {with_.loss:.4f}, without residuals {without.loss:.4f}")
    return {
        "events": events, "along_a_plain_run": _along(scale, seed, task, tell), "num_events": len(events),
        "final": {"baseline": baseline.loss, "with": with_.loss, "without": without.loss},
        "diverged": int(not all(math.isfinite(e["corrected"]) for e in events)),
    }  # fmt: skip


def error_of(coefficients: Tensor, hindsight: Hindsight) -> float:
    """|told - actual| from inner products, coefficients (G, K)."""
    c = coefficients.double()
    squared = torch.einsum("gk,gkl,gl->", c, hindsight.BB, c) - 2 * (c * hindsight.BT).sum() + hindsight.TT.sum()
    return math.sqrt(max(float(squared), 0.0))


def _along(scale: Scale, seed: int, task: Any, tell: Callable[[str], None]) -> dict[str, float]:
    """Errors of the one-window forecasts of a plain run, summed: as told, corrected, and of no change."""
    loop = Loop(scale, seed, (scale.forced,), task=task)
    forecasts = Forecasts(loop, scale.forced, corrects=True)
    sums = {"told": 0.0, "corrected": 0.0, "zero": 0.0}
    for _ in range(loop.total):
        loop.step()
        if loop.window is None:
            continue
        seen = forecasts.close(loop.window)
        hindsight = loop.window.hindsight
        if seen is None or hindsight is None:
            continue
        told, corrected, _ = seen
        sums["told"] += error_of(told.coefficients, hindsight)
        sums["corrected"] += error_of(corrected.coefficients, hindsight)
        sums["zero"] += math.sqrt(float(hindsight.TT.sum()))
    tell(f"seed {seed}: forecasts along a plain run of {loop.total} steps")
    return sums


def rank_correlation(one: list[float], other: list[float]) -> float:
    """Spearman's; 0 where one of them does not vary."""
    from scipy import stats

    if len(one) < 3 or len(set(one)) < 2 or len(set(other)) < 2:
        return 0.0
    return float(stats.spearmanr(one, other).statistic)


def falls_p(before: list[float], after: list[float]) -> float:
    """One-sided p of the paired t test that losses do not fall; 1 below three pairs."""
    from scipy import stats

    if len(before) < 3 or all(a == b for a, b in zip(before, after, strict=True)):
        return 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # equal falls have no spread: p is then 0, rightly
        return float(stats.ttest_rel(before, after, alternative="greater").pvalue)


def criteria(found: Mapping[str, Any], seed: int = 0) -> list[Criterion]:
    """The bars, each beside the same real steps without a jump, or no prediction."""
    events = found["events"]
    before, jumped, corrected, control = (
        [float(e[k]) for e in events] for k in ("before", "jumped", "corrected", "control")
    )
    falls = [(j - c) / j for j, c in zip(jumped, corrected, strict=True)]
    usual = [(b - c) / b for b, c in zip(before, control, strict=True)]
    same, along, final = "the same real steps without a jump", found["along_a_plain_run"], found["final"]
    needed = [float(e["needed"]) for e in events]
    harm = [j - b for j, b in zip(jumped, before, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    shuffled = [
        abs(rank_correlation([needed[i] for i in torch.randperm(len(needed), generator=generator)], harm))
        for _ in range(NUM_SHUFFLES if len(needed) > 2 else 0)
    ]
    lost = {k: final[k] / final["baseline"] - 1 for k in ("with", "without")}
    count = max(len(events), 1)
    worst = max((c / b for b, c in zip(before, corrected, strict=True)), default=math.nan)
    usual_worst = max((c / b for b, c in zip(before, control, strict=True)), default=math.nan)
    return [
        Criterion(name="mean fall of the loss in a correction", value=sum(falls) / count, bar=FALL_BAR, sense="above",
                  control=sum(usual) / count, control_name=same),
        Criterion(name="share of corrections that lower the loss", value=sum(f > 0 for f in falls) / count,
                  bar=HELPED_BAR, sense="above", control=sum(f > 0 for f in usual) / count, control_name=same),
        Criterion(name="p that the loss does not fall in a correction", value=falls_p(jumped, corrected), bar=LEVEL,
                  sense="below", control=falls_p(before, control), control_name=same),
        Criterion(name="error of forecasts taken back by residuals", value=_saved(along, "corrected"),
                  bar=ERROR_BAR, sense="above", control=_saved(along, "zero"),
                  control_name="predicting no change"),
        Criterion(name="loss lost against the baseline taken back by residuals", value=_taken_back(lost), bar=ERROR_BAR,
                  sense="above", control=0.0, control_name="the same jumps and steps without residuals"),
        Criterion(name="rank correlation of steps needed and harm of the jump", value=rank_correlation(needed, harm),
                  bar=sorted(shuffled)[int(0.95 * len(shuffled))] if shuffled else math.nan, sense="above",
                  control=sum(shuffled) / max(len(shuffled), 1), control_name="shuffled"),
        Criterion(name="worst loss after a correction over that before the jump", value=worst, bar=UNSTABLE,
                  sense="below", control=usual_worst, control_name=same),
    ]  # fmt: skip


def _saved(sums: Mapping[str, float], which: str) -> float:
    """Share of the summed error that another forecast saves; NaN where nothing was told."""
    return 1 - sums[which] / sums["told"] if sums["told"] > 0 else math.nan


def _taken_back(lost: Mapping[str, float]) -> float:
    """Share of the loss against the baseline that residuals save; NaN where nothing was lost, or a run diverged."""
    if not (math.isfinite(lost["with"]) and math.isfinite(lost["without"])) or lost["without"] <= 0:
        return math.nan
    return 1 - lost["with"] / lost["without"]


def decision(found: Mapping[str, Any]) -> str:
    """Continue where corrections pay for the jump and residuals halve the error; refine where one of them does."""
    bars = {bar.name: bar for bar in criteria(found)}
    asked = [bar for name, bar in bars.items() if "fall of" in name or "residuals" in name]
    ours = [bar.passed and not bar.control_passes for bar in asked]
    return "continue" if all(ours) else "refine" if any(ours) else "stop"
