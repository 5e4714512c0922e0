"""An inverse Hessian approximation made of the last pairs: self-scaled limited-memory BFGS in compact form.

The formula is that of :mod:`...predictors.quasi_newton`.  Here the pairs are whole vectors, and a step takes two passes
over them: one for the products with the new gradient, whose differences to those with the last one are the products
with the new y, and one for the step itself.  Products of pairs slide along the diagonal of a matrix of twice their
number, so that those in memory are one block at every time and nothing is gathered.

Letters: ``P`` weights, ``K`` places, ``n`` pairs in memory, s displacement, y difference of gradients.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...numerics.dense_inverse import MIN_CURVATURE
from ...observe.basis import FLOAT64_BELOW
from ...predictors.quasi_newton import MIN_TAU, direction
from ...records import StateDict


class LimitedInverse:
    """H of the last K pairs, with its product with the present gradient.

    Attributes:
        Hg: (P,), of the gradient's type.
        num_pairs: In memory.
    """

    def __init__(self, g: Tensor, history: int, *, scaled: bool = True) -> None:
        """The unit matrix.

        Args:
            g: (P,) present gradient; tells type and device.
            history: K.
            scaled: Divide by tau before an update; without, it is L-BFGS.
        """
        self._K, self._scaled = history, scaled
        dtype = torch.float64 if len(g) < FLOAT64_BELOW and g.device.type != "mps" else g.dtype
        # memory that is never written to is never taken
        self._pairs = torch.empty(2, history, len(g), dtype=dtype, device=g.device)
        self._SY, self._YY = (torch.zeros(2 * history, 2 * history, dtype=torch.float64) for _ in range(2))
        self._log_tau, self._ratios = (torch.zeros(2 * history, dtype=torch.float64) for _ in range(2))
        self.forget(g)

    @property
    def first(self) -> bool:
        """Nothing was learnt since H was the unit matrix."""
        return self.num_pairs == 0

    def forget(self, g: Tensor) -> None:
        """The unit matrix again, at a gradient."""
        self.num_pairs, self._low = 0, 0  # pairs in memory, and where their block begins
        self._newest = -1  # place of the newest
        self._see(g)

    def see(self, g: Tensor) -> None:
        """Another gradient, without a step that led to it."""
        self._see(g)

    def _see(self, g: Tensor) -> None:
        self._products = self._with(g.to(self._pairs.dtype))
        self.Hg = self._product(g)

    @property
    def _num_places(self) -> int:
        """Places that hold a pair, or held one: those of a ring that has come round are all of them."""
        return self._K if self.num_pairs == self._K else self._newest + 1

    def _with(self, g: Tensor) -> Tensor:
        """(2, n) products of s and y with a gradient, oldest first, in float64."""
        found = (self._pairs[:, : self._num_places] @ g).to("cpu", torch.float64)
        return self._oldest_first(found)

    def _oldest_first(self, found: Tensor) -> Tensor:
        full = self.num_pairs == self._K and self._newest != self._K - 1
        return found.roll(-(self._newest + 1), -1) if full else found

    def learn(self, s: Tensor, y: Tensor, before: Tensor, after: Tensor, t: float) -> None:
        """Take a pair; one without positive curvature changes nothing but the gradient.

        Args:
            s: (P,) t times -Hg.
            y: (P,) after - before.
            before: (P,) gradient where s began.
            after: (P,) gradient where it ended.
            t: Multiple of the step that was taken.
        """
        wide = self._pairs.dtype
        s, y, then, now = (v.to(wide) for v in (s, y, before, after))
        products = self._with(now)
        y = now - then  # with all digits
        s_y, y_y, s_s = float(s @ y), float(y @ y), float(s @ s)
        if s_y > MIN_CURVATURE * math.sqrt(s_s * y_y):
            b = -t * float(s @ then)
            scales = self._scaled and b > 0 and not self.first
            with_y = products - self._products
            own = torch.tensor([[float(s @ now)], [float(y @ now)]], dtype=torch.float64)
            if self.num_pairs == self._K:
                self._low, self.num_pairs = self._low + 1, self._K - 1
                products, with_y = products[:, 1:], with_y[:, 1:]
            self._make_room()
            self._newest = (self._newest + 1) % self._K
            self._pairs[0, self._newest], self._pairs[1, self._newest] = s, y
            end, block = self._low + self.num_pairs, slice(self._low, self._low + self.num_pairs)
            self._SY[block, end], self._SY[end, end] = with_y[0], s_y
            self._YY[block, end], self._YY[end, block], self._YY[end, end] = with_y[1], with_y[1], y_y
            self._log_tau[end] = math.log(min(1.0, max(s_y / b, MIN_TAU))) if scales else 0.0
            self._ratios[end] = s_y / y_y
            self.num_pairs += 1
            products = torch.cat([products, own], 1)
        self._products = products
        self.Hg = self._product(after)

    def _make_room(self) -> None:
        """Before another pair: the block goes back to the beginning where it has come to the end."""
        if self._low + self.num_pairs < 2 * self._K:
            return
        old, new = slice(self._low, self._low + self.num_pairs), slice(0, self.num_pairs)
        for M in (self._SY, self._YY):
            M[new, new] = M[old, old].clone()
        for v in (self._log_tau, self._ratios):
            v[new] = v[old].clone()
        self._low = 0

    @np.errstate(over="ignore", invalid="ignore", divide="ignore")  # a step that is not finite is refused
    def _product(self, g: Tensor) -> Tensor:
        """(P,) H g from the products with g."""
        if self.first:
            return g.clone()
        block = slice(self._low, self._low + self.num_pairs)
        of_s, of_y, of_g = direction(
            self._SY[block, block], self._YY[block, block], self._products[0], self._products[1],
            self._log_tau[block], float(self._ratios[block].max()),
        )  # fmt: skip
        told = torch.stack([of_s, of_y])
        if self.num_pairs == self._K and self._newest != self._K - 1:
            told = told.roll(self._newest + 1, -1)
        pairs = self._pairs[:, : told.shape[1]]
        told = told.to(pairs)
        d = told[0] @ pairs[0]
        d += told[1] @ pairs[1]
        d.add_(g, alpha=of_g)
        return d.neg_().to(g.dtype)

    def memory_bytes(self) -> int:
        """Of the pairs that were ever held, and their products."""
        held = 2 * self._num_places * self._pairs.shape[-1] * self._pairs.element_size()
        return held + 2 * self._SY.numel() * self._SY.element_size()

    def state_dict(self) -> StateDict:
        """Pairs and products, oldest first."""
        block = slice(self._low, self._low + self.num_pairs)
        return {
            "pairs": self._pairs[:, : self._num_places].clone(), "newest": self._newest, "num_pairs": self.num_pairs,
            "SY": self._SY[block, block].clone(), "YY": self._YY[block, block].clone(),
            "log_tau": self._log_tau[block].clone(), "ratios": self._ratios[block].clone(),
            "products": self._products.clone(), "Hg": self.Hg.clone(),
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self._newest, self.num_pairs, self._low = state["newest"], state["num_pairs"], 0
        block = slice(0, self.num_pairs)
        self._pairs[:, : self._num_places] = state["pairs"]
        held: Any
        for held, name in ((self._SY, "SY"), (self._YY, "YY")):
            held[block, block] = state[name]
        self._log_tau[block], self._ratios[block] = state["log_tau"], state["ratios"]
        self._products, self.Hg = state["products"].clone(), state["Hg"].clone()
