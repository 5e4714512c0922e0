"""`hpt train`: one run in a folder of its own, which an interrupted run is resumed from bit for bit.

The folder holds ``run.json`` (what was asked for), ``config.toml``, ``metrics.jsonl``, ``checkpoints/`` and,
where the run has ended or was stopped, ``summary.json``.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from .. import checkpoint, persistence
from ..metrics import JsonlSink, jsonable
from ..records import CheckpointError, StepResult
from ..toml_io import load, to_toml
from ..trainer import HybridTrainer
from .arms import Setup, Validation, Watch, build_trainer, write_json
from .environment import environment
from .recording import FOR_EVER, Recorder, recording_settings
from .setup import InputError, Options, as_input_error, build_setup

#: What a folder of results has at least one of.
OURS = ("run.json", "config.toml", "metrics.jsonl", "summary.json", "compare.json", "checkpoints", "runs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One run: the options, the seed, and whether prediction is off."""

    options: Options
    seed: int = 0
    plain: bool = False
    record: bool = False  # keep every window


def refuse_used(out: Path, advice: str) -> None:
    """Refuse a folder that holds results.

    Raises:
        InputError: it does, or it is a file.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file, --out must name a folder")
    used = next((name for name in OURS if (out / name).exists()), None)
    if used is not None:
        raise InputError(f"{out}: holds another run ({used}); {advice}")


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep a second process out of a folder; the lock ends with the process, however it ends.

    Raises:
        InputError: the folder cannot be made, or another process has it.
    """
    with as_input_error():
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    with lock:
        try:
            import fcntl
        except ImportError:  # not a POSIX system
            yield
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{out}: another process is writing to it") from None
        yield


class StopSignal:
    """The first SIGINT or SIGTERM asks for an end after the current step, the second ends the process."""

    def __init__(self) -> None:
        """Nothing has been asked yet."""
        self.number = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        """Listen, where this is the main thread."""
        with contextlib.suppress(ValueError):
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        for each in self._previous:
            signal.signal(each, signal.SIG_DFL)

    def __exit__(self, *error: object) -> None:
        """Listen no more."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def exit_status(self) -> int:
        """As shells report a signal; 0 if there was none."""
        return 128 + self.number if self.number else 0


def train(request: Request, out: Path, *, resume: bool, watch: Watch | None = None) -> tuple[dict[str, Any], int]:
    """Train to the end or to a signal.

    Args:
        request: What to run; where it is resumed, what the user said again (it has to agree).
        out: Folder of the run.
        resume: Continue from the latest intact checkpoint.
        watch: Watches the steps.

    Returns:
        The object to print, and the exit status.

    Raises:
        InputError: the request cannot be met.
        CheckpointError: there is nothing intact to resume from, or a checkpoint cannot be written.
    """
    if resume:
        request = _resumed(request, out)
        with as_input_error():
            setup = build_setup(request.options, load(out / "config.toml"))
    else:
        refuse_used(out, "add --resume to continue it, or choose another --out")
        setup = build_setup(request.options)
    if request.record:
        setup = replace(setup, config=recording_settings(setup.config, plain=request.plain))
    with locked(out):
        if not resume:
            write_json(out / "run.json", asdict(request))
            (out / "config.toml").write_text(to_toml(setup.config), encoding="utf-8")
        return _train(setup, request, out, resume=resume, watch=watch)


def _resumed(request: Request, out: Path) -> Request:
    """The request of the run in ``out``, which whatever is said now must agree with."""
    try:
        stored = json.loads((out / "run.json").read_text(encoding="utf-8"))
        values: dict[str, Any] = {**stored["options"], "set": tuple(stored["options"]["set"])}
        options = Options(**values)
        before = Request(options=options, seed=stored["seed"], plain=stored["plain"], record=stored["record"])
    except OSError:
        raise InputError(f"{out}: there is no run to resume (no run.json); leave out --resume to start one") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{out / 'run.json'}: is damaged; start a new run with another --out") from None
    for name, value in asdict(request.options).items():
        was = getattr(before.options, name)
        if value not in (None, (), "") and value != was:
            flag = "--" + name.replace("_", "-")
            said = f"without {flag}" if was in (None, ()) else f"with {flag} {was}"
            raise InputError(f"{out}: was started {said}, not {value}; leave the flag out or choose another --out")
    for name in ("seed", "plain", "record"):
        if getattr(request, name) and getattr(request, name) != getattr(before, name):
            raise InputError(f"{out}: was started with --{name} {getattr(before, name)}; leave the flag out")
    return before


def _train(
    setup: Setup, request: Request, out: Path, *, resume: bool, watch: Watch | None
) -> tuple[dict[str, Any], int]:
    trainer = build_trainer(
        setup, lr=setup.recipe.lr, steps=setup.steps, seed=request.seed, predict=request.record or not request.plain,
        wrap=Recorder if request.record else None,
    )  # fmt: skip
    if isinstance(trainer.run.predictor, Recorder):
        trainer.run.predictor.attach(trainer.run.basis)
        if request.plain:  # watched, and never asked for a jump
            trainer.force_full_phase(FOR_EVER)
    folder = out / "checkpoints"
    data = Position()
    if resume:
        data = Position.of(persistence.load(trainer.run, trainer.metrics, checkpoint.latest(folder)))
    trainer.metrics.sink = JsonlSink(out / "metrics.jsonl")
    validation = Validation(trainer, setup.task, setup.steps, before_s=data.wall_s)
    note = watch("", trainer, setup.steps) if watch is not None else _silent
    every = setup.config.checkpoint.save_interval
    saved = trainer.current_step if resume else -1

    def save() -> None:
        nonlocal saved
        if trainer.current_step != saved:
            data.wall_s = validation.wall_s()
            persistence.save(trainer.run, trainer.metrics, folder, extra={"data": asdict(data)})
            saved = trainer.current_step

    def after_step(result: StepResult) -> None:
        data.num_consumed += result.consumed
        started = time.perf_counter()
        note(result)
        validation.outside_s += time.perf_counter() - started
        if validation.due():
            validation.measure()
        if trainer.current_step % every == 0:
            save()

    with StopSignal() as stop:
        if not resume:
            save()  # a run that is killed early can be resumed too, and a disk that refuses says so now
        if not _ended(trainer, setup.steps):
            batches = setup.task.batches(request.seed, start=data.num_consumed)
            trainer.fit(
                batches, total_steps=setup.steps, progress_callback=after_step, should_stop=lambda: stop.number > 0
            )
        wall_s = validation.wall_s()
        save()
        ended = _ended(trainer, setup.steps)
        val_loss = validation.final() if ended else None
        result = _result(setup, request, trainer, wall_s, val_loss, ended=ended)
        trainer.metrics.sink.close()
        if isinstance(trainer.run.predictor, Recorder):
            trainer.run.predictor.recording.save(out / "recording")
        write_json(out / "summary.json", result)
    printed = {k: v for k, v in result.items() if k != "divergence_events"}
    status = 0 if ended else stop.exit_status
    return {"out": str(out), "checkpoint": str(folder / f"checkpoint_step_{saved}"), **jsonable(printed)}, status


def _silent(result: StepResult) -> None:
    """Nobody watches."""


def _ended(trainer: HybridTrainer, steps: int) -> bool:
    run = trainer.run
    return run.position >= steps and run.probation is None and run.segment is None


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
    setup: Setup, request: Request, trainer: HybridTrainer, wall_s: float, val_loss: float | None, *, ended: bool
) -> dict[str, Any]:
    return {
        "task": setup.task.name, "seed": request.seed, "arm": "plain" if request.plain else "hybrid",
        "steps": setup.steps, "lr": setup.recipe.lr, "completed": ended, "final_val_loss": val_loss,
        "wall_s": wall_s, "environment": environment(setup.settings.device), "task_settings": setup.task.describe(),
        **trainer.summary(),
    }  # fmt: skip
