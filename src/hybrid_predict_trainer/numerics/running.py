"""Running moments, a baseline that outliers do not move, the slope of points."""

from __future__ import annotations

import math
from collections.abc import Reversible
from dataclasses import dataclass
from itertools import islice

import numpy as np

from ..records import StateDict
from .tail import Array, running_sum


@dataclass(slots=True)
class RunningMoments:
    """Exponential mean and variance with the start-up bias taken out (as Adam does)."""

    decay: float
    count: int = 0
    _mean: float = 0.0
    _square: float = 0.0

    def push(self, value: float) -> None:
        """Add one finite value."""
        self.count += 1
        self._mean = self.decay * self._mean + (1 - self.decay) * value
        self._square = self.decay * self._square + (1 - self.decay) * value * value

    @property
    def mean(self) -> float:
        """Mean; NaN before the first value."""
        return self._mean / (1 - self.decay**self.count) if self.count else math.nan

    @property
    def std(self) -> float:
        """Standard deviation; 0 for a constant."""
        if not self.count:
            return math.nan
        mean = self.mean
        return math.sqrt(max(0.0, self._square / (1 - self.decay**self.count) - mean * mean))

    def state_dict(self) -> StateDict:
        """Plain numbers."""
        return {"decay": self.decay, "count": self.count, "mean": self._mean, "square": self._square}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.decay, self.count = state["decay"], state["count"]
        self._mean, self._square = state["mean"], state["square"]


@dataclass(slots=True)
class Baseline:
    """Mean, spread and range of a quantity over warm-up (Welford's update)."""

    count: int = 0
    mean: float = 0.0
    _m2: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    def push(self, value: float) -> None:
        """Add one finite value."""
        self.count += 1
        delta = value - self.mean
        self.mean += delta / self.count
        self._m2 += delta * (value - self.mean)
        self.low, self.high = min(self.low, value), max(self.high, value)

    @property
    def std(self) -> float:
        """Sample standard deviation, 0 below two values."""
        return math.sqrt(self._m2 / (self.count - 1)) if self.count > 1 else 0.0

    def state_dict(self) -> StateDict:
        """Plain numbers."""
        return {"count": self.count, "mean": self.mean, "m2": self._m2, "low": self.low, "high": self.high}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.count, self.mean, self._m2 = state["count"], state["mean"], state["m2"]
        self.low, self.high = state["low"], state["high"]


def newest(values: Reversible[float], num: int) -> list[float]:
    """The last ``num`` of a sequence, oldest first; a copy of all that a deque holds reads all its numbers."""
    found = list(islice(reversed(values), num))
    found.reverse()
    return found


def slope(xs: Array, ys: Array) -> float:
    """Least-squares slope of the points with coordinates (n,) each, 0 below two distinct x.

    Points whose y is not finite are left out.
    """
    finite = np.isfinite(ys)
    if not finite.all():
        xs, ys = xs[finite], ys[finite]
    n = len(xs)
    if n < 2:
        return 0.0
    away = xs - running_sum(xs) / n
    spread = running_sum(away * away)
    return running_sum(away * (ys - running_sum(ys) / n)) / spread if spread else 0.0
