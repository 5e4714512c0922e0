"""One run of one arm.  Arms of a comparison share everything here but budget, rate and trainer settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config.settings import NEED_RESIDUALS, SOURCES
from ..predictors import Predictor, build
from ..records import ConfigError, StateDict, StepResult
from ..tasks import Task
from ..trainer import HybridTrainer
from ..weights import algebra as weights
from ..weights.parameters import predicted_parameters
from .arms.drive import (
    COUNTS,
    NUM_VALIDATIONS,
    Arm,
    ArmRun,
    Experiment,
    Kind,
    Validation,
    Watch,
    drive,
    in_steps,
    recipe_for,
    recipe_optimizer,
    recipe_schedule,
    seeded_model,
    steps_of,
    write_json,
    write_run,
)
from .baselines import run_baseline

__all__ = [
    "COUNTS",
    "NUM_VALIDATIONS",
    "Arm",
    "ArmRun",
    "Experiment",
    "Kind",
    "UndoneJumps",
    "Validation",
    "Watch",
    "build_trainer",
    "in_steps",
    "run_arm",
    "steps_of",
    "write_json",
    "write_run",
]


def build_trainer(
    setup: Experiment, *, lr: float, steps: int, seed: int, predict: bool,
    wrap: Callable[[Predictor], Predictor] | None = None,
) -> HybridTrainer:  # fmt: skip
    """A fresh model in a trainer, with the recipe's optimizer and a schedule that ends at ``steps``.

    Args:
        setup: Task, recipe and trainer settings.
        lr: Peak learning rate.
        steps: Length of the run on the configured clock.
        seed: Of the model, of dropout, and of the trainer's control group.
        predict: False: ``enabled=False``, the plain loop bit for bit.
        wrap: Put around the predictor, to record what it sees.
    """
    model = seeded_model(setup, seed)
    recipe = recipe_for(setup, lr=lr, steps=steps)
    optimizer = recipe_optimizer(model, recipe, setup.settings)
    schedule = recipe_schedule(optimizer, recipe)
    config = replace(setup.config, enabled=setup.config.enabled and predict, seed=setup.config.seed + seed)
    predictor, source = None, config.predictor_type in SOURCES
    if wrap is not None:
        groups = predicted_parameters(model, optimizer)[1]
        predictor = wrap(build(config, groups.num_groups, groups.num_weights))
    trainer = HybridTrainer(
        model, optimizer, config, loss_fn=setup.task.loss_fn, lr_scheduler=schedule, predictor=predictor,
        **(_residuals_of(setup.task, config.predictor_type) if source else {}),
    )  # fmt: skip
    trainer.keep_no_checkpoints()  # many runs share these settings: they would write into one folder
    return trainer


def _residuals_of(task: Task, predictor: str) -> dict[str, Any]:
    """What a source of closed-form moves needs of a task.

    Raises:
        ConfigError: the task has neither residuals nor outputs with a convex loss, and the source needs them.
    """
    for name in ("residual_fn", "output_fn"):
        if hasattr(task, name):
            return {name: getattr(task, name)}
    if predictor not in NEED_RESIDUALS:
        return {}
    raise ConfigError(
        f"predictor.type = {predictor!r} needs residuals, and task {task.name} has none: take an equation, regression "
        "or a classifier"
    )


class UndoneJumps:
    """Called after every step of a run: puts accepted jumps back, so that they are paid for and go nowhere.

    The trainer proposes, tests and books as ever; weights and basis are as they were before the jump
    when the next real step begins.
    """

    def __init__(self, trainer: HybridTrainer) -> None:
        """Args: trainer: between steps."""
        self._run = trainer.run
        self._saved: tuple[list[torch.Tensor], StateDict] | None = None

    def __call__(self, result: StepResult) -> None:
        """Undo the step if it was a jump; remember the weights if the next one may be."""
        run = self._run
        if result.was_predicted:
            assert self._saved is not None, "a jump is proposed only where a window has closed"
            parameters, mark = self._saved
            weights.copy_(run.subject.parameters, parameters)
            run.windows.basis.revert(mark)
            run.watch.writes.record()  # it is no write of the user's
        elif run.windows.just_closed:
            self._saved = (weights.clone(run.subject.parameters), run.windows.basis.mark())


def run_arm(
    setup: Experiment, arm: Arm, seed: int, folder: Path | None = None, watch: Watch | None = None, label: str = ""
) -> ArmRun:
    """Train one arm from one seed to the end of its budget.

    Args:
        setup: What the arms share.
        arm: What is special about this one.
        seed: Of model, data order and dropout.
        folder: Where ``metrics.jsonl``, ``summary.json`` and ``config.toml`` go; None: nowhere.
        watch: Asked once for something to call after every step.
        label: What ``watch`` is to call the run.
    """
    if arm.kind == "peer":
        return run_baseline(setup, arm, seed, folder=folder, watch=watch, label=label)
    if arm.kind == "jump-of-zero":  # jumps are put back, nothing else may move the weights: they are the plain run's
        calm = replace(setup.config.lookahead, extrapolation=0.0, damping=0.0)
        still = replace(setup.config, max_lr_multiplier=1.0, min_group_factor=1.0, recipe="off", lookahead=calm)
        setup = replace(setup, config=still)
    steps = steps_of(setup, arm.budget)
    trainer = build_trainer(setup, lr=arm.lr, steps=steps, seed=seed, predict=arm.kind != "plain")
    undo = UndoneJumps(trainer) if arm.kind == "jump-of-zero" else None
    return drive(trainer, setup, arm, seed, undo=undo, folder=folder, watch=watch, label=label)
