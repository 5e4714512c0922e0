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
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..numerics.calibration import (
    EPSILON,
    Array,
    _log_loss_of,
    calibration_error,
    calibration_noise,
    debiased_error,
    fit_logistic,
    fit_temperature,
    log_loss,
    logit,
    monotone_curve,
    reliability_curve,
    scaled,
)
from ..records import StateDict

#: Outcomes of which one more changes next to nothing: a fit waits for so many times fewer of them than are known.
MANY = 64
#: Numbers that :meth:`Evidence.features` gives.
NUM_FEATURES = 5
_LARGEST = logit(1 - EPSILON)


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

    def state_dict(self) -> StateDict:
        """Plain numbers."""
        return {
            "forgetting": self.forgetting, "num_outcomes": self.num_outcomes,
            "successes": self.successes, "failures": self.failures,
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.forgetting, self.num_outcomes = state["forgetting"], state["num_outcomes"]
        self.successes, self.failures = state["successes"], state["failures"]


# ---- probabilities ------------------------------------------------------------------------------


# ---- reliability --------------------------------------------------------------------------------


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
        # (n, F + 3): evidence, outcome, logit of the logistic before the outcome was learnt, and what was stated then.
        # It is made anew with every outcome: an interruption finds it with the outcome or without
        self._outcomes = np.zeros((0, NUM_FEATURES + 3))
        self._weights = np.array(self.PRIOR)
        self.temperature = 1.0
        self._num_new = 0  # outcomes since the last fit

    def _logit(self, features: Array) -> float:
        return min(max(float(features @ self._weights), -_LARGEST), _LARGEST)

    def predict(self, evidence: Evidence) -> float:
        """Probability in (0, 1) that the jump will be kept and pay."""
        return self._stated_of(self._logit(evidence.features()))

    def _stated_of(self, logit_of_it: float) -> float:
        return float(scaled(np.array(logit_of_it), self.temperature))

    def observe(self, evidence: Evidence, kept: bool) -> None:
        """Score what would have been said, then learn the outcome.

        A fit of 500 outcomes takes some 0.2 ms, as much as a step of a small model.
        """
        features = evidence.features()
        n = min(len(self._outcomes) + 1, self.capacity)
        outcomes = np.empty((n, NUM_FEATURES + 3))
        outcomes[:-1] = self._outcomes[len(self._outcomes) - n + 1 :]
        known_before = self._logit(features)
        outcomes[-1] = (*features, float(kept), known_before, self._stated_of(known_before))
        self._outcomes, self._num_new = outcomes, self._num_new + 1
        if self._num_new < n // MANY:
            return
        known = n > MANY  # one outcome more moves the minimum little then: it is looked for from where it was
        self._weights = fit_logistic(
            self._evidence, self._kept, np.array(self.PRIOR), self.prior_precision, self._weights if known else None
        )
        self.temperature = fit_temperature(
            self._logits, self._kept, prior_weight=self.prior_weight, start=self.temperature if known else None
        )
        self._num_new = 0

    @property
    def _evidence(self) -> Array:
        return np.ascontiguousarray(self._outcomes[:, :NUM_FEATURES])

    @property
    def _kept(self) -> Array:
        return self._outcomes[:, NUM_FEATURES].copy()

    @property
    def _logits(self) -> Array:
        return self._outcomes[:, NUM_FEATURES + 1].copy()

    @property
    def _stated(self) -> Array:
        return self._outcomes[:, NUM_FEATURES + 2].copy()

    @property
    def num_outcomes(self) -> int:
        """Outcomes kept."""
        return len(self._outcomes)

    def report(self, num_bins: int = 10) -> dict[str, Any]:
        """Calibration of the probabilities as they were stated, JSON-able; null where nothing is known."""
        stated, kept = self._stated.tolist(), self._kept.tolist()
        curve = reliability_curve(stated, kept, num_bins)
        adaptive = reliability_curve(stated, kept, num_bins, "mass")
        known = self.num_outcomes > 0
        return {
            "num_outcomes": self.num_outcomes,
            "temperature": self.temperature,
            "ece": calibration_error(curve) if known else None,
            "ece_adaptive": calibration_error(adaptive) if known else None,
            "ece_sweep": calibration_error(monotone_curve(stated, kept)) if known else None,
            "ece_debiased": debiased_error(adaptive) if self.num_outcomes >= 2 * num_bins else None,
            "ece_by_chance": calibration_noise(curve) if known else None,
            "log_loss": _log_loss_of(stated, kept) if known else None,
            "log_loss_raw": log_loss(self._evidence[:, 0], self._kept) if known else None,
            "reliability": [asdict(b) for b in curve],
        }

    def state_dict(self) -> StateDict:
        """Everything learnt."""
        return {
            "evidence": self._evidence.tolist(), "kept": self._kept.tolist(), "logits": self._logits.tolist(),
            "stated": self._stated.tolist(), "weights": self._weights.tolist(), "temperature": self.temperature,
            "num_new": self._num_new,
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        evidence = np.array(state["evidence"], dtype=np.float64).reshape(-1, NUM_FEATURES)
        columns = [evidence, *(np.array(state[name], dtype=np.float64) for name in ("kept", "logits", "stated"))]
        self._outcomes = np.column_stack(columns)[-self.capacity :].copy()
        self._weights, self.temperature = np.array(state["weights"]), state["temperature"]
        self._num_new = state.get("num_new", 0)  # an older checkpoint: every outcome was learnt at once
