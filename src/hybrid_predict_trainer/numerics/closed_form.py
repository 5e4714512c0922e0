"""Training of a linearised model in closed form: gradient flow for a time, its damped limit, how to solve for them.

With residuals rho (scaled so that the loss is |rho|^2 / 2) and their Jacobian A at theta, the model f(theta + d) is
taken for linear in d.  Gradient flow from theta then has a closed form (Jacot, Gabriel & Hongler, NeurIPS 2018; Lee
et al., NeurIPS 2019), with the kernel Theta = A A':

    rho(t) = exp(-Theta t) rho,    d(t) = -A' phi_t(Theta) rho,    phi_t(s) = (1 - exp(-s t)) / s.

phi_t is a filter that cuts the directions in which training is slow.  The rational filter 1 / (s + 1 / t) cuts them at
the same place and needs no eigenvectors: it is the step of Levenberg (1944) and Marquardt (1963) with 1 / t as its
damping.  Both lead to the least-squares solution as t goes to infinity.

Three forms give the same move.  Kernel form solves with A A' (R x R), weight form with A'A (P x P), and conjugate
gradients need products with A and A' only; a Nystroem approximation preconditions them (Frangella, Tropp & Udell, SIAM
J. Matrix Anal. Appl. 44, 2023, algorithm 5.1).

Letters: ``R`` residuals, ``P`` weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]

#: Up to so many rows a product with its own transpose is made in one piece.
WHOLE_ROWS = 256
#: Elements of a piece of a kernel that is made of outer products: two of them stay in the cache.
PIECE = 131072
#: Pieces that such a kernel is made in at least: half of all that is below the diagonal is not computed.
PIECES = 4
#: Multiplications that an element of such a kernel takes as long as, beside those of its two inner products.
ELEMENTWISE = 50
#: Eigenvalues below this share of the largest are rounding: in those directions nothing is known.
RANK_TOLERANCE = 1e-15


def gram(A: Tensor) -> Tensor:
    """A A' (R, R) of A (R, P), without computing the upper triangle twice."""
    if A.device.type == "cpu" and A.dtype in (torch.float32, torch.float64):
        rows = A.numpy()
        product: Tensor = torch.from_numpy(rows @ rows.T)  # numpy knows a product with an own transpose, torch does not
        return product
    out = A.new_empty(len(A), len(A))
    _gram_into(out, A)
    return out


def _gram_into(out: Tensor, A: Tensor, depth: int = 3) -> None:
    """By halves: a corner off the diagonal is computed once."""
    rows = len(A)
    if depth == 0 or rows <= WHOLE_ROWS:
        out.copy_(A @ A.T)
        return
    half = rows // 2
    _gram_into(out[:half, :half], A[:half], depth - 1)
    _gram_into(out[half:, half:], A[half:], depth - 1)
    corner = A[half:] @ A[:half].T
    out[half:, :half] = corner
    out[:half, half:] = corner.T


def outer_gram(left: Tensor, right: Tensor) -> Tensor:
    """A A' (R, R) of rows that are sums of c outer products, without writing them out.

    The inner product of two outer products is the product of two inner products.  Pieces stay in the cache, and those
    below the diagonal are copied.

    Args:
        left: (R, c, a).
        right: (R, c, b); row r is sum_k left[r, k] x right[r, k], a * b columns.
    """
    rows = len(left)
    each = [(a.contiguous(), b.contiguous()) for a, b in zip(left.unbind(1), right.unbind(1), strict=True)]
    out = left.new_zeros(rows, rows)
    step = max(min(PIECE // max(rows, 1), rows // PIECES), 32)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        piece = out[start:stop, start:]
        for a, b in each:
            for other_a, other_b in each:
                piece.addcmul_(a[start:stop] @ other_a[start:].T, b[start:stop] @ other_b[start:].T)
        out[stop:, start:stop] = out[start:stop, stop:].T
    return out


def outer_gram_pays(rows: int, c: int, a: int, b: int) -> bool:
    """Whether :func:`outer_gram` is cheaper than writing the rows out: (R, c, a) and (R, c, b)."""
    return outer_gram_products(rows, c, a, b) < written_gram_products(rows, c, a, b)


def outer_gram_products(rows: int, c: int, a: int, b: int) -> float:
    """Multiplications that :func:`outer_gram` takes as long as."""
    return float(rows * c) ** 2 * (a + b + ELEMENTWISE) / 2


def written_gram_products(rows: int, c: int, a: int, b: int) -> float:
    """Multiplications of writing such rows out, and of :func:`gram` of them."""
    return float(rows) ** 2 * a * b / 2 + float(rows) * c * a * b


def flow_filter(s: Tensor, t: float) -> Tensor:
    """phi_t(s) = (1 - exp(-s t)) / s for eigenvalues s >= 0; t where s is 0, 1 / s for t = infinity."""
    if math.isinf(t):
        return torch.where(s > 0, 1 / s.clamp(min=torch.finfo(s.dtype).tiny), torch.zeros_like(s))
    small = s * t < 1e-8
    return torch.where(small, t * (1 - s * t / 2), -torch.expm1(-s * t) / torch.where(small, torch.ones_like(s), s))


class Spectrum:
    """Eigenvalues and eigenvectors of A A' or A'A: any time of the flow from one decomposition."""

    def __init__(self, M: Tensor) -> None:
        """Decompose.

        Args:
            M: (n, n) symmetric, positive semidefinite up to rounding.

        Raises:
            RuntimeError: the iteration does not converge.
        """
        s, self.Q = torch.linalg.eigh(M)
        floor = RANK_TOLERANCE * len(s) * float(s[-1].clamp(min=0)) if len(s) else 0.0
        self.s = torch.where(s > floor, s, torch.zeros_like(s))

    def apply(self, t: float, v: Tensor) -> Tensor:
        """phi_t(M) v; for t = infinity the pseudo-inverse."""
        filtered: Tensor = self.Q @ (flow_filter(self.s, t) * (self.Q.T @ v))
        return filtered

    def loss_curve(self, rho: Tensor, times: list[float]) -> list[float]:
        """|exp(-Theta t) rho|^2 / 2 at each time, of the spectrum of A A'."""
        weight = (self.Q.T @ rho).square()
        return [0.5 * float((weight * torch.exp(-2 * self.s * t)).sum()) for t in times]


class Damped:
    """Solves with M + damping I."""

    def __init__(self, M: Tensor, damping: float) -> None:
        """Factorise.

        Args:
            M: (n, n) symmetric, positive semidefinite up to rounding.
            damping: Added to the diagonal, > 0.

        Raises:
            ArithmeticError: it is not positive definite, or not finite.
        """
        shifted = M.clone()
        shifted.diagonal().add_(damping)
        self._L, info = torch.linalg.cholesky_ex(shifted)
        if int(info) != 0 or not bool(torch.isfinite(self._L.diagonal()).all()):
            raise ArithmeticError("the damped matrix is not positive definite")

    def solve(self, v: Tensor) -> Tensor:
        """(M + damping I)^-1 v for v (n,)."""
        x: Tensor = torch.cholesky_solve(v[:, None], self._L)
        return x[:, 0]


class Nystroem:
    """Approximation M ~ U diag(s) U' of a symmetric positive semidefinite operator, to precondition M + damping I."""

    def __init__(self, product: Product, like: Tensor, rank: int, generator: torch.Generator) -> None:
        """Draw a test matrix, apply the operator to it, and decompose.

        Args:
            product: v (n,) -> M v.
            like: (n,) for size, type and device.
            rank: Columns of the test matrix, at most n.
            generator: Draws it, on the CPU.
        """
        n = len(like)
        omega = torch.randn(n, min(rank, n), generator=generator, dtype=torch.float64).to(like)
        omega = torch.linalg.qr(omega).Q
        Y = torch.stack([product(column) for column in omega.T], dim=1)
        shift = torch.finfo(Y.dtype).eps * float(torch.linalg.matrix_norm(Y))
        Y = Y + shift * omega
        core = omega.T @ Y
        C = torch.linalg.cholesky((core + core.T) / 2)
        B = torch.linalg.solve_triangular(C, Y.T, upper=False).T
        self.U, s, _ = torch.linalg.svd(B, full_matrices=False)
        self.s = (s.square() - shift).clamp(min=0.0)

    def precondition(self, v: Tensor, damping: float) -> Tensor:
        """P^-1 v with P of condition number near 1 where the rank covers the spectrum above the damping."""
        along = self.U.T @ v
        scaled = (self.s[-1] + damping) / (self.s + damping) * along
        preconditioned: Tensor = self.U @ (scaled - along) + v
        return preconditioned


def conjugate_gradients(
    product: Product, b: Tensor, precondition: Product, *, tolerance: float, max_iterations: int
) -> tuple[Tensor, int]:
    """Solve M x = b for a symmetric positive definite operator.

    Args:
        product: v (n,) -> M v.
        b: (n,).
        precondition: v (n,) -> P^-1 v.
        tolerance: Of the residual, relative to b.
        max_iterations: Products at most.

    Returns:
        The solution, and the products spent; the best that was reached where they were too few.

    Raises:
        ArithmeticError: the operator is not positive, or a number is not finite.
    """
    x, r = torch.zeros_like(b), b.clone()
    z = precondition(r)
    p, rz, limit = z.clone(), float(r @ z), tolerance * float(b.norm())
    for k in range(max_iterations):
        if float(r.norm()) <= limit:
            return x, k
        q = product(p)
        curvature = float(p @ q)
        if not curvature > 0 or not math.isfinite(curvature):
            raise ArithmeticError(f"curvature {curvature:g} along a search direction")
        a = rz / curvature
        x = x + a * p
        r = r - a * q
        z = precondition(r)
        rz, before = float(r @ z), rz
        p = z + (rz / before) * p
    return x, max_iterations
