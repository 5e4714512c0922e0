"""Tests that may be looked at after every observation and still err no more often than they say.

A t test that is repeated at every check finds something sooner or later, whatever the truth.  What is used here instead
is an e-process: a non-negative quantity that is 1 on the mean for ever while the null hypothesis holds, so that it ever
reaches 1 / alpha with probability alpha at most (Ville's inequality).  For the mean of normal observations of unknown
spread it has a closed form, a Bayes factor with the right Haar prior on the spread and a normal prior on the effect
mean / spread (Lai 1976; Gronau, Ly & Wagenmakers, arXiv 1704.02479; Wang & Ramdas, arXiv 2310.03722): with the t
statistic t on nu degrees of freedom from n observations and w = g / (n + g),

    E_n = sqrt(w) ((1 + t^2 / nu) / (1 + w t^2 / nu))^((nu + 1) / 2),

and a confidence sequence is the set of means that it has not refuted.  Two samples are the same with
n = n_1 n_2 / (n_1 + n_2) and the pooled spread.

Letters: ``alpha`` level, ``n`` observations, ``nu`` degrees of freedom, ``g`` precision of the prior on the effect:
1, an effect of about one standard deviation is expected.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

#: Precision of the prior on mean / spread.
PRECISION = 1.0


def log_evidence(t: float, num: float, freedom: float, precision: float = PRECISION) -> float:
    """log E_n against a mean of zero; 0 without a degree of freedom.

    Args:
        t: The t statistic; infinite where the spread is zero.
        num: n, of two samples n_1 n_2 / (n_1 + n_2).
        freedom: nu.
        precision: g.
    """
    if freedom < 1 or num <= 0 or math.isnan(t):
        return 0.0
    w = precision / (num + precision)
    x = t * t / freedom
    ratio = 1 / w if math.isinf(x) else (1 + x) / (1 + w * x)
    return 0.5 * math.log(w) + 0.5 * (freedom + 1) * math.log(ratio)


def half_width(num: float, freedom: float, spread: float, alpha: float, precision: float = PRECISION) -> float:
    """Half the width of the always-valid confidence interval of a mean; infinite while nothing can be refuted.

    Args:
        num: n, of two samples n_1 n_2 / (n_1 + n_2).
        freedom: nu.
        spread: Standard deviation, of two samples the pooled one.
        alpha: The true mean lies outside at any time with this probability at most.
        precision: g.
    """
    if freedom < 1 or num <= 0:
        return math.inf
    w = precision / (num + precision)
    ratio = math.exp(-2 * (math.log(alpha) + 0.5 * math.log(w)) / (freedom + 1))  # (1 + x) / (1 + w x) at the bound
    if w * ratio >= 1:
        return math.inf
    return spread * math.sqrt(freedom * (ratio - 1) / (1 - w * ratio) / num)


@dataclass(slots=True)
class Moments:
    """Number, mean and variance of a sample of any length (Welford's update)."""

    num: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of the squared distances from the mean

    def push(self, values: Iterable[float]) -> None:
        """Add values."""
        for value in values:
            self.num += 1
            delta = value - self.mean
            self.mean += delta / self.num
            self.squares += delta * (value - self.mean)

    @property
    def variance(self) -> float:
        """Sample variance of at least two values."""
        return self.squares / (self.num - 1)


@dataclass(frozen=True, slots=True)
class MeanInterval:
    """A mean, its always-valid interval and the spread of one observation."""

    mean: float
    half_width: float
    spread: float

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.half_width


def mean_interval(values: Iterable[float] | Moments, alpha: float, precision: float = PRECISION) -> MeanInterval:
    """Always-valid interval of the mean of what was seen so far; all reals below two values.

    Args:
        values: Every observation since the test began, or their moments: dropping some afterwards voids the level.
        alpha: Level, two-sided.
        precision: g.
    """
    moments = values if isinstance(values, Moments) else Moments()
    if not isinstance(values, Moments):
        moments.push(values)
    n = moments.num
    if n < 2:
        return MeanInterval(moments.mean if n else math.nan, math.inf, math.nan)
    spread = math.sqrt(moments.variance)
    return MeanInterval(moments.mean, half_width(n, n - 1, spread, alpha, precision), spread)


def difference_interval(a: Collection[float], b: Collection[float], alpha: float) -> MeanInterval:
    """Always-valid interval of mean(a) - mean(b), observations of one spread arriving in any order.

    Args:
        a: One sample, two values at least, or the interval is all reals.
        b: The other.
        alpha: Level, two-sided.
    """
    if len(a) < 2 or len(b) < 2:
        return MeanInterval(math.nan, math.inf, math.nan)
    freedom = len(a) + len(b) - 2
    spread = math.sqrt(((len(a) - 1) * variance(a) + (len(b) - 1) * variance(b)) / freedom)
    num = len(a) * len(b) / (len(a) + len(b))
    return MeanInterval(mean(a) - mean(b), half_width(num, freedom, spread, alpha), spread)


def spent(alpha: float, k: int) -> float:
    """Level of the k-th of any number of tests, k = 1, 2, ..., that together err with probability ``alpha`` at most."""
    return alpha / (k * (k + 1))


def mean(values: Collection[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def variance(values: Collection[float]) -> float:
    """Sample variance of at least two values."""
    m = mean(values)
    return sum((v - m) * (v - m) for v in values) / (len(values) - 1)  # a power of a large number would raise
