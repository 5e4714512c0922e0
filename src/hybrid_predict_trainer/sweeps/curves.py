"""A trial as a forecast sees it: what it reported, its learning rates, its parameters; lower is better."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..records import ConfigError

Array = NDArray[np.float64]

#: Shares of a run at which it is looked at.  Equal steps of the logarithm: a run tells as much in each.
LOOKS = (0.06, 0.09, 0.13, 0.19, 0.27, 0.38, 0.53, 0.73, 1.0)
#: A look may come this much late (in shares of the run) and still count as on time.
LATE = 0.002
#: A slope is fitted over the reports since this share of the step it is asked for.
SLOPE_SINCE = 0.5
#: A level is the end of a line through the reports since this share of it: single reports are noisy.
LEVEL_SINCE = 0.8
#: Where there are not two, the last two will do if the earlier one is at least this share of it.
SLOPE_SINCE_AT_MOST = 1 / 3
#: A value between two reports is taken from the line between them if neither is further off than this ratio.
NEAR = 0.7
#: Power of the rate whose drop lowers the loss (``forecast.law``, learnt on published curves).
RATE_POWER = 0.75
#: Values beyond this, and below its inverse, have squares that are no numbers, or 0.
HUGE = 1e100


def checked_rates(key: int, rates: Array) -> Array:
    """The learning rate of every step of a trial, (T,).

    Raises:
        ConfigError: no rate, none above 0, or one that is negative or no number.
    """
    rate = np.asarray(rates, dtype=np.float64)
    if rate.ndim != 1 or not rate.size or not np.isfinite(rate).all() or (rate < 0).any() or rate.max() <= 0:
        raise ConfigError(
            f"trial {key}: its schedule must give a rate of at least 0 for every step, one of them above 0"
        )
    return rate


@dataclass(frozen=True, slots=True)
class Stand:
    """A trial at a look.

    Attributes:
        level: value there.
        slope: d value / d ln(progress).
        noise, level_noise, slope_noise: standard deviations of single reports, and of the two.
    """

    level: float
    slope: float
    noise: float
    level_noise: float
    slope_noise: float


@dataclass(frozen=True)
class TrialCurve:
    """One trial.

    Attributes:
        key: that it is known by: its number.
        steps: (n,) at which it reported, rising.
        values: (n,) reported, on a scale on which lower is better (see :class:`Scale`).
        total_steps: T, of its plan.
        progress: (T + 1,) summed rate after each step over the largest, 0 before the first.
        factor: (T,) rate of each step over the largest.
        peak: the largest rate.
        params: its values by name.
        complete: it has come to its end; its last value is its final one.
        first: the first step that says something: after warm-up and start.
        looks: shares of a run at which it is looked at, rising, the last is 1; the same for all that are compared.
    """

    key: int
    steps: Array
    values: Array
    total_steps: int
    progress: Array
    factor: Array
    peak: float
    params: Mapping[str, Any] = field(default_factory=dict)
    complete: bool = False
    first: float = 0.0
    looks: tuple[float, ...] = LOOKS

    @staticmethod
    def of(
        key: int, reports: Sequence[tuple[float, float]], rates: Array, *, params: Mapping[str, Any] | None = None,
        complete: bool = False, looks: tuple[float, ...] = LOOKS,
    ) -> TrialCurve:  # fmt: skip
        """Check and sort.

        Args:
            key: Its number.
            reports: (step, value); of two at one step the last counts, one that is no number is left out.
            rates: (T,) learning rate of every step.
            params: Its values by name.
            complete: Whether it has ended.
            looks: Shares of a run at which it is looked at.

        Raises:
            ConfigError: no rate, none above 0, or one that is negative or no number.
        """
        rate = checked_rates(key, rates)
        last = {float(step): float(value) for step, value in reports if math.isfinite(value) and step >= 0}
        steps = np.array(sorted(last), dtype=np.float64)
        factor = rate / rate.max()
        warmup = int(np.argmax(factor >= 0.999)) + 1
        return TrialCurve(
            key=key, steps=steps, values=np.array([last[s] for s in steps]), total_steps=len(rate),
            progress=np.concatenate([[0.0], np.cumsum(factor)]), factor=factor, peak=float(rate.max()),
            params=dict(params or {}), complete=complete, first=1.5 * warmup if warmup > 1 else 0.0,
            looks=looks,
        )  # fmt: skip

    @property
    def last_step(self) -> float:
        """Of its reports; 0 before the first."""
        return float(self.steps[-1]) if len(self.steps) else 0.0

    def progress_at(self, step: float) -> float:
        """Summed rate over the largest, at least that of a first step."""
        whole = min(int(step), self.total_steps - 1)
        found = self.progress[whole] + (min(step, self.total_steps) - whole) * (
            self.progress[whole + 1] - self.progress[whole]
        )
        return max(float(found), float(self.progress[1]), 1e-9)

    @property
    def share(self) -> float:
        """Of the run that is behind the last report."""
        return self.last_step / self.total_steps

    @functools.cached_property
    def _log_progress(self) -> Array:
        """At the reports, (n,)."""
        found = np.interp(self.steps, np.arange(len(self.progress)), self.progress)
        logs: Array = np.log(np.maximum(found, max(float(self.progress[1]), 1e-9)))
        return logs

    @property
    def standing(self) -> int | None:
        """Index of the look that it was at last; None where its reports do not say enough for that very one."""
        last = max((k for k, look in enumerate(self.looks) if look <= self.share + LATE), default=-1)
        return last if last in self.stands else None

    @functools.cached_property
    def stands(self) -> dict[int, Stand]:
        """Index of a look -> where it stands, for those that its reports say enough for; not in its warm-up."""
        found = {}
        for k, look in enumerate(self.looks[:-1]):
            step = look * self.total_steps
            if look <= self.share + LATE and step >= self.first:
                level, slope = self.level(step), self.slope(step)
                if level is not None and slope is not None:
                    found[k] = Stand(level, slope, *self._noise(step))
        if self.complete and len(self.values):
            found[len(self.looks) - 1] = Stand(float(self.values[-1]), 0.0, 0.0, 0.0, 0.0)
        return found

    @functools.cached_property
    def levels(self) -> tuple[tuple[float, float, float, float], ...]:
        """What its reports say of each look after the warm-up, the end left out.

        Logarithm of the share of the run, rate over the largest to the law's power, level, the level's scatter.
        """
        found = []
        for look in self.looks[:-1]:
            step = look * self.total_steps
            if look <= self.share + LATE and step >= self.first:
                level = self.level(step)
                if level is not None:
                    found.append((math.log(look), self.power_at(step), level, self.scatter(step)))
        return tuple(found)

    def power_at(self, step: float) -> float:
        """Rate over the largest to the power whose drop lowers the loss; after the last step that of the last."""
        at = min(max(math.ceil(step), 1), self.total_steps) - 1
        return float(self.factor[at] ** RATE_POWER)

    def level(self, step: float) -> float | None:
        """Value at a step: the line through the reports since four fifths of it; None where the nearest are far off.

        At the end of a complete trial it is the last report itself: what the search is judged by.
        """
        if not len(self.steps):
            return None
        if self.complete and step >= self.total_steps:
            return float(self.values[-1])
        start, upto = self._rows(LEVEL_SINCE * step, step)
        if upto - start >= 2:
            return self._line(step, start, upto)[0]
        low, high = max(upto - 1, 0), min(upto, len(self.steps) - 1)
        if self.steps[low] < NEAR * step or self.steps[high] * NEAR > step:
            near = abs(self.steps[low] - step) <= (1 - LEVEL_SINCE) * step
            slope = self.slope(step) if near else None
            if slope is None:
                return None
            return float(self.values[low]) + slope * math.log(
                self.progress_at(step) / self.progress_at(self.steps[low])
            )
        return float(np.interp(step, self.steps, self.values))

    def slope(self, step: float) -> float | None:
        """d value / d ln(progress) at a step, from the reports since half of it, or the last two; None without two."""
        start, upto = self._rows(SLOPE_SINCE * step, step)
        if upto - start < 2:
            start = upto - 2
            if start < 0 or self.steps[start] < max(SLOPE_SINCE_AT_MOST * step, self.first):
                return None
        return self._line(step, start, upto)[1]

    def scatter(self, step: float) -> float:
        """Standard deviation of a level at a step, from how the reports around it scatter; 0 where fewer than three."""
        upto = int(np.searchsorted(self.steps, step + 1e-9, side="right"))
        start, since = self._rows(SLOPE_SINCE * step, step)[0], self._rows(LEVEL_SINCE * step, step)[0]
        return self._scatter(start, upto) / math.sqrt(max(upto - since, 1)) if upto - start >= 3 else 0.0

    def _scatter(self, start: int, upto: int) -> float:
        """Standard deviation of single reports, see :meth:`_noise`; at least two of them."""
        order = min(3, max(upto - start - 2, 1))
        rest = np.diff(self.values[start:upto], order)
        return math.sqrt(float(rest @ rest) / len(rest) / math.comb(2 * order, order))

    def _noise(self, step: float) -> tuple[float, float, float]:
        """Standard deviations of single reports, of the level and of the slope that are read off at a step.

        That of a report comes from third differences, which a smooth curve leaves at 0; of fewer than five reports from
        second or first ones, which take some of the curve itself for noise.
        """
        start, upto = self._rows(SLOPE_SINCE * step, step)
        start = min(start, upto - 2)
        each = self._scatter(start, upto)
        first, _ = self._rows(LEVEL_SINCE * step, step)
        near, x = self._log_progress[first:upto], self._log_progress[start:upto]
        if len(near) < 2:
            near = x[-2:]
        off = near[-1] - near.mean()
        level = math.sqrt(1 / len(near) + off**2 / max(float(((near - near.mean()) ** 2).sum()), 1e-12))
        return each, each * min(level, 1.0), each / math.sqrt(max(float(((x - x.mean()) ** 2).sum()), 1e-12))

    def _rows(self, since: float, step: float) -> tuple[int, int]:
        """Where the reports lie that were made after the warm-up, from one step to another."""
        upto = int(np.searchsorted(self.steps, step + 1e-9, side="right"))
        return min(int(np.searchsorted(self.steps, max(since, self.first))), upto), upto

    def _line(self, step: float, start: int, upto: int) -> tuple[float, float]:
        """Value at a step and slope of the least-squares line through some reports, in ln(progress)."""
        x = self._log_progress[start:upto]
        y = self.values[start:upto]
        centre = x - x.mean()
        spread = float(centre @ centre)
        slope = float(centre @ y) / spread if spread > 1e-12 else 0.0
        return float(y.mean()) + slope * (math.log(self.progress_at(step)) - float(x.mean())), slope


@dataclass(frozen=True, slots=True)
class Scale:
    """From reported values to a scale on which lower is better and differences compare, and back.

    Losses that are all above 0 are compared by their logarithms, so that a difference is a relative one; whatever is
    maximised, or may be 0 or below, by itself.

    Attributes:
        logarithmic: of the values.
        sign: -1 where more is better.
        unit: that values are counted in: 1, or the largest of them where squares would leave the range of numbers.
    """

    logarithmic: bool
    sign: float = 1.0
    unit: float = 1.0

    @staticmethod
    def of(values: Sequence[float], *, maximize: bool) -> Scale:
        """That fits the values; those that are no numbers do not count."""
        finite = [v for v in values if math.isfinite(v)]
        logarithmic = not maximize and bool(finite) and min(finite) > 0
        largest = max((abs(v) for v in finite), default=0.0)
        unit = largest if largest and not logarithmic and not 1 / HUGE < largest < HUGE else 1.0
        return Scale(logarithmic, -1.0 if maximize else 1.0, unit)

    def into(self, value: float) -> float:
        """Reported -> compared; what is no number stays none."""
        if not math.isfinite(value):
            return math.nan
        return math.log(value) if self.logarithmic else self.sign * value / self.unit

    def back(self, value: float) -> float:
        """Compared -> reported."""
        return math.exp(min(value, 700.0)) if self.logarithmic else self.sign * value * self.unit
