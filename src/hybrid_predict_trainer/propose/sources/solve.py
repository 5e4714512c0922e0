"""The move that training of the linearised model leads to, by whichever of three forms is the smallest.

See :mod:`...numerics.closed_form` for the formulas.

Letters: ``R`` residuals, ``P`` weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ...numerics.closed_form import Damped, Nystroem, Spectrum, conjugate_gradients
from . import price
from .jacobian import Jacobian
from .sample import probabilities, systematic

Form = Literal["kernel", "weight", "cg"]
Filter = Literal["damped", "flow"]

#: Relative residual at which conjugate gradients stop.
CG_TOLERANCE = 1e-10


def form_for(num_rows: int, num_weights: int, *, largest: int, memory_mb: float) -> Form:
    """Kernel or weight form, whichever is smaller; conjugate gradients where neither fits.

    Args:
        num_rows: R.
        num_weights: P.
        largest: Side of a matrix that is still factorised.
        memory_mb: For the matrix and its factor.
    """
    smaller = min(num_rows, num_weights)
    needed = 8 * 3 * smaller**2 / 2**20  # the matrix, its damped copy and its factor
    if smaller > largest or needed > memory_mb:
        return "cg"
    return "kernel" if num_rows <= num_weights else "weight"


class Linearized:
    """A linearised model: moves for any damping or time, and for other residuals than its own.

    Attributes:
        form: How they are solved for.
        scale: Mean eigenvalue of the smaller of A A' and A'A: what dampings are relative to.
        num_products: Products with A or A' that were spent beside factorisations.
        num_factors: Factorisations, one per damping.
    """

    def __init__(self, A: Jacobian, form: Form, *, rank: int, max_iterations: int, seed: int) -> None:
        """Form the matrix, if there is one.

        Args:
            A: (R, P).
            form: See :func:`form_for`.
            rank: Of the preconditioner of conjugate gradients.
            max_iterations: Of conjugate gradients.
            seed: Of the preconditioner's test matrix.

        Raises:
            ArithmeticError: the Jacobian is not finite.
        """
        self.A, self.form = A, form
        self._rank, self._max_iterations, self._seed = rank, max_iterations, seed
        self.num_products = self.num_factors = 0
        self._kernel = form == "kernel" or (form == "cg" and A.num_rows <= A.num_weights)
        self._M: Tensor | None = None
        if form != "cg":
            self._M = A.gram() if form == "kernel" else A.normal()
            trace = float(self._M.diagonal().sum())
        else:
            trace = A.squared_norm()
        self.scale = trace / max(min(A.num_rows, A.num_weights), 1)
        if not math.isfinite(self.scale):
            raise ArithmeticError("the Jacobian is not finite")
        self._factor: Damped | None = None
        self._damping = math.nan
        self._spectrum: Spectrum | None = None
        self._nystroem: Nystroem | None = None

    @property
    def num_matrix_products(self) -> float:
        """Multiplications that the matrix took; 0 where there is none."""
        if self._M is None:
            return 0.0
        return self.A.counts.num_gram_products if self._kernel else self.A.counts.num_normal_products

    @property
    def price(self) -> float:
        """Forwards that the matrix, its factors, and products beside them have been worth so far."""
        return price.least_squares(
            self.A.counts, self.num_matrix_products, num_products=self.num_products, num_factors=self.num_factors
        )

    def move(self, rho: Tensor, damping: float, kind: Filter = "damped") -> Tensor:
        """d (P,) for residuals rho (R,).

        Args:
            rho: At the point of linearisation, or a correction of them.
            damping: Absolute; the flow's time is its inverse, and 0 leads to the least-squares solution.
            kind: Which filter.

        Raises:
            ArithmeticError: the damped matrix is not positive definite, or conjugate gradients break down.
        """
        if kind == "flow" or damping == 0:
            return self._flow(rho, math.inf if damping == 0 else 1 / damping)
        if self._M is None:
            return self._iterated(rho, damping)
        if self._factor is None or damping != self._damping:
            self._factor, self._damping = Damped(self._M, damping), damping
            self.num_factors += 1
        self.num_products += 1
        if self._kernel:
            return -self.A.vjp(self._factor.solve(rho))
        return -self._factor.solve(self.A.vjp(rho))

    def _flow(self, rho: Tensor, t: float) -> Tensor:
        spectrum = self.spectrum
        self.num_products += 1
        if self._kernel:
            return -self.A.vjp(spectrum.apply(t, rho))
        return -spectrum.apply(t, self.A.vjp(rho))

    @property
    def spectrum(self) -> Spectrum:
        """Of A A' or A'A, whichever was formed.

        Raises:
            ArithmeticError: there is none, conjugate gradients never form it; or the iteration does not converge.
        """
        if self._M is None:
            raise ArithmeticError("conjugate gradients know the damped limit only: set filter = damped")
        if self._spectrum is None:
            try:
                self._spectrum = Spectrum(self._M)
            except RuntimeError as error:
                raise ArithmeticError(str(error)) from error
        return self._spectrum

    def _iterated(self, rho: Tensor, damping: float) -> Tensor:
        """By conjugate gradients in the smaller of the two spaces."""
        A = self.A

        def plain(v: Tensor) -> Tensor:
            return A.jvp(A.vjp(v)) if self._kernel else A.vjp(A.jvp(v))

        b = rho if self._kernel else A.vjp(rho)
        if self._nystroem is None:
            generator = torch.Generator().manual_seed(self._seed)
            self._nystroem = Nystroem(plain, b, self._rank, generator)
            self.num_products += 2 * self._rank
        nystroem = self._nystroem
        x, spent = conjugate_gradients(
            lambda v: plain(v) + damping * v, b, lambda v: nystroem.precondition(v, damping),
            tolerance=CG_TOLERANCE, max_iterations=self._max_iterations,
        )  # fmt: skip
        self.num_products += 2 * spent + 1
        return -A.vjp(x) if self._kernel else -x


class Averaged(Linearized):
    """In weight form with a curvature that was averaged over batches: a step of recursive least squares."""

    def __init__(self, A: Jacobian, curvature: Tensor, num_batches: int) -> None:
        """Bind.

        Args:
            A: (R, P) of this batch.
            curvature: (P, P) mean of A'A over batches, this one included.
            num_batches: Of that mean.

        Raises:
            ArithmeticError: the mean is not finite.
        """
        self.A, self.form = A, "weight"
        self.num_products = self.num_factors = 0
        self._kernel, self._M, self._num_batches = False, curvature, num_batches
        self.scale = float(curvature.diagonal().sum()) / max(A.num_weights, 1)
        if not math.isfinite(self.scale):
            raise ArithmeticError("the averaged curvature is not finite")
        self._factor: Damped | None = None
        self._damping = math.nan
        self._spectrum: Spectrum | None = None

    def move(self, rho: Tensor, damping: float, kind: Filter = "damped") -> Tensor:
        """See :class:`Linearized`; this batch has a share of one in ``num_batches``."""
        return super().move(rho, damping, kind) / self._num_batches


class Sampled:
    """A linearised model that is solved for on a sample of its rows; see :mod:`.sample`.

    Attributes:
        A: (R, P), all rows: what a move does to those left out is known.
        scale: Mean eigenvalue of the smaller of A A' and A'A, of all rows.
    """

    def __init__(
        self, A: Jacobian, rho: Tensor, number: int, solver: Callable[[Jacobian], Linearized], *, start: float
    ) -> None:
        """Draw a sample and form its matrix.

        Args:
            A: (R, P).
            rho: (R,) residuals at the point of linearisation.
            number: Rows, about.
            solver: Of a part of the rows.
            start: Of the sample, from 0 to 1; see :func:`.sample.systematic`.

        Raises:
            ArithmeticError: the Jacobian is not finite.
        """
        self.A, self._rho, self._solver, self._start = A, rho, solver, start
        self._squares = A.row_squares().to(rho.dtype)
        self.scale = float(self._squares.sum()) / max(min(A.num_rows, A.num_weights), 1)
        if not math.isfinite(self.scale):
            raise ArithmeticError("the Jacobian is not finite")
        self._spent = 0.0
        self._draw(number)

    def _draw(self, number: int) -> None:
        # few numbers, and sums in an order that devices do not promise
        chance = probabilities(self._squares.cpu().double(), self._rho.cpu().double(), number)
        rows = systematic(chance, self._start)
        self._rows, self._factors = rows.to(self._rho.device), chance[rows].rsqrt().to(self._rho)
        self._part = self.A.weighted(self._rows, self._factors)
        self._inner = self._solver(self._part)

    @property
    def num_rows(self) -> int:
        """Of the sample."""
        return len(self._rows)

    def enlarge(self, factor: float) -> None:
        """Draw a sample of so many times as many rows."""
        self._spent = self.price
        self._draw(min(round(self.num_rows * factor), self.A.num_rows))

    @property
    def price(self) -> float:
        """See :class:`Linearized`."""
        counts, inner = self.A.counts, self._inner
        share = self.num_rows / counts.num_rows  # products with the sample are so much cheaper
        return self._spent + price.least_squares(
            replace(counts, num_rows=self.num_rows), inner.num_matrix_products,
            num_products=share * inner.num_products, num_factors=inner.num_factors,
        )  # fmt: skip

    def move(self, rho: Tensor, damping: float, kind: Filter = "damped") -> Tensor:
        """See :class:`Linearized`; rho is that of all rows."""
        return self._inner.move(self._picked(rho), damping, kind)

    def promised(self, d: Tensor) -> float:
        """Reduction of half a square that the sample predicts of a move d (P,)."""
        before = self._picked(self._rho)
        after = before + self._part.jvp(d)
        return 0.5 * float(before @ before - after @ after)

    def _picked(self, rho: Tensor) -> Tensor:
        return rho[self._rows] * self._factors
