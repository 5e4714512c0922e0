"""Correction of a prediction by what similar predictions got wrong before.

    r(state)  =  0.7 * sum_i w_i r_i   +  0.3 * ridge(state)         in coefficients (G, K), per step of horizon

with the top five stored residuals above a cosine of 0.7 and weights proportional to it; then scaled
to the horizon and bounded: |r| <= max_magnitude * |c| in the metric of weight space, from the Gram
matrices of the basis.  A correction is a row of coefficients for every group, so ``Basis.combine``
turns it into a delta for every predicted tensor; it goes through the gate like any jump.

Residuals are those of a *forecast* of the displacement (``hold``, ``linear``, learned predictors).  A
predictor that aims elsewhere than where plain training goes, such as ``secant``, has no use for them.

Letters: ``G`` groups, ``K`` columns, ``F`` features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..numerics.ridge import OnlineRidge
from ..records import BasisSpec, PhasePrediction, Residual, StateDict, zeros_like_coefficients
from .residuals import CAPACITIES, NUM_SIMILAR, SIMILARITY_THRESHOLD, ResidualStore, growth

#: Share of the retrieved residuals against the linear model's (the earlier implementation's default).
RETRIEVED_SHARE = 0.7
#: Bound on a correction, in lengths of the predicted jump (likewise).
MAX_CORRECTION_MAGNITUDE = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """What to add to a prediction, and where it comes from (for the log)."""

    coefficients: Tensor  # (G, K)
    loss: float = 0.0
    magnitude: float = 0.0  # length over that of the predicted jump, after bounding
    num_similar: int = 0
    weights: tuple[float, ...] = ()  # of the similar residuals
    nothing: bool = False  # the coefficients are zero, and nobody need look


class Corrector(Protocol):
    """Says what a prediction will have got wrong."""

    def correct(self, prediction: PhasePrediction, features: Tensor, BB: Tensor) -> Correction:
        """Correction of a prediction made in a state (F,), on columns with Gram matrices (G, K, K)."""

    def observe(self, residual: Residual) -> None:
        """Learn from a prediction whose window has closed."""

    def memory_bytes(self) -> int:
        """Bytes held."""

    def state_dict(self) -> StateDict:
        """Everything learnt."""

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""


class NoCorrection:
    """Null object: predictions stay as they are."""

    def correct(self, prediction: PhasePrediction, features: Tensor, BB: Tensor) -> Correction:
        """Zero."""
        return Correction(coefficients=torch.zeros_like(prediction.coefficients), nothing=True)

    def observe(self, residual: Residual) -> None:
        """Nothing is learnt."""

    def memory_bytes(self) -> int:
        """None."""
        return 0

    def state_dict(self) -> StateDict:
        """Nothing."""
        return {}

    def load_state_dict(self, state: StateDict) -> None:
        """Nothing."""


def length(coefficients: Tensor, BB: Tensor) -> float:
    """|sum_k c_k b_k| over all groups, from coefficients (G, K) and Gram matrices (G, K, K)."""
    return math.sqrt(max(float(torch.einsum("gk,gkl,gl->", coefficients, BB, coefficients)), 0.0))


def bounded(coefficients: Tensor, BB: Tensor, limit: float) -> Tensor:
    """Coefficients shortened to at most ``limit`` in the metric of weight space; zeros if not finite."""
    size = length(coefficients, BB)
    if not (math.isfinite(size) and math.isfinite(limit) and bool(torch.isfinite(coefficients).all())):
        return torch.zeros_like(coefficients)
    return coefficients * (limit / size) if size > limit else coefficients


def apply(prediction: PhasePrediction, correction: Correction) -> PhasePrediction:
    """The corrected prediction; the uncorrected one stays the gate's first alternative."""
    if correction.nothing or not bool(correction.coefficients.any()):
        if correction.loss == 0:
            return prediction
        return replace(prediction, predicted_loss=prediction.predicted_loss + correction.loss)
    low, high = prediction.loss_interval
    return replace(
        prediction,
        coefficients=prediction.coefficients + correction.coefficients.to(prediction.coefficients.dtype),
        alternatives=(prediction.coefficients, *prediction.alternatives),
        predicted_loss=prediction.predicted_loss + correction.loss,
        loss_interval=(low + correction.loss, high + correction.loss),
        predicted_reduction=max(prediction.predicted_reduction - correction.loss, 0.0),
    )


class ResidualCorrector:
    """Similar residuals and an online linear model on the state, blended and bounded."""

    def __init__(
        self, spec: BasisSpec, num_groups: int, num_features: int, *,
        capacity: int = CAPACITIES["medium"], max_magnitude: float = MAX_CORRECTION_MAGNITUDE,
        retrieved_share: float = RETRIEVED_SHARE, threshold: float = SIMILARITY_THRESHOLD,
        limit: int = NUM_SIMILAR, l2: float = 0.1, forgetting: float = 0.95,
    ) -> None:  # fmt: skip
        """Empty store, untrained model.

        Args:
            spec: Columns of the basis.
            num_groups: G.
            num_features: F.
            capacity: Residuals kept.
            max_magnitude: Bound, in lengths of the predicted jump and shares of the predicted loss.
            retrieved_share: Weight of the retrieved residuals; the linear model has the rest.
            threshold: Least cosine.
            limit: Most residuals used.
            l2: Ridge strength of the linear model.
            forgetting: Weight of a residual one residual later, in the linear model.
        """
        self.spec, self.num_groups = spec, num_groups
        self.max_magnitude, self.retrieved_share = max_magnitude, retrieved_share
        self.threshold, self.limit = threshold, limit
        self.store = ResidualStore(capacity)
        outputs = num_groups * spec.num_columns + 1  # coefficients and the loss, per step of horizon
        self._linear = OnlineRidge(num_features, outputs, l2=l2, forgetting=forgetting)

    def observe(self, residual: Residual) -> None:
        """Store the residual and teach the linear model; what is not finite is left out."""
        if residual.horizon > 0 and self.store.add(residual):
            per_step = residual.coefficients.double() * growth(self.spec, 1 / residual.horizon)
            loss = torch.tensor([residual.loss / residual.horizon], dtype=torch.float64)
            self._linear.observe(residual.features, torch.cat([per_step.reshape(-1), loss]))

    def correct(self, prediction: PhasePrediction, features: Tensor, BB: Tensor) -> Correction:
        """Zero for an empty store; never longer than ``max_magnitude`` predicted jumps.

        Args:
            prediction: What the predictor says, for Y steps.
            features: (F,) state it was made in.
            BB: (G, K, K) Gram matrices of the basis the prediction is on.
        """
        zero = zeros_like_coefficients(self.num_groups, self.spec.num_columns)
        if prediction.coefficients.shape != zero.shape:
            return Correction(coefficients=torch.zeros_like(prediction.coefficients))  # the gate refuses it
        if not len(self.store) or not bool(torch.isfinite(features).all()):
            return Correction(coefficients=zero)
        Y = prediction.horizon
        similar = self.store.find_similar(features, threshold=self.threshold, limit=self.limit)
        coefficients, loss = zero, 0.0
        for weight, residual in similar:
            coefficients = coefficients + weight * residual.coefficients * growth(self.spec, Y / residual.horizon)
            loss += weight * residual.loss * Y / residual.horizon
        modelled = self._linear.predict(features)
        linear = modelled[:-1].reshape(zero.shape) * growth(self.spec, Y)
        share = self.retrieved_share
        coefficients = share * coefficients + (1 - share) * linear
        loss = share * loss + (1 - share) * float(modelled[-1]) * Y
        coefficients = coefficients * (BB.diagonal(dim1=1, dim2=2) > 0)  # columns that hold nothing yet
        jump = length(prediction.coefficients.double(), BB)
        coefficients = bounded(coefficients, BB, self.max_magnitude * jump)
        return Correction(
            coefficients=coefficients,
            loss=_clamped(loss, self.max_magnitude * abs(prediction.predicted_loss)),
            magnitude=length(coefficients, BB) / jump if jump > 0 else 0.0,
            num_similar=len(similar),
            weights=tuple(weight for weight, _ in similar),
        )

    def memory_bytes(self) -> int:
        """Bytes of the store and the linear model."""
        return self.store.memory_bytes() + self._linear.memory_bytes()

    def state_dict(self) -> StateDict:
        """Store and linear model."""
        return {"store": self.store.state_dict(), "linear": self._linear.state_dict()}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.store.load_state_dict(state["store"])
        self._linear.load_state_dict(state["linear"])


def _clamped(value: float, limit: float) -> float:
    return min(max(value, -limit), limit) if math.isfinite(value) and math.isfinite(limit) else 0.0
