"""Runs of methods that evaluate the loss several times a step, in loops of their own.

Model, seeds, validation marks and units are those of the other arms.  Weight decay and learning-rate schedules are not
part of these methods and do not apply.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path

from ...cost import STEP_UNITS
from ...tasks.base import HasSolution
from ..arms.drive import COUNTS, NUM_VALIDATIONS, ArmRun, seeded_model, steps_of, summary_of, write_json
from .base import BaselineJob


class OwnLoop:
    """One run: its model and batch, its validations, and its clock, which stands still while they are made.

    Attributes:
        model: At the start.
        batch: The only one.
        steps: Length in full steps.
        budget: The same in units.
    """

    def __init__(self, order: BaselineJob) -> None:
        """Build the model; the clock starts."""
        self._order, setup = order, order.setup
        self.steps = steps_of(setup, order.arm.budget)
        self.budget = STEP_UNITS * self.steps
        self.model = seeded_model(setup, order.seed)
        self.batch = next(iter(setup.task.batches(order.seed)))
        self._curve: list[tuple[float, float]] = []
        self._every = self.budget / NUM_VALIDATIONS
        self._outside_s = self._outside_cpu_s = 0.0
        self._started, self._started_cpu = time.perf_counter(), time.process_time()

    def after_iteration(self, cost_units: float) -> None:
        """Validate where the cost has passed the next mark."""
        if cost_units >= self._every * (1 + (self._curve[-1][0] // self._every if self._curve else 0)):
            self._validate(cost_units)

    def _validate(self, cost_units: float) -> float:
        began, began_cpu = time.perf_counter(), time.process_time()
        loss = self._order.setup.task.evaluate(self.model)
        self._curve.append((cost_units, loss))
        self._outside_s += time.perf_counter() - began
        self._outside_cpu_s += time.process_time() - began_cpu
        return loss

    def ended(self, counts: Mapping[str, float], error: str = "") -> ArmRun:
        """What the run came to; its summary is written where the order names a folder.

        Args:
            counts: Some of :data:`COUNTS`, ``cost_units`` among them; others are 0.
            error: Why it has no final loss; "" where it has one.
        """
        wall_s = time.perf_counter() - self._started - self._outside_s
        cpu_s = time.process_time() - self._started_cpu - self._outside_cpu_s
        cost, task = counts["cost_units"], self._order.setup.task
        measured = bool(self._curve) and self._curve[-1][0] == cost
        final = math.nan if error else self._curve[-1][1] if measured else self._validate(cost)
        known = isinstance(task, HasSolution) and not error
        run = ArmRun(
            arm=self._order.arm, seed=self._order.seed, steps=self.steps, final_val_loss=final, wall_s=wall_s,
            counts=dict.fromkeys(COUNTS, 0.0) | dict(counts), curve=tuple(self._curve), error=error, cpu_s=cpu_s,
            solution_error=task.solution_error(self.model) if known else math.nan,  # type: ignore[attr-defined]
        )  # fmt: skip
        if self._order.folder is not None:
            _write(self._order.folder, run)
        return run


def _write(folder: Path, run: ArmRun) -> None:
    write_json(folder / "summary.json", {**summary_of(run), "statistics": run.counts, "curve": list(run.curve)})
