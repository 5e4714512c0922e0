"""Low-pass lookahead: every few real steps the weights move on along their slow drift.

A jump is tested and applied at once.  On one pass over new data the drift of the weights is too small
against the noise of any test, and a jump along it makes the loss worse at first: it holds the walls of
the valley too, which the next steps have to come down again.  Spread over many steps the same motion
helps, because in between the optimizer damps what does not belong to the drift (EMA-Nesterov,
arXiv 2605.25395).  There, before every forward pass,

    theta <- theta + beta_t m,      m = EMA_gamma of the steps theta_(t+1) - theta_t.

By Abel summation m = (1 - gamma) (theta - x) with x = EMA_gamma(theta): one copy of the weights instead
of two, and nothing to do between applications.  Applied every n steps, with gamma^n for gamma,

    x <- gamma^n x + (1 - gamma^n) theta,      theta <- theta + n beta_t (1 - gamma) (theta - x),

and beta_t = beta lr / lr_max: the schedule's decay takes the lookahead out with the rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from . import weights
from .records import State
from .weights import Tensors

#: Steps between two applications: per step the same motion would cost five times the passes.
EVERY = 5
#: gamma per step: the drift of the last hundred steps.
GAMMA = 0.99


class Lookahead(Protocol):
    """What a run needs of a motion between real steps."""

    def after_step(self, parameters: Sequence[Tensor], strength: float) -> int:
        """Count a real step and move the weights if it is time; returns passes over the weights."""
        ...

    def translate(self, deltas: Sequence[Tensor], scale: float) -> None:
        """A jump has moved the weights: it is no drift, so the average moves along."""
        ...

    def memory_bytes(self) -> int:
        """Bytes held."""
        ...

    def state_dict(self) -> State:
        """Everything a resume needs."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        ...


class NoLookahead:
    """The null object."""

    def after_step(self, parameters: Sequence[Tensor], strength: float) -> int:
        """Nothing."""
        return 0

    def translate(self, deltas: Sequence[Tensor], scale: float) -> None:
        """Nothing."""

    def memory_bytes(self) -> int:
        """None."""
        return 0

    def state_dict(self) -> State:
        """Nothing."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Nothing."""


class EmaLookahead:
    """The motion away from the exponential average of the weights."""

    def __init__(self, beta: float, *, every: int = EVERY, gamma: float = GAMMA) -> None:
        """Args: beta: share of the drift added.  every: steps between applications.  gamma: of the EMA, per step."""
        self.beta, self.every, self.gamma = beta, every, gamma
        self.num_steps = 0
        self._x: Tensors = []

    @torch.no_grad()
    def after_step(self, parameters: Sequence[Tensor], strength: float) -> int:
        """Every ``every`` steps update x and move the weights by ``n beta strength (1 - gamma) (theta - x)``.

        Args:
            parameters: Moved in place.
            strength: beta_t / beta, in [0, 1]: the rate against its peak; 0 only observes.

        Returns:
            Passes over the weights.
        """
        self.num_steps += 1
        if self.num_steps % self.every:
            return 0
        theta = [p.detach() for p in parameters]
        if not self._x:
            self._x = [t.to(torch.promote_types(t.dtype, torch.float32), copy=True) for t in theta]
            return 2
        kept = self.gamma**self.every
        for x, t in zip(self._x, theta, strict=True):
            x.lerp_(t.to(x.dtype), 1 - kept)
        amount = self.every * self.beta * strength * (1 - self.gamma)
        if amount > 0:
            for x, p in zip(self._x, parameters, strict=True):
                p.lerp_(x.to(p.dtype), -amount)
        return 6

    @torch.no_grad()
    def translate(self, deltas: Sequence[Tensor], scale: float) -> None:
        """Move x by ``scale`` times the jump."""
        for x, d in zip(self._x, deltas, strict=False):
            x.add_(d.to(dtype=x.dtype, device=x.device), alpha=scale)

    def memory_bytes(self) -> int:
        """One copy of the weights."""
        return sum(t.numel() * t.element_size() for t in self._x)

    def state_dict(self) -> State:
        """Step count and average."""
        return {"num_steps": self.num_steps, "x": list(self._x)}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`, with copies."""
        self.num_steps = state["num_steps"]
        self._x = weights.clone(state["x"])
