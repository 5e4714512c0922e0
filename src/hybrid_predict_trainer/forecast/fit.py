"""Fits of the law: most probable parameters given curves and a prior, and how sure they are."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..records import ConfigError
from .curve import MIN_ROWS, Array, Curve
from .law import NAMES, TRANSIENT, Plan, losses
from .prior import Prior

#: Residuals beyond this many standard deviations count linearly (Huber, Ann. Math. Stat. 35, 1964).
OUTLIER = 2.0
#: The law's own error is smooth along a curve: it averages out over as many rows as this, however many there are.
SMOOTH_ROWS = 40
#: Share of the rows that say whether the law describes a curve (single spikes do not), the share that is its end, and
#: how many standard errors of the end's rows are left to their noise.
WITHOUT_SPIKES, AT_THE_END, NOISE_ERRORS = 0.9, 0.125, 3.0
#: The noise of so many rows is itself known to half: of pure noise, whatever the number of rows, less than one curve in
#: a hundred lies farther off than is left to it.
FEW_ROWS = 60
LEAST_LOSS = 1e-12


@dataclass(frozen=True, slots=True)
class Fit:
    """Parameters of the law.

    Attributes:
        theta: (9,) in the order of ``law.NAMES``.
        covariance: (9, 9) of the posterior, by its curvature at the maximum (Laplace).
        start: progress at the first row that was fitted.
        first: loss there.
        evidence: logarithm of the probability of the data under the prior, up to a constant of the data.
        off: how far the law is from the curves beyond their rows' noise, in ln L: over all of one, or at its end.
    """

    theta: Array
    covariance: Array
    start: float
    first: float
    evidence: float
    off: float = 0.0

    @property
    def shape(self) -> Array:
        """The parameters with the transient as a share of the first loss: what a prior is learnt from, (9,)."""
        found = self.theta.copy()
        found[TRANSIENT] /= self.first
        return found

    def losses(self, plan: Plan, steps: Array) -> Array:
        """L at steps, (n,)."""
        return losses(self.theta, plan, steps, self.start)

    def log_deviation(self, plan: Plan, steps: Array) -> Array:
        """Standard deviation of ln L at steps, (n,)."""
        gradient = np.empty((len(NAMES), len(steps)))
        for k, size in enumerate(np.sqrt(np.diag(self.covariance))):
            step = np.zeros(len(NAMES))
            step[k] = max(1e-3 * size, 1e-9)
            up, down = (np.log(_positive(losses(self.theta + s * step, plan, steps, self.start))) for s in (1, -1))
            gradient[k] = (up - down) / (2 * step[k])
        found: Array = np.sqrt(np.maximum(np.einsum("kn,kl,ln->n", gradient, self.covariance, gradient), 0.0))
        return found


def fit(curves: Sequence[tuple[Curve, Plan]], prior: Prior, *, discrepancy: float | None = None) -> Fit:
    """Most probable parameters of one model.

    Args:
        curves: Of the model, one or several, with their plans; only rows after the warm-up count.
        prior: Of the shape.
        discrepancy: Standard deviation of the law about the curve, in ln L; None: the prior's.

    Raises:
        ConfigError: fewer than 8 rows after the warm-up, or scipy is missing.
    """
    told = prior.discrepancy if discrepancy is None else discrepancy
    parts = [_usable(curve, plan) for curve, plan in curves]
    weights = []
    for part in parts:
        smooth = told**2 * max(1.0, len(part.steps) / SMOOTH_ROWS)
        weights.append(1 / np.sqrt(smooth + part.noise**2 / part.sizes))
    mean, spread = prior.around(float(parts[0].losses[0]), float(np.mean([part.losses[-1] for part in parts])))
    plans = [plan for _, plan in curves]
    start = min(float(plan.at(part.steps[:1])[0]) for part, plan in zip(parts, plans, strict=True))

    def residuals(theta: Array) -> Array:
        rows = [
            (np.log(_positive(losses(theta, plan, part.steps, start))) - np.log(part.losses)) * weight
            for part, plan, weight in zip(parts, plans, weights, strict=True)
        ]
        return np.concatenate([_huber(np.concatenate(rows)), (theta - mean) / spread])

    found = _optimize().least_squares(residuals, mean, max_nfev=100, x_scale=spread)
    precision = found.jac.T @ found.jac
    covariance = np.linalg.pinv(precision, hermitian=True)
    evidence = -found.cost - 0.5 * float(np.linalg.slogdet(precision)[1]) - float(np.log(spread).sum())
    evidence += sum(float(np.log(weight).sum()) for weight in weights)
    off = max(_beyond_noise(found.x, part, plan, start) for part, plan in zip(parts, plans, strict=True))
    return Fit(found.x, covariance, start, float(parts[0].losses[0]), evidence, off)


def _beyond_noise(theta: Array, part: Curve, plan: Plan, start: float) -> float:
    """How far the law is from a curve beyond its rows' noise: over all of it, or at its end, whichever is more."""
    residuals = np.log(_positive(losses(theta, plan, part.steps, start))) - np.log(part.losses)
    of_noise = part.noise**2 / part.sizes
    kept = np.sort(residuals**2 - of_noise)[: math.ceil(WITHOUT_SPIKES * len(residuals))]
    count = len(residuals)
    chance = NOISE_ERRORS * float(of_noise.mean()) * math.sqrt(2 / count) * (1 + FEW_ROWS / count)
    last = math.ceil(AT_THE_END * len(residuals))
    end = abs(float(np.median(residuals[-last:]))) - NOISE_ERRORS * part.noise / math.sqrt(part.sizes[-last:].sum())
    return max(math.sqrt(max(0.0, float(kept.mean()) - chance)), end)


def _usable(curve: Curve, plan: Plan) -> Curve:
    """Blocks of the rows after the warm-up."""
    part = curve.since(plan.first)
    if len(part.steps) < MIN_ROWS:
        raise ConfigError(
            f"only {len(part.steps)} losses from step {plan.first} on, where warm-up and start are over: "
            f"a forecast needs at least {MIN_ROWS}"
        )
    return part.blocks()


def _huber(residuals: Array) -> Array:
    """Residuals whose squares are Huber's loss."""
    size = np.abs(residuals)
    far = np.sqrt(np.maximum(2 * OUTLIER * size - OUTLIER**2, 0.0))
    found: Array = np.where(size <= OUTLIER, residuals, np.sign(residuals) * far)
    return found


def _positive(values: Array) -> Array:
    found: Array = np.maximum(values, LEAST_LOSS)
    return found


def _optimize() -> Any:
    """``scipy.optimize``, which only a forecast needs."""
    try:
        return importlib.import_module("scipy.optimize")
    except ModuleNotFoundError:
        raise ConfigError('a forecast needs scipy; run: pip install "hybrid-predict-trainer[forecast]"') from None
