r"""Where the trials of a search will end, foretold from the parameters and from all looks at once.

`ends` carries a trial on from where it stands.  Early in a run that is worth less than what the parameters say: trials
that are near one another end near one another.  Here the value of every trial at every look is one Gaussian process,

    y_i(s) = mean(s) + f(x_i, s) + own_i(s) + u_i(s) (g_0 + g(x_i)) + noise

with x the parameters, peak rate and schedule of a trial, u its rate over the peak (to the power of the law), and mean,
f and own processes in log(s) whose correlation falls by e over a length (multi-task Gaussian process: Bonilla, Chai &
Williams, NeurIPS 2007; for curves of trials: Swersky, Snoek & Adams, arXiv 1406.3896).  So a trial may be foretold that
nobody has begun.  How long a difference between trials lasts is the question that grids answer differently: three
lengths are taken, each weighted by the probability of all that has been seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .curves import Array, TrialCurve
from .ends import End, Nearness

#: Reports that one forecast rests on at most; of more, those of the trials that came furthest and show least.
MOST_POINTS = 600
#: Times the distance of the best, or of the upper quartile, from the median, beyond which a value counts as no worse.
FAR = 5.0
#: Beyond which a report tells nothing of the mean of all: in units of the differences between trials.
WIDE, WIDE_LENGTH = 5.0, 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """Standard deviations, in units of the differences between trials, and lengths of the process.

    Chosen on the recorded grid ``gpt-source`` by how soon searches find its best.  Between the last variants of the
    process all four recorded grids decided, on other random problems (LOG.md): none of them is a clean judge.

    Attributes:
        rate, others, schedule: inverse squared lengths, of distances that are 1 across the whole range.
        mean: of what all trials share at a look.
        own: of what a trial has alone.
        fall, fall_each: of what a high rate costs, for all trials alike, and by parameters.
        noise: of single levels, beside the scatter that reports show.
        lengths: in log(share of the run), of which the data choose.
        own_length: of ``own``, as a multiple of each.
        doubt: reports that the prior of the scale counts as.
    """

    rate: float = 3.0
    others: float = 0.26
    schedule: float = 0.31
    mean: float = 2.4
    own: float = 0.2
    fall: float = 1.0
    fall_each: float = 0.9
    noise: float = 0.03
    lengths: tuple[float, ...] = (0.3, 1.0, 3.0)
    own_length: float = 1.5
    doubt: float = 4.0


def ends_jointly(
    curves: Sequence[TrialCurve], *, surface: Surface = Surface(), rate_names: Sequence[str] = ()
) -> list[End]:
    """The ends of all trials, of those that nobody has begun as well.

    Args:
        curves: Of the search.
        surface: Of the process.
        rate_names: Parameters that are about learning rate and schedule only.

    Returns:
        One for each trial; of those that are complete the end itself.  ``look`` is the share of the run that is behind
        its last level, 0 where there is none.  Before any trial has a level nothing is known.
    """
    points = _points_of(curves)
    if not len(points.value):
        return [End(math.nan, math.inf, 1.0, 0.0)] * len(curves)
    near = _alike(curves, rate_names, surface)
    asked = _ends_as_points(curves)
    found = [_from_length(points, asked, near, surface, length) for length in surface.lengths]
    weights = np.exp(np.array([f[0] for f in found]) - max(f[0] for f in found))
    weights /= weights.sum()
    mean = sum(w * f[1] for w, f in zip(weights, found, strict=True))
    second = sum(w * (f[2] + f[1] ** 2) for w, f in zip(weights, found, strict=True))
    scale = np.sqrt(np.maximum(second - mean**2, 1e-18))
    # the levels of one trial say little that is new of how ends scatter
    degrees = surface.doubt + sum(curve.complete for curve in curves)
    return [
        End(float(curve.values[-1]), 0.0, math.inf, 1.0)
        if curve.complete and len(curve.values)
        else End(float(mean[i]), float(scale[i]), degrees, math.exp(curve.levels[-1][0]) if curve.levels else 0.0)
        for i, curve in enumerate(curves)
    ]


def spread_first(curves: Sequence[TrialCurve], count: int, rate_names: Sequence[str] = ()) -> list[int]:
    """Indices of trials to begin with: each the one of which those before it say least."""
    rest = _alike(curves, rate_names, Surface())
    chosen: list[int] = []
    while len(chosen) < min(count, len(curves)):
        unsure = np.diag(rest).copy()
        unsure[chosen] = -math.inf
        at = int(unsure.argmax())
        chosen.append(at)
        rest = rest - np.outer(rest[:, at], rest[at]) / (rest[at, at] + 0.02)
    return chosen


# ---- the process ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Points:
    """(n,) trial, log(share of its run), rate over the peak to the law's power, value and its scatter."""

    trial: NDArray[np.intp]
    time: Array
    power: Array
    value: Array
    scatter: Array


def _points_of(curves: Sequence[TrialCurve]) -> _Points:
    """Every level that reports say, at the looks after the warm-up; the end of a complete trial."""
    rows: list[tuple[float, ...]] = []
    for i, curve in enumerate(curves):
        rows += [(i, *level) for level in curve.levels]
        if curve.complete and len(curve.values):
            rows.append((i, 0.0, curve.power_at(curve.total_steps), float(curve.values[-1]), 0.0))
    if len(rows) > MOST_POINTS:
        rows = sorted(rows, key=lambda row: (-row[1], row[3]))[:MOST_POINTS]
    trial, time, power, value, scatter = np.array(rows, dtype=np.float64).reshape(-1, 5).T
    for look in np.unique(time):
        value[time == look] = _calmed(value[time == look])
    return _Points(trial.astype(np.intp), time, power, value, scatter)


def _calmed(values: Array) -> Array:
    """Values at one look; one that is far above the others, as of a run that diverges, says no more than that."""
    low, middle, high = np.quantile(values, (0.0, 0.5, 0.75))
    found: Array = np.minimum(values, middle + FAR * max(middle - low, high - middle))
    return found


def _ends_as_points(curves: Sequence[TrialCurve]) -> _Points:
    count = len(curves)
    power = np.array([curve.power_at(curve.total_steps) for curve in curves])
    return _Points(np.arange(count), np.zeros(count), power, np.zeros(count), np.zeros(count))


def _alike(curves: Sequence[TrialCurve], rate_names: Sequence[str], surface: Surface) -> Array:
    """Correlation of trials by parameters, peak rate and schedule, (n, n)."""
    parts = Nearness.parts(curves, rate_names)
    found: Array = np.exp(
        -(
            surface.rate * parts.rate
            + surface.others * (parts.others + parts.length)
            + surface.schedule * parts.schedule
        )
    )
    return found


def _from_length(
    points: _Points, asked: _Points, near: Array, surface: Surface, length: float
) -> tuple[float, Array, Array]:
    """Logarithm of the probability of the points (but a constant), and mean and variance of the ends, (m,)."""
    plain = _covariance(points, points, near, surface, length)
    middle = float(points.value.mean())
    rest = points.value - middle
    least = surface.doubt * (5e-4 * float(np.var(points.value)) + 1e-8)
    scale2 = 0.0
    for _ in range(2):  # the scatter is known in units of the values, the process up to its scale
        matrix = plain.copy()
        matrix[np.diag_indices_from(matrix)] += surface.noise**2 + (points.scatter**2 / scale2 if scale2 > 0 else 0.0)
        factor = np.linalg.cholesky(matrix)
        white = np.linalg.solve(factor, rest)
        scale2 = (float(white @ white) + least) / (len(rest) + surface.doubt)
    cross = np.linalg.solve(factor, _covariance(points, asked, near, surface, length))
    prior = WIDE**2 + surface.mean**2 + 1 + surface.own**2 + asked.power**2 * (surface.fall**2 + surface.fall_each**2)
    probability = -0.5 * len(rest) * math.log(scale2) - float(np.log(np.diag(factor)).sum())
    variance = np.maximum(prior - (cross**2).sum(0), 1e-9) * scale2
    return probability, middle + cross.T @ white, variance


def _covariance(a: _Points, b: _Points, near: Array, surface: Surface, length: float) -> Array:
    """Between points, (len(a), len(b))."""
    apart = np.abs(a.time[:, None] - b.time[None])
    alike, same = near[np.ix_(a.trial, b.trial)], a.trial[:, None] == b.trial[None]
    found: Array = (
        WIDE**2
        + surface.mean**2 * np.exp(-apart / WIDE_LENGTH)
        + alike * np.exp(-apart / length)
        + surface.own**2 * same * np.exp(-apart / (surface.own_length * length))
        + np.outer(a.power, b.power) * (surface.fall**2 + surface.fall_each**2 * alike)
    )
    return found
