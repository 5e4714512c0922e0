"""Where records go: JSON lines, or nowhere."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ..notices import warn
from ..safe_files import open_append

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
    """Where records go."""

    incomplete: bool

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one record."""

    def close(self) -> None:
        """Nothing more will come."""


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

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a line; after a failure write no more."""
        if self.incomplete:
            return
        try:
            self._file.write(json.dumps(jsonable(record), allow_nan=False, separators=(",", ":")) + "\n")
            self._file.flush()
        except OSError as error:
            self.incomplete = True
            warn(f"{self._path}: {error.strerror}; metrics are no longer written, training goes on", stacklevel=2)

    def close(self) -> None:
        """Close the file."""
        try:
            self._file.close()
        except OSError:
            self.incomplete = True
