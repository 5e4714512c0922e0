"""What every run of a comparison shares: its records, its validation, and how it is driven and written."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ...config.settings import HybridTrainerConfig
from ...config.toml import to_toml
from ...cost import STEP_UNITS
from ...records import DivergenceError, StepResult
from ...safe_files import write_text
from ...tasks import Task, TaskDefaults, TaskSettings, build_optimizer, build_scheduler, with_steps
from ...tasks.base import HasSolution
from ...tell.sinks import JsonlSink, jsonable
from ...trainer import HybridTrainer

Kind = Literal["plain", "hybrid", "jump-of-zero", "peer"]

NUM_VALIDATIONS = 20

#: (label of the run, trainer, steps) -> what is called after every step, outside the run's wall time.
Watch = Callable[[str, HybridTrainer, int], Callable[[StepResult], None]]

#: Counts of ``trainer.statistics()`` that a comparison reports.
COUNTS = (
    "cost_units", "fair_cost_units", "num_forward", "num_backward", "num_real_steps", "num_claimed_steps",
    "num_credited_steps", "num_jumps_proposed", "num_jumps_accepted", "num_rollbacks", "backward_reduction_pct",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """What all arms share: task, recipe, length at budget 1, and the settings of the hybrid trainer."""

    task: Task
    settings: TaskSettings
    recipe: TaskDefaults
    config: HybridTrainerConfig
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """What differs: the trainer, the budget in multiples of ``Experiment.steps``, the peak learning rate.

    A peer's arm bears the peer's name, with ``@`` and a budget behind it where there are several.
    """

    name: str
    kind: Kind
    lr: float
    budget: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmRun:
    """What one run of an arm came to."""

    arm: Arm
    seed: int
    steps: int
    final_val_loss: float  # NaN if it diverged
    wall_s: float  # without validation
    counts: dict[str, float]
    curve: tuple[tuple[float, float], ...]  # (cost units, validation loss)
    error: str = ""
    cpu_s: float = math.nan  # processor time of all threads, without validation
    solution_error: float = math.nan  # relative L2 error against the true solution, where the task knows one

    @property
    def cost_units(self) -> float:
        """Everything the run has spent, in forwards, at the prices it decides by."""
        return self.counts["cost_units"]

    @property
    def fair_cost_units(self) -> float:
        """The same with every pass over the weights at the price of the optimizer's own."""
        return self.counts["fair_cost_units"]


def steps_of(setup: Experiment, budget: float) -> int:
    """Length of a run of that budget in full steps, at least 1."""
    return max(1, round(setup.steps * budget))


def recipe_for(setup: Experiment, *, lr: float, steps: int) -> TaskDefaults:
    """The recipe at another rate and length."""
    return with_steps(replace(setup.recipe, lr=lr), steps)


def seeded_model(setup: Experiment, seed: int) -> nn.Module:
    """A fresh model; the global generator is seeded, so that dropout is the same in every arm."""
    torch.manual_seed(seed)
    return setup.task.build_model(seed)


def recipe_optimizer(model: nn.Module, recipe: TaskDefaults, settings: TaskSettings) -> torch.optim.Optimizer:
    """The optimizer the recipe names."""
    return build_optimizer(model, recipe, fused=settings.fused)


def recipe_schedule(optimizer: torch.optim.Optimizer, recipe: TaskDefaults) -> LambdaLR:
    """The recipe's schedule, ending at ``recipe.steps``."""
    return build_scheduler(optimizer, recipe.schedule, recipe.steps, recipe.warmup_steps, recipe.decay_frac)


class Validation:
    """Validates every ``1 / number`` of a run's cost; what that takes is kept out of the wall time."""

    def __init__(
        self, trainer: HybridTrainer, task: Task, steps: int, before_s: float = 0.0,
        at: Callable[[], AbstractContextManager[None]] = nullcontext, number: int = NUM_VALIDATIONS,
    ) -> None:  # fmt: skip
        """Prepare the marks.

        Args:
            trainer: Whose model is validated.
            task: Knows how.
            steps: Of the whole run.
            before_s: Seconds spent before a resume.
            at: Inside this context the model has the weights to be validated.
            number: Of validations in the whole run.
        """
        self._trainer, self._task, self._at = trainer, task, at
        self._every = max(1.0, steps / number)
        self._next = self._every
        while self.due():  # a resumed run has been there
            self._next += self._every
        self._started, self._started_cpu = time.perf_counter() - before_s, time.process_time()
        self.outside_s = self.outside_cpu_s = 0.0
        self.curve: list[tuple[float, float]] = []
        self.error: float | None = None  # relative L2 error against the true solution, where the task knows one

    def wall_s(self) -> float:
        """Seconds of training so far."""
        return time.perf_counter() - self._started - self.outside_s

    def cpu_s(self) -> float:
        """Seconds of processor time of training since this object was made."""
        return time.process_time() - self._started_cpu - self.outside_cpu_s

    def due(self) -> bool:
        """Whether the cost has passed the next mark."""
        return self._trainer.run.meter.cost_steps >= self._next

    def measure(self) -> float:
        """Validate now and record it."""
        wait_for_device(self._trainer)
        wall_s, started, started_cpu = self.wall_s(), time.perf_counter(), time.process_time()
        run = self._trainer.run
        with self._at():
            loss = self._task.evaluate(run.subject.model)
            if isinstance(self._task, HasSolution):
                self.error = self._task.solution_error(run.subject.model)
        self._trainer.metrics.validation(run, loss, wall_s, self.error)
        self.curve.append((run.meter.cost_units, loss))
        while self.due():
            self._next += self._every
        self.outside_s += time.perf_counter() - started
        self.outside_cpu_s += time.process_time() - started_cpu
        return loss

    def final(self) -> float:
        """Loss of the model as it is, measured unless the last step did so."""
        last = self.curve[-1] if self.curve else None
        return last[1] if last and last[0] == self._trainer.run.meter.cost_units else self.measure()


def wait_for(device: torch.device) -> None:
    """Until an accelerator has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def wait_for_device(trainer: HybridTrainer) -> None:
    """Let queued work end before a clock is read."""
    for device in {p.device for p in trainer.run.subject.parameters}:
        wait_for(device)


def nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What is done around the steps of a run, inside its wall time but for ``evaluation``."""

    before_step: Callable[[], None] = nothing
    after_step: Callable[[], None] = nothing
    evaluation: Callable[[], AbstractContextManager[None]] = nullcontext  # validation happens inside it


def drive(
    trainer: HybridTrainer, setup: Experiment, arm: Arm, seed: int, *, hooks: Hooks | None = None,
    undo: Callable[[StepResult], None] | None = None,
    folder: Path | None = None, watch: Watch | None = None, label: str = "",
) -> ArmRun:  # fmt: skip
    """Train to the end of the arm's budget, validating on the way.

    Args:
        trainer: At the start.
        setup: What the arms share.
        arm: What is special about this one.
        seed: Of the data order.
        hooks: Called around every step.
        undo: Called after every step, outside the wall time.
        folder: Where ``metrics.jsonl``, ``summary.json`` and ``config.toml`` go; None: nowhere.
        watch: Asked once for something to call after every step.
        label: What ``watch`` is to call the run.
    """
    hooks = hooks or Hooks()
    steps = steps_of(setup, arm.budget)
    if folder is not None:
        trainer.metrics.sink = JsonlSink(folder / "metrics.jsonl", follow_links=False)
    validation = Validation(trainer, setup.task, steps, at=hooks.evaluation)
    note = watch(label, trainer, steps) if watch is not None else None

    def batches() -> Iterable[Any]:
        for batch in setup.task.batches(seed):
            hooks.before_step()
            yield batch

    def after_step(result: StepResult) -> None:
        hooks.after_step()
        started, started_cpu = time.perf_counter(), time.process_time()
        if undo is not None:
            undo(result)
        if note is not None:
            note(result)
        validation.outside_s += time.perf_counter() - started
        validation.outside_cpu_s += time.process_time() - started_cpu
        if validation.due():
            validation.measure()

    error = ""
    try:
        trainer.fit(batches(), total_steps=steps, progress_callback=after_step)
    except DivergenceError as diverged:
        error = str(diverged)
    wait_for_device(trainer)
    wall_s, cpu_s = validation.wall_s(), validation.cpu_s()
    final = math.nan if error else validation.final()
    if not error and not math.isfinite(final):  # the plain loop looks at no loss
        error, final = "the run diverged: its validation loss is not finite", math.nan
    statistics = trainer.statistics()
    run = ArmRun(
        arm=arm, seed=seed, steps=steps, final_val_loss=final, wall_s=wall_s,
        counts={name: float(statistics[name]) for name in COUNTS}, curve=tuple(validation.curve), error=error,
        cpu_s=cpu_s, solution_error=math.nan if error or validation.error is None else validation.error,
    )  # fmt: skip
    if folder is not None:
        write_run(folder, trainer, run)
    return run


def write_run(folder: Path, trainer: HybridTrainer, run: ArmRun) -> None:
    """Write what belongs beside the metrics of a run."""
    trainer.metrics.sink.close()
    peaks = {"peak_rates": trainer.recipe().peak_rates(run.arm.lr)}
    write_json(folder / "summary.json", {**summary_of(run), **peaks, **trainer.summary()})
    write_text(folder / "config.toml", to_toml(trainer.config))
    trainer.recipe().save(folder / "recipe.toml")


def summary_of(run: ArmRun) -> dict[str, Any]:
    """What a summary says of the run itself."""
    return {
        "arm": run.arm.name, "seed": run.seed, "lr": run.arm.lr, "budget": run.arm.budget, "steps": run.steps,
        "final_val_loss": run.final_val_loss, "wall_s": run.wall_s, "cpu_s": run.cpu_s, "error": run.error,
    }  # fmt: skip


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file for people and programs."""
    write_text(path, json.dumps(jsonable(value), indent=1, allow_nan=False) + "\n")


def in_steps(cost_units: float) -> float:
    """Cost in full optimizer steps (forward, backward and update)."""
    return cost_units / STEP_UNITS
