"""Arms of the lean full-batch methods: their iterations until the budget is spent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ...tasks import TaskDefaults
from ..arms.drive import ArmRun
from .base import BaselineJob
from .lbfgs import ROUNDING, BudgetSpentError
from .own_loop import OwnLoop
from .second_order import Flat

#: (task, flat weights) -> the loss before each iteration.
Iterations = Callable[[Any, Flat], Iterator[float]]


def one_rate(recipe: TaskDefaults) -> tuple[float, ...]:
    """Line searches and dampings find the step: there is nothing to tune."""
    return (1.0,)


def train(iterations: Iterations) -> Callable[[BaselineJob], ArmRun]:
    """One run of a method.

    An iteration that the budget does not reach the end of does not count: the weights are those before it.
    """

    def run(order: BaselineJob) -> ArmRun:
        loop = OwnLoop(order)
        spent, number = 0.0, 0

        def pay(forwards: float) -> None:
            nonlocal spent
            if spent + forwards > loop.budget + ROUNDING:
                raise BudgetSpentError
            spent += forwards

        flat = Flat(loop.model, order.setup.task.loss_fn, loop.batch, pay)
        known = flat.x.clone()
        try:
            for _ in iterations(order.setup.task, flat):
                known.copy_(flat.x)
                number += 1
                loop.after_iteration(spent)
        except BudgetSpentError:
            flat.x.copy_(known)
        counts = {
            "cost_units": spent, "fair_cost_units": spent, "num_real_steps": float(number),
            "num_forward": flat.num_forward, "num_backward": flat.num_backward,
        }  # fmt: skip
        return loop.ended(counts)

    return run
