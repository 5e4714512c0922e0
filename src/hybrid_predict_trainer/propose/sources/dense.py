"""``quasi_newton`` in steps of its own: loss and gradient at every trial point, and no optimizer between.

The limited form (:mod:`...predictors.quasi_newton`) learns from real steps and proposes one step after each.  Here a
proposal is a run of quasi-Newton steps: the gradient that a line search ends with is the one that the next step begins
with, and no forward is spent twice.  The base optimizer's real steps between two proposals are given up where they
raise the loss, which on these problems is nearly always.

The matrix is dense where P x P numbers fit, else (``form = "wolfe"``) made of the last pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.lbfgs import _strong_wolfe

from ...config.settings import QuasiNewtonConfig
from ...keep.isolation import isolated
from ...keep.loss_modules import Reach
from ...keep.subject import LossFn
from ...numerics.dense_inverse import DenseInverse
from ...observe.batches import num_samples
from ...predictors.quasi_newton import history_that_fits
from ...records import BasisSpec, PhasePrediction, StateDict, Verdict
from ...weights import algebra as weights
from ...weights.real_views import all_differentiable
from . import price
from .base import Material, Move, Source
from .flat import displacement, joined, put, split
from .limited_inverse import LimitedInverse

#: Steps of one proposal, and proposals in a row without a real step between them.
NUM_STEPS, CHAIN = 16, 8
#: Steps of the smallest proposal, and forwards that an evaluation of loss and gradient is worth.
LEAST_STEPS, EVALUATION = 4, 3.0
#: Steps before which a matrix has not seen enough to be judged.
TRIAL_STEPS = 50
#: Evaluations of a line search, at most.
MAX_LINE_SEARCH = 25
#: Relative difference between the loss that was promised and the one that the gate sees that passes for rounding.
SAME_LOSS = 1e-3

Evaluate = Callable[[Tensor], tuple[float, Tensor]]


def fits(config: QuasiNewtonConfig, num_weights: int, itemsize: int) -> bool:
    """Whether the matrix and a copy that a checkpoint makes stay within ``memory_mb``."""
    return num_weights**2 * itemsize <= config.memory_mb * 2**20


class OwnSteps(Source):
    """BFGS, self-scaled BFGS or self-scaled Broyden on the run's own loss; see the module."""

    name = "quasi_newton"
    chain = CHAIN

    def __init__(self, config: QuasiNewtonConfig, loss_fn: LossFn, *, longest: int) -> None:
        """Bind.

        Args:
            config: Which update.
            loss_fn: (model, batch) -> loss.
            longest: Steps that a move may claim to be worth, at most.
        """
        self.config, self._loss_fn, self._longest = config, loss_fn, longest
        self._reach = Reach(loss_fn)
        self.spec = BasisSpec(num_displacements=1)
        self._inverse: DenseInverse | LimitedInverse | None = None
        self._x: Tensor | None = None  # (P,) where the last step ended
        self._f, self._g = math.inf, torch.empty(0)  # loss and gradient there
        self._known = False  # of the batch that comes
        self._movable: list[bool] = []

    def _new_inverse(self, g: Tensor) -> DenseInverse | LimitedInverse:
        """A matrix that has learnt nothing, at a gradient."""
        raise NotImplementedError

    def _price(self, num_steps: int, num_weights: int, samples: int) -> float:
        """Forwards that the matrix work of so many steps is worth."""
        raise NotImplementedError

    def propose(self, material: Material) -> Move:
        """A run of steps from the best weights known.

        Raises:
            ArithmeticError: nothing lowers the loss.
            TypeError: parameters are complex, or of a subclass of Tensor.
        """
        if not all_differentiable(material.parameters):
            form = self.config.form
            raise TypeError(
                f'quasi_newton.form = "{form}" needs real parameters, some are complex or of a subclass: take "limited"'
            )
        if self._movable != material.movable:
            self.overwritten()
            self._movable = list(material.movable)
        live = [p for p, may in zip(material.parameters, material.movable, strict=True) if may]
        if not live:
            raise ArithmeticError("no parameter may be moved")
        before, passes = weights.clone(live), 0
        try:
            with isolated(material.model, "training" if material.exact else "quiet", reach=self._reach) as isolation:

                def at(x: Tensor) -> tuple[float, Tensor]:
                    nonlocal passes
                    put(live, x)
                    isolation.begin()
                    passes += 1
                    with torch.enable_grad():
                        loss = self._loss_fn(material.model, material.batch)
                        if material.decay is not None:
                            loss = loss + material.decay().to(loss)
                        found = torch.autograd.grad(loss, live, allow_unused=True)
                    parts = [torch.zeros_like(p) if g is None else g for p, g in zip(live, found, strict=True)]
                    return float(loss.detach()), joined(parts, x)

                begin = joined([p.detach() for p in live], _widest(live))

                def spent(num_steps: int) -> float:
                    return EVALUATION * passes + self._price(num_steps, len(begin), num_samples(material.batch))

                num_steps = self._walk(begin, at, spent, material.room)
            assert self._x is not None, "walked"
            end = [t.clone() for t in split(self._x, live)]
        finally:
            weights.copy_(live, before)
        horizon = min(max(num_steps, 1), self._longest)
        prediction = PhasePrediction(
            coefficients=torch.ones(1, 1, dtype=torch.float64), horizon=horizon, predicted_loss=self._f,
            loss_trajectory=((horizon, self._f),), predicted_reduction=0.0, max_scale=1.0,
        )  # fmt: skip
        matrix = self._price(num_steps, len(self._x), num_samples(material.batch))
        delta = displacement(material.parameters, material.movable, end)
        return Move(prediction=prediction, delta=delta, num_forward=passes, num_backward=passes,
                    num_matrix_forwards=matrix)  # fmt: skip

    def _walk(self, x: Tensor, at: Evaluate, spent: Callable[[int], float], room: float) -> int:
        """Steps from x, or from where the last one ended where that is better, for as long as there is room.

        Args:
            x: (P,).
            at: Loss and gradient.
            spent: Forwards that this proposal has cost, with so many steps.
            room: Forwards until the run's end, which not even the least number of steps exceeds.
        """
        self._start(x, at)
        assert self._inverse is not None, "started"
        assert self._x is not None, "started"
        inverse, fails, done = self._inverse, 0, 0
        least = LEAST_STEPS if torch.equal(self._x, x) else 0  # the way back is a proposal by itself
        while done < NUM_STEPS and fails < 2 and (done < least or spent(done) < self.allowance):
            most = int(min((room - spent(done + 1)) / EVALUATION, MAX_LINE_SEARCH))
            if most < 1:
                break
            assert self._x is not None, "started"
            x, f, g, d = self._x, self._f, self._g, -inverse.Hg
            slope, t = float(g @ d), min(1.0, 1.0 / float(g.abs().sum())) if inverse.first else 1.0
            f2, g2 = math.inf, g
            if slope < 0:
                f2, g2, t, _ = _strong_wolfe(
                    lambda x, t, d: at(x + t * d), x, t, d, f, g, slope, max_ls=most, tolerance_change=0.0
                )
            if not f2 < f:
                if most < MAX_LINE_SEARCH:  # the search was cut short, which says nothing of the matrix
                    break
                fails += 1
                inverse.forget(g)
                continue
            s = float(t) * d
            inverse.learn(s, g2 - g, g, g2, float(t))
            self._x, self._f, self._g = x + s, f2, g2
            done, fails = done + 1, 0
        return done

    def _start(self, x: Tensor, at: Evaluate) -> None:
        """Loss and gradient of the better one of x and the weights where the last step ended."""
        if self._x is not None and torch.equal(self._x, x) and self._known:
            return
        f, g = at(x)
        if not math.isfinite(f):
            raise ArithmeticError("the loss is not finite")
        if self._x is not None and not self._known:
            self._f, self._g = at(self._x)
        self._known = True
        if self._x is None or not self._f <= f:
            self._x, self._f, self._g = x, f, g
        if self._inverse is None:
            self._inverse = self._new_inverse(self._g)
        self._inverse.see(self._g)

    # ---- what becomes of them ----------------------------------------------------------------------------

    def on_data(self, num_different: int) -> None:
        """On other points the loss is another one; the curvature is much the same."""
        if num_different:
            self._known = False

    def on_verdict(self, verdict: Verdict) -> None:
        """Where the gate does not see the loss that was promised, everything is begun anew."""
        if not verdict.accepted and verdict.loss_after > self._f + SAME_LOSS * abs(self._f):
            self.overwritten()

    def least_price(self, material: Material) -> float:
        """See :class:`Source`."""
        num_weights = sum(p.numel() for p, may in zip(material.parameters, material.movable, strict=True) if may)
        return EVALUATION * TRIAL_STEPS + self._price(TRIAL_STEPS, num_weights, num_samples(material.batch))

    def know(self, best: list[Tensor], loss: float, *, stale: bool) -> None:
        """See :class:`Source`; the gradient there has to be computed."""
        self._x, self._f, self._known = joined(best, _widest(best)), loss, False

    @property
    def knows_better(self) -> bool:
        """Whether there are weights to come back to."""
        return self._x is not None

    def overwritten(self) -> None:
        """Weights from before are of no use any more."""
        self._x, self._inverse, self._f, self._known = None, None, math.inf, False

    def memory_bytes(self) -> int:
        """Of the matrix and two vectors."""
        vectors = 0 if self._x is None else 2 * self._x.numel() * self._x.element_size()
        return vectors + (0 if self._inverse is None else self._inverse.memory_bytes())

    # ---- state -------------------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """Matrix, and where the last step ended."""
        return {
            "x": None if self._x is None else self._x.clone(), "f": self._f, "g": self._g.clone(),
            "known": self._known, "inverse": None if self._inverse is None else self._inverse.state_dict(),
            "movable": list(self._movable), "num_in_chain": self.num_in_chain, "num_asked": self._num_asked,
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self._x = None if state["x"] is None else state["x"].clone()
        self._f, self._g, self._known = state["f"], state["g"].clone(), state["known"]
        self._inverse = None
        if state["inverse"] is not None:
            self._inverse = self._new_inverse(self._g)
            self._inverse.load_state_dict(state["inverse"])
        self._movable = [bool(v) for v in state["movable"]]
        self.num_in_chain, self._num_asked = state["num_in_chain"], state["num_asked"]


class DenseQuasiNewton(OwnSteps):
    """With a matrix over all weights."""

    def _new_inverse(self, g: Tensor) -> DenseInverse:
        return DenseInverse(g, self.config.update)

    def _price(self, num_steps: int, num_weights: int, samples: int) -> float:
        return price.dense_steps(num_steps, num_weights, samples)


class LimitedQuasiNewton(OwnSteps):
    """With a matrix of the last pairs, as many as the memory holds."""

    def _new_inverse(self, g: Tensor) -> LimitedInverse:
        c = self.config
        return LimitedInverse(g, history_that_fits(c, len(g)), scaled=c.self_scaling and c.update != "bfgs")

    def _price(self, num_steps: int, num_weights: int, samples: int) -> float:
        num_pairs = 0 if self._inverse is None else self._inverse.num_pairs  # type: ignore[union-attr]
        return price.limited_steps(num_steps, num_pairs, num_weights, samples)


def _widest(live: list[Tensor]) -> Any:
    """An empty tensor of the widest type among the weights: a matrix of float32 weights is of that type, too."""
    return torch.empty(0, dtype=max((p.dtype for p in live), key=lambda d: d.itemsize), device=live[0].device)
