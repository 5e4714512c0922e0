"""L-BFGS with a strong Wolfe line search, for losses that are the same function at every step.

Its own loop, because a step evaluates the loss several times; model, seeds, validation marks and units are those of
the other arms.  Weight decay and learning-rate schedules are not part of the method and do not apply.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import LBFGS

from ...cost import BACKWARD_UNITS, FAIR_PASS_UNITS, FORWARD_UNITS, PASS_UNITS, STEP_UNITS, UPDATE_UNITS
from ...tasks import TaskDefaults
from ...weights import algebra as weights
from ..arms.drive import COUNTS, NUM_VALIDATIONS, ArmRun, seeded_model, steps_of, summary_of, write_json
from .base import BaselineJob, recipe_grid

#: Evaluations of a line search, the package's default.
MAX_LINE_SEARCH = 25
EVALUATION_UNITS = FORWARD_UNITS + BACKWARD_UNITS
#: L-BFGS does not depend on the scale of the loss, but the package drops pairs whose product is below an absolute
#: 1e-10, which losses near float32's floor could reach.  A power of two, so that nothing else changes, not even
#: rounding: runs of 500 and 800 steps on pinn-poisson and regression end at the same loss with 1 in its place.
SCALE = 2.0**14
#: Loss of a point without one, in multiples of that at the start of the iteration: arbitrary, large.
WALL = 1e6
#: What a sum of thousands of prices may be off.
ROUNDING = 1e-6


class BudgetSpentError(Exception):
    """The next evaluation would cost more than is left."""


class NotFiniteError(Exception):
    """Loss or gradient of the current weights is not a number."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Loss and gradient at a point."""

    weights: list[Tensor]
    loss: float
    gradients: list[Tensor]


@dataclass(slots=True)
class Meter:
    """What a run has cost, in forwards: an evaluation is one and a backward, an iteration an update and its passes."""

    budget_units: float
    num_evaluations: int = 0
    num_iterations: int = 0
    iteration_units: float = 0.0
    num_passes: float = 0.0

    @property
    def cost_units(self) -> float:
        """Everything so far."""
        return EVALUATION_UNITS * self.num_evaluations + self.iteration_units

    def pay_iteration(self, num_pairs: int) -> None:
        """Book the direction and the move of one iteration.

        Raises:
            BudgetSpentError: it and an evaluation cannot be paid.
        """
        price = UPDATE_UNITS + PASS_UNITS * two_loop_passes(num_pairs)
        self.check(price + EVALUATION_UNITS)
        self.iteration_units += price
        self.num_passes += two_loop_passes(num_pairs)

    def pay_evaluation(self) -> None:
        """Book one evaluation.

        Raises:
            BudgetSpentError: it cannot be paid.
        """
        self.check(EVALUATION_UNITS)
        self.num_evaluations += 1

    def check(self, price: float) -> None:
        """Raise ``BudgetSpentError`` if that much is not left."""
        if self.cost_units + price > self.budget_units + ROUNDING:
            raise BudgetSpentError


@dataclass(slots=True)
class Objective:
    """The closure: pays for every evaluation, and remembers those of the current iteration.

    ``LBFGS.step`` begins by evaluating the point its last line search has ended at; remembering saves paying
    for that twice, so that single iterations cost what one long call would.
    """

    loss_fn: Callable[[], Tensor]
    parameters: list[Tensor]
    meter: Meter
    seen: list[Evaluation] = field(default_factory=list)  # in this iteration
    start: Evaluation | None = None  # of the point it begins at, until it has been asked for

    def __call__(self) -> float:
        """Loss at the current weights, their gradients set.

        Raises:
            BudgetSpentError: there is no money for it.
            NotFiniteError: the iteration begins where there is no loss.
        """
        here, self.start = self.start, None
        if here is None:
            self.meter.pay_evaluation()
            for p in self.parameters:
                p.grad = None
            loss = SCALE * self.loss_fn()
            loss.backward()
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
            here = Evaluation(weights.clone(self.parameters), float(loss.detach()), weights.clone(gradients))
            if not (math.isfinite(here.loss) and weights.all_finite(here.gradients)):
                here = self._wall(here)
        self.seen.append(here)
        for p, g in zip(self.parameters, here.gradients, strict=True):
            p.grad = g.clone()
        return here.loss

    def _wall(self, here: Evaluation) -> Evaluation:
        """A trial beyond the numbers counts as very bad, because the line search cannot interpolate infinity."""
        if not self.seen:
            raise NotFiniteError
        flat = [torch.zeros_like(g) for g in here.gradients]
        return Evaluation(here.weights, WALL * max(abs(self.seen[0].loss), 1.0), flat)

    def begin_iteration(self) -> None:
        """What is known of the current point stays known; other points are forgotten."""
        self.start = next((e for e in reversed(self.seen) if _equal(e.weights, self.parameters)), None)
        self.seen = []

    def best(self) -> list[Tensor] | None:
        """Weights of the lowest loss seen in this iteration; None if there is none."""
        return min(self.seen, key=lambda e: e.loss).weights if self.seen else None


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def two_loop_passes(num_pairs: int) -> int:
    """Passes over the weights of one iteration.

    Two loops over the pairs, each a dot product (2 reads) and an update of a vector (2 reads, 1 write); and
    forming the newest pair, its two products, the direction and the move.
    """
    return 10 * num_pairs + 12


def minimize(
    objective: Objective, *, history: int, lr: float, after_iteration: Callable[[float], None] = lambda loss: None
) -> str:
    """Iterate until the budget is spent or no step can be found even from a new start.

    Args:
        objective: What is minimised; holds the weights.
        history: Pairs kept.
        lr: First step length a line search tries.
        after_iteration: Called with the loss before the iteration.

    Returns:
        Why it ended: "" for the budget, else one line.  The weights are the best of the last line search.
    """
    parameters, meter = objective.parameters, objective.meter

    def fresh() -> LBFGS:
        # no tolerances: whether a change is small is the budget's question, not an absolute number's
        return LBFGS(
            parameters, lr=lr, max_iter=1, max_eval=1 + MAX_LINE_SEARCH, tolerance_grad=0.0, tolerance_change=0.0,
            history_size=history, line_search_fn="strong_wolfe",
        )  # fmt: skip

    optimizer, restarted = fresh(), False
    while True:
        before = weights.clone(parameters)
        objective.begin_iteration()
        pairs = len(optimizer.state[parameters[0]].get("old_dirs") or ())
        try:
            meter.pay_iteration(min(history, pairs + 1))
            loss = float(optimizer.step(objective)) / SCALE
        except BudgetSpentError:
            weights.copy_(parameters, objective.best() or before)
            return ""
        except NotFiniteError:
            return "L-BFGS diverged: the loss is not finite"
        meter.num_iterations += 1
        if not weights.all_finite(parameters):  # extrapolation in the line search can overflow
            weights.copy_(parameters, before)
        moved = not _equal(before, parameters)
        if not moved and restarted:
            return ""  # the gradient itself leads nowhere: rounding, or the minimum
        if not moved:
            optimizer = fresh()
        restarted = not moved
        after_iteration(loss)


def train(order: BaselineJob) -> ArmRun:
    """One run.

    Raises:
        ValueError: batches differ from step to step.
    """
    setup, arm = order.setup, order.arm
    history = int(order.values["history"])
    steps = steps_of(setup, arm.budget)
    budget = STEP_UNITS * steps
    model = seeded_model(setup, order.seed)
    batch = next(iter(setup.task.batches(order.seed)))
    meter = Meter(budget)
    parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    objective = Objective(lambda: setup.task.loss_fn(model, batch), parameters, meter)
    curve: list[tuple[float, float]] = []
    every = budget / NUM_VALIDATIONS
    outside_s, outside_cpu_s, started, started_cpu = 0.0, 0.0, time.perf_counter(), time.process_time()

    def validate() -> float:
        nonlocal outside_s, outside_cpu_s
        began, began_cpu = time.perf_counter(), time.process_time()
        loss = setup.task.evaluate(model)
        curve.append((meter.cost_units, loss))
        outside_s += time.perf_counter() - began
        outside_cpu_s += time.process_time() - began_cpu
        return loss

    def after_iteration(loss: float) -> None:
        if meter.cost_units >= every * (1 + (curve[-1][0] // every if curve else 0)):
            validate()

    error = minimize(objective, history=history, lr=arm.lr, after_iteration=after_iteration)
    wall_s = time.perf_counter() - started - outside_s
    cpu_s = time.process_time() - started_cpu - outside_cpu_s
    measured = bool(curve) and curve[-1][0] == meter.cost_units
    final = math.nan if error else curve[-1][1] if measured else validate()
    counts = dict.fromkeys(COUNTS, 0.0) | {
        "cost_units": meter.cost_units,
        "fair_cost_units": meter.cost_units + (FAIR_PASS_UNITS - PASS_UNITS) * meter.num_passes,
        "num_forward": float(meter.num_evaluations),
        "num_backward": float(meter.num_evaluations),
        "num_real_steps": float(meter.num_iterations),
    }
    run = ArmRun(
        arm=arm, seed=order.seed, steps=steps, final_val_loss=final, wall_s=wall_s, counts=counts,
        curve=tuple(curve), error=error, cpu_s=cpu_s,
    )  # fmt: skip
    if order.folder is not None:
        _write(order.folder, run)
    return run


def _write(folder: Path, run: ArmRun) -> None:
    write_json(folder / "summary.json", {**summary_of(run), "statistics": run.counts, "curve": list(run.curve)})


def grid(recipe: TaskDefaults) -> tuple[float, ...]:
    """1, the step of Newton's method, and smaller: as many as the recipe has rates."""
    return tuple(2.0**-i for i in range(len(recipe_grid(recipe))))[::-1]
