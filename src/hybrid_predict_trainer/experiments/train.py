"""`hpt train`: one run in a folder of its own, which an interrupted run is resumed from bit for bit.

The folder holds ``run.json`` (what was asked for), ``config.toml``, ``metrics.jsonl``, ``checkpoints/`` and,
where the run has ended or was stopped, ``summary.json`` and ``recipe.toml``.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..config.settings import NEED_RESIDUALS
from ..config.toml import load, to_toml
from ..keep import housekeeping
from ..keep.background import Write
from ..keep.manifest import CONFIG, verify
from ..keep.periodic import PeriodicSaver
from ..keep.stop_signal import StopSignal
from ..records import CheckpointError, DivergenceError, StateDict, StepResult
from ..safe_files import UnusableFileError, write_text
from ..tell.sinks import JsonlSink, jsonable
from ..trainer import HybridTrainer
from .arms.environment import environment
from .arms.options import InputError, as_input_error, build_experiment
from .arms.recording import FOR_EVER, Recorder, recording_settings
from .run_arm import NUM_VALIDATIONS, Experiment, Validation, Watch, build_trainer, write_json
from .run_folder import (
    Request,
    agree,
    agree_checkpoint,
    agree_config,
    agree_task,
    locked,
    refuse_used,
    saved_steps,
    stored,
    to_store,
    untrained,
)

__all__ = ["Request", "Saver", "StopSignal", "locked", "refuse_used", "train"]

#: What to do where a run is in the way.
IN_USE = "add --resume to continue it, or choose another --out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of a run: it is paused behind it, validated there, and resumed bit for bit.

    Attributes:
        until: position at which it is paused, on the configured clock.
        num_validations: of the whole run.
    """

    until: float = math.inf
    num_validations: int = NUM_VALIDATIONS


def train(
    request: Request, out: Path, *, resume: bool, watch: Watch | None = None, part: Part | None = None
) -> tuple[dict[str, Any], int]:
    """Train to the end, to the end of a part, or to a signal.

    Args:
        request: What to run; where it is resumed, what the user said again (it has to agree).
        out: Folder of the run.
        resume: Continue from the latest intact checkpoint, from the beginning where there is none yet.
        watch: Watches the steps.
        part: How far to go now; None: to the end.

    Returns:
        The object to print, and the exit status.

    Raises:
        InputError: the request cannot be met, or is not that of the run to be resumed.
        CheckpointError: there is nothing intact to resume from, or the last checkpoint cannot be written.
        DivergenceError: the weights or the validation loss are not finite, or too many steps in a row were not.
    """
    if resume:
        request, setup = _resumed(request, out)
    else:
        refuse_used(out, IN_USE)
        request = replace(request, seed=request.seed or 0)
        setup = build_experiment(request.options)
    described = setup.task.describe()
    if request.record:
        if setup.config.predictor_type in NEED_RESIDUALS:
            raise InputError(f"{setup.config.predictor_type} sees no windows: there is nothing to record")
        setup = replace(setup, config=recording_settings(setup.config, plain=request.plain))
    with locked(out):
        begin = not saved_steps(out)
        if not resume:
            refuse_used(out, IN_USE)  # somebody else may have been quicker
        elif begin and not untrained(out):
            raise InputError(f"{out}: was trained, but holds no checkpoint any more; choose another --out")
        elif begin:
            warnings.warn(f"{out}: has no checkpoint yet: starting from step 0", stacklevel=2)
        if begin:
            with as_input_error():
                if not resume:
                    write_json(out / "run.json", to_store(request, described))
                write_text(out / "config.toml", to_toml(setup.config))
        return _train(setup, request, out, resume=not begin, watch=watch, part=part or Part())


def _resumed(said: Request, out: Path) -> tuple[Request, Experiment]:
    """The request of the run in ``out``, which whatever is said now must agree with, and what it needs."""
    then = stored(out)
    agree(out, said, then)
    request = then.request
    options = request.options if then.data_path is None else replace(request.options, data=then.data_path)
    begun = bool(saved_steps(out))  # else config.toml may be missing: a kill came between
    with as_input_error():
        setup = build_experiment(options, load(out / "config.toml") if begun else None)
    agree_config(out, said.options, request.options, setup.config)
    agree_task(out, then.task, setup.task.describe())
    return request, setup


def _train(
    setup: Experiment, request: Request, out: Path, *, resume: bool, watch: Watch | None, part: Part
) -> tuple[dict[str, Any], int]:
    seed = request.seed or 0
    trainer = build_trainer(
        setup, lr=setup.recipe.lr, steps=setup.steps, seed=seed, predict=request.record or not request.plain,
        wrap=Recorder if request.record else None,
    )  # fmt: skip
    if isinstance(trainer.run.proposer.predictor, Recorder):
        trainer.run.proposer.predictor.attach(trainer.run.windows.basis)
        if request.plain:  # watched, and never asked for a jump
            trainer.force_full_phase(FOR_EVER)
    folder = out / "checkpoints"
    data = Position()
    if resume:
        data = housekeeping.first_good(folder, lambda path: _taken(trainer, out, path))
    with as_input_error():
        trainer.metrics.sink = JsonlSink(out / "metrics.jsonl", follow_links=False)
    validation = Validation(trainer, setup.task, setup.steps, data.wall_s, number=part.num_validations)
    note = watch("", trainer, setup.steps) if watch is not None else _silent
    saver = Saver(trainer, folder, data, validation, saved=trainer.current_step if resume else -1)

    def after_step(result: StepResult) -> None:
        data.num_consumed += result.consumed
        started = time.perf_counter()
        note(result)
        validation.outside_s += time.perf_counter() - started
        if validation.due():
            validation.measure()
            if isinstance(note, ShowsError) and validation.error is not None:
                note.show_error(validation.error)
        if saver.due:
            saver.keep_up()

    with StopSignal() as stop, contextlib.closing(trainer.metrics.sink):
        if not resume:
            saver.save()  # a run that is killed early can be resumed too, and a disk that refuses says so now
        if not _ended(trainer, setup.steps) and trainer.run.position < part.until:
            batches = setup.task.batches(seed, start=data.num_consumed)
            trainer.fit(
                batches, total_steps=setup.steps, progress_callback=after_step,
                should_stop=lambda: stop.number > 0 or trainer.run.position >= part.until,
            )  # fmt: skip
        wall_s = validation.wall_s()
        failed = saver.attempt()
        ended = _ended(trainer, setup.steps)
        val_loss = validation.final() if ended else None
        if not ended and trainer.run.position >= part.until:
            validation.final()  # whoever chooses what is trained next knows how it stands here
        result = _result(setup, request, trainer, wall_s, val_loss, ended=ended)
        if ended and validation.error is not None:
            result["solution_error"] = validation.error
        trainer.metrics.sink.close()
        _write_results(trainer, out, result)
    if val_loss is not None and not math.isfinite(val_loss):
        raise DivergenceError(f"{out}: training diverged: the validation loss is {val_loss}.  Lower --lr")
    if failed is not None:
        raise failed
    printed = {k: v for k, v in result.items() if k != "divergence_events"}
    status = 0 if ended else stop.exit_status
    return {"out": str(out), "checkpoint": str(folder / f"checkpoint_step_{saver.saved}"), **jsonable(printed)}, status


def _taken(trainer: HybridTrainer, out: Path, path: Path) -> Position:
    """Go on from a checkpoint of the run in ``out``.

    Raises:
        CheckpointError: it is damaged, or of another trainer.
        InputError: the run's settings have been changed since.
    """
    verify(path)
    agree_checkpoint(out / "config.toml", load(path / CONFIG), trainer.config)
    return Position.of(trainer.load_checkpoint(path))


def _write_results(trainer: HybridTrainer, out: Path, result: Mapping[str, Any]) -> None:
    """Summary and recording.

    Raises:
        CheckpointError: the disk refused.
    """
    try:
        write_json(out / "summary.json", result)
        trainer.recipe().save(out / "recipe.toml")
        if isinstance(trainer.run.proposer.predictor, Recorder):
            trainer.run.proposer.predictor.recording.save(out / "recording")
    except (OSError, UnusableFileError) as error:
        raise CheckpointError(f"{out}: the results cannot be written: {error}") from error


@runtime_checkable
class ShowsError(Protocol):
    """Who watches the steps and shows the error of the solution beside them."""

    def show_error(self, error: float) -> None:
        """Relative L2 error against the true solution, as it was measured last."""


class Saver:
    """Writes checkpoints of a run.  One that fails in its course is warned of and tried again at the next interval."""

    def __init__(
        self, trainer: HybridTrainer, folder: Path, data: Position, validation: Validation, *, saved: int
    ) -> None:
        """Args: trainer: of the run.  folder: of checkpoints.  data: its position.  validation: knows the wall time.

        saved: step of the newest checkpoint, -1 if there is none.
        """
        self._trainer, self._data, self._validation = trainer, data, validation
        settings = trainer.config.checkpoint
        capture = self._capture if settings.async_save else None
        self._periodic = PeriodicSaver(folder, settings.save_interval, self._write, capture)
        if saved >= 0:
            self._periodic.loaded(folder / f"checkpoint_step_{saved}", saved)

    @property
    def saved(self) -> int:
        """Step of the newest checkpoint, -1 if there is none."""
        return self._periodic.saved

    @property
    def due(self) -> bool:
        """Whether an interval has ended."""
        return self._periodic.due(self._trainer.current_step)

    def save(self) -> None:
        """Write one, unless the newest is of this step.

        Raises:
            CheckpointError: it cannot be written.
        """
        self._periodic.save(self._trainer.current_step)

    def attempt(self) -> CheckpointError | None:
        """:meth:`save`, whose failure is returned; said once until one is written again."""
        return self._periodic.attempt(self._trainer.current_step)

    def keep_up(self) -> CheckpointError | None:
        """As :meth:`attempt`, in the background where the settings say so."""
        return self._periodic.keep_up(self._trainer.current_step)

    def _write(self, folder: Path) -> None:
        self._trainer.save_checkpoint(folder, extra=self._position())

    def _capture(self, folder: Path) -> Write:
        return self._trainer.capture_checkpoint(folder, extra=self._position())

    def _position(self) -> dict[str, StateDict]:
        self._data.wall_s = self._validation.wall_s()
        return {"data": asdict(self._data)}


def _silent(result: StepResult) -> None:
    """Nobody watches."""


def _ended(trainer: HybridTrainer, steps: int) -> bool:
    run = trainer.run
    return run.position >= steps and run.judge.probation is None and run.proposer.segment is None


@dataclass(slots=True)
class Position:
    """Where the run stands in its data: batches used up (a refused proposal's batch is not), seconds so far."""

    num_consumed: int = 0
    wall_s: float = 0.0

    @classmethod
    def of(cls, parts: Mapping[str, Any]) -> Position:
        """From the parts of a checkpoint.

        Raises:
            CheckpointError: it was not written by ``hpt train``.
        """
        try:
            return cls(**parts["data"])
        except (KeyError, TypeError):
            raise CheckpointError("the checkpoint has no data position: it was not written by hpt train") from None


def _result(
    setup: Experiment, request: Request, trainer: HybridTrainer, wall_s: float, val_loss: float | None, *, ended: bool
) -> dict[str, Any]:
    return {
        "task": setup.task.name, "seed": request.seed or 0, "arm": "plain" if request.plain else "hybrid",
        "steps": setup.steps, "lr": setup.recipe.lr, "completed": ended, "final_val_loss": val_loss,
        "wall_s": wall_s, "environment": environment(setup.settings.device), "task_settings": setup.task.describe(),
        "peak_rates": trainer.recipe().peak_rates(setup.recipe.lr),
        **trainer.summary(),
    }  # fmt: skip
