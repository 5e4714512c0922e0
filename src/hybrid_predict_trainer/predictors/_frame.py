"""A well-conditioned frame for displacements: Gram-Schmidt on the columns of the basis.

Raw displacement columns are nearly parallel, so optimal coefficients on them are huge, alternate in
sign and jump about.  In the Gram-Schmidt frame of the same columns, newest first,

    q_j = sum_k M[j, k] b_k,   target[j] = q_j . T / (length of the last displacements),

targets are of order one and a bounded answer is a bounded jump.  Because M is lower triangular, target
j needs inner products with the newest j columns only; the Gram matrix of a window j windows later
still holds those, so displacements up to ``J`` windows ahead become targets without one more pass over
the weights.  The lag x - theta comes after the displacements: half of the next displacement of a
window mean has already happened and is in it, the later ones are not.

Letters: ``G`` groups, ``K`` columns, ``J`` windows ahead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..records import BasisSpec, Window

#: J: how many windows ahead targets are kept; the longest arm of the horizon bandit is 4 N.
MAX_AHEAD = 4
#: Squared relative length of a direction under which the frame fades it out.
JITTER = 1e-6


@dataclass(frozen=True, slots=True)
class Frame:
    """Gram-Schmidt frame of the displacement columns, per group."""

    M: Tensor  # (G, K, K) rows q_j in columns
    inverse: Tensor  # (G, K, K) columns b_k in the frame: b_k = sum_j inverse[j, k] q_j
    length: Tensor  # (G,) root mean square of the last displacements' lengths

    @classmethod
    def of(cls, gram: Tensor) -> Frame:
        """From a Gram matrix (G, K, K).

        A jitter on the normalised Gram matrix fades near-dependent directions out smoothly: their q
        become shorter than one, which shrinks instead of amplifying.
        """
        squared = gram.diagonal(dim1=1, dim2=2).clamp(min=0)
        inverse = torch.where(squared > 0, squared.clamp(min=1e-300).rsqrt(), torch.zeros_like(squared))
        normal = inverse[:, :, None] * gram * inverse[:, None, :]
        missing = torch.diag_embed((squared <= 0).double())
        eye = torch.eye(normal.shape[1], dtype=torch.float64)
        # the factor of the jittered matrix exists whatever rounding did to the Gram matrix
        L, failed = torch.linalg.cholesky_ex(normal + missing + JITTER * eye)
        if bool(failed.any()):
            L, _ = torch.linalg.cholesky_ex(normal + missing + 1e-2 * eye)
        M = torch.linalg.solve_triangular(L, torch.diag_embed(inverse), upper=False)
        recent = squared[:, :3]  # one alone vanishes at the turning point of an oscillation
        length = (recent.sum(dim=1) / (recent > 0).sum(dim=1).clamp(min=1)).sqrt()
        return cls(torch.nan_to_num(M), torch.nan_to_num(L.mT * squared.sqrt()[:, None, :]), length)

    def project(self, dots: Tensor) -> Tensor:
        """Inner products with the columns (G, K) -> target (G, K); zero where nothing moved."""
        return (self.M @ dots[:, :, None])[:, :, 0] * self._per_length()[:, None]

    def express(self, coefficients: Tensor) -> Tensor:
        """Coefficients on the columns (..., G, K) -> the same vector in the frame (..., G, K)."""
        return (self.inverse @ coefficients[..., None])[..., 0] * self._per_length()[:, None]

    def _per_length(self) -> Tensor:
        return torch.where(self.length > 0, 1 / self.length.clamp(min=1e-300), torch.zeros_like(self.length))

    def coefficients(self, u: Tensor) -> Tensor:
        """Answer in the frame (G, K) -> coefficients on the columns (G, K)."""
        return (self.M.mT @ u.double()[:, :, None])[:, :, 0] * self.length[:, None]


def known_targets(spec: BasisSpec) -> Tensor:
    """(J, K) bool: whether the component along q_k of a displacement j + 1 windows ahead is observable."""
    j, k = torch.arange(MAX_AHEAD)[:, None], torch.arange(spec.num_columns)[None, :]
    # one window ahead the hindsight has all columns; later only what the ring still holds
    return (j == 0) | (k + j + 1 < spec.num_displacements)


def drift_rates(before: float, window: Window) -> Tensor:
    """(J,) how much longer the learning-rate plan makes the displacements ahead than the last one.

    A displacement joins the means of two windows, so it sees half of each one's learning rates.
    """
    past = 0.5 * (before + window.lr_integral) if before > 0 else window.lr_integral
    if not (past > 0 and math.isfinite(past) and math.isfinite(window.lr_ahead)):
        return torch.ones(MAX_AHEAD, dtype=torch.float64)
    rates = torch.full((MAX_AHEAD,), window.lr_ahead / past, dtype=torch.float64)
    rates[0] = 0.5 * (window.lr_integral + window.lr_ahead) / past
    return rates


def step_weights(num_windows: float) -> Tensor:
    """(J,) how often each of the steps ahead counts over a horizon of m windows; the last stands for all later."""
    full = torch.arange(MAX_AHEAD, dtype=torch.float64)
    weights = (num_windows - full).clamp(0.0, 1.0)
    weights[-1] = max(num_windows - (MAX_AHEAD - 1), 0.0)
    return weights
