"""How well each residual is told by all others: leaving one out, in closed form.

Residuals rho of a model that is linear in its weights, with the kernel K = A A' of their Jacobian, are fitted by ridge
regression with damping lambda.  Refitting without residual i and looking at what is left of it takes no refitting:

    e_i = [(K + lambda I)^-1 rho]_i / [(K + lambda I)^-1]_ii

(Allen, Technometrics 16, 1974; for kernels Rasmussen & Williams, Gaussian Processes for Machine Learning, 2006,
equation 5.12).  Where residuals are noise, e_i is at least as large as rho_i on average: the others say nothing of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def left_out_error(K: Tensor, rho: Tensor, damping: float) -> float:
    """Mean square of what is left of a residual that was left out, over the mean square of the residuals.

    Args:
        K: (R, R) symmetric, positive semidefinite up to rounding.
        rho: (R,), not all zero.
        damping: lambda, as a share of the trace of K; > 0.

    Returns:
        0 where the others tell all of a residual, 1 where they tell nothing of it, and more where what they tell leads
        astray.

    Raises:
        ArithmeticError: the damped kernel is not positive definite, or the ratio is not finite.
    """
    damped = K.clone()
    damped.diagonal().add_(damping * K.diagonal().sum())
    L, info = torch.linalg.cholesky_ex(damped)
    if int(info) != 0:
        raise ArithmeticError("the damped kernel is not positive definite")
    inverse = torch.cholesky_inverse(L)
    errors = (inverse @ rho) / inverse.diagonal()
    ratio = float(errors.square().mean() / rho.square().mean())
    if not math.isfinite(ratio):
        raise ArithmeticError("errors of residuals that were left out are not finite")
    return ratio
