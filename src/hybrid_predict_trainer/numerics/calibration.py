"""How well stated probabilities agree with what happened: logistic fits, temperature, reliability."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


#: Probabilities are kept this far from 0 and 1, so that one surprise costs 7 nats and not infinity.
EPSILON = 1e-3


def sigmoid(z: Array) -> Array:
    """1 / (1 + exp(-z)) without overflow."""
    p = np.tanh(0.5 * np.asarray(z))
    p = 1 + p
    p *= 0.5
    return p


def logit(p: float) -> float:
    """log(p / (1 - p)), with p kept within ``EPSILON`` of 0 and 1; not a number counts as 1/2."""
    p = min(max(p, EPSILON), 1 - EPSILON) if math.isfinite(p) else 0.5
    return math.log(p) - math.log1p(-p)


def scaled(logits: Array, temperature: float) -> Array:
    """Probabilities of logits (n,) divided by a temperature > 0: flatter above 1, sharper below."""
    return sigmoid(logits / temperature)


def log_loss(logits: Array, kept: Array) -> float:
    """Mean negative log-likelihood, nats, of outcomes (n,) in {0, 1} under logits (n,)."""
    return float(np.mean(np.logaddexp(0, logits) - kept * logits)) if len(logits) else math.nan


def fit_temperature(logits: Array, kept: Array, *, prior_weight: float = 10.0, start: float | None = None) -> float:
    """T of the maximum a posteriori, by bisection.

    In b = 1/T the objective  sum_i nll(b z_i, y_i) + prior_weight / 2 * (b - 1)^2  is strictly convex
    and its derivative rises, so bisection finds the one minimum; b = 1 is a candidate, so the
    log-loss on these outcomes never grows.

    Args:
        logits: (n,) as stated.
        kept: (n,) outcomes in {0, 1}.
        prior_weight: Curvature of the prior, in nats; an outcome at a logit of 2 weighs about 0.4.
        start: T of an outcome less, say: Newton's iteration begins there, and its answer is not halved any further.

    Returns:
        T in [1/20, 20].
    """
    low, high = 1 / 20, 20.0

    def derivative(b: float) -> float:
        return float((sigmoid(b * logits) - kept) @ logits) + prior_weight * (b - 1)

    below, above = _bracket(derivative, logits, prior_weight, 1 / (start or 1.0))
    if start is not None and low < below < above < high:
        return 2 / (below + above)
    for _ in range(60):
        middle = (low + high) / 2
        rises = middle > below and (middle >= above or derivative(middle) >= 0)
        low, high = (low, middle) if rises else (middle, high)
    return 2 / (low + high)


def _bracket(
    derivative: Callable[[float], float], logits: Array, prior_weight: float, start: float
) -> tuple[float, float]:
    """Two numbers between which the rising derivative has its zero, so that halving need not ask outside of them.

    Newton's iteration finds them within 1e-11 of each other; where it doesn't they are minus and plus infinity.
    """
    b, squares = start, logits * logits
    for _ in range(8):
        p = sigmoid(b * logits)
        step = derivative(b) / (float((p * (1 - p)) @ squares) + prior_weight)
        b -= step
        if abs(step) < 1e-12 * abs(b):
            break
    below, above = b - 1e-11 * abs(b), b + 1e-11 * abs(b)
    return (below, above) if derivative(below) < 0 < derivative(above) else (-math.inf, math.inf)


def fit_logistic(Z: Array, kept: Array, prior: Array, precision: float, start: Array | None = None) -> Array:
    """Weights of the maximum a posteriori logistic regression, by damped Newton steps.

    argmin_w  sum_i nll(z_i . w, y_i) + precision / 2 * |w - prior|^2

    Args:
        Z: (n, F) evidence.
        kept: (n,) outcomes in {0, 1}.
        prior: (F,) what no evidence means.
        precision: Of the prior.
        start: (F,) where the iteration begins, the weights of an outcome less, say; None: at ``prior``.
    """
    w = (prior if start is None else start).copy()

    def objective(v: Array) -> float:
        z = Z @ v
        away = v - prior
        return float(np.add.reduce(np.logaddexp(0, z) - kept * z) + precision / 2 * np.add.reduce(away * away))

    value, ridge = objective(w), precision * np.eye(len(w))
    for _ in range(30):
        p = sigmoid(Z @ w)
        gradient = Z.T @ (p - kept) + precision * (w - prior)
        hessian = (Z.T * (p * (1 - p))) @ Z + ridge
        step = np.linalg.solve(hessian, gradient)
        length = 1.0
        while (new := objective(w - length * step)) > value and length > 1e-4:
            length /= 2
        if new >= value or float(gradient @ step) < 1e-12 * (1 + value):
            break
        w, value = w - length * step, new
    return w


@dataclass(frozen=True, slots=True, kw_only=True)
class ReliabilityBin:
    """One point of a reliability curve."""

    center: float  # of the bin's edges
    confidence: float  # mean stated probability
    accuracy: float  # share that was kept
    count: int


def reliability_curve(
    stated: Sequence[float], kept: Sequence[float], num_bins: int = 10, kind: Literal["width", "mass"] = "width"
) -> list[ReliabilityBin]:
    """Stated probability against frequency, bins without data left out.

    Args:
        stated: (n,) probabilities.
        kept: (n,) outcomes in {0, 1}.
        num_bins: Most bins.
        kind: Bins of equal ``width`` of [0, 1], or with quantiles as edges, of equal ``mass``
            (adaptive; equal confidences stay together).  Edges belong to the bin below.
    """
    p, y = np.asarray(stated, dtype=np.float64), np.asarray(kept, dtype=np.float64)
    assert p.shape == y.shape, f"{p.shape} probabilities, {y.shape} outcomes"
    if not p.size:
        return []
    positions = np.linspace(0.0, 1.0, num_bins + 1)
    edges = positions if kind == "width" else np.quantile(p, positions)
    index = np.searchsorted(edges[1:-1], p)
    curve = []
    for i in np.unique(index):
        inside = index == i
        center, confidence, accuracy = (edges[i] + edges[i + 1]) / 2, p[inside].mean(), y[inside].mean()
        curve.append(
            ReliabilityBin(
                center=float(center), confidence=float(confidence), accuracy=float(accuracy), count=int(inside.sum())
            )
        )
    return curve


def calibration_error(curve: Sequence[ReliabilityBin]) -> float:
    """ECE: mean of |accuracy - confidence| over outcomes; NaN without any."""
    total = sum(b.count for b in curve)
    return sum(b.count * abs(b.accuracy - b.confidence) for b in curve) / total if total else math.nan


def calibration_noise(curve: Sequence[ReliabilityBin]) -> float:
    """What ECE a perfectly calibrated stream of this size would show by chance (normal approximation).

    500 outcomes spread over 10 bins show 0.04; an ECE is worth reading against this.
    """
    total = sum(b.count for b in curve)
    chance = sum(math.sqrt(2 / math.pi * b.count * b.confidence * (1 - b.confidence)) for b in curve)
    return chance / total if total else math.nan


def debiased_error(curve: Sequence[ReliabilityBin]) -> float:
    """Root of the mean squared calibration error, chance taken out (Kumar et al., NeurIPS 2019, definition 4.1).

    An accuracy measured on n_b outcomes scatters by acc (1 - acc) / (n_b - 1) around the true one, which
    adds to every squared gap and is subtracted; bins of one outcome say nothing.  At least as large as the
    ECE of the same gaps, and near 0 for honest probabilities.  NaN without any bin of two.
    """
    known = [b for b in curve if b.count > 1]
    total = sum(b.count for b in known)
    squares = ((b.accuracy - b.confidence) ** 2 - b.accuracy * (1 - b.accuracy) / (b.count - 1) for b in known)
    mean = sum(b.count * s for b, s in zip(known, squares, strict=True)) / total if total else math.nan
    return math.sqrt(max(mean, 0.0)) if total else math.nan


def monotone_curve(stated: Sequence[float], kept: Sequence[float], most: int = 100) -> list[ReliabilityBin]:
    """Reliability in as many bins of equal mass as leave the accuracy rising (ECE-sweep, Roelofs et al., AISTATS 2022).

    A true reliability curve rises, so bins between which it falls show noise and not the curve; ten bins
    whatever the data makes the ECE of 500 honest outcomes 0.045, this one 0.035.

    Args:
        stated: (n,) probabilities.
        kept: (n,) outcomes in {0, 1}.
        most: Most bins tried.
    """
    best: list[ReliabilityBin] = []
    for num_bins in range(1, min(most, len(stated)) + 1):
        curve = reliability_curve(stated, kept, num_bins, "mass")
        if any(later.accuracy < sooner.accuracy for sooner, later in pairwise(curve)):
            break
        best = curve
    return best


def _log_loss_of(stated: Sequence[float], kept: Sequence[float]) -> float:
    return log_loss(np.array([logit(p) for p in stated]), np.array(kept))
