"""A loss as half the square of residuals, or as close to one as a convex function of the outputs is.

Least squares: ``residual_fn(model, batch)`` returns r of shape (R,) or (R, C), and the loss is their mean square.  With
rho = sqrt(2 / M) r, M the number of entries, it is |rho|^2 / 2.

Convex: ``output_fn(model, batch)`` returns outputs z of shape (N,) or (N, C) and the loss as a function of them, a mean
of a convex function of every row.  With the gradient h and the Hessian B B' of a row, the generalized Gauss-Newton
model (Schraudolph, Neural Computation 14, 2002; Martens, JMLR 21, 2020) is that of residuals with the Jacobian
B' dz/dtheta and the value rho with B rho = h: again half a square, up to a constant.

Letters: ``N`` rows, ``C`` columns, ``K`` residuals per row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...keep.subject import OutputFn, ResidualFn
from ...weights import algebra as weights

WANTED = "residual_fn must return residuals of shape (R,) or (R, C), with a graph, whose mean square is the loss"
WANTED_OUTPUTS = (
    "output_fn must return (outputs of shape (N,) or (N, C), with a graph, and the loss as a convex function of them)"
)
#: Eigenvalues of a row's Hessian below this share of its largest are rounding.
RANK_TOLERANCE = 1e-10
#: The same against the largest of all rows, and against curvature one of a mean over rows: what second derivatives of
#: saturated outputs are off.
ROUNDING = 1e-14
#: Share of the largest eigenvalue that a negative one may have.
NEGATIVE = 1e-6


class ResidualError(TypeError):
    """What a user's residual function returned is no residuals; the message says what is wanted."""


@dataclass(frozen=True, slots=True)
class Point:
    """The loss at some weights, as half a square.

    Attributes:
        outputs: (N,) or (N, C), with a graph where it was asked for.
        loss: As the loss function has it.
        rho: (K * N,) residuals, those of the first kind first; in the widest type of the device.
        cotangents: K tensors of the outputs' shape: row (k, n) of the Jacobian is that of ``cotangents[k][n] . z[n]``.
    """

    outputs: Tensor
    loss: float
    rho: Tensor
    cotangents: tuple[Tensor, ...]

    def folded(self, z: Tensor) -> Tensor:
        """(K * N,) a change of the outputs as a change of the residuals."""
        wide = z.to(self.rho.dtype)
        return torch.cat([(c.to(wide.dtype) * wide).flatten(1).sum(1) if z.dim() > 1 else c * wide
                          for c in self.cotangents])  # fmt: skip


class LeastSquares:
    """Residuals of a model on a batch."""

    def __init__(self, residual_fn: ResidualFn) -> None:
        """Bind."""
        self._residual_fn = residual_fn

    def at(self, model: nn.Module, batch: Any) -> Point:
        """Residuals at the model's weights.

        Raises:
            ResidualError: what came back is no residuals.
        """
        r = checked(self._residual_fn(model, batch), WANTED)
        scale = math.sqrt(2.0 / max(r.numel(), 1))
        values = r.detach().to(weights.accumulate_dtype(r.device)) * scale
        columns = 1 if r.dim() == 1 else r.shape[1]
        rho = values if r.dim() == 1 else values.T.reshape(-1)
        ones = torch.zeros(len(r), columns, dtype=rho.dtype, device=r.device)
        cotangents = []
        for k in range(columns):
            seed = ones.clone()
            seed[:, k] = scale
            cotangents.append(seed[:, 0] if r.dim() == 1 else seed)
        return Point(r, 0.5 * float(rho @ rho), rho, tuple(cotangents))


class Convex:
    """A convex loss of a model's outputs on a batch."""

    def __init__(self, output_fn: OutputFn) -> None:
        """Bind."""
        self._output_fn = output_fn

    def at(self, model: nn.Module, batch: Any) -> Point:
        """Outputs at the model's weights, and the square that stands for their loss.

        Raises:
            ResidualError: what came back is no outputs with their loss, or the loss is not convex.
        """
        found = self._output_fn(model, batch)
        if not (isinstance(found, tuple | list) and len(found) == 2 and callable(found[1])):
            raise ResidualError(f"{WANTED_OUTPUTS}, not {_told(found)}")
        outputs = checked(found[0], WANTED_OUTPUTS)
        with torch.enable_grad():
            z = outputs.detach().to(weights.accumulate_dtype(outputs.device)).requires_grad_(True)
            loss = found[1](z)
            if not (isinstance(loss, Tensor) and loss.numel() == 1):
                raise ResidualError(f"{WANTED_OUTPUTS}; that loss is not {_told(loss)}")
            value, h, H = _row_hessians(loss, z)
        s, Q = torch.linalg.eigh(H)  # (N, C)
        # a saturated softmax has p - p^2 on its diagonal, which is off by the rounding of p, not of the difference
        largest, floor = float(s.max()), ROUNDING / len(z)
        if bool((s[:, 0] < -NEGATIVE * max(largest, 0.0) - floor).any()) or not largest >= -floor:
            raise ResidualError(f"{WANTED_OUTPUTS}; the Hessian of that loss has negative eigenvalues")
        kept = s > (RANK_TOLERANCE * s[:, -1:]).clamp(min=max(ROUNDING * largest, floor))
        root = torch.where(kept, s, torch.zeros_like(s)).clamp(min=0).sqrt()
        B = Q * root[:, None, :]  # (N, C, K)
        along = torch.einsum("ncj,nc->nj", Q, h)
        rho = torch.where(kept, along / torch.where(kept, root, torch.ones_like(root)), torch.zeros_like(along))
        cotangents = tuple(B[:, :, k] if outputs.dim() == 2 else B[:, 0, k] for k in range(B.shape[2]))
        return Point(outputs, value, rho.T.reshape(-1), cotangents)


def _row_hessians(loss: Tensor, z: Tensor) -> tuple[float, Tensor, Tensor]:
    """Loss, gradient (N, C) and Hessians (N, C, C) of a mean over rows."""
    (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
    columns = gradient.reshape(len(z), -1)
    H = torch.zeros(len(z), columns.shape[1], columns.shape[1], dtype=z.dtype, device=z.device)
    if columns.requires_grad:
        for c in range(columns.shape[1]):
            (row,) = torch.autograd.grad(columns[:, c].sum(), z, retain_graph=True, allow_unused=True)
            if row is not None:
                H[:, c] = row.reshape(len(z), -1)
    return float(loss.detach()), columns.detach(), (H + H.transpose(1, 2)) / 2


def checked(r: Any, wanted: str) -> Tensor:
    """What a user's function returned, if it is a matrix of real numbers with one row per residual.

    Raises:
        ResidualError: it is not; the message says what is wanted and what came.
    """
    fits = isinstance(r, Tensor) and r.dim() in (1, 2) and r.numel() > 0 and r.is_floating_point()
    if not fits:
        raise ResidualError(f"{wanted}, not {_told(r)}")
    if torch.is_grad_enabled() and not r.requires_grad:
        raise ResidualError(f"{wanted}, not a tensor without a graph: do not detach it or compute it under no_grad")
    found: Tensor = r
    return found


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}".removeprefix("torch.")
    return type(value).__name__
