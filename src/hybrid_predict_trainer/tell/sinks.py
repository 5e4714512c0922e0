"""Where records go: JSON lines, objects of the user's own, or nowhere."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..config.settings import HybridTrainerConfig
from ..keep.failures import MAX_FAILURES
from ..notices import warn
from ..records import ConfigError
from ..safe_files import end_torn_line, open_append

SCHEMA = 1


def jsonable(value: Any) -> Any:
    """Plain JSON value; a number that is not finite becomes null (JSON has no NaN)."""
    if isinstance(value, bool) or value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [jsonable(v) for v in value]
    return jsonable(value.tolist() if hasattr(value, "tolist") else str(value))


class Sink(Protocol):
    """Where records go: one call of ``write`` per event of a run, in order."""

    @property
    def incomplete(self) -> bool:
        """Whether a record was lost; the summary then carries ``metrics_incomplete``."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one record.

        Args:
            record: ``schema``, ``event`` ("step", "transition", "jump", "correction", "outcome", "divergence", "health"
                or "validation"), ``step``, and what belongs to the event.  Values are plain numbers, strings and lists;
                a number may be NaN or infinite (:func:`jsonable` makes it None).  It is not changed later.
        """

    def close(self) -> None:
        """Release what it holds; nothing more will come."""


class Writer(Protocol):
    """The least that a sink of the user's own has: a method that takes one record."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one record, as :meth:`Sink.write`."""


class NullSink:
    """Records go nowhere."""

    incomplete = False

    def write(self, record: Mapping[str, Any]) -> None:
        """Drop it."""

    def close(self) -> None:
        """Nothing to do."""


class JsonlSink:
    """Appends one line per record and flushes it, so that a killed run loses at most one line."""

    def __init__(self, path: str | Path, *, follow_links: bool = True) -> None:
        """Open for appending; the folder is made if needed.

        Args:
            path: Of the file.
            follow_links: False: refuse symbolic links and whatever is no regular file, in a folder of others' say.

        Raises:
            UnusableFileError: what stands there is refused.
        """
        self.incomplete = False
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if follow_links:
            self._file = self._path.open("a", encoding="utf-8")
        else:
            self._file = os.fdopen(open_append(self._path), "a", encoding="utf-8")
        end_torn_line(self._path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a line; after a failure write no more."""
        if self.incomplete:
            return
        try:
            self._file.write(json.dumps(jsonable(record), allow_nan=False, separators=(",", ":")) + "\n")
            self._file.flush()
        except OSError as error:
            self.incomplete = True
            warn(f"{self._path}: {error.strerror}; metrics are no longer written, training goes on")

    def close(self) -> None:
        """Close the file."""
        try:
            self._file.close()
        except OSError:
            self.incomplete = True


class Sinks:
    """Hands every record to several sinks.  One that raises three times gets no more; the others go on."""

    def __init__(self, sinks: Sequence[Sink | Writer]) -> None:
        """Args: sinks: In this order; only ``write`` is asked for, ``close`` and ``incomplete`` where they exist."""
        self.sinks = list(sinks)
        self._lost = [0] * len(self.sinks)

    @property
    def incomplete(self) -> bool:
        """Whether any of them has lost a record."""
        return any(self._lost) or any(getattr(sink, "incomplete", False) for sink in self.sinks)

    def write(self, record: Mapping[str, Any]) -> None:
        """Hand it to each; the first failure of each is said."""
        for i, sink in enumerate(self.sinks):
            if self._lost[i] >= MAX_FAILURES:
                continue
            try:
                sink.write(record)
            except Exception as error:
                self._lost[i] += 1
                if self._lost[i] == 1:
                    warn(
                        f"sink {type(sink).__name__} failed ({type(error).__name__}: {error}); training goes on, after "
                        f"{MAX_FAILURES} times it gets no more records",
                    )

    def close(self) -> None:
        """Close those that can be closed, whatever raises."""
        for sink in self.sinks:
            with contextlib.suppress(Exception):
                getattr(sink, "close", lambda: None)()


def sink_of(config: HybridTrainerConfig, sinks: Sequence[Sink | Writer] = ()) -> Sink:
    """Where the records of a run go: the file that the settings name, and the user's own sinks.

    Raises:
        ConfigError: one of them has no method ``write``.
    """
    for sink in sinks:
        if not callable(getattr(sink, "write", None)):
            raise ConfigError(f"sinks: {type(sink).__name__} has no method write(record)")
    wanted = config.collect_metrics and config.metrics.path
    named: list[Sink] = [JsonlSink(config.metrics.path)] if wanted else []
    if sinks and config.collect_metrics:
        return Sinks([*named, *sinks])
    return named[0] if named else NullSink()
