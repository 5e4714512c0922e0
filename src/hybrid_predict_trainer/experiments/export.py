"""A run's record as a Parquet file, for programs that read tables.

``metrics.jsonl`` is the record: it is complete up to the last line however a run ends.  The table is derived from it,
written whole or not at all, and can be made again at any time.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..safe_files import refuse_special
from .arms.options import InputError
from .extras import require
from .report.data import Record, read_records

#: Names in a run's folder: the record, and what is made of it.
RECORD, TABLE = "metrics.jsonl", "metrics_history.parquet"

#: Columns that come first, where there are any.
FIRST = ("event", "step", "phase", "loss")


def export(run: Path, out: Path | None = None) -> tuple[Path, int, tuple[str, ...]]:
    """Write the table of a run.

    One row per record, one column per name that any record has; what a record lacks is null.  Numbers are int64 or
    float64, lists of numbers are lists of float64, other tables and lists are JSON texts.

    Args:
        run: A run's folder, or a file of JSON lines.
        out: The file; None: ``metrics_history.parquet`` beside the record.

    Returns:
        The file, its number of rows, and what was left out of it.

    Raises:
        InputError: there is no record.
        ModuleNotFoundError: pyarrow is not installed.
        ValueError: a line in the middle is torn.
        OSError: the disk refused; what stood there stands.
    """
    require("pyarrow")
    import pyarrow
    from pyarrow import parquet

    source = run / RECORD if run.is_dir() else run
    if not source.is_file():
        raise InputError(f"{source}: there is no record; give the folder of a run, or its {RECORD}")
    records, notices = read_records(source)
    target = source.with_name(TABLE) if out is None else out
    table = pyarrow.table(columns(records, pyarrow))
    refuse_special(target)
    partial = target.with_name(f".{target.name}.part")
    try:
        parquet.write_table(table, partial, compression="zstd")
        partial.replace(target)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return target, len(records), notices


def columns(records: Sequence[Record], pyarrow: Any) -> dict[str, Any]:
    """Name -> array, of one type each.

    Args:
        records: Any JSON objects.
        pyarrow: The library.
    """
    names = dict.fromkeys(name for record in records for name in record)
    ordered = [*(name for name in FIRST if name in names), *sorted(name for name in names if name not in FIRST)]
    return {name: _column([record.get(name) for record in records], pyarrow) for name in ordered}


def _column(values: Sequence[Any], pyarrow: Any) -> Any:
    there = [value for value in values if value is not None]
    if all(type(value) is bool for value in there):
        return pyarrow.array(values, pyarrow.bool_())
    if all(type(value) is int and abs(value) < 2**63 for value in there):
        return pyarrow.array(values, pyarrow.int64())
    if _are_numbers(there):
        return pyarrow.array([None if value is None else float(value) for value in values], pyarrow.float64())
    if all(isinstance(value, list) and _are_numbers(v for v in value if v is not None) for value in there):
        return pyarrow.array(values, pyarrow.list_(pyarrow.float64()))
    return pyarrow.array([_text(value) for value in values], pyarrow.string())


def _are_numbers(values: Iterable[Any]) -> bool:
    """Whether all of them fit a float."""
    return all(
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2.0**1023 for value in values
    )


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value)


def told(path: Path, rows: int, notices: Sequence[str]) -> Mapping[str, Any]:
    """What ``hpt export`` says."""
    return {"table": str(path), "rows": rows, "bytes": path.stat().st_size, "notices": list(notices)}
