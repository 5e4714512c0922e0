"""``quasi_newton``: a limited-memory BFGS step, made of what real steps compute anyway.

The secant model stays in the span of past displacements; a quasi-Newton step leaves it along the present
gradient.  With window means x, their gradients g and the pairs s = x' - x, y = g' - g of the last K windows,

    d = -H g,    H the BFGS matrix of those pairs over gamma I,   gamma = s'y / y'y of the newest pair

(two-loop recursion: Nocedal & Wright, Numerical Optimization, 2nd ed., algorithm 7.4).  The recursion
needs inner products of s, y and g only (vector-free L-BFGS, Chen, Wang & Zhou, NIPS 2014), which is just what a
predictor sees.  The jump goes from theta to x + d, so a column x - theta (the lag) takes the base optimizer's
last motion back where the step is better than it, and where neither is better than x.

Pairs without positive curvature are left out, as line searches would have avoided them.  It is meant for
full-batch training with windows of one step: every real step brings a pair, every forward a test.

Letters: ``K`` pairs; columns in the order s, y, lag, gradient.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..config import QuasiNewtonConfig
from ..records import BasisSpec, PhasePrediction, State, Window, zeros_like_coefficients
from ._common import linear_loss_trajectory, window_from_state, window_state

#: s'y has to exceed this share of |s| |y|: a pair with less has no curvature a step could trust.
MIN_CURVATURE = 1e-10


def two_loop(M: Tensor, Mg: Tensor, num_pairs: int) -> tuple[Tensor, float]:
    """-H g as coefficients of the columns s_0 .. s_(K-1), y_0 .. y_(K-1), newest first, and of g.

    Args:
        M: (2K, 2K) inner products of those columns.
        Mg: (2K,) their inner products with g.
        num_pairs: Pairs that hold data, the newest ones, at most K.

    Returns:
        (2K,) coefficients of the columns, and the coefficient of g.
    """
    # numpy: a hundred products of short vectors, at a fifth of what torch takes to dispatch each
    m, mg = M.numpy(), Mg.numpy()
    K = len(mg) // 2
    c, of_g = np.zeros(2 * K), 1.0
    norms = np.sqrt(np.maximum(m.diagonal(), 0.0))
    curvature = m[np.arange(K), K + np.arange(K)]
    curved = curvature > MIN_CURVATURE * norms[:K] * norms[K:]
    pairs = [i for i in range(num_pairs) if curved[i]]
    alphas = {}
    for i in pairs:  # newest to oldest
        alphas[i] = (m[i] @ c + of_g * mg[i]) / curvature[i]
        c[K + i] -= alphas[i]
    if pairs:
        newest = pairs[0]
        gamma = curvature[newest] / m[K + newest, K + newest]
        c, of_g = gamma * c, gamma * of_g
    for i in reversed(pairs):
        c[i] += alphas[i] - (m[K + i] @ c + of_g * mg[K + i]) / curvature[i]
    return torch.from_numpy(-c), -float(of_g)


class QuasiNewton:
    """The step of one global BFGS model over all groups (their products are summed)."""

    name = "quasi_newton"

    def __init__(self, config: QuasiNewtonConfig) -> None:
        """Args: config: pairs and the multiples to try."""
        self.config = config
        self.spec = BasisSpec(
            num_displacements=config.history, lag=True, gradient=True, curvature=True, differences=True
        )
        self._window: Window | None = None
        self._step: tuple[Tensor, float] | None = None  # of that window, once it was asked for

    @property
    def ready(self) -> bool:
        """After one pair."""
        return self._window is not None and self._window.num_columns >= 1

    def observe(self, window: Window) -> None:
        """Remember the window; the products hold all the rest."""
        self._window, self._step = window, None

    def predict(self, horizon: int) -> PhasePrediction:
        """The step, and shorter ones the gate may fall back on; ``horizon`` changes nothing but the claim."""
        window = self._window
        assert window is not None, "predict() before ready"
        first_extra = self.spec.first_extra
        lag, gradient = first_extra, first_extra + 1
        M = window.products.BB.sum(0)[:first_extra, :first_extra]
        Mg = window.products.Bg.sum(0)[:first_extra]
        if self._step is None:
            self._step = two_loop(M, Mg, window.num_columns)
        c, of_g = self._step
        slope = float(Mg @ c) + of_g * float(window.products.gg.sum())  # g'd: negative for a descent direction
        candidates = []
        for multiple in (*self.config.shrink, 0.0):  # 0: back to x
            coefficients = zeros_like_coefficients(window.products.num_groups, self.spec.num_columns)
            coefficients[:, :first_extra] = multiple * c
            coefficients[:, gradient] = multiple * of_g
            coefficients[:, lag] = 1.0
            candidates.append(coefficients)
        reduction = max(-slope / 2, 0.0)  # of a quadratic whose minimum along d lies at d
        trajectory = linear_loss_trajectory(window.loss, -reduction / max(horizon, 1), horizon)
        return PhasePrediction(
            coefficients=candidates[0],
            horizon=horizon,
            predicted_loss=trajectory[-1][1],
            loss_trajectory=trajectory,
            predicted_reduction=reduction,
            alternatives=tuple(candidates[1:]),
            max_scale=1.0,
            first_fit=True,
            way_back=True,
        )

    def memory_bytes(self) -> int:
        """A handful of numbers: the pairs belong to the basis."""
        return 0

    def state_dict(self) -> State:
        """The last window."""
        return {"window": window_state(self._window)}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self._window, self._step = window_from_state(state["window"]), None
