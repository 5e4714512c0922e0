"""Intervals over seeds that hold what they promise.

Every figure of a benchmark is a mean over a handful of seeds.  Its interval is Student's t interval of the values, or
of their logarithms where they are ratios, times or losses (the mean is geometric then).  For normal values it holds
its level at every number of seeds; a percentile bootstrap at 95 % holds 51 % over 2 seeds, 74 % over 3, 84 % over 5.
Beside it stands the bootstrap-t (Efron & Tibshirani, An Introduction to the Bootstrap, section 12.5), which needs no
normality but more seeds: it resamples Student's statistic instead of the mean.  Quantiles and tests are scipy's; the
bootstrap-t is written here because ``scipy.stats.bootstrap`` has percentile, basic and BCa intervals only.

A seed whose value is only bounded ("at least 16": no plain budget was long enough) counts at its bound.  The mean of
values cut off at a bound lies below the true mean, so the lower end stays a lower end; there is no upper one.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ..numerics.sequential import mean_interval

Bound = Literal["exact", "at least", "at most"]

#: Words for tables and result files.
METHOD = "t interval of logarithms over seeds"

#: Fewest seeds of a paired test: two that agree by chance have an interval of no width.
MIN_PAIRED = 3

NUM_RESAMPLES = 10_000
#: Below this many values the bootstrap-t has too few resamples: of normal values it holds 81 % over 3, 95 % over 4.
MIN_BOOTSTRAP = 4
#: Up to this many values every resample is taken, 3,125 at most, instead of random ones.
ALL_RESAMPLES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean and its two-sided confidence interval.

    Attributes:
        mean: of the values, geometric where the interval is of logarithms; NaN where it is not known.
        low: lower end; None where there is none.
        high: upper end; None where there is none.
        bootstrap_t: ends of the bootstrap-t interval; None below :data:`MIN_BOOTSTRAP` values or where ``low`` or
            ``high`` is None.
        level: of both intervals, the share of such intervals that contain the true mean.
        n: number of values.
        note: why an end is missing or the interval has no width; empty otherwise.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    bootstrap_t: tuple[float, float] | None = None
    level: float = 0.95
    n: int
    note: str = ""

    @property
    def ends(self) -> tuple[float | None, float | None] | None:
        """Both ends, an open one as None; None if both are missing."""
        return None if self.low is None and self.high is None else (self.low, self.high)

    def mapped(self, change: Callable[[float], float]) -> Interval:
        """The interval under a function that rises, ``exp`` of an interval of logarithms say."""
        return replace(
            self,
            mean=change(self.mean),
            low=None if self.low is None else change(self.low),
            high=None if self.high is None else change(self.high),
            bootstrap_t=None
            if self.bootstrap_t is None
            else (change(self.bootstrap_t[0]), change(self.bootstrap_t[1])),
        )


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's t interval of a mean, ``mean ± t * s / sqrt(n)`` with n - 1 degrees of freedom.

    Args:
        values: One per seed, independent.
        level: Two-sided.  A one-sided limit of 95 % is an end of the interval at 0.90.

    Returns:
        Without ends for fewer than two values or where one is not finite; of no width where all are equal.  The note
        says so.

    Raises:
        ValueError: the level is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level {level} must lie between 0 and 1")
    data = np.asarray(values, dtype=np.float64)
    count = len(data)
    if count == 0:
        return Interval(mean=math.nan, level=level, n=0, note="no value")
    if not np.isfinite(data).all():
        return Interval(mean=math.nan, level=level, n=count, note="a value is not finite")
    if count == 1:
        return Interval(mean=float(data[0]), level=level, n=1, note="one seed has no confidence interval")
    center, spread = _moments(data)
    if spread == 0.0:
        note = "the seeds do not differ, so the interval has no width"
        return Interval(mean=center, low=center, high=center, level=level, n=count, note=note)
    half = t_quantile((1 - level) / 2, count - 1) * spread / math.sqrt(count)
    return Interval(
        mean=center, low=center - half, high=center + half, bootstrap_t=bootstrap_t(data, level), level=level, n=count
    )


def log_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Geometric mean and the t interval of the logarithms, as factors; no ends where a value is not above 0."""
    if not all(0 < v < math.inf for v in values):
        return Interval(mean=math.nan, level=level, n=len(values), note="a value is not finite and above 0")
    return t_interval([math.log(v) for v in values], level).mapped(_exp)


def paired_interval(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Interval:
    """Geometric mean of ``a / b`` over pairs, and the t interval of the paired logarithms.

    Args:
        a: Losses, times or costs, one per seed.
        b: Those of the other arm, in the same order of seeds.
        level: Two-sided; see :func:`t_interval`.

    Raises:
        ValueError: not equally many.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values cannot be paired with {len(b)}")
    if not all(0 < v < math.inf for v in (*a, *b)):
        return Interval(mean=math.nan, level=level, n=len(a), note="a value is not finite and above 0")
    logs = [math.log(x) - math.log(y) for x, y in zip(a, b, strict=True)]
    return t_interval(logs, level).mapped(_exp)


def bounded_interval(values: Sequence[float], bounds: Sequence[Bound], level: float = 0.95) -> Interval:
    """:func:`log_interval` where some values are only bounds, and are counted at the bound.

    An end is given only where cutting off cannot have moved it inwards: the lower one where values are "at least",
    the upper one where they are "at most", none where both occur or every value is a bound (their spread is that of
    the bounds).
    """
    found = log_interval(values, level)
    kinds = set(bounds) - {"exact"}
    if not kinds or found.ends is None:
        return found
    found = replace(found, bootstrap_t=None)
    if len(kinds) == 2:
        return replace(found, low=None, high=None, note="bounded on both sides: no confidence interval")
    (kind,) = kinds
    if "exact" not in bounds:
        return replace(found, low=None, high=None, note="all seeds stand at the bound: no confidence interval")
    if kind == "at least":
        return replace(found, high=None, note="seeds at the bound: no upper end")
    return replace(found, low=None, note="seeds at the bound: no lower end")


def gap_interval(pairs: Sequence[tuple[float, float]], level: float = 0.95) -> Interval:
    """By how many percent the second loss of a pair is above the first: :func:`paired_interval` of their ratio.

    Where a loss is not above 0 it is the plain mean and t interval of the percentages.

    Args:
        pairs: (baseline, other) final losses of a seed.
        level: Two-sided.
    """
    if all(loss > 0 for pair in pairs for loss in pair):
        found = paired_interval([b for _, b in pairs], [a for a, _ in pairs], level)
        return found.mapped(lambda ratio: 100 * (ratio - 1))
    return t_interval([100 * (b - a) / abs(a) if a else math.nan for a, b in pairs], level)


def ends_words(ends: Sequence[float | None] | None, form: str = ".3g") -> str:
    """``[1.1, 1.3]``; ``[1.1, ∞)`` and ``(0, 1.3]`` where an end of a ratio is open; empty where both are."""
    low, high = ends if ends is not None and len(ends) == 2 else (None, None)
    if low is None and high is None:
        return ""
    left = "(0" if low is None else f"[{low:{form}}"
    return f"{left}, " + ("\N{INFINITY})" if high is None else f"{high:{form}}]")


def bootstrap_t(values: Sequence[float] | np.ndarray, level: float = 0.95, seed: int = 0) -> tuple[float, float] | None:
    """Bootstrap-t interval of a mean: ``mean - t*(high) s / sqrt(n)`` to ``mean - t*(low) s / sqrt(n)``.

    Args:
        values: One per seed.
        level: Two-sided.
        seed: Of the resampling, so that a table can be reproduced; unused up to :data:`ALL_RESAMPLES` values.

    Returns:
        None below :data:`MIN_BOOTSTRAP` values, or where they do not differ.
    """
    data = np.asarray(values, dtype=np.float64)
    count = len(data)
    if count < MIN_BOOTSTRAP:
        return None
    center, spread = _moments(data)
    if spread == 0.0 or not math.isfinite(spread):
        return None
    with np.errstate(over="ignore"):
        scaled = (data - center) / spread
    if not np.isfinite(scaled).all():  # values at either end of what a float holds
        scaled = data / spread - center / spread
    if count <= ALL_RESAMPLES:
        picks = np.array(list(itertools.product(range(count), repeat=count)))
    else:
        picks = np.random.default_rng(seed).integers(count, size=(NUM_RESAMPLES, count))
    samples = scaled[picks]
    spreads = samples.std(axis=1, ddof=1)
    able = spreads > 1e-12  # a resample of one value only has no statistic
    statistic = samples[able].mean(axis=1) / (spreads[able] / math.sqrt(count))
    low, high = np.quantile(statistic, ((1 - level) / 2, (1 + level) / 2))
    step = spread / math.sqrt(count)
    return float(center - high * step), float(center - low * step)


def t_quantile(level: float, freedom: int) -> float:
    """Upper one-sided quantile of Student's t (``scipy.stats.t.isf``).

    Args:
        level: Probability above the quantile, between 0 and 0.5.
        freedom: Degrees of freedom, at least 1.
    """
    from scipy import stats  # importing it takes a second, which a run without a table need not wait for

    return float(stats.t.isf(level, freedom))


def paired_t(differences: Sequence[float]) -> float | None:
    """Student's t of paired differences; None below two, or if they do not differ."""
    if len(differences) < 2 or np.ptp(differences) == 0:
        return None
    from scipy import stats

    return float(stats.ttest_1samp(differences, 0.0).statistic)


def significant(differences: Sequence[float], level: float = 0.05) -> bool | None:
    """Whether the mean of paired differences is not zero, two-sided; None where :func:`paired_t` is."""
    t = paired_t(differences)
    return None if t is None else abs(t) > t_quantile(level / 2, len(differences) - 1)


def paired_p(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Two-sided p of the paired t test over seeds; None below :data:`MIN_PAIRED` seeds or for a diverged run.

    Of the logarithms where all losses are positive, because means over seeds are geometric then: losses of one task
    may differ by a factor of ten between seeds.

    Args:
        pairs: (plain, arm) final losses of a seed.
    """
    flat = [v for pair in pairs for v in pair]
    if len(pairs) < MIN_PAIRED or not all(map(math.isfinite, flat)):
        return None
    change = [math.log(b) - math.log(a) if min(flat) > 0 else b - a for a, b in pairs]
    if all(d == 0 for d in change):
        return 1.0  # the test itself would divide nothing by nothing
    from scipy import stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # equal differences have no spread: p is then 0, rightly
        return float(stats.ttest_1samp(change, 0.0).pvalue)


def _moments(data: np.ndarray) -> tuple[float, float]:
    """Mean and sample standard deviation, without the rounding that gives equal values a spread."""
    if (data == data[0]).all():
        return float(data[0]), 0.0
    size = float(np.abs(data).max())  # sums and squares of huge or tiny values leave the range of floats
    return size * float(np.mean(data / size)), size * float(np.std(data / size, ddof=1))


def _exp(value: float) -> float:
    """``exp`` that ends in infinity instead of raising."""
    return math.exp(value) if value < 709 else math.inf


# ---- tests over seeds ------------------------------------------------------------------------------------

#: Fewest values of an interval by resampling with bias and acceleration.
MIN_BCA = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedTests:
    """Tests that the other arm does not differ from the baseline, two-sided, over paired seeds.

    Attributes:
        n: pairs.
        t: p of the paired t test.
        wilcoxon: p of the signed-rank test.
        permutation: p over all exchanges of sign.
        least: the smallest p that n pairs can have in the last two, 2 / 2^n: 0.25 of three.
    """

    n: int
    t: float | None
    wilcoxon: float | None
    permutation: float | None
    least: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Equivalence:
    """Whether two arms are equal within a margin.

    Attributes:
        margin: as a share of the baseline.
        p: of the hypothesis that they differ by the margin or more; None where it has none.
        interval: of the ratio, at 1 - 2 alpha: inside the margin exactly where p < alpha.
        equal: p < alpha.
    """

    margin: float
    p: float | None
    interval: Interval
    equal: bool


def paired_tests(pairs: Sequence[tuple[float, float]]) -> PairedTests:
    """All three tests of :class:`PairedTests`, of logarithms where every loss is above 0.

    Args:
        pairs: (baseline, other) of a seed.
    """
    change = paired_changes(pairs)
    count = len(change)
    return PairedTests(
        n=count, t=paired_p(pairs), wilcoxon=wilcoxon_p(change), permutation=permutation_p(change),
        least=min(1.0, 2.0 ** (1 - count)),
    )  # fmt: skip


def paired_changes(pairs: Sequence[tuple[float, float]]) -> list[float]:
    """ln(other / baseline) of every pair where all are above 0, else other - baseline."""
    logs = all(v > 0 for pair in pairs for v in pair)
    return [math.log(b) - math.log(a) if logs else b - a for a, b in pairs]


def wilcoxon_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of the signed-rank test (Wilcoxon, Biometrics Bulletin 1, 1945), exact for few pairs.

    Args:
        differences: One per seed; zeros are left out.

    Returns:
        None below :data:`MIN_PAIRED` pairs or where a difference is not finite; 1 where all are 0.
    """
    if len(differences) < MIN_PAIRED or not all(map(math.isfinite, differences)):
        return None
    kept = [d for d in differences if d != 0]
    if not kept:
        return 1.0
    from scipy import stats

    return float(stats.wilcoxon(kept).pvalue)


def permutation_p(differences: Sequence[float], seed: int = 0) -> float | None:
    """Two-sided p of the mean under exchange of the arms within pairs: all 2^n exchanges, or random ones of many.

    It needs no distribution, only that the arms could be exchanged if there were no effect (Fisher, 1935).

    Args:
        differences: One per seed.
        seed: Of the random exchanges, beyond 13 pairs.
    """
    if len(differences) < MIN_PAIRED or not all(map(math.isfinite, differences)):
        return None
    data = np.asarray(differences, dtype=np.float64)
    if not data.any():
        return 1.0
    from scipy import stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = stats.permutation_test(
            (data,), np.mean, permutation_type="samples", n_resamples=NUM_RESAMPLES, rng=np.random.default_rng(seed)
        )
    return float(found.pvalue)


def bca_interval(values: Sequence[float], level: float = 0.95, seed: int = 0) -> tuple[float, float] | None:
    """Interval of a mean by the bootstrap with bias correction and acceleration (Efron, JASA 82, 1987).

    Args:
        values: One per seed.
        level: Two-sided.
        seed: Of the resampling.

    Returns:
        None below :data:`MIN_BCA` values, or where they do not differ or one is not finite.
    """
    data = np.asarray(values, dtype=np.float64)
    if len(data) < MIN_BCA or not np.isfinite(data).all() or np.ptp(data) == 0:
        return None
    from scipy import stats

    found = stats.bootstrap(
        (data,), np.mean, confidence_level=level, method="BCa", rng=np.random.default_rng(seed)
    ).confidence_interval
    return float(found.low), float(found.high)


def bonferroni(p: Sequence[float]) -> list[float]:
    """Every p times the number of tests, at most 1."""
    return [min(1.0, len(p) * value) for value in p]


def holm(p: Sequence[float]) -> list[float]:
    """Step-down adjusted p values (Holm, Scand. J. Statist. 6, 1979): never above Bonferroni's, as safe."""
    found = [1.0] * len(p)
    running = 0.0
    for rank, at in enumerate(sorted(range(len(p)), key=lambda k: p[k])):
        running = max(running, min(1.0, (len(p) - rank) * p[at]))
        found[at] = running
    return found


def equivalent(pairs: Sequence[tuple[float, float]], margin: float, alpha: float = 0.05) -> Equivalence:
    """Two one-sided t tests of paired logarithms (TOST; Schuirmann, J. Pharmacokin. Biopharm. 15, 1987).

    A claim "within 2 %" needs this test: that a difference is not significant says only that there are few seeds.

    Args:
        pairs: (baseline, other) losses of a seed, above 0.
        margin: Above 0: other / baseline must lie between 1 / (1 + margin) and 1 + margin.
        alpha: Level of each of the two tests.

    Raises:
        ValueError: the margin is not above 0.
    """
    if not margin > 0:
        raise ValueError(f"a margin of {margin} leaves no room to be equal in")
    interval = paired_interval([b for _, b in pairs], [a for a, _ in pairs], 1 - 2 * alpha)
    if interval.ends is None or not math.isfinite(interval.mean):
        return Equivalence(margin=margin, p=None, interval=interval, equal=False)
    change = np.array(paired_changes(pairs))
    bound = math.log1p(margin)
    center, spread = _moments(change)
    if spread == 0.0:
        p = 0.0 if abs(center) < bound else 1.0
    else:
        from scipy import stats

        error = spread / math.sqrt(len(change))
        p = max(float(stats.t.sf((side * center + bound) / error, len(change) - 1)) for side in (1, -1))
    return Equivalence(margin=margin, p=p, interval=interval, equal=p < alpha)


def always_valid(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Interval of a mean that holds its level however often somebody looks while values arrive, and stops at will.

    ``numerics.sequential.mean_interval`` has the derivation; it is wider than a t interval for it.

    Returns:
        None where it is unbounded yet: below three values or so.
    """
    found = mean_interval(list(values), 1 - level)
    return (found.low, found.high) if math.isfinite(found.low) and math.isfinite(found.high) else None
