"""How often a learned predictor trains: every k-th window, so that it stays within a share of the run's time.

    k = the smallest power of two with  update / k <= budget * window

from the medians of the first few times measured.  It is chosen once and is part of the state: a run
that followed the clock all along could not be resumed bit for bit.  A power of two, because two runs
on the same machine then mostly agree.  Who never says how long windows take (an offline replay) has
no budget and trains at every window.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from ..records import StateDict

#: Times of each kind whose median is taken: the first update allocates, a first window may compile.
NUM_MEASURED = 3
#: No run has so many windows: training is as good as off.
MAX_INTERVAL = 2**20


@runtime_checkable
class Paced(Protocol):
    """A predictor that trains, and can keep to a share of the run's time."""

    @property
    def update_every(self) -> int:
        """Windows between two updates."""

    def pace(self, window_seconds: float) -> None:
        """Hear, before the window is observed, how long its real steps took.

        Args:
            window_seconds: Wall time; not finite if it was not measured.
        """


def update_interval(update_seconds: float, window_seconds: float, budget: float) -> int:
    """k, a power of two of at least 1.

    Args:
        update_seconds: What one training costs.
        window_seconds: What the real steps of a window take.
        budget: Largest share of the real steps' time, > 0.
    """
    allowed = budget * window_seconds
    if update_seconds <= allowed:
        return 1
    if not allowed * MAX_INTERVAL > update_seconds:
        return MAX_INTERVAL
    return 1 << math.ceil(math.log2(update_seconds / allowed))


class Pace:
    """:func:`update_interval` with the measurements it needs."""

    def __init__(self, budget: float, clock: Callable[[], float] = time.perf_counter) -> None:
        """Args: budget: share of the real steps' time, 0 for no bound.  clock: seconds."""
        self.budget, self.clock = budget, clock
        self.update_every = 1
        self.settled = budget == 0
        self._windows: deque[float] = deque(maxlen=NUM_MEASURED)
        self._updates: deque[float] = deque(maxlen=NUM_MEASURED)

    def on_window(self, seconds: float) -> None:
        """Real steps of a window took so long."""
        if not self.settled and math.isfinite(seconds) and seconds > 0:
            self._windows.append(seconds)

    def due(self, index: int) -> bool:
        """Whether to train at window number ``index``."""
        return index % self.update_every == 0

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Around the training of one window."""
        if self.settled:
            yield
            return
        began = self.clock()
        yield
        if self._windows:  # else nobody paces us
            self._updates.append(self.clock() - began)
        if len(self._windows) == len(self._updates) == NUM_MEASURED:
            update, window = statistics.median(self._updates), statistics.median(self._windows)
            self.update_every = update_interval(update, window, self.budget)
            self.settled = True
            self._windows.clear()
            self._updates.clear()

    def state_dict(self) -> StateDict:
        """The interval, or what was measured for it so far."""
        return {
            "update_every": self.update_every, "settled": self.settled,
            "windows": list(self._windows), "updates": list(self._updates),
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`; without a bound there is nothing to take over."""
        if self.budget == 0:
            return
        self.update_every, self.settled = state["update_every"], state["settled"]
        self._windows = deque(state["windows"], maxlen=NUM_MEASURED)
        self._updates = deque(state["updates"], maxlen=NUM_MEASURED)
