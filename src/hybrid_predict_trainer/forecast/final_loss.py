"""The forecast itself, and the two simple ones that it has to beat."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from ..records import ConfigError
from .curve import MIN_ROWS, Array, Curve
from .fit import Fit, _optimize, fit
from .law import REFERENCE, SCALE, Plan
from .prior import PRIORS, SCALE_SHARE, Prior, shipped

#: Points of the forecast curve that are told.
NUM_POINTS = 50
#: The final loss is the mean over this share of the run: one row of a noisy loss cannot be forecast.
FINAL_SHARE = 0.01
#: The law's distance from the known losses (of their logarithms, beyond their noise) that is told, and that is refused:
#: on published curves it is below 0.001, on short runs of small models below 0.015.
OFF, FAR_OFF = 0.01, 0.03
#: How far the logarithm of the scale is from the usual one where that is told: on published curves it is within 0.31,
#: and where each of their steps is told as four, or four as one, from 0.27 to 0.75 off.
STEEP = 0.45
#: Of a prior whose evidence is so much smaller than the best one's (in ln) nothing is mixed in.
NEGLIGIBLE = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The end of a run, foretold.

    Losses are in the units of the curve.

    Attributes:
        final_loss: at the last step of the plan.
        low, high: ends of its interval.
        level: of the interval, the share of such intervals that hold the final loss.
        step: the last that was observed.
        total_steps: of the plan.
        last_value: mean of the last rows, the forecast of somebody who expects no change.
        power_law: a power law of the step without learning rates, fitted to the same rows; None where it has no end.
        log_line: a straight line in the logarithm of the step, through the later half of the rows.
        points: (step, loss, low, high) from the last observed step to the end.
        prior: name of what was known before, and its weight.
        notes: what to beware of, a sentence each.
    """

    final_loss: float
    low: float
    high: float
    level: float
    step: int
    total_steps: int
    last_value: float
    power_law: float | None
    log_line: float | None
    points: tuple[tuple[float, float, float, float], ...]
    prior: tuple[tuple[str, float], ...]
    notes: tuple[str, ...] = ()


def forecast(
    steps: Sequence[float] | Array, losses: Sequence[float] | Array, rates: Sequence[float] | Array, *,
    level: float = 0.9, priors: Sequence[Prior] | None = None,
) -> Forecast:  # fmt: skip
    """Forecast the final loss of a run.

    Args:
        steps: (n,) optimizer steps taken when each loss was measured.
        losses: (n,) above 0; training losses or validation losses, the forecast is one of the same kind.
        rates: (T,) learning rate of each step of the whole run, past and planned.
        level: Of the interval.
        priors: What is known of such models; None: those that come with the package, weighed by how well they explain
            the curve.

    Raises:
        ConfigError: fewer than 8 losses after the warm-up, a loss that is not finite and above 0, steps beyond the
            plan, a curve that the law does not describe, or scipy is missing.
    """
    if not 0 < level < 1:
        raise ConfigError(f"the level of an interval lies between 0 and 1, not at {level:g}")
    curve, plan = under_way(steps, losses, rates)
    now = float(curve.steps[-1])
    unit = last_value(curve)  # a loss in other units, or a tiny one of a problem that is solved, is the same loss
    curve = curve.scaled(1 / unit)
    known = [shipped(name) for name in PRIORS] if priors is None else list(priors)
    fits = [fit([(curve, plan)], prior) for prior in known]
    shares = weights_of(fits)
    notes = [*notes_of(curve, plan), *misfit(fits, known, shares)]
    at = np.linspace(now, plan.steps, NUM_POINTS)
    middle, deviation = mixture(fits, known, shares, plan, at)
    final_rows = max(1.0, FINAL_SHARE * len(curve.steps) * plan.steps / max(now, 1.0))
    deviation = np.hypot(deviation, curve.noise / math.sqrt(final_rows))
    half = NormalDist().inv_cdf((1 + level) / 2) * deviation
    low, high = np.exp(middle - half), np.exp(middle + half)
    found = np.exp(middle)
    points = np.stack([at, *(unit * line for line in (found, low, high))], axis=1)
    if not np.isfinite(points).all():
        raise ConfigError(
            f"the forecast is no finite number: losses of about {unit:g} cannot be told in this precision"
        )
    power, line = power_law(curve, plan), log_line(curve, plan)
    return Forecast(
        final_loss=float(points[-1, 1]), low=float(points[-1, 2]), high=float(points[-1, 3]), level=level,
        step=int(now), total_steps=plan.steps, last_value=unit, power_law=None if power is None else unit * power,
        log_line=None if line is None else unit * line, points=tuple(map(tuple, points.tolist())),
        prior=tuple((prior.name, float(w)) for prior, w in zip(known, shares, strict=True)), notes=tuple(notes),
    )  # fmt: skip


def under_way(
    steps: Sequence[float] | Array, losses: Sequence[float] | Array, rates: Sequence[float] | Array
) -> tuple[Curve, Plan]:
    """What is known of a run and what is planned, of which something can be said.

    Args:
        steps: (n,) optimizer steps taken when each loss was measured.
        losses: (n,) above 0.
        rates: (T,) learning rate of each step.

    Raises:
        ConfigError: there are no losses, they all are the same, or they go beyond the plan.
    """
    curve, plan = Curve.of(steps, losses), Plan.of(rates)
    if not len(curve.steps):
        raise ConfigError("there are no losses to forecast from")
    if curve.steps[-1] > plan.steps:
        raise ConfigError(f"the run is at step {curve.steps[-1]:g}, beyond the {plan.steps} steps of the plan")
    if float(np.ptp(curve.losses)) == 0.0 and len(curve.steps) > 1:
        raise ConfigError(
            f"all {len(curve.steps)} losses are {curve.losses[0]:g}: a loss that never moves has no forecast"
        )
    return curve, plan


def misfit(fits: Sequence[Fit], priors: Sequence[Prior], shares: Array) -> list[str]:
    """What a reader has to know of how the law describes a curve.

    Raises:
        ConfigError: it does not.
    """
    found, off = [], min(f.off for f in fits)
    if off > FAR_OFF:
        raise ConfigError(
            f"the law does not describe this curve, it is off by {100 * off:.2g} % where losses are known: a loss that "
            "rises, or stands still and falls later, cannot be forecast"
        )
    if off > OFF:
        found.append(
            f"the law is off by {100 * off:.2g} % where losses are known: the interval, which was measured on curves "
            "that follow it, is too narrow"
        )
    best = int(shares.argmax())
    steep = float(fits[best].theta[SCALE]) - math.log(SCALE_SHARE)
    if priors[best].name in PRIORS and abs(steep) > STEEP:
        found.append(
            f"after {REFERENCE:,.0f} steps this loss falls {math.exp(steep):.2g} times as steeply as the curves that "
            "the law was measured on: if its steps are no optimizer steps, or have many more or fewer examples, the "
            "interval is too narrow"
        )
    return found


def weights_of(fits: Sequence[Fit]) -> Array:
    """How much each prior counts: in proportion to the probability of the curve under it."""
    evidence = np.array([f.evidence for f in fits])
    behind = evidence - evidence.max()
    shares = np.where(behind < -NEGLIGIBLE, 0.0, np.exp(behind))
    found: Array = shares / shares.sum()
    return found


def mixture(fits: Sequence[Fit], priors: Sequence[Prior], shares: Array, plan: Plan, at: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of ln L at steps, (n,) each, over all priors."""
    means = np.array([np.log(np.maximum(f.losses(plan, at), 1e-12)) for f in fits])
    spreads = np.array([
        p.widening * np.hypot(f.log_deviation(plan, at), p.discrepancy) for f, p in zip(fits, priors, strict=True)
    ])  # fmt: skip
    middle = shares @ means
    return middle, np.sqrt(shares @ (spreads**2 + (means - middle) ** 2))


def last_value(curve: Curve) -> float:
    """Mean over the last hundredth of the rows: what is expected where nothing changes any more."""
    count = max(1, round(FINAL_SHARE * len(curve.losses)))
    return float(curve.losses[-count:].mean())


def power_law(curve: Curve, plan: Plan) -> float | None:
    """L0 + A n^-a of the step n, fitted by least squares to the logarithms; at the end of the plan."""
    part = curve.since(plan.first).blocks()
    if len(part.steps) < MIN_ROWS:
        return None
    ratio = part.steps / part.steps[-1]
    last = float(part.losses[-1])

    def value(theta: Array, n: Array | float) -> Array:
        found: Array = np.maximum(theta[0] + np.exp(theta[1]) * n ** -np.exp(theta[2]), 1e-12)
        return found

    def residuals(theta: Array) -> Array:
        found: Array = np.log(value(theta, ratio)) - np.log(part.losses)
        return found

    found = _optimize().least_squares(residuals, np.array([0.8 * last, math.log(0.2 * last), math.log(0.5)]))
    end = float(value(found.x, plan.steps / float(part.steps[-1])))
    return end if math.isfinite(end) else None


def log_line(curve: Curve, plan: Plan) -> float | None:
    """a + b ln n of the step n, fitted to the rows since half of the last step; at the end of the plan."""
    part = curve.since(max(plan.first, 0.5 * float(curve.steps[-1])))
    if len(part.steps) < 2:
        return None
    slope, level = np.polyfit(np.log(part.steps), part.losses, 1)
    return float(level + slope * math.log(plan.steps))


def notes_of(curve: Curve, plan: Plan) -> list[str]:
    """What a reader of the figure has to know."""
    found = []
    share = float(curve.steps[-1]) / plan.steps
    if share < 0.2:
        found.append(f"only {100 * share:.0f} % of the run is known; the interval was measured from 25 % on")
    if (plan.after > plan.before + 1e-3).any():
        found.append("the rate rises again after its peak: the law was measured on rates that fall")
    return found
