"""What riding along has brought and cost, in a few lines that a reader without the documentation understands.

Steps gained are what the holdout supports: jumps that were applied against jumps that were approved and skipped.  The
speed against plain training (S) is not in it, because one run cannot know it; ``hpt compare`` measures it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..cost import STEP_UNITS
from ..records import StateDict, StepResult
from .figures import statistics

if TYPE_CHECKING:
    from ..cycle.state import State


class Account:
    """Refusals by reason, and the time that was spent beside the loop's own.

    Attributes:
        refused: Reason of a verdict -> proposals that were refused for it.
        own_seconds: Wall-clock time inside the engine: looking, proposing, judging, learning.
    """

    def __init__(self) -> None:
        """Nothing has happened."""
        self.refused: dict[str, int] = {}
        self.own_seconds = 0.0
        self._began: float | None = None  # of the run in this process
        self._inside = False

    @contextmanager
    def timed(self) -> Iterator[None]:
        """A block of the engine's own work; one inside another is counted once."""
        if self._inside:
            yield
            return
        now = time.perf_counter()
        self._began = now if self._began is None else self._began
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
            self.own_seconds += time.perf_counter() - now

    def note(self, result: StepResult) -> None:
        """What became of a proposal."""
        verdict = result.verdict
        if verdict is not None and not verdict.accepted:
            reason = str(verdict.reason)
            self.refused[reason] = self.refused.get(reason, 0) + 1

    def report(self, run: State, why_not: str = "") -> dict[str, Any]:
        """Everything that :func:`text` says, JSON-able.

        Args:
            run: Of the engine.
            why_not: Why nothing is proposed as things stand, empty if something is.

        Returns:
            Counts; ``cost_steps`` in plain training steps; ``own_seconds`` of ``seconds`` of wall-clock time.
        """
        found = statistics(run)
        kept = (
            "num_real_steps", "num_skipped_steps", "steps_gained", "steps_gained_ci95", "num_jumps_proposed",
            "num_jumps_accepted", "num_controls", "num_rollbacks", "num_guard_alarms", "num_guard_retries", "withdrawn",
            "learned_scale", "learning_rate_factor", "num_early_cuts", "lookahead_effect", "lookahead_switched_off",
            "predictor", "exact_losses",
        )  # fmt: skip
        seconds = 0.0 if self._began is None else time.perf_counter() - self._began
        return {
            **{name: found[name] for name in kept},
            "steps_gained_reason": found.get("reason"), "cost_steps": found["cost_units"] / STEP_UNITS,
            "refused": dict(sorted(self.refused.items(), key=lambda item: -item[1])),
            "own_seconds": self.own_seconds, "seconds": seconds, "why_not": why_not,
        }  # fmt: skip

    def state_dict(self) -> StateDict:
        """Plain containers; times are those of one process and stay behind."""
        return {"refused": dict(self.refused)}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.refused = {str(reason): int(count) for reason, count in state["refused"].items()}


def format_text(report: Mapping[str, Any]) -> str:
    """A report of :meth:`Account.report` as lines."""
    steps, cost = report["num_real_steps"], report["cost_steps"]
    lines = [f"hybrid-predict-trainer: {steps} steps of the optimizer, at the cost of {cost:.1f} plain ones"]
    gained, interval = report["steps_gained"], report["steps_gained_ci95"]
    if gained is None:
        lines.append(f"steps gained by jumps: not measured ({report['steps_gained_reason']})")
    else:
        low, high = interval
        lines.append(f"steps gained by jumps, against those held out: {gained:.1f} (95 % {low:.1f} to {high:.1f})")
    lines.append(
        f"jumps: {report['num_jumps_proposed']} proposed, {report['num_jumps_accepted']} accepted, "
        f"{report['num_controls']} held out, {report['num_rollbacks']} taken back"
    )
    lines += [f"  refused {count} times: {reason}" for reason, count in report["refused"].items()]
    if report["why_not"]:
        lines.append(f"  nothing is proposed: {report['why_not']}")
    lines.append(motions(report))
    if report["withdrawn"]:
        lines.append("everything was withdrawn, and training went on plainly: the loss stood above its best")
    seconds, own = report["seconds"], report["own_seconds"]
    share = f" ({100 * own / seconds:.1f} %)" if seconds > 0 else ""
    lines.append(f"watching and judging took {own:.2f} s of {seconds:.2f} s{share}")
    lines.append("the speed against plain training is known from a comparison only: hpt compare")
    return "\n".join(lines)


def motions(report: Mapping[str, Any]) -> str:
    """What was done to the optimizer's own steps: a line.

    Args:
        report: Of :meth:`Account.report`, or counts of ``statistics()``.
    """
    factor = report.get("learning_rate_factor", 1.0)  # counts of an earlier version have none
    lowered = "" if factor == 1.0 else f", and times {factor:g} by recovery"
    said = [f"learning rate times {report['learned_scale']:g}{lowered}"]
    if report["num_early_cuts"]:
        said.append(f"{report['num_early_cuts']} cuts of groups' first steps")
    effect = report["lookahead_effect"]
    if report["lookahead_switched_off"]:
        said.append("lookahead switched off by its trial")
    elif isinstance(effect, float) and math.isfinite(effect):
        said.append(f"lookahead's effect on the loss {effect:+.2e}")
    return f"steps: {', '.join(said)}"
