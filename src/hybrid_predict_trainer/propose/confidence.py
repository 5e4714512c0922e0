"""Confidence: the probability that a jump will be kept and pay for itself, and how far it can be believed.

Three layers, each of which does nothing until outcomes are there:

    record      share of this run's jumps that were kept (:class:`TrackRecord`)
    logistic    p = sigmoid(w . z(evidence)), w by maximum a posteriori; its prior says "the record alone"
    temperature p_T = sigmoid(logit(p) / T), T fitted to what p was worth before it knew (Guo et al., ICML 2017)

A temperature is one strictly increasing map, so it can never change which of two jumps looks better.
Reliability is always measured on probabilities stated *before* their outcome was learnt.

Letters: ``n`` outcomes, ``F`` features of the evidence, ``E`` members of an ensemble.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..records import State

Array = NDArray[np.float64]
T = TypeVar("T")

#: Probabilities are kept this far from 0 and 1, so that one surprise costs 7 nats and not infinity.
EPSILON = 1e-3


@dataclass(slots=True)
class TrackRecord:
    """Share of this run's jumps that were kept, with forgetting and a uniform prior.

    A Beta(1, 1) prior makes the first answer 0.5 and keeps a handful of outcomes from meaning
    certainty; forgetting lets a run that changes its mind be believed again.
    """

    forgetting: float = 0.9
    num_outcomes: int = 0
    successes: float = 0.0
    failures: float = 0.0

    def record(self, kept: bool) -> None:
        """Add the outcome of one jump."""
        self.num_outcomes += 1
        self.successes = self.forgetting * self.successes + float(kept)
        self.failures = self.forgetting * self.failures + float(not kept)

    @property
    def confidence(self) -> float:
        """In (0, 1)."""
        return (self.successes + 1) / (self.successes + self.failures + 2)

    def state_dict(self) -> State:
        """Plain numbers."""
        return {
            "forgetting": self.forgetting, "num_outcomes": self.num_outcomes,
            "successes": self.successes, "failures": self.failures,
        }  # fmt: skip

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.forgetting, self.num_outcomes = state["forgetting"], state["num_outcomes"]
        self.successes, self.failures = state["successes"], state["failures"]


# ---- probabilities ------------------------------------------------------------------------------


def sigmoid(z: Array) -> Array:
    """1 / (1 + exp(-z)) without overflow."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * z)))


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


def fit_temperature(logits: Array, kept: Array, *, prior_weight: float = 10.0) -> float:
    """T of the maximum a posteriori, by bisection.

    In b = 1/T the objective  sum_i nll(b z_i, y_i) + prior_weight / 2 * (b - 1)^2  is strictly convex
    and its derivative rises, so bisection finds the one minimum; b = 1 is a candidate, so the
    log-loss on these outcomes never grows.

    Args:
        logits: (n,) as stated.
        kept: (n,) outcomes in {0, 1}.
        prior_weight: Curvature of the prior, in nats; an outcome at a logit of 2 weighs about 0.4.

    Returns:
        T in [1/20, 20].
    """
    low, high = 1 / 20, 20.0

    def derivative(b: float) -> float:
        return float((sigmoid(b * logits) - kept) @ logits) + prior_weight * (b - 1)

    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if derivative(middle) < 0 else (low, middle)
    return 2 / (low + high)


def fit_logistic(Z: Array, kept: Array, prior: Array, precision: float) -> Array:
    """Weights of the maximum a posteriori logistic regression, by damped Newton steps.

    argmin_w  sum_i nll(z_i . w, y_i) + precision / 2 * |w - prior|^2

    Args:
        Z: (n, F) evidence.
        kept: (n,) outcomes in {0, 1}.
        prior: (F,) what no evidence means.
        precision: Of the prior.
    """
    w = prior.copy()

    def objective(v: Array) -> float:
        z = Z @ v
        return float(np.sum(np.logaddexp(0, z) - kept * z) + precision / 2 * np.sum((v - prior) ** 2))

    value = objective(w)
    for _ in range(30):
        p = sigmoid(Z @ w)
        gradient = Z.T @ (p - kept) + precision * (w - prior)
        hessian = (Z.T * (p * (1 - p))) @ Z + precision * np.eye(len(w))
        step = np.linalg.solve(hessian, gradient)
        length = 1.0
        while (new := objective(w - length * step)) > value and length > 1e-4:
            length /= 2
        if new >= value or float(gradient @ step) < 1e-12 * (1 + value):
            break
        w, value = w - length * step, new
    return w


# ---- reliability --------------------------------------------------------------------------------


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


# ---- uncertainty --------------------------------------------------------------------------------


def split_variance(means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Law of total variance over an ensemble (E, ...): (epistemic, aleatoric), each (...).

    Epistemic is the variance between the members' means, aleatoric the mean of their own variances;
    the sum is the variance of the mixture.
    """
    return means.var(dim=0, unbiased=False), variances.mean(dim=0)


def split_entropy(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy of an ensemble's categoricals (E, ..., classes): (epistemic, aleatoric) in nats, each (...).

    Aleatoric is the members' mean entropy, epistemic what the mixture's exceeds it by: the mutual
    information of class and member (Depeweg et al., ICML 2018, equation 5).
    """
    total = torch.special.entr(probabilities.mean(dim=0)).sum(dim=-1)
    aleatoric = torch.special.entr(probabilities).sum(dim=-1).mean(dim=0)
    return (total - aleatoric).clamp(min=0), aleatoric


# ---- the model of a run -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is known of a jump when it is proposed, before any forward is spent on it."""

    raw: float  # the predictor's own confidence, in [0, 1]
    record: float  # TrackRecord.confidence
    reduction: float = 0.0  # predicted reduction of the loss
    price: float = 0.0  # of the proposal, in loss
    noise: float = 0.0  # spread of the loss around its EMA, relative to it

    def features(self) -> Array:
        """(5,): logits of both confidences, log of reduction over price, log of the noise, 1."""
        worth = math.log(max(self.reduction, 0.0) + 1e-12) - math.log(max(self.price, 0.0) + 1e-12)
        noise = math.log10(self.noise + 1e-6) / 3 + 1 if self.noise >= 0 else 0.0
        values = (logit(self.raw), logit(self.record), min(max(worth, -5.0), 5.0) / 2, min(max(noise, -1.0), 1.0), 1.0)
        return np.array([v if math.isfinite(v) else 0.0 for v in values])


class Confidence:
    """Learns from outcomes what the evidence is worth, and says how well it has been doing."""

    #: Without outcomes the answer is the track record's.
    PRIOR = (0.0, 1.0, 0.0, 0.0, 0.0)

    def __init__(self, *, capacity: int = 500, prior_precision: float = 2.0, prior_weight: float = 10.0) -> None:
        """Args: capacity: outcomes kept.  prior_precision: of the weights.  prior_weight: of T = 1."""
        self.capacity, self.prior_precision, self.prior_weight = capacity, prior_precision, prior_weight
        self._evidence: deque[Array] = deque(maxlen=capacity)
        self._kept: deque[float] = deque(maxlen=capacity)
        self._logits: deque[float] = deque(maxlen=capacity)  # of the logistic, before the outcome was learnt
        self._stated: deque[float] = deque(maxlen=capacity)  # with the temperature, likewise
        self._weights = np.array(self.PRIOR)
        self.temperature = 1.0

    def _logit(self, features: Array) -> float:
        return float(np.clip(features @ self._weights, -logit(1 - EPSILON), logit(1 - EPSILON)))

    def predict(self, evidence: Evidence) -> float:
        """Probability in (0, 1) that the jump will be kept and pay."""
        return float(scaled(np.array(self._logit(evidence.features())), self.temperature))

    def observe(self, evidence: Evidence, kept: bool) -> None:
        """Score what would have been said, then learn the outcome.  A fit of 500 outcomes takes below 1 ms."""
        features = evidence.features()
        logit_before, stated = self._logit(features), self.predict(evidence)
        # all at once: an interruption must not leave them of different lengths
        self._evidence, self._kept, self._logits, self._stated = (
            _with(self._evidence, features),
            _with(self._kept, float(kept)),
            _with(self._logits, logit_before),
            _with(self._stated, stated),
        )
        outcomes = np.array(self._kept)
        self._weights = fit_logistic(np.array(self._evidence), outcomes, np.array(self.PRIOR), self.prior_precision)
        self.temperature = fit_temperature(np.array(self._logits), outcomes, prior_weight=self.prior_weight)

    @property
    def num_outcomes(self) -> int:
        """Outcomes kept."""
        return len(self._kept)

    def report(self, num_bins: int = 10) -> dict[str, Any]:
        """Calibration of the probabilities as they were stated, JSON-able; null where nothing is known."""
        curve = reliability_curve(list(self._stated), list(self._kept), num_bins)
        adaptive = reliability_curve(list(self._stated), list(self._kept), num_bins, "mass")
        known = self.num_outcomes > 0
        raw = np.array([z[0] for z in self._evidence])
        return {
            "num_outcomes": self.num_outcomes,
            "temperature": self.temperature,
            "ece": calibration_error(curve) if known else None,
            "ece_adaptive": calibration_error(adaptive) if known else None,
            "ece_sweep": calibration_error(monotone_curve(list(self._stated), list(self._kept))) if known else None,
            "ece_debiased": debiased_error(adaptive) if self.num_outcomes >= 2 * num_bins else None,
            "ece_by_chance": calibration_noise(curve) if known else None,
            "log_loss": _log_loss_of(self._stated, self._kept) if known else None,
            "log_loss_raw": log_loss(raw, np.array(self._kept)) if known else None,
            "reliability": [asdict(b) for b in curve],
        }

    def state_dict(self) -> State:
        """Everything learnt."""
        return {
            "evidence": [z.tolist() for z in self._evidence], "kept": list(self._kept), "logits": list(self._logits),
            "stated": list(self._stated), "weights": self._weights.tolist(), "temperature": self.temperature,
        }  # fmt: skip

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self._evidence = deque((np.array(z) for z in state["evidence"]), maxlen=self.capacity)
        self._kept = deque(state["kept"], maxlen=self.capacity)
        self._logits = deque(state["logits"], maxlen=self.capacity)
        self._stated = deque(state["stated"], maxlen=self.capacity)
        self._weights, self.temperature = np.array(state["weights"]), state["temperature"]


def _with(values: deque[T], new: T) -> deque[T]:
    """A deque with one more at its end."""
    return deque([*values, new], maxlen=values.maxlen)


def _log_loss_of(stated: Sequence[float], kept: Sequence[float]) -> float:
    return log_loss(np.array([logit(p) for p in stated]), np.array(kept))
