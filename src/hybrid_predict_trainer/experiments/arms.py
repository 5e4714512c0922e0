"""One run of one arm.  Arms of a comparison share everything here but budget, rate and trainer settings."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from .. import weights
from ..config import HybridTrainerConfig
from ..ledger import STEP_UNITS
from ..metrics import JsonlSink, jsonable
from ..predictors import Predictor, build
from ..records import DivergenceError, State, StepResult
from ..tasks import Task, TaskDefaults, TaskSettings, build_optimizer, build_scheduler, with_steps
from ..toml_io import to_toml
from ..trainer import HybridTrainer
from ..weights import predicted_parameters

Kind = Literal["plain", "hybrid", "jump-of-zero"]

NUM_VALIDATIONS = 20

#: (label of the run, trainer, steps) -> what is called after every step, outside the run's wall time.
Watch = Callable[[str, HybridTrainer, int], Callable[[StepResult], None]]

#: Counts of ``trainer.statistics()`` that a comparison reports.
COUNTS = (
    "cost_units", "num_forward", "num_backward", "num_real_steps", "num_claimed_steps", "num_credited_steps",
    "num_jumps_proposed", "num_jumps_accepted", "num_rollbacks", "backward_reduction_pct",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What all arms share: task, recipe, length at budget 1, and the settings of the hybrid trainer."""

    task: Task
    settings: TaskSettings
    recipe: TaskDefaults
    config: HybridTrainerConfig
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """What differs: the trainer, the budget in multiples of ``Setup.steps``, the peak learning rate."""

    name: str
    kind: Kind
    lr: float
    budget: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one run of an arm came to."""

    arm: Arm
    seed: int
    steps: int
    final_val_loss: float  # NaN if it diverged
    wall_s: float  # without validation
    counts: dict[str, float]
    curve: tuple[tuple[float, float], ...]  # (cost units, validation loss)
    error: str = ""

    @property
    def cost_units(self) -> float:
        """Everything the run has spent, in forwards."""
        return self.counts["cost_units"]


def steps_of(setup: Setup, budget: float) -> int:
    """Length of a run of that budget in full steps, at least 1."""
    return max(1, round(setup.steps * budget))


def build_trainer(
    setup: Setup, *, lr: float, steps: int, seed: int, predict: bool,
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
    torch.manual_seed(seed)
    model = setup.task.build_model(seed)
    recipe = with_steps(replace(setup.recipe, lr=lr), steps)
    optimizer = build_optimizer(model, recipe, fused=setup.settings.fused)
    schedule = build_scheduler(optimizer, recipe.schedule, steps, recipe.warmup_steps, recipe.decay_frac)
    config = replace(setup.config, enabled=setup.config.enabled and predict, seed=setup.config.seed + seed)
    predictor = None
    if wrap is not None:
        num_groups = predicted_parameters(model, optimizer)[1].num_groups
        predictor = wrap(build(config, num_groups))
    return HybridTrainer(
        model, optimizer, config, loss_fn=setup.task.loss_fn, lr_scheduler=schedule, predictor=predictor
    )


class UndoneJumps:
    """Called after every step of a run: puts accepted jumps back, so that they are paid for and go nowhere.

    The trainer proposes, tests and books as ever; weights and basis are as they were before the jump
    when the next real step begins.
    """

    def __init__(self, trainer: HybridTrainer) -> None:
        """Args: trainer: between steps."""
        self._run = trainer.run
        self._saved: tuple[list[torch.Tensor], State] | None = None

    def __call__(self, result: StepResult) -> None:
        """Undo the step if it was a jump; remember the weights if the next one may be."""
        run = self._run
        if result.was_predicted:
            assert self._saved is not None, "a jump is proposed only where a window has closed"
            parameters, mark = self._saved
            weights.copy_(run.parameters, parameters)
            run.basis.revert(mark)
        elif run.window_just_closed:
            self._saved = (weights.clone(run.parameters), run.basis.mark())


class Validation:
    """Validates every ``1 / NUM_VALIDATIONS`` of a run's cost; what that takes is kept out of the wall time."""

    def __init__(self, trainer: HybridTrainer, task: Task, steps: int, before_s: float = 0.0) -> None:
        """Args: trainer: whose model is validated.  task: knows how.  steps: of the whole run.  before_s: a resume."""
        self._trainer, self._task = trainer, task
        self._every = max(1.0, steps / NUM_VALIDATIONS)
        self._next = self._every
        while self.due():  # a resumed run has been there
            self._next += self._every
        self._started = time.perf_counter() - before_s
        self.outside_s = 0.0
        self.curve: list[tuple[float, float]] = []

    def wall_s(self) -> float:
        """Seconds of training so far."""
        return time.perf_counter() - self._started - self.outside_s

    def due(self) -> bool:
        """Whether the cost has passed the next mark."""
        return self._trainer.run.counters.cost_steps >= self._next

    def measure(self) -> float:
        """Validate now and record it."""
        _wait_for_device(self._trainer)
        wall_s, started = self.wall_s(), time.perf_counter()
        run = self._trainer.run
        loss = self._task.evaluate(run.model)
        self._trainer.metrics.validation(run, loss, wall_s)
        self.curve.append((run.counters.cost_units, loss))
        while self.due():
            self._next += self._every
        self.outside_s += time.perf_counter() - started
        return loss

    def final(self) -> float:
        """Loss of the model as it is, measured unless the last step did so."""
        last = self.curve[-1] if self.curve else None
        return last[1] if last and last[0] == self._trainer.run.counters.cost_units else self.measure()


def _wait_for_device(trainer: HybridTrainer) -> None:
    if not trainer.run.on_cpu:
        torch.cuda.synchronize()


def run_arm(
    setup: Setup, arm: Arm, seed: int, folder: Path | None = None, watch: Watch | None = None, label: str = ""
) -> Run:
    """Train one arm from one seed to the end of its budget.

    Args:
        setup: What the arms share.
        arm: What is special about this one.
        seed: Of model, data order and dropout.
        folder: Where ``metrics.jsonl``, ``summary.json`` and ``config.toml`` go; None: nowhere.
        watch: Asked once for something to call after every step.
        label: What ``watch`` is to call the run.
    """
    steps = steps_of(setup, arm.budget)
    trainer = build_trainer(setup, lr=arm.lr, steps=steps, seed=seed, predict=arm.kind != "plain")
    if folder is not None:
        trainer.metrics.sink = JsonlSink(folder / "metrics.jsonl")
    validation = Validation(trainer, setup.task, steps)
    undo = UndoneJumps(trainer) if arm.kind == "jump-of-zero" else None

    note = watch(label, trainer, steps) if watch is not None else None

    def after_step(result: StepResult) -> None:
        started = time.perf_counter()
        if undo is not None:
            undo(result)
        if note is not None:
            note(result)
        validation.outside_s += time.perf_counter() - started
        if validation.due():
            validation.measure()

    error = ""
    try:
        trainer.fit(setup.task.batches(seed), total_steps=steps, progress_callback=after_step)
    except DivergenceError as diverged:
        error = str(diverged)
    _wait_for_device(trainer)
    wall_s = validation.wall_s()
    final = math.nan if error else validation.final()
    statistics = trainer.statistics()
    run = Run(
        arm=arm, seed=seed, steps=steps, final_val_loss=final, wall_s=wall_s,
        counts={name: float(statistics[name]) for name in COUNTS}, curve=tuple(validation.curve), error=error,
    )  # fmt: skip
    if folder is not None:
        write_run(folder, trainer, run)
    return run


def write_run(folder: Path, trainer: HybridTrainer, run: Run) -> None:
    """Write what belongs beside the metrics of a run."""
    trainer.metrics.sink.close()
    summary = {
        "arm": run.arm.name, "seed": run.seed, "lr": run.arm.lr, "budget": run.arm.budget, "steps": run.steps,
        "final_val_loss": run.final_val_loss, "wall_s": run.wall_s, "error": run.error, **trainer.summary(),
    }  # fmt: skip
    write_json(folder / "summary.json", summary)
    (folder / "config.toml").write_text(to_toml(trainer.config), encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file for people and programs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(jsonable(value), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def in_steps(cost_units: float) -> float:
    """Cost in full optimizer steps (forward, backward and update)."""
    return cost_units / STEP_UNITS
