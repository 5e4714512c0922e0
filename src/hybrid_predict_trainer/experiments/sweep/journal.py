"""Optuna's journal file, which goes on after a line that was not written to its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import filelock
from optuna.storages.journal import JournalFileBackend

#: Bytes that are looked at, at once, for the end of the last whole line.
BLOCK = 1 << 16


class KernelLock:
    """The lock of the journal.  It ends with its process, so that a killed worker holds nobody up."""

    def __init__(self, path: Path) -> None:
        """Args: path: of the lock's file."""
        self._lock = filelock.FileLock(path, timeout=120)

    def acquire(self) -> bool:
        """Wait for it; who has it already may take it again."""
        self._lock.acquire()
        return True

    def release(self) -> None:
        """Let the next one have it."""
        self._lock.release()


class Journal(JournalFileBackend):  # type: ignore[misc]  # Optuna is read without its types
    """Cuts off half a line before it writes.

    A disk that was full, or power that was cut, leaves one.  Optuna's own backend (5.0.0,
    ``storages/journal/_file.py``) writes on behind it, and what results is no JSON: no later opening of the study
    gets past that line.
    """

    def __init__(self, path: Path, lock: KernelLock) -> None:
        """Args: path: of the journal.  lock: held while it is written."""
        super().__init__(str(path), lock_obj=lock)
        self._path, self._alone = path, lock

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write behind the last whole line."""
        self._alone.acquire()
        try:
            self._cut()
            super().append_logs(logs)
        finally:
            self._alone.release()

    def _cut(self) -> None:
        """Half a line is no record: whoever wrote it was told that it failed, or is gone."""
        with self._path.open("r+b") as file:
            size = whole = file.seek(0, 2)
            while whole > 0:
                begin = max(whole - BLOCK, 0) if whole < size else size - 1  # nearly always the last byte is the end
                file.seek(begin)
                end = file.read(whole - begin).rfind(b"\n")
                if end >= 0:
                    whole = begin + end + 1
                    break
                whole = begin
            if whole < size:
                file.truncate(whole)
