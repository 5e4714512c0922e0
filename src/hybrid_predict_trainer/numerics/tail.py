"""The newest numbers of a stream as arrays that are views: sums over hundreds of them are asked for at every step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Tail:
    """The last rows of numbers, at most ``capacity`` of them.

    Rows are written one behind the other into twice the room, and brought to its front when that is full.
    """

    def __init__(self, width: int, capacity: int) -> None:
        """Nothing yet.

        Args:
            width: Numbers of a row.
            capacity: Rows kept.
        """
        self.capacity = capacity
        self._room = np.empty((width, 2 * capacity))
        self._end = self._num = 0

    def __len__(self) -> int:
        """Rows kept."""
        return self._num

    def push(self, row: Sequence[float]) -> None:
        """Add a row; the oldest one goes where there are too many."""
        if self._end == self._room.shape[1]:
            kept = self._room[:, self._end - self.capacity + 1 :].copy()
            self._end = kept.shape[1]
            self._room[:, : self._end] = kept
        self._room[:, self._end] = row
        self._end += 1
        self._num = min(self._num + 1, self.capacity)

    def newest(self, num: int) -> Array:
        """(width, at most num) the last rows, oldest first; a view that the next push but one may write over."""
        return self._room[:, self._end - min(num, self._num) : self._end]

    def rows(self) -> list[list[float]]:
        """All that are kept, oldest first."""
        found: list[list[float]] = self.newest(self._num).T.tolist()
        return found

    def refill(self, rows: Iterable[Sequence[float]]) -> None:
        """These and no others."""
        self._end = self._num = 0
        for row in rows:
            self.push(row)


def running_sum(values: Array) -> float:
    """Sum of (n,) from the first to the last, as a loop adds: ``values.sum()`` adds in pairs and rounds otherwise."""
    return float(np.add.accumulate(values)[-1]) if len(values) else 0.0
