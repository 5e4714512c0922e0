"""Loss curves out of the logs that training programs write.

Read are: a table (CSV, Weights & Biases' exports among them), JSON lines (this project's ``metrics.jsonl`` and
others'), ``trainer_state.json`` of transformers, and TensorBoard's event files.  A column is found by its usual names,
by being the only one whose name speaks of a loss or of steps, or named by the caller; where several would do the file
is refused and the names are told, so that no forecast is made of the wrong curve.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..records import ConfigError
from ..safe_files import read_json_object, read_lines, read_text
from .curve import Array

#: Longest table that is read, bytes.
MAX_BYTES = 500_000_000
#: Usual names, the better known first; compared without case, and behind the last "/" or " - " too.
STEP_NAMES = ("step", "global_step", "_step", "trainer/global_step", "iteration", "iter", "steps", "n")
LOSS_NAMES = ("loss", "train_loss", "train/loss", "training_loss", "train_loss_step", "val_loss", "eval_loss",
              "valid_loss", "validation_loss", "lm_loss")  # fmt: skip
#: What a name has in it where none is usual.
SPEAKS_OF = {"loss": ("loss",), "step": ("step", "iter")}
RATE_NAMES = ("lr", "learning_rate", "learning-rate", "rate", "lr-adamw", "lr-adam", "lr-sgd")
#: Logs by their usual names, in a folder of a run.
IN_FOLDERS = ("metrics.jsonl", "trainer_state.json", "metrics.csv")
EVENT_FILES = "events.out.tfevents.*"
#: Weights & Biases adds the least and largest value of each point.
SPREADS = ("__MIN", "__MAX")


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """What a log says of a run.

    Attributes:
        steps, losses: (n,) each, rows that have both.
        rate_steps, rates: (m,) each, rows that have a rate.
        total_steps: the planned length where the log knows it.
        loss_name: the column that was taken for the loss.
        notes: what was left out.
    """

    steps: Array
    losses: Array
    rate_steps: Array
    rates: Array
    total_steps: int | None = None
    loss_name: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Columns:
    """Names that the caller gives; None: the usual ones."""

    loss: str | None = None
    rate: str | None = None
    step: str | None = None


def read_log(path: Path, columns: Columns | None = None) -> Log:
    """The loss curve in a file, or in a folder that holds one of :data:`IN_FOLDERS`, checkpoints or event files.

    Raises:
        ConfigError: there is no such file, it is of none of these kinds, it has no step, no loss, or several of one.
    """
    wanted = columns or Columns()
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder")
    if path.is_dir():
        return _folder(path, wanted)
    if ".tfevents." in path.name:
        return _events(path, wanted)
    if path.suffix == ".json":
        return _trainer_state(path, wanted)
    if path.suffix in (".jsonl", ".ndjson"):
        return _json_lines(path, wanted)
    if path.suffix in (".csv", ".tsv", ".txt"):
        return _table(path, wanted)
    raise ConfigError(f"{path}: must be .csv, .jsonl, trainer_state.json, a TensorBoard event file or a folder of them")


# ---- kinds of files --------------------------------------------------------------------------------------


def _folder(path: Path, columns: Columns) -> Log:
    """The log in a folder, or in its newest checkpoint of transformers."""
    for name in IN_FOLDERS:
        if (path / name).is_file():
            return read_log(path / name, columns)
    if any(path.glob(EVENT_FILES)):
        return _events(path, columns)
    states = [p for p in path.glob("checkpoint-*/trainer_state.json") if p.parent.name[11:].isdecimal()]
    if states:
        return read_log(max(states, key=lambda p: int(p.parent.name[11:])), columns)
    below = sorted({str(p.parent) for pattern in (*IN_FOLDERS, EVENT_FILES) for p in path.glob(f"*/{pattern}")})
    if below:
        raise ConfigError(f"{path}: holds no log itself; give one of {', '.join(below[:5])}")
    raise ConfigError(
        f"{path}: holds no {', no '.join(IN_FOLDERS)}, no checkpoint-*/trainer_state.json and no TensorBoard event file"
    )


def _table(path: Path, columns: Columns) -> Log:
    text = read_text(path, MAX_BYTES)
    head = text.partition("\n")[0]
    if not head.strip():
        raise ConfigError(f"{path}: is empty")
    separator = max(",;\t", key=head.count)
    stream = io.StringIO(text)
    try:
        heads = [name.strip() for name in next(csv.reader(stream, delimiter=separator, skipinitialspace=True))]
        reader = csv.DictReader(stream, heads, delimiter=separator, skipinitialspace=True)
        rows: list[dict[str, Any]] = list(reader)
    except csv.Error as error:
        raise ConfigError(f"{path}: is no table: {error}") from None
    names = [name for name in heads if name and not name.endswith(SPREADS)]
    if separator == ";":  # where numbers have a decimal comma, cells are set apart by semicolons
        rows = [{k: v.replace(",", ".") if isinstance(v, str) else v for k, v in row.items()} for row in rows]
    return _log(str(path), names, rows, columns)


def _json_lines(path: Path, columns: Columns) -> Log:
    rows: list[Mapping[str, Any]] = []
    torn = 0
    for number, raw in enumerate(read_lines(path), 1):
        if torn:
            raise ConfigError(f"{path}, line {torn}: is no JSON object")
        if not raw.strip():
            continue
        try:
            row = json.loads(raw)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            torn = number
    ours = [row for row in rows if row.get("event") == "step"]
    if ours:  # a predicted step has the loss of its test, at another point
        rows = [row for row in ours if row.get("phase") != "predict" and not row.get("was_predicted")]
    names = list(dict.fromkeys(name for row in rows for name in row))
    notes = (f"the last line of {path.name} is torn and has been left out",) if torn else ()
    return _log(str(path), names, rows, columns, notes=notes)


def _trainer_state(path: Path, columns: Columns) -> Log:
    found = read_json_object(path)
    rows = found.get("log_history")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{path}: has no log_history, as trainer_state.json of transformers has")
    total = found.get("max_steps")
    names = list(dict.fromkeys(name for row in rows for name in row))
    known = total if isinstance(total, int) and total > 0 else None
    return _log(str(path), names, rows, columns, total_steps=known)


def _events(path: Path, columns: Columns) -> Log:
    """By tensorboard's own reader."""
    try:
        module = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    except ModuleNotFoundError:
        raise ConfigError(
            f'{path}: reading event files needs tensorboard; run: pip install "hybrid-predict-trainer[tensorboard]"'
        ) from None
    events = module.EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    rows: dict[int, dict[str, Any]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            rows.setdefault(event.step, {"step": event.step})[tag] = event.value
    for tag in events.Tags()["tensors"]:  # what TensorFlow 2 writes
        for event in events.Tensors(tag):
            value = importlib.import_module("tensorboard.util.tensor_util").make_ndarray(event.tensor_proto)
            if value.size == 1 and value.dtype.kind in "fiu":  # a text is a tensor as well
                rows.setdefault(event.step, {"step": event.step})[tag] = float(value.reshape(()))
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    return _log(str(path), names, [rows[step] for step in sorted(rows)], columns)


# ---- columns -----------------------------------------------------------------------------------------------


def _log(
    where: str, names: Sequence[str], rows: Sequence[Mapping[str, Any]], columns: Columns, *,
    total_steps: int | None = None, notes: tuple[str, ...] = (),
) -> Log:  # fmt: skip
    """Find the columns and take their numbers."""
    step = _chosen(where, names, columns.step, STEP_NAMES, "step")
    loss = _chosen(where, names, columns.loss, LOSS_NAMES, "loss")
    rate = _chosen(where, names, columns.rate, RATE_NAMES, "rate", needed=False)
    if step is None or loss is None:
        missing = "step" if step is None else "loss"
        raise ConfigError(
            f"{where}: has no column that is called like a {missing}; name it with --{missing}-column "
            f"(there are: {', '.join(map(str, names[:20])) or 'none'})"
        )
    steps, losses = _pairs(rows, step, loss)
    if not len(steps):
        raise ConfigError(f"{where}: the column {loss!r} holds no number beside a step")
    steps, losses, gaps = _without_gaps(steps, losses)
    rate_steps, rates = _pairs(rows, step, rate) if rate is not None else (np.zeros(0), np.zeros(0))
    return Log(
        steps=steps, losses=losses, rate_steps=rate_steps, rates=rates, total_steps=total_steps, loss_name=loss,
        notes=(*notes, *gaps),
    )  # fmt: skip


def _without_gaps(steps: Array, losses: Array) -> tuple[Array, Array, tuple[str, ...]]:
    """The rows without losses that are not finite where the run went on, and a note; after a divergence they stay.

    A step that a gradient scaler skipped, or a cell that a table fills with NaN, is no divergence: a finite loss
    follows.  In the last rows it may be one, and is left for the curve to refuse.
    """
    finite = np.isfinite(losses)
    last = steps[finite].max() if finite.any() else -math.inf
    gap = ~finite & (steps < last)
    if not gap.any():
        return steps, losses, ()
    note = f"{int(gap.sum())} of {len(losses)} losses are not finite and have been left out: the run went on after them"
    return steps[~gap], losses[~gap], (note,)


def _chosen(
    where: str, names: Sequence[str], said: str | None, usual: Sequence[str], kind: str, *, needed: bool = True
) -> str | None:
    """The caller's column, the one with the best known of the usual names, or the only one that speaks of it.

    Raises:
        ConfigError: the caller's is not there, or several could be meant.
    """
    if said is not None:
        if said in names:
            return said
        raise ConfigError(f"{where}: has no column {said!r} (there are: {', '.join(map(str, names[:20]))})")
    for name in usual:
        for match in (lambda n: n.lower(), lambda n: n.lower().rsplit(" - ", 1)[-1], _last):
            found = [n for n in names if match(n) == name]
            if len(found) > 1 and needed:
                raise ConfigError(f"{where}: {len(found)} columns could be the {kind}: {', '.join(found[:5])}; "
                                  f"choose one with --{kind}-column")  # fmt: skip
            if found:
                return found[0]
    found = [n for n in names if any(word in n.lower() for word in SPEAKS_OF.get(kind, ()))]
    if len(found) > 1:
        raise ConfigError(f"{where}: {len(found)} columns could be the {kind}: {', '.join(found[:5])}; "
                          f"choose one with --{kind}-column")  # fmt: skip
    return found[0] if found else None


def _last(name: str) -> str:
    return name.lower().rsplit(" - ", 1)[-1].rsplit("/", 1)[-1]


def _pairs(rows: Iterable[Mapping[str, Any]], step: str, value: str) -> tuple[Array, Array]:
    """Rows that have a number in both columns; a value that says NaN or infinity is kept, for the fit to refuse."""
    found = []
    for row in rows:
        at, what = _number(row.get(step)), _number(row.get(value))
        if at is not None and what is not None and math.isfinite(at):
            found.append((at, what))
    pairs = np.array(found, dtype=np.float64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _number(value: Any) -> float | None:
    """A number, or the text of one; None for anything else, an empty cell among it."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
