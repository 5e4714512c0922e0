"""The folder of a run: what it holds, who may write to it, and whether what is asked now is what was asked then."""

from __future__ import annotations

import contextlib
import math
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config.settings import HybridTrainerConfig
from ..config.toml import differences
from ..keep import housekeeping
from ..safe_files import read_json_object, refuse_links, refuse_special
from ..tell.sinks import jsonable
from .arms.options import RANGES, InputError, Options, as_input_error, given_config
from .extras import require
from .report.text import short_value

#: What a folder of results has at least one of.
OURS = (
    "run.json",
    "plan.json",
    "config.toml",
    "metrics.jsonl",
    "summary.json",
    "compare.json",
    "checkpoints",
    "runs",
    "sweep",
)
#: What a command writes to; none of it may lead elsewhere.
WRITTEN = (*OURS, "recipe.toml", ".lock", "report.html", "recording", "finished")

#: A run's own description is a page.
MAX_RUN_JSON_BYTES = 1_000_000
MAX_TEXT = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One run: the options, the seed (None: not said, 0), and whether prediction is off."""

    options: Options
    seed: int | None = None
    plain: bool = False
    record: bool = False  # keep every window


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What ``run.json`` says: the request, the data's absolute path (None: no file), and the task as it was."""

    request: Request
    data_path: str | None = None
    task: Mapping[str, Any] | None = None


# ---- who may write -----------------------------------------------------------------------------------------


def untrained(out: Path) -> bool:
    """Whether nothing that was trained is in a folder: a run that was killed before its first checkpoint."""
    if any((out / name).exists() for name in ("summary.json", "compare.json", "runs", "sweep")):
        return False
    metrics = out / "metrics.jsonl"
    if metrics.exists() and metrics.stat().st_size > 0:
        return False
    folder = out / "checkpoints"
    return not folder.exists() or not any("checkpoint_step_" in p.name and p.name[0] != "." for p in folder.iterdir())


def refuse_used(out: Path, advice: str) -> None:
    """Refuse a folder that holds results.

    Raises:
        InputError: it does, or it is a file.
    """
    with as_input_error():
        if out.exists() and not out.is_dir():
            raise InputError(f"{out}: is a file, --out must name a folder")
        used = next((name for name in OURS if os.path.lexists(out / name)), None)
        if used is not None and not untrained(out):
            raise InputError(f"{out}: holds another run ({used}); {advice}")


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep a second process out of a folder; the lock ends with the process, however it ends.

    Raises:
        InputError: the folder cannot be made, another process has it, or a name in it is a symbolic link.
    """
    with as_input_error():
        require("filelock")
    import filelock

    with as_input_error():
        out.mkdir(parents=True, exist_ok=True)
        refuse_links(out, WRITTEN)
        refuse_special(out / ".lock")
    lock = filelock.FileLock(out / ".lock", timeout=0)
    with as_input_error():
        try:
            lock.acquire()
        except filelock.Timeout:
            raise InputError(f"{out}: another process is writing to it") from None
    try:
        yield
    finally:
        lock.release()


# ---- what was asked ------------------------------------------------------------------------------------------


def to_store(request: Request, task: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of ``run.json``."""
    return {**asdict(request), "data_path": absolute(request.options.data), "task": task}


def absolute(data: str | None) -> str | None:
    """Where the data is whatever the working directory; None if it is no file or folder."""
    return str(Path(data).absolute()) if data is not None and Path(data).exists() else None


def stored(out: Path) -> Stored:
    """What ``run.json`` says, every value checked.

    Raises:
        InputError: there is none, or a value is not what a flag would take.
    """
    path = out / "run.json"
    with as_input_error():
        if not path.exists():
            raise InputError(f"{out}: there is no run to resume (no run.json); leave out --resume to start one")
        found = read_json_object(path, MAX_RUN_JSON_BYTES)
        try:
            options = options_of(found["options"])
            flags = {name: of_type(name, found[name], bool) for name in ("plain", "record")}
            seed = of_type("seed", found["seed"], int)
            data_path, task = found.get("data_path"), found.get("task")
            if data_path is not None:
                of_type("data_path", data_path, str)
            if task is not None and not isinstance(task, dict):
                raise ValueError("task must be an object")
        except (KeyError, ValueError, TypeError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{path}: is damaged: {what}; start a new run with another --out") from None
    return Stored(request=Request(options=options, seed=seed, **flags), data_path=data_path, task=task)


def options_of(found: object) -> Options:
    """Options from JSON.

    Raises:
        ValueError: an unknown name, a wrong type, or a value no flag would take.
    """
    if not isinstance(found, dict):
        raise ValueError("options must be an object")
    hints = typing.get_type_hints(Options)
    unknown = [name for name in found if name not in hints]
    if unknown:
        raise ValueError(f"unknown option {short_value(unknown[0])}")
    values: dict[str, Any] = {}
    for name, value in found.items():
        if name == "set":
            if not isinstance(value, list):
                raise ValueError("set must be a list")
            values[name] = tuple(of_type(name, text, str) for text in value)
        elif value is None and name != "task":
            values[name] = None
        else:
            hint = hints[name]
            kind = next(k for k in typing.get_args(hint) or (hint,) if k is not types.NoneType)
            values[name] = of_type(name, value, kind)
    if not values.get("task"):
        raise ValueError("it names no task")
    return Options(**values)


def of_type(name: str, value: object, kind: type) -> Any:
    """The value, if a flag of that name would take it.

    Raises:
        ValueError: it would not.
    """
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits:
        raise ValueError(f"{name} = {short_value(value)} must be {words[kind]}")
    low, high = RANGES.get(name, (-math.inf, math.inf))
    if isinstance(value, int | float) and not low <= value <= high:
        raise ValueError(f"{name} = {short_value(value)} is out of range")
    if isinstance(value, str) and (len(value) > MAX_TEXT or "\0" in value or not encodable(value)):
        raise ValueError(f"{name} is no text that a flag could hold")
    return value


def encodable(text: str) -> bool:
    """Whether a text can be written down: halves of surrogate pairs cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ---- whether it is the same -----------------------------------------------------------------------------------


#: Options that decide the trainer's settings: these are compared, so that ``--config`` may be another file.
OF_CONFIG = ("config", "config_preset", "predictor", "set")


def agree(out: Path, said: Request, then: Stored) -> None:
    """Hold what is said now against the run in ``out``; what is not said agrees.

    Raises:
        InputError: an option differs; the message names it and both values.
    """
    before = then.request
    for name, value in asdict(said.options).items():
        was = getattr(before.options, name)
        if value in (None, (), "") or value == was or name in OF_CONFIG:
            continue
        if name == "data" and then.data_path is not None and absolute(value) == then.data_path:
            continue
        refuse_change(out, "--" + name.replace("_", "-"), was, value)
    if said.seed is not None and said.seed != before.seed:
        refuse_change(out, "--seed", before.seed, said.seed)
    for name in ("plain", "record"):
        if getattr(said, name) and not getattr(before, name):
            refuse_change(out, f"--{name}", None, True)


def agree_plan(out: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Hold a comparison's plan that is said now against that of the comparison in ``out``.

    Raises:
        InputError: something differs; the message names it and both values.
    """
    was, said = dict(leaves(then)), dict(leaves(jsonable(now)))
    for key in [*said, *(key for key in was if key not in said)]:
        # names of data are paths, which may be told in two ways
        if key not in ("options.data", "task.data.name") and was.get(key) != said.get(key):
            refuse_change(out, key.removeprefix("options."), was.get(key), said.get(key))


def refuse_change(out: Path, flag: str, was: object, now: object) -> None:
    """Say which option differs, with both values.

    Raises:
        InputError: always.
    """
    started = f"without {flag}" if was in (None, ()) else f"with {flag} {short_value(was)}"
    raise InputError(f"{out}: was started {started}, not {short_value(now)}; leave it out or choose another --out")


def agree_config(out: Path, said: Options, then: Options, config: HybridTrainerConfig) -> None:
    """Hold the settings that are said now against those of the run.

    Args:
        out: Folder of the run.
        said: Now.
        then: When the run was started; its assignments hold where nothing else is said.
        config: The run's settings.

    Raises:
        InputError: a setting differs; the message names it and both values.
    """
    if all(getattr(said, name) in (None, ()) for name in OF_CONFIG):
        return
    for key, (was, now) in differences(config, given_config(config, said, then)).items():
        told = f"{key} = {short_value(was)}, not {short_value(now)}"
        raise InputError(f"{out}: was started with {told}; leave it out or choose another --out")


def agree_task(out: Path, then: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
    """Hold the task as it is built now against the one that was trained: the data may have changed.

    Raises:
        InputError: something differs; the message names it and both values.
    """
    if then is None:  # written by a version that did not keep it
        return
    was, found = dict(leaves(then)), dict(leaves(jsonable(now)))
    for key in [*was, *(key for key in found if key not in was)]:
        # names of data are paths, which may be told in two ways
        if key.rpartition(".")[2] != "name" and was.get(key) != found.get(key):
            told = f"{key} was {short_value(was.get(key))} and is {short_value(found.get(key))} now"
            raise InputError(f"{out}: the data or the task has changed since the run was started: {told}")


def agree_checkpoint(path: Path, saved: HybridTrainerConfig, config: HybridTrainerConfig) -> None:
    """Hold ``config.toml`` of the run against the copy in its checkpoint.

    Raises:
        InputError: it was edited or replaced; the message names the first setting and both values.
    """
    for key, (was, now) in differences(saved, config).items():
        told = f"{key} is {short_value(now)}, the checkpoint was written with {short_value(was)}"
        raise InputError(f"{path}: was changed: {told}; put it back, or start a new run with another --out")


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values of nested JSON objects by dotted key."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def saved_steps(out: Path) -> Sequence[Path]:
    """Checkpoints of the run, oldest first, unverified."""
    return housekeeping.checkpoints(out / "checkpoints")
