"""L-BFGS with a strong Wolfe line search, for losses that are the same function at every step.

It has a loop of its own (:mod:`.own_loop`), because a step evaluates the loss several times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import LBFGS

from ...cost import BACKWARD_UNITS, FAIR_PASS_UNITS, FORWARD_UNITS, PASS_UNITS, UPDATE_UNITS
from ...tasks import TaskDefaults
from ...weights import algebra as weights
from ..arms.drive import ArmRun
from .base import BaselineJob, recipe_grid
from .own_loop import OwnLoop

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
    loop = OwnLoop(order)
    meter = Meter(loop.budget)
    parameters: list[Tensor] = [p for p in loop.model.parameters() if p.requires_grad]
    objective = Objective(lambda: order.setup.task.loss_fn(loop.model, loop.batch), parameters, meter)
    error = minimize(
        objective, history=int(order.values["history"]), lr=order.arm.lr,
        after_iteration=lambda loss: loop.after_iteration(meter.cost_units),
    )  # fmt: skip
    counts = {
        "cost_units": meter.cost_units,
        "fair_cost_units": meter.cost_units + (FAIR_PASS_UNITS - PASS_UNITS) * meter.num_passes,
        "num_forward": float(meter.num_evaluations),
        "num_backward": float(meter.num_evaluations),
        "num_real_steps": float(meter.num_iterations),
    }
    return loop.ended(counts, error)


def grid(recipe: TaskDefaults) -> tuple[float, ...]:
    """1, the step of Newton's method, and smaller: as many as the recipe has rates."""
    return tuple(2.0**-i for i in range(len(recipe_grid(recipe))))[::-1]
