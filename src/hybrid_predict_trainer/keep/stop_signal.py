"""SIGTERM, SIGINT and SIGHUP end a run between two steps."""

from __future__ import annotations

import contextlib
import signal
from types import FrameType
from typing import Any


class StopSignal:
    """The first SIGINT, SIGTERM or SIGHUP asks for an end after the current step, the second ends the process.

    A hang-up that is ignored stays ignored: that is what ``nohup`` asks for.
    """

    def __init__(self) -> None:
        """Nothing has been asked yet."""
        self.number = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        """Listen, where this is the main thread."""
        with contextlib.suppress(ValueError):
            for number in self._numbers():
                self._previous[number] = signal.signal(number, self._note)
        return self

    @staticmethod
    def _numbers() -> list[int]:
        hang_up = getattr(signal, "SIGHUP", None)  # not everywhere
        heeded = hang_up is not None and signal.getsignal(hang_up) is not signal.SIG_IGN
        return [signal.SIGINT, signal.SIGTERM, *([hang_up] if hang_up is not None and heeded else [])]

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
