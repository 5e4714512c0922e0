"""Full-batch methods that experts use on small problems, lean: a flat vector of weights and nothing around it.

Levenberg-Marquardt (Levenberg 1944, Marquardt 1963) in kernel or weight form, whichever is smaller; dense self-scaled
BFGS and Broyden (Al-Baali, Computational Optimization and Applications 9, 1998; Urban, Stefanou & Pons, J. Comput.
Phys. 523, 2025); self-scaled limited-memory BFGS; NysNewton-CG (Rathore, Lei, Frangella, Lu & Udell, ICML 2024):
Newton's method by conjugate gradients, preconditioned by a Nystroem sketch of the Hessian.  Quasi-Newton methods search
with the strong Wolfe conditions and begin with steps of Adam, without which they may end in a spurious solution between
the points.

Letters: ``P`` weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lbfgs import _strong_wolfe

from ...cost import BACKWARD_UNITS, FORWARD_UNITS, UPDATE_UNITS
from ...numerics.closed_form import Nystroem, Product
from ...numerics.dense_inverse import MIN_CURVATURE, DenseInverse
from ...observe.batches import num_samples
from ...predictors.quasi_newton import MIN_TAU, direction
from ...propose.sources import price
from ...propose.sources.jacobian import Linearizer
from ...propose.sources.least_squares import LeastSquares
from ...propose.sources.solve import Linearized

#: Steps of Adam, and their rate, before a quasi-Newton method begins.
FIRST_STEPS, FIRST_RATE = 100, 1e-2
#: Evaluations of a line search, at most.
MAX_LINE_SEARCH = 25
#: NysNewton-CG: iterations of L-BFGS before it, columns of the sketch, Newton steps that it serves, damping.
FIRST_PAIRS, SKETCH, SKETCH_EVERY, NEWTON_DAMPING = 100, 60, 20, 1e-2
#: Its products of conjugate gradients, at most, and their tolerance.
MAX_PRODUCTS, TOLERANCE = 1000, 1e-16
#: Its line search: sufficient decrease, factor, and trials at most.
DECREASE, BACKTRACK, MAX_BACKTRACKS = 0.1, 0.5, 30


def free(forwards: float) -> None:
    """Nobody counts."""


class Flat:
    """A model's weights as one vector, its loss and its gradient on one batch.

    Attributes:
        num_forward, num_backward: Through the model, so far.
    """

    def __init__(
        self, model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any,
        pay: Callable[[float], None] = free,
    ) -> None:  # fmt: skip
        """The parameters become views of the vector.

        Args:
            model: Is trained.
            loss_fn: (model, batch) -> loss.
            batch: The only one.
            pay: Called with what is about to be spent, in forwards; may raise.
        """
        self.model, self.batch, self._loss_fn, self._pay = model, batch, loss_fn, pay
        self.num_forward = self.num_backward = 0.0
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.x = torch.cat([p.detach().reshape(-1) for p in self.parameters]).clone()
        for p, part in zip(self.parameters, self.x.split([p.numel() for p in self.parameters]), strict=True):
            p.data = part.view_as(p)

    def pay(self, forwards: float = 0.0, *, passes: float = 0.0, backwards: float = 0.0) -> None:
        """Say what is about to be spent: work worth so many forwards, and passes through the model."""
        self._pay(forwards + FORWARD_UNITS * passes + BACKWARD_UNITS * backwards)
        self.num_forward += passes
        self.num_backward += backwards

    def loss(self) -> float:
        """At the present weights."""
        self.pay(passes=1)
        with torch.no_grad():
            return float(self._loss_fn(self.model, self.batch))

    def loss_and_gradient(self) -> tuple[float, Tensor]:
        """At the present weights."""
        self.pay(passes=1, backwards=1)
        loss = self._loss_fn(self.model, self.batch)
        gradients = torch.autograd.grad(loss, self.parameters)
        return float(loss.detach()), torch.cat([g.reshape(-1) for g in gradients])

    def hessian(self) -> tuple[Product, float, Tensor]:
        """Products with the Hessian at the present weights, and loss and gradient there."""
        self.pay(passes=1, backwards=1)
        loss = self._loss_fn(self.model, self.batch)
        gradients = torch.autograd.grad(loss, self.parameters, create_graph=True)
        g = torch.cat([part.reshape(-1) for part in gradients])

        def product(v: Tensor) -> Tensor:
            self.pay(backwards=2)  # backward of a backward
            found = torch.autograd.grad(g, self.parameters, v.to(g.dtype), retain_graph=True)
            return torch.cat([part.reshape(-1) for part in found])

        return product, float(loss.detach()), g.detach()

    def backtrack(self, f: float, g: Tensor, d: Tensor) -> bool:
        """Armijo line search along d from step 1; the weights are at its end, or where they were if it fails."""
        x, slope, t = self.x.clone(), float(g @ d), 1.0
        for _ in range(MAX_BACKTRACKS):
            self.x.copy_(x + t * d)
            if self.loss() <= f + DECREASE * t * slope:
                return True
            t *= BACKTRACK
        self.x.copy_(x)
        return False

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
        flat.pay(UPDATE_UNITS)
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
        flat.pay(passes=1)
        point = problem.at(flat.model, flat.batch)
        yield point.loss
        flat.pay(backwards=linearizer.num_backward(len(point.cotangents), len(point.rho)))
        A = linearizer.jacobian(point.outputs, point.cotangents, check=False)
        form = "kernel" if A.num_rows <= A.num_weights else "weight"
        model, x = Linearized(A, form, rank=1, max_iterations=1, seed=0), flat.x.clone()  # type: ignore[arg-type]
        paid = 0.0
        for _ in range(12):
            try:
                flat.x.copy_(x + model.move(point.rho, damping * model.scale).to(x.dtype))
                price_so_far = model.price
                flat.pay(price_so_far - paid, passes=1)
                paid = price_so_far
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
        flat.pay(price.dense_steps(1, len(g), num_samples(flat.batch)))
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
        flat.pay(price.limited_steps(1, pairs.count, len(g), num_samples(flat.batch)))
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


def nys_newton_cg(flat: Flat) -> Iterator[float]:
    """NysNewton-CG after Adam and L-BFGS, as published: they lead to where Newton's method works.

    The published settings, with the damping that most of its problems were given.
    """
    for number, f in enumerate(limited(flat, FIRST_PAIRS)):
        yield f
        if number >= FIRST_STEPS + FIRST_PAIRS:
            break
    generator, number = torch.Generator().manual_seed(0), 0
    sketch: Product = _as_it_is
    while True:
        product, f, g = flat.hessian()
        yield f
        if number % SKETCH_EVERY == 0:
            sketch = _sketched(product, g, generator)
        d, number = _newton_direction(product, g, sketch), number + 1
        if not flat.backtrack(f, g, d):
            return


def _as_it_is(v: Tensor) -> Tensor:
    return v


def _sketched(product: Product, g: Tensor, generator: torch.Generator) -> Product:
    """A preconditioner; none where the Hessian's sketch is not positive."""
    try:
        sketch = Nystroem(product, g, SKETCH, generator)
    except RuntimeError:  # torch's LinAlgError is one
        return _as_it_is
    return lambda v: sketch.precondition(v, NEWTON_DAMPING)


def _newton_direction(product: Product, g: Tensor, precondition: Product) -> Tensor:
    """-(H + damping)^-1 g by preconditioned conjugate gradients, as far as the Hessian is positive; else -g."""
    x, r = torch.zeros_like(g), -g
    z = precondition(r)
    p, rz = z, float(r @ z)
    for _ in range(MAX_PRODUCTS):
        q = product(p) + NEWTON_DAMPING * p
        curvature = float(p @ q)
        if not curvature > 0:
            break
        x, r = x + rz / curvature * p, r - rz / curvature * q
        if float(r.norm()) <= TOLERANCE * float(g.norm()):
            break
        z = precondition(r)
        rz, before = float(r @ z), rz
        p = z + rz / before * p
    return x if bool(x.any()) and float(g @ x) < 0 else -g


#: Methods by name: (task, flat weights) -> the loss before each iteration.
METHODS: dict[str, Callable[[Any, Flat], Iterator[float]]] = {
    "lm": lambda task, flat: levenberg_marquardt(flat, task.residual_fn),
    "ssbroyden": lambda task, flat: dense(flat, "ssbroyden"),
    "ssbfgs": lambda task, flat: dense(flat, "ssbfgs"),
    "lean-lbfgs": lambda task, flat: limited(flat, 400),
    "nysnewton-cg": lambda task, flat: nys_newton_cg(flat),
}
