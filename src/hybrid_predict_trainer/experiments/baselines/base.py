"""What a baseline is, and how those that run in the ordinary training loop are driven.

A peer is a published method that competes with predicted phases.  Its arm shares model, data order, seeds, clock and
validation with the plain arm; its extra work is booked in the units of ``ledger``: a pass over the weights where it
reads or writes vectors, forwards in proportion to FLOPs where it multiplies matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from ...cost import FORWARD_UNITS
from ...cycle.state import State as TrainerState
from ...tasks import Task, TaskDefaults, TaskSettings
from ...trainer import HybridTrainer
from ...weights import algebra as weights
from ..arms.drive import (
    Arm,
    ArmRun,
    Experiment,
    Hooks,
    Watch,
    drive,
    recipe_for,
    recipe_optimizer,
    recipe_schedule,
    seeded_model,
    steps_of,
)

Family = Literal["outer loop", "averaging", "forecast", "optimizer", "quasi-Newton", "Gauss-Newton", "schedule"]
Values = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineJob:
    """One run of a baseline that has been asked for."""

    setup: Experiment
    arm: Arm
    seed: int
    values: Values
    folder: Path | None = None
    watch: Watch | None = None
    label: str = ""

    @property
    def recipe(self) -> TaskDefaults:
        """The recipe at the arm's rate and length."""
        return recipe_for(self.setup, lr=self.arm.lr, steps=steps_of(self.setup, self.arm.budget))


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """A method, its hyper-parameters and where it makes sense.

    Attributes:
        about: one line.
        source: paper or package.
        family: what kind of method it is.
        weights_only: whether it changes nothing but the weights, between the steps of the recipe's own optimizer.
        deterministic_only: whether it needs every batch to be the same.
        needs_residuals: whether it needs a task that tells its residuals apart.
        values: hyper-parameters by name, as published; learning rates are not among them.
        grid: rates to choose from, as many as the recipe's own grid has.
        train: one run.
    """

    about: str
    source: str
    family: Family
    weights_only: bool
    deterministic_only: bool = False
    needs_residuals: bool = False
    values: Values
    grid: Callable[[TaskDefaults], tuple[float, ...]]
    train: Callable[[BaselineJob], ArmRun]

    def why_not(self, task: Task) -> str:
        """Why it makes no sense on a task; "" where it does."""
        if self.deterministic_only and not task.deterministic:
            return f"it needs the same batch at every step, which task {task.name!r} does not give"
        if self.needs_residuals and not hasattr(task, "residual_fn"):
            return f"it needs residuals, and task {task.name!r} tells a loss only"
        return ""


def recipe_grid(recipe: TaskDefaults) -> tuple[float, ...]:
    """The rates the plain arm is tuned over."""
    return recipe.lr_grid or (recipe.lr,)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineRun:
    """A run of a baseline in the ordinary loop, at its start."""

    order: BaselineJob
    run: TrainerState
    recipe: TaskDefaults

    @property
    def values(self) -> Values:
        """The peer's hyper-parameters."""
        return self.order.values

    def charge_passes(self, num_passes: float) -> None:
        """Book passes over the weights."""
        self.run.meter.add_passes(num_passes)

    def charge_forwards(self, num_forwards: float) -> None:
        """Book work that is not a forward at the price of so many forwards."""
        self.run.meter.add_priced(num_forwards * FORWARD_UNITS)

    @contextmanager
    def swapped(self, other: list[Tensor]) -> Iterator[None]:
        """Inside, the model has other weights; afterwards its own, bit for bit."""
        own = weights.clone(self.run.subject.parameters)
        weights.copy_(self.run.subject.parameters, other)
        try:
            yield
        finally:
            weights.copy_(self.run.subject.parameters, own)


#: Makes the optimizer of a baseline.
BuildOptimizer = Callable[[nn.Module, TaskDefaults, TaskSettings, Values], Optimizer]


def no_hooks(session: BaselineRun) -> Hooks:
    """Nothing is done around the steps."""
    return Hooks()


def as_it_is(recipe: TaskDefaults) -> TaskDefaults:
    """The recipe the other arms have."""
    return recipe


def _own_optimizer(model: nn.Module, recipe: TaskDefaults, settings: TaskSettings, values: Values) -> Optimizer:
    return recipe_optimizer(model, recipe, settings)


def in_loop(
    attach: Callable[[BaselineRun], Hooks] = no_hooks, *, optimizer: BuildOptimizer = _own_optimizer,
    scheduled: bool = True, changed: Callable[[TaskDefaults], TaskDefaults] = as_it_is,
) -> Callable[[BaselineJob], ArmRun]:  # fmt: skip
    """Training in the plain loop with something different about it.

    Args:
        attach: What is done around the steps.
        optimizer: Instead of the recipe's.
        scheduled: Whether the recipe's schedule applies.
        changed: Makes the recipe it trains with.
    """

    def train(order: BaselineJob) -> ArmRun:
        setup, recipe = order.setup, changed(order.recipe)
        model = seeded_model(setup, order.seed)
        own = optimizer(model, recipe, setup.settings, order.values)
        schedule = recipe_schedule(own, recipe) if scheduled else None
        # the cost clock whatever the comparison uses: a baseline's dearer steps must be fewer steps
        config = replace(setup.config, enabled=False, clock="cost", seed=setup.config.seed + order.seed)
        trainer = HybridTrainer(model, own, config, loss_fn=setup.task.loss_fn, lr_scheduler=schedule)
        trainer.keep_no_checkpoints()
        hooks = attach(BaselineRun(order=order, run=trainer.run, recipe=recipe))
        return drive(
            trainer, setup, order.arm, order.seed,
            hooks=hooks, folder=order.folder, watch=order.watch, label=order.label,
        )  # fmt: skip

    return train
