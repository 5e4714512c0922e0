"""A trial's folder: a run of ``hpt train`` that is paused and goes on, and whose records are its reports.

What the storage knows of a trial can be made anew from its folder: ``trial.json`` says its values and how it ended,
``metrics.jsonl`` what it has shown.
"""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...records import CheckpointError, ConfigError, DivergenceError
from ...safe_files import UnusableFileError, read_json_object, read_lines
from ..arms.drive import in_steps, write_json
from ..arms.options import InputError
from ..run_folder import Request
from ..train import Part, train
from .plan import Plan
from .space import with_params

FOLDER, CLAIMS, TRIAL = "trials", "claims", "trial.json"
#: Validations of a run: two before the first look.
NUM_VALIDATIONS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """What a slice of training came to.

    Attributes:
        reports: (step, validation loss) of the whole run so far.
        seconds: of training, in the whole run so far.
        final: validation loss at the end; None before it.
        failed: why it will never have one; empty otherwise.
        status: exit status where a signal has ended it, 0 otherwise.
    """

    reports: tuple[tuple[int, float], ...]
    seconds: float
    final: float | None = None
    failed: str = ""
    status: int = 0


def folder_of(out: Path, number: int) -> Path:
    """Of a trial."""
    return out / FOLDER / f"{number:05d}"


@contextlib.contextmanager
def claimed(out: Path, name: str, *, wait: bool = False) -> Iterator[bool]:
    """Keep other workers of this machine, or of this shared folder, away from a trial; ends with the process.

    Args:
        out: Folder of the search.
        name: Of what is claimed.
        wait: For the other one, rather than being told False.
    """
    import filelock

    (out / CLAIMS).mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(out / CLAIMS / f"{name}.lock", timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def advance(plan: Plan, out: Path, number: int, params: Mapping[str, Any], until: float) -> Slice:
    """Train a trial until a step, from where it was paused.

    A trial whose settings do not go together, or that diverges, has failed; the search goes on.

    Raises:
        CheckpointError: the disk refuses.
    """
    folder = folder_of(out, number)
    request = Request(
        options=with_params(plan.options, params), seed=int(params.get("seed", plan.seed)), plain=plan.plain
    )
    note(out, number, params=dict(params))
    failed, final, status = "", None, 0
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*has no checkpoint yet")  # it was killed that early
            result, status = train(
                request, folder, resume=(folder / "run.json").exists(),
                part=Part(until=until, num_validations=NUM_VALIDATIONS),
            )  # fmt: skip
        final = result["final_val_loss"]
        seconds = float(result["wall_s"])
    except DivergenceError as error:
        failed, seconds = f"diverged: {error}", math.nan
    except (InputError, ConfigError) as error:
        failed, seconds = str(error), math.nan
    except OSError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    except RuntimeError as error:  # too little memory for a large model, sizes that do not go together
        failed, seconds = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", math.nan
    if failed:
        note(out, number, failed=failed)
    return Slice(reports=reports_of(folder), seconds=seconds, final=final, failed=failed, status=status)


def reports_of(folder: Path) -> tuple[tuple[int, float], ...]:
    """(step, validation loss) of a run, rising; what came behind a checkpoint is there once."""
    found: dict[int, float] = {}
    if (folder / "metrics.jsonl").exists():
        for line in read_lines(folder / "metrics.jsonl"):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                event = json.loads(line)
                if event["event"] == "validation":
                    loss = event["val_loss"]
                    found[round(in_steps(event["cost_units"]))] = math.nan if loss is None else float(loss)
    return tuple(sorted(found.items()))


def note(out: Path, number: int, **values: Any) -> None:
    """Keep something about a trial in its folder, beside what is there.

    Raises:
        CheckpointError: the disk refuses.
    """
    folder = folder_of(out, number)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = read_json_object(folder / TRIAL) if (folder / TRIAL).exists() else {}
        if any(before.get(name) != value for name, value in values.items()):
            write_json(folder / TRIAL, {**before, **values})
    except (OSError, UnusableFileError) as error:
        raise CheckpointError(f"{folder}: {error}") from error


def kept(out: Path) -> list[tuple[int, dict[str, Any]]]:
    """Number and notes of all trials that have a folder, by number."""
    found = []
    for path in sorted((out / FOLDER).glob("*")) if (out / FOLDER).is_dir() else []:
        if path.name.isdecimal() and (path / TRIAL).exists():
            try:
                found.append((int(path.name), read_json_object(path / TRIAL)))
            except (OSError, UnusableFileError) as error:
                raise InputError(f"{path / TRIAL}: {error}") from None
    return found
