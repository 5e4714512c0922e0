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
from .curve import Array, latest, resumed_at

#: Longest table that is read, bytes.
MAX_BYTES = 500_000_000
#: Usual names, the better known first; compared without case, and behind the last "/" or " - " too.
#: A count of all steps comes before one that may begin anew in every epoch, or count what was written.
STEP_NAMES = ("trainer/global_step", "global_step", "step", "_step", "iteration", "iter", "steps", "n")
LOSS_NAMES = ("loss", "train_loss", "train/loss", "training_loss", "train_loss_step", "val_loss", "eval_loss",
              "valid_loss", "validation_loss", "lm_loss")  # fmt: skip
#: What a name has in it where none is usual.
SPEAKS_OF = {"loss": ("loss",), "step": ("step", "iter")}
RATE_NAMES = ("lr", "learning_rate", "learning-rate", "rate", "lr-adamw", "lr-adam", "lr-sgd")
#: Logs by their usual names, in a folder of a run.
IN_FOLDERS = ("metrics.jsonl", "trainer_state.json", "metrics.csv")
EVENT_FILES = "events.out.tfevents.*"
#: What stands in a cell without a number.
BLANKS = ("", "-", "--", "none", "null", "na", "n/a", "<na>", "undefined")
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
    reader = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True)
    try:
        heads = [name.strip() for name in next(reader)]
        names = [name for name in heads if name and not name.endswith(SPREADS)]
        found = _columns(str(path), names, columns)
        asked = {name: heads.index(name) for name in found if name is not None}
        rows: list[Mapping[str, Any]] = []
        cells: list[str] = []
        for cells in reader:  # only what is asked for is kept: a log of a million rows may have twenty columns
            rows.append({name: cells[at] for name, at in asked.items() if at < len(cells)})
    except csv.Error as error:
        raise ConfigError(f"{path}: is no table: {error}") from None
    if separator == ";":  # where numbers have a decimal comma, cells are set apart by semicolons
        rows = [{name: cell.replace(",", ".") for name, cell in row.items()} for row in rows]
    notes: tuple[str, ...] = ()
    if not text.endswith(("\n", "\r")) and _torn(rows, cells, heads):
        rows.pop()
        notes = (f"the last line of {path.name} is torn and has been left out",)
    return _log(str(path), found, rows, notes=notes)


def _torn(rows: Sequence[Mapping[str, Any]], cells: Sequence[str], heads: Sequence[str]) -> bool:
    """Whether the last line, which has no end, was cut: within its cells, or in the last one's digits."""
    if len(rows) < 2 or not cells:
        return False
    name = heads[len(cells) - 1] if len(cells) <= len(heads) else ""
    others = [len(row[name]) for row in rows[:-1] if row.get(name)]
    cut = name in rows[-1] and bool(others) and len(cells[-1]) < min(others)
    return cut or len(cells) < len(heads)


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
    return _log(str(path), _columns(str(path), names, columns), rows, notes=notes)


def _trainer_state(path: Path, columns: Columns) -> Log:
    found = read_json_object(path)
    rows = found.get("log_history")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{path}: has no log_history, as trainer_state.json of transformers has")
    total = found.get("max_steps")
    names = list(dict.fromkeys(name for row in rows for name in row))
    known = total if isinstance(total, int) and total > 0 else None
    return _log(str(path), _columns(str(path), names, columns), rows, total_steps=known)


def _events(path: Path, columns: Columns) -> Log:
    """By tensorboard's own reader."""
    try:
        module = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    except ModuleNotFoundError:
        raise ConfigError(
            f'{path}: reading event files needs tensorboard; run: pip install "hybrid-predict-trainer[tensorboard]"'
        ) from None
    files = sorted(path.glob(EVENT_FILES)) if path.is_dir() else [path]
    parts = [_events_of(module, file) for file in files]
    rows = [row for part in parts for row in part]
    found = _columns(str(path), list(dict.fromkeys(name for row in rows for name in row)), columns)
    begun: dict[Path, float] = {}
    for file, part in zip(files, parts, strict=True):
        steps = [row["step"] for row in part if found[1] in row]
        if steps and begun and min(steps) <= min(begun.values()):
            raise ConfigError(
                f"{path}: holds the event files of several runs, each from its beginning; give one of "
                f"{', '.join(str(p) for p in [*begun, file][:5])}"
            )
        if steps:
            begun[file] = min(steps)
    return _log(str(path), found, rows)


def _events_of(module: Any, file: Path) -> list[dict[str, Any]]:
    """Rows of one event file, in order of steps."""
    events = module.EventAccumulator(str(file), size_guidance={"scalars": 0, "tensors": 0})
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
    return [rows[step] for step in sorted(rows)]


# ---- columns -----------------------------------------------------------------------------------------------


def _columns(where: str, names: Sequence[str], columns: Columns) -> tuple[str, str, str | None]:
    """The columns of the steps, the losses and, where there is one, the rates.

    Raises:
        ConfigError: there is no step, no loss, or several of one.
    """
    step = _chosen(where, names, columns.step, STEP_NAMES, "step")
    loss = _chosen(where, names, columns.loss, LOSS_NAMES, "loss")
    rate = _chosen(where, names, columns.rate, RATE_NAMES, "rate", needed=False)
    if step is None or loss is None:
        missing = "step" if step is None else "loss"
        raise ConfigError(
            f"{where}: has no column that is called like a {missing}; name it with --{missing}-column "
            f"(there are: {', '.join(map(str, names[:20])) or 'none'})"
        )
    return step, loss, rate


def _log(
    where: str, columns: tuple[str, str, str | None], rows: Sequence[Mapping[str, Any]], *,
    total_steps: int | None = None, notes: tuple[str, ...] = (),
) -> Log:  # fmt: skip
    """Take the numbers of the columns of :func:`_columns`."""
    step, loss, rate = columns
    steps, losses = _pairs(where, rows, step, loss)
    if not len(steps):
        raise ConfigError(f"{where}: the column {loss!r} holds no number beside a step")
    parts = steps != np.floor(steps)
    if parts.any():
        raise ConfigError(
            f"{where}: the step {steps[parts][0]:g} is no whole number: a forecast counts optimizer steps, no epochs, "
            "and knows no marks within a number"
        )
    steps, losses, resumed = _last_written(steps, losses)
    steps, losses, gaps = _without_gaps(steps, losses)
    rate_steps, rates = _pairs(where, rows, step, rate) if rate is not None else (np.zeros(0), np.zeros(0))
    order = latest(rate_steps)
    return Log(
        steps=steps, losses=losses, rate_steps=rate_steps[order], rates=rates[order], total_steps=total_steps,
        loss_name=loss, notes=(*notes, *resumed, *gaps),
    )  # fmt: skip


def _last_written(steps: Array, losses: Array) -> tuple[Array, Array, tuple[str, ...]]:
    """The rows that count in order of their steps, and a note where a resumed run wrote others anew."""
    order, back = latest(steps), resumed_at(steps)
    if not len(back):
        return steps[order], losses[order], ()
    note = (
        f"the log goes back from step {steps[back[-1] - 1]:g} to {steps[back[-1]]:g}: {len(steps) - len(order)} losses "
        "that were written before have been left out"
    )
    return steps[order], losses[order], (note,)


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


def _pairs(where: str, rows: Iterable[Mapping[str, Any]], step: str, value: str) -> tuple[Array, Array]:
    """Rows that have a number in both columns; a value that says NaN or infinity is kept, for the fit to refuse.

    Raises:
        ConfigError: among numbers there is a text that is none: steps with marks between thousands are not passed over.
    """
    found, strange = [], ""
    for row in rows:
        cells = row.get(step), row.get(value)
        at, what = _number(cells[0]), _number(cells[1])
        if at is not None and what is not None and math.isfinite(at):
            found.append((at, what))
            continue
        for name, cell, number in zip((step, value), cells, (at, what), strict=True):
            # a head that is written again where a program went on with a file is no cell
            if number is None and isinstance(cell, str) and cell.strip().lower() not in (*BLANKS, name.strip().lower()):
                strange = strange or f"{where}: the column {name!r} holds {cell[:40]!r}, which is no number"
    if found and strange:
        raise ConfigError(strange)
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
