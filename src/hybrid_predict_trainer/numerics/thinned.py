"""A curve of any length in bounded memory: neighbouring points are averaged as it grows."""

from __future__ import annotations

from ..records import StateDict

#: Blocks kept; when they are full each two become one.
CAPACITY = 512
#: Numbers of a point: position, loss, learning rate.
WIDTH = 3


class ThinnedCurve:
    """Means of (position, loss, rate) over blocks of equally many points.

    Attributes:
        block: points per block.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.block = 1
        self._sums: list[float] = []  # of complete blocks, WIDTH numbers each
        self._open = [0.0] * WIDTH
        self._num_open = 0

    def push(self, position: float, loss: float, rate: float) -> None:
        """Add a point, all numbers finite."""
        for k, value in enumerate((position, loss, rate)):
            self._open[k] += value
        self._num_open += 1
        if self._num_open < self.block:
            return
        self._sums += self._open
        self._open, self._num_open = [0.0] * WIDTH, 0
        if len(self._sums) >= CAPACITY * WIDTH:
            blocks = [self._sums[i : i + WIDTH] for i in range(0, len(self._sums), WIDTH)]
            pairs = zip(blocks[::2], blocks[1::2], strict=True)
            self._sums = [a + b for first, second in pairs for a, b in zip(first, second, strict=True)]
            self.block *= 2

    def points(self) -> list[tuple[float, ...]]:
        """(position, loss, rate) of every block, the open one's last."""
        sums = [self._sums[i : i + WIDTH] for i in range(0, len(self._sums), WIDTH)]
        found = [tuple(value / self.block for value in block) for block in sums]
        if self._num_open:
            found.append(tuple(value / self._num_open for value in self._open))
        return found

    def state_dict(self) -> StateDict:
        """Plain containers."""
        return {"block": self.block, "sums": list(self._sums), "open": list(self._open), "num_open": self._num_open}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.block, self._num_open = int(state["block"]), int(state["num_open"])
        self._sums, self._open = [float(v) for v in state["sums"]], [float(v) for v in state["open"]]
