r"""Where the trials of a search will end, foretold together.

Each trial is looked at after fixed shares of its run (``TrialCurve.looks``).  From look s on its value follows

    y(t) = y(s) + b ln(S_t / S_s) + b (u_s^p - u_t^p) + c r(t)

with S the summed learning rate, u the rate over its peak, b the slope dy/dlnS at s: the first terms of
``forecast.law`` (a power law of the summed rate, and a drop of the rate that gains about its slope), which need two
reports and no fit.  What the law gets wrong, r, is a Gaussian process over trials and time, learnt from all trials that
are further on, complete or not:

    cov(r_i(t), r_j(t')) = common + features + [group + parameters + own] G(t, t')

* features: how much too large or small each of the two terms is, the same number for all trials;
* group: trials that share everything but rate and schedule share what they do (learning-rate transfer);
* parameters: trials near one another in all parameters and schedules do alike (squared exponential);
* own: what cannot be known.

c is the trial's own size of change.  The size of r as a whole is learnt as well, with the conjugate prior, so that an
end is Student-distributed (Rasmussen & Williams, Gaussian Processes for Machine Learning, 2006, chapters 2 and 9.9;
after Swersky, Snoek & Adams, Freeze-Thaw Bayesian Optimization, arXiv 1406.3896, whose kernel knows no rates).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .curves import Array, Stand, TrialCurve


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Standard deviations of the parts of r, in units of a trial's own change, before any trial has shown its end.

    The values are those under which the ends of the recorded grids ``gpt-source`` and ``pinn`` are most probable, found
    by a random search; other grids are the test of them.

    Attributes:
        power, drop: of the law's two terms, as shares of them.
        fall, common: of what a fall of the rate, and time, bring whatever the slope.
        reversion: share of a trial's distance from the others that it loses per unit of time.
        group, parameters, own: see above.
        length: distance of parameters, each from 0 to 1, at which trials have little in common.
        calm: of what a fall of the rate brings where reports scatter, as a share of their scatter.
        noise: of single values.
        rough: share of G that is a random walk; the rest grows in one direction.
        degrees: of freedom that the prior of r's size counts as.
    """

    power: float = 1.7
    drop: float = 4.3
    fall: float = 0.46
    common: float = 0.4
    reversion: float = 0.45
    calm: float = 0.88
    noise: float = 0.016
    group: float = 0.08
    parameters: float = 0.5
    own: float = 0.18
    length: float = 2.4
    rough: float = 1.0
    degrees: float = 8.0


@dataclass(frozen=True, slots=True)
class End:
    """The final value of a trial, on the scale on which lower is better.

    Attributes:
        mean: expected.
        scale: of its Student distribution; 0 where the trial is complete.
        degrees: of freedom.
        look: share of the run that it is foretold from; 1 where it is complete, 0 where nothing is known.
    """

    mean: float
    scale: float
    degrees: float
    look: float


UNKNOWN = End(math.nan, math.inf, 1.0, 0.0)


def ends_of(
    curves: Sequence[TrialCurve], *, model: Model = Model(), rate_names: Sequence[str] = (),
    asked: Sequence[int] | None = None,
) -> list[End]:  # fmt: skip
    """The ends of trials.

    Args:
        curves: Of the search.
        model: Of what the law gets wrong.
        rate_names: Parameters that are about learning rate and schedule only.
        asked: Indices of those whose end is foretold; None: all.

    Returns:
        One for each trial; of those that are complete the end itself, of others that were not asked for nothing.
    """
    ends = [UNKNOWN] * len(curves)
    waiting: dict[int, list[int]] = {}
    for i in range(len(curves)) if asked is None else asked:
        look = curves[i].standing
        if look is not None and not curves[i].complete:
            waiting.setdefault(look, []).append(i)
    for i, curve in enumerate(curves):
        if curve.complete and len(curve.values):
            ends[i] = End(float(curve.values[-1]), 0.0, math.inf, 1.0)
    near = Nearness.of(curves, rate_names) if waiting else None
    for k, standing in waiting.items():
        assert near is not None, "somebody is waiting"
        known = [i for i, curve in enumerate(curves) if k in curve.stands and max(curve.stands) > k]
        for i, end in zip(standing, _from_look(curves, k, standing, known, near, model), strict=True):
            ends[i] = end
    return ends


# ---- one look ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Points:
    """Points (trial, time) of a look's process, all (n,).

    Attributes:
        trial: index of the trial.
        law: what the law says, y.
        size: c.
        power, drop, fall, common, reversion, calm: terms over c, see :class:`Model`.
        time: how much has changed by then: distance in logarithm of the progress, and in the rate.
        noise: of the law, through level and slope, over c.
    """

    trial: Array
    law: Array
    size: Array
    power: Array
    drop: Array
    fall: Array
    common: Array
    reversion: Array
    calm: Array
    time: Array
    noise: Array


def _from_look(
    curves: Sequence[TrialCurve], k: int, asked: Sequence[int], known: Sequence[int], near: Nearness, model: Model
) -> list[End]:
    """Ends of the trials that stand at look k, from those that are further on."""
    everyone, looks = [*asked, *known], curves[asked[0]].looks
    states = {i: curves[i].stands[k] for i in everyone}
    typical = (
        float(np.median([stand.level for stand in states.values()])),
        max(float(np.median([math.hypot(stand.slope, stand.noise) for stand in states.values()])), 1e-9),
    )
    ends = _points(curves, [(i, 1.0) for i in asked], looks[k], states, typical)
    data = [(i, m) for i in known for m in curves[i].stands if m > k]
    degrees, size2 = model.degrees, 1.0
    between = _covariance(ends, ends, near, model, own=True)
    mean, variance = np.zeros(len(asked)), np.diag(between).copy()
    if data:
        points = _points(curves, [(i, looks[m]) for i, m in data], looks[k], states, typical)
        found = np.array([curves[i].stands[m].level for i, m in data])
        rest = (found - points.law) / points.size
        matrix = _covariance(points, points, near, model, own=True)
        matrix[np.diag_indices_from(matrix)] += model.noise**2
        factor = np.linalg.cholesky(matrix)
        white = np.linalg.solve(factor, rest)
        cross = np.linalg.solve(factor, _covariance(points, ends, near, model, own=False))
        mean = cross.T @ white
        variance = np.maximum(variance - (cross**2).sum(0), 1e-8)
        count = sum(curves[i].complete for i in known)  # rows of one trial say little that is new of the size
        size2 = (degrees + count * float(white @ white) / len(white)) / (degrees + count)
        degrees += count
    scale = np.sqrt(size2 * variance) * ends.size
    middle = ends.law + mean * ends.size
    return [End(float(m), float(s), degrees, looks[k]) for m, s in zip(middle, scale, strict=True)]


def _points(
    curves: Sequence[TrialCurve], where: Sequence[tuple[int, float]], look: float,
    states: Mapping[int, Stand], typical: tuple[float, float],
) -> Points:  # fmt: skip
    rows = []
    for i, share in where:
        curve, stand = curves[i], states[i]
        level, slope = stand.level, stand.slope
        start, end = look * curve.total_steps, share * curve.total_steps
        way = math.log(curve.progress_at(end) / curve.progress_at(start))
        drop = curve.power_at(start) - curve.power_at(end)
        size = math.sqrt(typical[1] * math.sqrt((slope**2 + stand.noise**2 + typical[1] ** 2) / 2))
        law = level + slope * way + min(slope, 0.0) * drop
        passed = math.log(share / look)
        rows.append((
            i, law, size, slope * way / size, min(slope, 0.0) * drop / size, drop * typical[1] / size,
            passed * typical[1] / size, passed * (level - typical[0]) / size, drop * stand.noise / size,
            passed + abs(drop), math.hypot(stand.level_noise, stand.slope_noise * (way + abs(drop))) / size,
        ))  # fmt: skip
    columns = np.array(rows, dtype=np.float64).reshape(-1, 11).T
    return Points(columns[0].astype(np.intp), *columns[1:])


def _covariance(a: Points, b: Points, near: Nearness, model: Model, *, own: bool) -> Array:
    """Of r between points, (len(a), len(b)); ``own``: the same trials may be on both sides."""
    linear = (
        model.power**2 * np.outer(a.power, b.power)
        + model.drop**2 * np.outer(a.drop, b.drop)
        + model.fall**2 * np.outer(a.fall, b.fall)
        + model.common**2 * np.outer(a.common, b.common)
        + model.reversion**2 * np.outer(a.reversion, b.reversion)
        + model.calm**2 * np.outer(a.calm, b.calm)
    )
    i, j = np.ix_(a.trial, b.trial)
    if own:
        linear = linear + np.outer(a.noise, b.noise) * (i == j)
    alike = model.group**2 * near.group[i, j] + model.parameters**2 * near.parameters(model.length)[i, j]
    if own:
        alike = alike + model.own**2 * (i == j)
    straight = np.outer(a.time, b.time)
    walk = np.minimum(a.time[:, None], b.time[None, :])
    found: Array = linear + alike * ((1 - model.rough) * straight + model.rough * walk)
    return found


# ---- which trials are alike -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Apart:
    """Squared distances of all pairs of trials, (n, n) each.

    Attributes:
        others: in all parameters but rate and schedule, at most 1 for each of them.
        rate: in the peak rate's logarithm, at most 1.
        schedule: between the courses of the rate.
        length: in the number of steps.
    """

    others: Array
    rate: Array
    schedule: Array
    length: Array


@dataclass(frozen=True, slots=True)
class Nearness:
    """Of all pairs of trials.

    Attributes:
        distance2: (n, n) squared distance in all parameters, rate and schedule.
        group: (n, n) 1 where everything but rate and schedule is the same.
    """

    distance2: Array
    group: Array

    @staticmethod
    def of(curves: Sequence[TrialCurve], rate_names: Sequence[str] = ()) -> Nearness:
        """From parameters and schedules."""
        parts = Nearness.parts(curves, rate_names)
        distance2 = parts.others + parts.rate + parts.schedule
        return Nearness(distance2 + parts.length, (parts.others == 0).astype(np.float64))

    @staticmethod
    def parts(curves: Sequence[TrialCurve], rate_names: Sequence[str] = ()) -> Apart:
        """What the distance consists of."""
        count = len(curves)
        others = np.zeros((count, count))
        for name in sorted({name for curve in curves for name in curve.params} - set(rate_names)):
            # rate and schedule are compared as they are, below
            others += _column([curve.params.get(name) for curve in curves])
        peaks = np.log([curve.peak for curve in curves])
        at = np.linspace(0, 1, 65)[1:]
        shapes = np.array([np.interp(at * c.total_steps, np.arange(1, c.total_steps + 1), c.factor) for c in curves])
        apart = np.abs(shapes[:, None] - shapes[None]).mean(-1) if count else np.zeros((0, 0))
        lengths = np.log([float(curve.total_steps) for curve in curves])
        return Apart(others, _spread(peaks), (2 * apart) ** 2, _spread(lengths))

    def parameters(self, length: float) -> Array:
        """Squared exponential of the distance, (n, n)."""
        found: Array = np.exp(-self.distance2 / (2 * length**2))
        return found


def _column(values: Sequence[Any], row: int | None = None) -> Array:
    """Squared distances in one parameter, at most 1: (n, n), or (n,) from one of them.

    A parameter that only some trials have is a number among those; these are all as far from the others as can be.
    """
    numbers = np.array([_number(v) for v in values])
    known = np.isfinite(numbers)
    if all(v is None for v, k in zip(values, known, strict=True) if not k) and known.any():
        found = np.where(known, numbers, numbers[known][0])
        if found.min() > 0 and found.max() / found.min() >= 10:
            found = np.log(found)
        apart = known[:, None] != known[None] if row is None else known != known[row]
        neither = ~known[:, None] & ~known[None] if row is None else ~known & ~known[row]
        near: Array = np.where(apart, 1.0, np.where(neither, 0.0, _spread(found, row)))
        return near
    texts = np.array([repr(v) for v in values])
    different: Array = (texts[:, None] != texts[None] if row is None else texts != texts[row]).astype(np.float64)
    return different


def _number(value: Any) -> float:
    """NaN where it is none."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:  # a whole number beyond all floats
        return math.nan


def _spread(values: Array, row: int | None = None) -> Array:
    """Squared differences over the squared range, (n, n), or (n,) from one of them."""
    width = float(np.ptp(values)) if len(values) else 0.0
    apart = values[:, None] - values[None] if row is None else values - values[row]
    found: Array = (apart / max(width, 1e-12)) ** 2 if width > 1e-12 else np.zeros_like(apart)
    return found


def nearest(curves: Sequence[TrialCurve], i: int, most: int, rate_names: Sequence[str] = ()) -> list[int]:
    """Index ``i``, first, and those of the trials nearest to it in parameters, rate and schedule, at most ``most``."""
    if len(curves) <= most + 1:
        return [i, *[j for j in range(len(curves)) if j != i]]
    far = np.zeros(len(curves))
    for name in sorted({name for curve in curves for name in curve.params} - set(rate_names)):
        far += _column([curve.params.get(name) for curve in curves], i)
    far += _spread(np.log([curve.peak for curve in curves]), i)
    at = np.linspace(0, 1, 65)[1:]
    shapes = np.array([np.interp(at * c.total_steps, np.arange(1, c.total_steps + 1), c.factor) for c in curves])
    far += (2 * np.abs(shapes - shapes[i]).mean(-1)) ** 2
    order = [int(j) for j in np.argsort(far, kind="stable") if j != i]
    return [i, *order[:most]]
