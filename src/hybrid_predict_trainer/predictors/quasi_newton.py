"""``quasi_newton``: a self-scaled limited-memory BFGS step, made of what real steps compute anyway.

The secant model stays in the span of past displacements; a quasi-Newton step leaves it along the present
gradient.  With window means x, their gradients g and the pairs s = x' - x, y = g' - g of the last K windows,

    d = -H g,    H the BFGS matrix of those pairs over gamma I.

Before each update H is divided by

    tau = min(1, s'y / s'B s),    B = H^-1,

the self-scaling of Al-Baali (Computational Optimization and Applications 9, 1998) after Oren & Luenberger (1974):
where the loss curves less than H believes, all of H grows, and not only its part along s.  On stiff networks that is
worth a factor of ten to a hundred (LOG.md; Urban, Stefanou & Pons, J. Comput. Phys. 523, 2025, report the same of dense
matrices).  s'B s costs nothing: a step that was taken, s = t d, has B s = -t g.

The compact form (Byrd, Nocedal & Schnabel, Math. Programming 63, 1994) with the scalings put in, pairs oldest first,
R the upper triangle of S'Y, D its diagonal, W = diag(w_i), w_i = 1 / prod_(j > i) tau_j, u = gamma / prod_j tau_j:

    R a = S'g,    R' b = W D a - u (Y'g - Y'Y a),    H g = u (g - Y a) + S b.

It needs inner products of s, y and g only (vector-free L-BFGS, Chen, Wang & Zhou, NIPS 2014), which is just what a
predictor sees, and two triangular solutions, of microseconds.  gamma is the largest s'y / y'y in memory: the pairs
know their directions, and in the others a scale too small costs more than one too large.

The jump goes from theta to x + d, so a column x - theta (the lag) takes the base optimizer's last motion back where
the step is better than it, and where neither is better than x.  Pairs without positive curvature are left out, as
line searches would have avoided them.  It is meant for full-batch training with windows of one step: every real step
brings a pair, every forward a test.

Letters: ``K`` pairs; columns in the order s, y, lag, gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config.settings import HybridTrainerConfig, QuasiNewtonConfig
from ..observe.basis import FLOAT64_BELOW
from ..observe.window import window_from_state, window_state
from ..records import BasisSpec, PhasePrediction, Products, StateDict, Window
from ._common import linear_loss_trajectory

Array = NDArray[Any]

#: s'y has to exceed this share of |s| |y|: a pair with less has no curvature a step could trust.
MIN_CURVATURE = 1e-10

#: Pairs kept whatever the memory: with fewer it is hardly better than the gradient.
MIN_HISTORY = 20

#: How far a displacement may be from a multiple of the step that was asked for, relative to its length.
SAME_STEP = 1e-3

#: Scalings of one update are cut here: a smaller one says that the pair is rounding noise.
MIN_TAU = 1e-6

#: Most that all scalings in memory together let the matrix grow, as a logarithm: beyond it numbers would overflow.
MAX_LOG_GROWTH = 200.0


def history_that_fits(config: QuasiNewtonConfig, num_weights: int) -> int:
    """K: as many pairs as the memory holds, at most those asked for."""
    per_pair = 2 * (8 if num_weights < FLOAT64_BELOW else 4) * max(num_weights, 1)
    return min(config.history, max(MIN_HISTORY, int(config.pairs_memory_mb * 2**20 / per_pair)))


def with_history_that_fits(config: HybridTrainerConfig, num_weights: int) -> HybridTrainerConfig:
    """The settings with the pairs that a model of this size leaves memory for."""
    fitting = history_that_fits(config.predictor.quasi_newton, num_weights)
    table = replace(config.predictor.quasi_newton, history=fitting)
    return replace(config, predictor=replace(config.predictor, quasi_newton=table))


def direction(
    SY: Tensor, YY: Tensor, Sg: Tensor, Yg: Tensor, log_tau: Tensor, gamma: float, left_out: Array | None = None
) -> tuple[Tensor, Tensor, float]:
    """-H g as coefficients of s, of y and of g, from inner products; pairs oldest first.

    A pair that is left out gets the coefficients zero by a row and a column of the unit matrix: a copy of all products
    without those of a few pairs would take longer than all the rest.

    Args:
        SY: (K, K) s_i'y_j.
        YY: (K, K) y_i'y_j.
        Sg: (K,) s_i'g.
        Yg: (K,) y_i'g.
        log_tau: (K,) logarithms of the scalings, at most 0; all 0: L-BFGS.
        gamma: Of the matrix gamma I that the updates start from.
        left_out: (n,) places of pairs that say nothing.
    """
    # a triangular solution reads nothing below the diagonal; numpy writes single rows several times faster
    R, tau = SY.contiguous(), log_tau.numpy()
    D = R.numpy().diagonal()  # of the copy, if it is one: a number per row of all products would be one read each
    if left_out is not None:
        D = D.copy()
        R = SY.clone(memory_format=torch.contiguous_format) if R is SY else R
        changed = R.numpy()
        changed[left_out] = 0.0
        changed[:, left_out] = 0.0
        changed[left_out, left_out] = 1.0
        tau, Sg = tau.copy(), Sg.clone()
        D[left_out], tau[left_out], Sg.numpy()[left_out] = 0.0, 0.0, 0.0
    a = torch.linalg.solve_triangular(R, Sg[:, None], upper=True)[:, 0]
    total = float(tau.sum())
    growth = np.minimum(tau.cumsum() - total, MAX_LOG_GROWTH)  # by the scalings after each pair
    u = gamma * math.exp(min(-total, MAX_LOG_GROWTH))
    right = np.exp(growth) * D * a.numpy() - u * (Yg - YY @ a).numpy()
    if left_out is not None:
        right[left_out] = 0.0
    b = torch.linalg.solve_triangular(R.T, torch.from_numpy(right)[:, None], upper=False)[:, 0]
    return -b, u * a, -u


@dataclass(frozen=True, slots=True)
class Step:
    """A step d = -H g, and what tells whether the next displacement is a multiple of it.

    Attributes:
        c: (2K,) coefficients of s and y, in the order of the ring.
        of_g: of the gradient.
        slope: g'd, negative for a descent direction.
        along: y'd for the newest y.
    """

    c: Tensor
    of_g: float
    slope: float
    along: float


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # what overflows is no curvature, and is left out
def step_of(
    products: Products, log_tau: Tensor, num_pairs: int, num_places: int, diagonals: Array | None = None
) -> Step:
    """The step of the pairs in memory.

    Args:
        products: Summed over groups.
        log_tau: (K,) by place in the ring.
        num_pairs: Pairs that hold data, the newest ones.
        num_places: K.
        diagonals: :func:`diagonals_of` the products, where they are known.
    """
    K, n = num_places, num_pairs
    # the same memory: numpy takes a third of torch's time for a few hundred numbers
    M, Mg = products.BB[0].numpy(), products.Bg[0].numpy()
    first = (products.newest - n + 1) % K
    SY, YY = M[:K, K : 2 * K], M[K : 2 * K, K : 2 * K]
    squares, s_y, y_y = diagonals_of(products, K) if diagonals is None else diagonals
    kept = oldest_first(s_y > MIN_CURVATURE * np.sqrt(np.maximum(squares * y_y, 0.0)), first, n)
    c, of_g = np.zeros((2, K)), -1.0
    num_kept = int(np.count_nonzero(kept))
    if num_kept:
        ratios = oldest_first(s_y, first, n)[kept] / oldest_first(y_y, first, n)[kept]
        Sg, Yg, tau = (oldest_first(v, first, n) for v in (Mg[:K], Mg[K : 2 * K], log_tau.numpy()))
        of_s, of_y, of_g = direction(
            torch.from_numpy(square(SY, first, n)), torch.from_numpy(square(YY, first, n)), torch.from_numpy(Sg),
            torch.from_numpy(Yg), torch.from_numpy(tau), float(ratios.max()),
            None if num_kept == n else np.flatnonzero(~kept),
        )  # fmt: skip
        for piece, start in by_place(c, first, n):
            at = slice(start, start + piece.shape[1])
            piece[0], piece[1] = of_s.numpy()[at], of_y.numpy()[at]
    told, newest_y = c.reshape(2 * K), K + products.newest
    slope = float(Mg[: 2 * K] @ told) + of_g * float(products.gg[0])
    along = float(M[newest_y, : 2 * K] @ told) + of_g * float(Mg[newest_y])
    return Step(torch.from_numpy(told), of_g, slope, along)


def diagonals_of(products: Products, num_places: int) -> Array:
    """(3, K) |s|^2, s'y and |y|^2 of every pair by place in the ring, as a copy."""
    K, M = num_places, products.BB[0].numpy()
    return np.stack([M.diagonal()[:K], M[:K, K : 2 * K].diagonal(), M.diagonal()[K : 2 * K]])


def by_place(ring: Array, first: int, n: int) -> list[tuple[Array, int]]:
    """Views of (..., K) numbers by place in the ring, oldest first, with how many older ones there are before each.

    Args:
        ring: By place.
        first: Place of the oldest.
        n: That hold data.
    """
    room = ring.shape[-1] - first
    if n <= room:
        return [(ring[..., first : first + n], 0)]
    return [(ring[..., first:], 0), (ring[..., : n - room], room)]


def oldest_first(ring: Array, first: int, n: int) -> Array:
    """(n,) of (K,) numbers by place in the ring; a view where the ring has not come round."""
    pieces = [piece for piece, _ in by_place(ring, first, n)]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def square(M: Array, first: int, n: int) -> Array:
    """(n, n) of (K, K) products by place in the ring, oldest first; a view where the ring has not come round."""
    columns = [piece for piece, _ in by_place(M, first, n)]
    if len(columns) == 1:
        return columns[0][first : first + n]
    found = np.empty((n, n))
    for column, (_, start) in zip(columns, by_place(M, first, n), strict=True):
        for piece, above in by_place(column.T, first, n):
            found[above : above + piece.shape[1], start : start + column.shape[1]] = piece.T
    return found


def log_scaling(products: Products, step: Step | None, num_places: int) -> float:
    """log tau of the newest pair: 0 where its displacement is not a multiple of the step before it.

    With s = t d it is s'g_before = t d'g_before, which tells t; that s'y is t d'y for another y confirms it.
    """
    if step is None or num_places < 2 or not step.slope < 0:
        return 0.0
    K, place = num_places, products.newest
    M = products.BB[0].numpy()  # single numbers are read several times faster there
    before = K + (place - 1) % K
    s_y = float(M[place, K + place])
    s_g = float(products.Bg.numpy()[0, place]) - s_y  # g_before = g - y
    t = s_g / step.slope
    length = math.sqrt(max(float(M[place, place] * M[before, before]), 0.0))
    if t <= 0 or s_y <= 0 or not abs(float(M[place, before]) - t * step.along) <= SAME_STEP * length:
        return 0.0
    return math.log(min(1.0, max(s_y / (-t * s_g), MIN_TAU)))


class QuasiNewton:
    """The step of one global BFGS model over all groups."""

    name = "quasi_newton"

    def __init__(self, config: QuasiNewtonConfig) -> None:
        """Args: config: pairs and the multiples to try."""
        self.config = config
        self._scales = config.self_scaling and config.update != "bfgs"
        self.spec = BasisSpec(
            num_displacements=config.history, lag=True, gradient=True, curvature=True, differences=True, pooled=True,
            features=False,
        )  # fmt: skip
        self._window: Window | None = None
        self._step: Step | None = None  # of that window, once it was asked for
        self._asked: tuple[Step, PhasePrediction] | None = None  # the last answer, and the step that it tells
        self._log_tau = torch.zeros(config.history, dtype=torch.float64)  # by place in the ring
        self._num_pairs = 0  # newest ones that are believed
        self._diagonals: Array | None = None  # of the products, by place in the ring; each number is a read far away

    @property
    def ready(self) -> bool:
        """After one pair."""
        return self._window is not None and self._window.num_columns >= 1

    def observe(self, window: Window) -> None:
        """Remember the window and how its pair scales the matrix; the products hold all the rest."""
        if window.refused:  # no multiple of the step helped: what these pairs say no longer holds here
            self._num_pairs, self._step = 0, None
        if window.num_columns:
            products = window.products
            self._num_pairs = min(self._num_pairs + 1, self.config.history)
            scaling = log_scaling(products, self._step, self.config.history) if self._scales else 0.0
            self._log_tau.numpy()[products.newest] = scaling
            self._follow(products)
        self._window, self._step, self._asked = window, None, None

    def _follow(self, products: Products) -> None:
        """Read the three numbers of the newest pair beside those of the others."""
        K, newest = self.config.history, products.newest
        if self._diagonals is None:
            self._diagonals = diagonals_of(products, K)
            return
        M, slot = products.BB[0].numpy(), K + newest
        self._diagonals[:, newest] = M[newest, newest], M[newest, slot], M[slot, slot]

    def predict(self, horizon: int) -> PhasePrediction:
        """The step, and shorter ones the gate may fall back on; ``horizon`` changes nothing but the claim."""
        window = self._window
        assert window is not None, "predict() before ready"
        lag = self.spec.first_extra
        if self._step is None:
            self._step = step_of(window.products, self._log_tau, self._num_pairs, self.config.history, self._diagonals)
        step = self._step
        if self._asked is not None and self._asked[0] is step and self._asked[1].horizon == horizon:
            return self._asked[1]  # a proposal is looked at before it is made
        multiples = np.array((*self.config.shrink, 0.0))[:, None]  # 0: back to x
        coefficients = np.empty((len(multiples), self.spec.num_columns))
        np.multiply(multiples, newest_first(step.c.numpy(), window.products.newest), out=coefficients[:, :lag])
        coefficients[:, lag] = 1.0
        coefficients[:, lag + 1 : lag + 2] = multiples * step.of_g
        candidates = tuple(torch.from_numpy(coefficients[i : i + 1]) for i in range(len(coefficients)))
        reduction = max(-step.slope / 2, 0.0)  # of a quadratic whose minimum along d lies at d
        trajectory = linear_loss_trajectory(window.loss, -reduction / max(horizon, 1), horizon)
        prediction = PhasePrediction(
            coefficients=candidates[0],
            horizon=horizon,
            predicted_loss=trajectory[-1][1],
            loss_trajectory=trajectory,
            predicted_reduction=reduction,
            alternatives=candidates[1:],
            max_scale=1.0,
            first_fit=True,
            way_back=True,
        )
        self._asked = step, prediction
        return prediction

    def memory_bytes(self) -> int:
        """A handful of numbers: the pairs belong to the basis."""
        return 0

    def state_dict(self) -> StateDict:
        """The last window, its step and the scalings."""
        step = self._step
        told = None if step is None else {"c": step.c, "of_g": step.of_g, "slope": step.slope, "along": step.along}
        return {
            "window": window_state(self._window),
            "step": told,
            "log_tau": self._log_tau.clone(),
            "num_pairs": self._num_pairs,
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self._window = window_from_state(state["window"])
        self._step = None if state["step"] is None else Step(**state["step"])
        self._log_tau, self._num_pairs = state["log_tau"].clone(), state["num_pairs"]
        self._diagonals = None


def newest_first(by_place: Array, newest: int) -> Array:
    """(2K,) numbers of s and y by place in the ring -> in the order of :class:`..records.BasisSpec`."""
    ring = by_place.reshape(2, -1)
    # from the newest down to the first place, then from the last place down to the one after the newest
    return np.concatenate([ring[:, newest::-1], ring[:, :newest:-1]], axis=1).reshape(-1)
