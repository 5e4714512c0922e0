"""``secant``: a multi-secant quadratic model of the loss in the span of the trajectory.

Training passes through points x_i with gradients g_i that it computes anyway.  Differences of
successive window means, S = [x_{i+1} - x_i] and Y = [g_{i+1} - g_i], are samples of the Hessian:
for a quadratic loss Y = H S.  So curvature on span(S) is known from inner products alone,

    B = sym(S' Y),   orthonormalised on the part of the span that is above rounding noise,

and with eigenpairs (mu, V) of B the model's minimiser in that span is

    d = -S V diag(1 / max(|mu|, lambda max |mu|)) V' S' g.

|mu| instead of mu makes negative curvature a direction to leave, not to approach (saddle-free
Newton, arXiv 1406.2572); lambda is the damping.  For a finite horizon the factor 1 / mu becomes
(1 - (1 - eta mu)^Y) / mu: the closed form of Y gradient steps of size eta in the lazy regime.
It costs no gradient of its own.

Letters: ``K`` secant pairs, ``R`` directions kept after orthonormalisation, ``G`` groups.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config.settings import SecantConfig
from ..observe.window import window_from_state, window_state
from ..records import BasisSpec, PhasePrediction, StateDict, Window, zeros_like_coefficients
from ._common import TRAJECTORY_POINTS


def orthonormaliser(gram: Tensor, tolerance: float) -> Tensor:
    """(K, K) Gram matrix -> (K, R) map T with T' gram T = I, short directions dropped.

    Args:
        gram: Positive semi-definite, any scale.
        tolerance: Directions shorter than this share of the longest (after the columns are
            normalised) are taken for rounding noise.
    """
    scale = gram.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    lengths, vectors = torch.linalg.eigh(inverse[:, None] * gram * inverse)
    keep = lengths > max(tolerance**2, 1e-14) * lengths[-1].clamp(min=1e-300)
    T: Tensor = inverse[:, None] * vectors[:, keep] / lengths[keep].sqrt()
    return T


def decay_factor(curvature: Tensor, horizon: float, step_size: float) -> Tensor:
    """(1 - (1 - eta mu)^Y) / mu elementwise for mu > 0; 1 / mu for an infinite horizon."""
    if not math.isfinite(horizon):
        return 1 / curvature
    return (1 - (1 - (step_size * curvature).clamp(max=1.0)) ** horizon) / curvature


def quadratic_model(BB: Tensor, BY: Tensor, Bg: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Curvatures mu (R,), their directions in coefficients (K, R), and slopes along them (R,)."""
    T = orthonormaliser(BB, tolerance)
    curvature = T.T @ ((BY + BY.T) / 2) @ T
    mu, V = torch.linalg.eigh((curvature + curvature.T) / 2)
    directions = T @ V
    return mu, directions, directions.T @ Bg


def damped_step(mu: Tensor, slopes: Tensor, damping: float, horizon: float, step_size: float) -> Tensor:
    """Steps (R,) along the eigendirections."""
    if not mu.numel():  # nothing moved: no direction is above rounding noise
        return torch.zeros_like(slopes)
    floor = damping * mu.abs().max().clamp(min=1e-300)
    return -slopes * decay_factor(mu.abs().clamp(min=floor), horizon, step_size)


def effective_step_size(Bg: Tensor, gg: float, num_steps: int) -> float:
    """eta: the gradient-descent step that would have made the last displacement's progress."""
    return max(-float(Bg[0]) / (num_steps * gg), 0.0) if gg > 0 else 0.0


class Secant:
    """One global quadratic model over all groups (their products are summed)."""

    name = "secant"

    def __init__(self, config: SecantConfig) -> None:
        """Args: config: number of pairs, damping, rank tolerance."""
        self.config = config
        self.spec = BasisSpec(num_displacements=config.num_displacements, curvature=True)
        self._window: Window | None = None

    @property
    def ready(self) -> bool:
        """After two pairs: one pair is a line, and a line search along it is ``hold``'s."""
        return self._window is not None and self._window.num_columns >= 2

    def observe(self, window: Window) -> None:
        """Remember the window; the products hold all the rest."""
        self._window = window

    def predict(self, horizon: int) -> PhasePrediction:
        """Step of the model with each damping, the most careful first.

        By default the step goes to the (damped) minimum whatever the horizon, because the gate tests
        its length anyway and the finite-horizon factor was measured to be worse (LOG.md).
        """
        window = self._window
        assert window is not None, "predict() before ready"
        n, K = window.num_columns, self.spec.num_columns
        products = window.products
        BB, BY, Bg = products.BB.sum(0)[:n, :n], products.BY.sum(0)[:n, :n], products.Bg.sum(0)[:n]
        mu, directions, slopes = quadratic_model(BB, BY, Bg, self.config.rank_tolerance)
        step_size = effective_step_size(Bg, float(products.gg.sum()), window.num_steps)
        reach = float(horizon) if self.config.finite_horizon else math.inf
        candidates, reductions = [], []
        for damping in self.config.damping:
            step = damped_step(mu, slopes, damping, reach, step_size)
            coefficients = zeros_like_coefficients(products.num_groups, K)
            coefficients[:, :n] = directions @ step
            candidates.append(coefficients)
            reductions.append(max(float(-(slopes @ step + 0.5 * (mu * step) @ step)), 0.0))
        reduction = reductions[0]
        loss = window.loss
        trajectory = {
            max(1, round(f * horizon)): loss - reduction * (1 - math.exp(-3 * f)) / (1 - math.exp(-3))
            for f in TRAJECTORY_POINTS
        }
        return PhasePrediction(
            coefficients=candidates[0],
            horizon=horizon,
            predicted_loss=loss - reduction,
            loss_trajectory=tuple(trajectory.items()),
            predicted_reduction=reduction,
            alternatives=tuple(candidates[1:]),
            max_scale=self.config.max_scale,
        )

    def memory_bytes(self) -> int:
        """A handful of numbers: the pairs belong to the basis."""
        return 0

    def state_dict(self) -> StateDict:
        """The last window."""
        return {"window": window_state(self._window)}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self._window = window_from_state(state["window"])
