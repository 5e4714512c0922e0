"""Checkpoints that are written while training goes on.

What is to be written is copied between two steps, so that it is one moment's state whatever training does next; a
thread then writes the copy with the same commit protocol as always.  One is written at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from ..records import CheckpointError

#: Writes a captured state; returns where it is.
Write = Callable[[], Path]


class BackgroundWriter:
    """A thread that writes one checkpoint, and whose failure is heard of.

    The thread is no daemon: a program that ends while a checkpoint is being written ends when it is complete.
    """

    def __init__(self) -> None:
        """Nothing is being written."""
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether one is still being written."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def pending(self) -> bool:
        """Whether one was begun whose outcome :meth:`wait` has not told yet."""
        return self._thread is not None

    def start(self, write: Write) -> None:
        """Begin to write.

        Args:
            write: Touches nothing that training changes.

        Raises:
            RuntimeError: another one is pending.
        """
        if self._thread is not None:
            raise RuntimeError("a checkpoint is still being written")
        self._error = None
        self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint", daemon=False)
        self._thread.start()

    def wait(self) -> None:
        """Wait until what was begun is written; nothing happens where nothing was.

        Raises:
            CheckpointError: it could not be.
        """
        thread = self._thread
        if thread is None:
            return
        thread.join()
        error, self._thread, self._error = self._error, None, None
        if isinstance(error, CheckpointError):
            raise error
        if error is not None:
            raise CheckpointError(f"a checkpoint could not be written: {type(error).__name__}: {error}") from error

    def _run(self, write: Write) -> None:
        try:
            write()
        except BaseException as error:  # told by wait(); a thread that raises ends nobody
            self._error = error

    def __deepcopy__(self, memo: object) -> BackgroundWriter:
        """A copy of a trainer writes its own."""
        return BackgroundWriter()

    def __reduce__(self) -> tuple[type[BackgroundWriter], tuple[()]]:
        """Likewise for a pickle."""
        return BackgroundWriter, ()
