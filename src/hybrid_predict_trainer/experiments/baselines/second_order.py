"""Full-batch methods that experts use on small problems, lean: a flat vector of weights and nothing around it.

Levenberg-Marquardt (Levenberg 1944, Marquardt 1963) in kernel or weight form, whichever is smaller; dense self-scaled
BFGS and Broyden (Al-Baali, Computational Optimization and Applications 9, 1998; Urban, Stefanou & Pons, J. Comput.
Phys. 523, 2025); self-scaled limited-memory BFGS.  Quasi-Newton methods search with the strong Wolfe conditions and
begin with steps of Adam, without which they may end in a spurious solution between the points.

Letters: ``P`` weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lbfgs import _strong_wolfe

from ...numerics.dense_inverse import MIN_CURVATURE, DenseInverse
from ...predictors.quasi_newton import MIN_TAU, direction
from ...propose.sources.jacobian import Linearizer
from ...propose.sources.least_squares import LeastSquares
from ...propose.sources.solve import Linearized

#: Steps of Adam, and their rate, before a quasi-Newton method begins.
FIRST_STEPS, FIRST_RATE = 100, 1e-2
#: Evaluations of a line search, at most.
MAX_LINE_SEARCH = 25


class Flat:
    """A model's weights as one vector, its loss and its gradient on one batch."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any) -> None:
        """The parameters become views of the vector."""
        self.model, self.batch, self._loss_fn = model, batch, loss_fn
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.x = torch.cat([p.detach().reshape(-1) for p in self.parameters]).clone()
        for p, part in zip(self.parameters, self.x.split([p.numel() for p in self.parameters]), strict=True):
            p.data = part.view_as(p)

    def loss(self) -> float:
        """At the present weights."""
        with torch.no_grad():
            return float(self._loss_fn(self.model, self.batch))

    def loss_and_gradient(self) -> tuple[float, Tensor]:
        """At the present weights."""
        loss = self._loss_fn(self.model, self.batch)
        gradients = torch.autograd.grad(loss, self.parameters)
        return float(loss.detach()), torch.cat([g.reshape(-1) for g in gradients])

    def search(self, f: float, g: Tensor, d: Tensor, t: float) -> tuple[float, Tensor, float]:
        """Strong Wolfe line search along d; the weights are at its end afterwards."""
        x = self.x.clone()

        def at(_: Any, step: float, along: Tensor) -> tuple[float, Tensor]:
            self.x.copy_(x + step * along)
            return self.loss_and_gradient()

        f2, g2, t, _ = _strong_wolfe(
            at, None, t, d, f, g, float(g @ d), max_ls=MAX_LINE_SEARCH, tolerance_change=0.0
        )  # fmt: skip
        self.x.copy_(x + float(t) * d)
        return f2, g2, float(t)


def adam_first(flat: Flat) -> Iterator[float]:
    """Steps of Adam; yields the loss of each."""
    optimizer = torch.optim.Adam(flat.parameters, lr=FIRST_RATE)
    sizes = [p.numel() for p in flat.parameters]
    for _ in range(FIRST_STEPS):
        loss, g = flat.loss_and_gradient()
        for p, part in zip(flat.parameters, g.split(sizes), strict=True):
            p.grad = part.view_as(p)
        optimizer.step()
        yield loss
    for p in flat.parameters:
        p.grad = None


def levenberg_marquardt(flat: Flat, residual_fn: Callable[[nn.Module, Any], Tensor]) -> Iterator[float]:
    """Damping over 3 after a step that lowers the loss, times 4 after one that does not; ends where none does."""
    problem, damping = LeastSquares(residual_fn), 1e-2
    linearizer = Linearizer(flat.parameters, chunk_rows=64, memory_mb=4096)
    while True:
        point = problem.at(flat.model, flat.batch)
        yield point.loss
        A = linearizer.jacobian(point.outputs, point.cotangents, check=False)
        form = "kernel" if A.num_rows <= A.num_weights else "weight"
        model, x = Linearized(A, form, rank=1, max_iterations=1, seed=0), flat.x.clone()  # type: ignore[arg-type]
        for _ in range(12):
            try:
                flat.x.copy_(x + model.move(point.rho, damping * model.scale).to(x.dtype))
                with torch.no_grad():
                    if problem.at(flat.model, flat.batch).loss < point.loss:
                        break
            except ArithmeticError:
                pass
            damping = max(4 * damping, 1e-16)
        else:
            flat.x.copy_(x)
            return
        damping = max(damping / 3, 1e-16)


def dense(flat: Flat, update: str) -> Iterator[float]:
    """Dense quasi-Newton method: ``ssbfgs`` or ``ssbroyden``; begins anew with the gradient where it fails."""
    yield from adam_first(flat)
    (f, g), fails = flat.loss_and_gradient(), 0
    inverse = DenseInverse(g, update)  # type: ignore[arg-type]
    while fails < 4:
        yield f
        x, d = flat.x.clone(), -inverse.Hg
        t = min(1.0, 1.0 / float(g.abs().sum())) if inverse.first else 1.0
        f2, g2, t = flat.search(f, g, d, t) if float(g @ d) < 0 else (math.inf, g, 0.0)
        if not f2 < f:
            flat.x.copy_(x)
            fails += 1
            inverse.forget(g)
            continue
        fails = 0
        inverse.learn(flat.x - x, g2 - g, g, g2, t)
        f, g = f2, g2


class _Pairs:
    """The last displacements s and gradient differences y with their products, in a ring."""

    def __init__(self, history: int, size: int) -> None:
        self.S, self.Y = (torch.zeros(history, size, dtype=torch.float64) for _ in range(2))
        self._SY, self._YY = (torch.zeros(history, history, dtype=torch.float64) for _ in range(2))
        self._log_tau = torch.zeros(history, dtype=torch.float64)
        self._head, self.count = -1, 0

    def clear(self) -> None:
        """Begin anew."""
        self._head, self.count = -1, 0

    def add(self, s: Tensor, y: Tensor, log_tau: float) -> None:
        """The newest pair."""
        self._head = (self._head + 1) % len(self.S)
        self.count = min(self.count + 1, len(self.S))
        self.S[self._head], self.Y[self._head], self._log_tau[self._head] = s, y, log_tau
        rows = slice(0, len(self.S) if self.count == len(self.S) else self._head + 1)
        self._SY[rows, self._head] = self.S[rows] @ y
        self._YY[rows, self._head] = self._YY[self._head, rows] = self.Y[rows] @ y

    def step(self, g: Tensor) -> Tensor:
        """-H g."""
        if not self.count:
            return -g
        places = torch.arange(self._head - self.count + 1, self._head + 1) % len(self.S)  # oldest first
        rows = slice(0, len(self.S) if self.count == len(self.S) else self._head + 1)
        SY, YY = self._SY[places[:, None], places], self._YY[places[:, None], places]
        gamma = float((SY.diagonal() / YY.diagonal()).max())
        Sg, Yg = self.S[rows] @ g, self.Y[rows] @ g
        of_s, of_y, of_g = direction(SY, YY, Sg[places], Yg[places], self._log_tau[places], gamma)
        a, b = torch.zeros_like(Sg), torch.zeros_like(Yg)
        a[places], b[places] = of_s, of_y
        return a @ self.S[rows] + b @ self.Y[rows] + of_g * g


def limited(flat: Flat, history: int) -> Iterator[float]:
    """Self-scaled limited-memory BFGS: the formula of ``quasi_newton``, every gradient a pair of its own."""
    yield from adam_first(flat)
    (f, g), fails = flat.loss_and_gradient(), 0
    pairs, g, low = _Pairs(history, flat.x.numel()), g.double(), flat.x.dtype
    while fails < 4:
        yield f
        d, x = pairs.step(g), flat.x.clone()
        t = 1.0 if pairs.count else min(1.0, 1.0 / float(g.abs().sum()))
        f2, g2, t = flat.search(f, g.to(low), d.to(low), t) if float(g @ d) < 0 else (math.inf, g, 0.0)
        if not f2 < f:
            flat.x.copy_(x)
            fails += 1
            pairs.clear()
            continue
        fails, s, y = 0, (flat.x - x).double(), g2.double() - g
        s_y, b = float(s @ y), -t * float(s @ g)
        if s_y > MIN_CURVATURE * float(s.norm() * y.norm()):
            pairs.add(s, y, math.log(min(1.0, max(s_y / b, MIN_TAU))) if b > 0 and pairs.count else 0.0)
        f, g = f2, g2.double()
