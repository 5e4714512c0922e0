"""Low-pass lookahead: every few real steps part of what the optimizer computed is replaced by what was predicted.

A jump is tested and applied at once.  On one pass over new data the drift of the weights is too small
against the noise of any test, and a jump along it makes the loss worse at first: it holds the walls of
the valley too, which the next steps have to come down again.  Spread over many steps the same motion
helps, because in between the optimizer damps what does not belong to the drift.

Every n steps, with theta_0 the weights after the last application,

    s = theta - theta_0                                     displacement that was computed
    b <- gamma^n b + (1 - gamma^n) s                        displacement that is predicted: the drift
    theta <- theta_0 + (1 - kappa) s + kappa b + beta_t b.

kappa takes out of s what is not drift (along an unstable direction the weights swing to and fro, and a learning
rate that suits the rest is too large there); Lookahead (arXiv 1907.08610) is kappa = 1/2 with b = 0, and pays for
its calm with half of the drift.  beta carries the drift on (EMA-Nesterov, arXiv 2605.25395); beta_t = beta lr / lr_max:
the schedule's decay takes it out with the rate.  b starts at zero, so that the first steps are shortened by
kappa as a longer warm-up would shorten them; correcting that bias was worse in trials.
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
#: gamma per step: the drift of the last seventy steps.
GAMMA = 0.986


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


class DriftLookahead:
    """The motion towards the drift, and along it."""

    def __init__(self, beta: float, kappa: float = 0.0, *, every: int = EVERY, gamma: float = GAMMA) -> None:
        """Args: beta: share of the drift added.  kappa: share of a displacement that is predicted, not computed.

        every: steps between applications.  gamma: of the drift's mean, per step.
        """
        self.beta, self.kappa, self.every, self.gamma = beta, kappa, every, gamma
        self.num_steps = 0
        self._theta_0: Tensors = []
        self._b: Tensors = []

    @torch.no_grad()
    def after_step(self, parameters: Sequence[Tensor], strength: float) -> int:
        """Every ``every`` steps: update b and move the weights.

        Args:
            parameters: Moved in place.
            strength: beta_t / beta, in [0, 1]: the rate against its peak; 0 only observes.

        Returns:
            Passes over the weights.
        """
        self.num_steps += 1
        if self.num_steps % self.every:
            return 0
        if not self._theta_0:
            self._theta_0 = [p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in parameters]
            self._b = [torch.zeros_like(t) for t in self._theta_0]
            return 3
        kept = self.gamma**self.every
        kappa, beta = (self.kappa, self.beta * strength) if strength > 0 else (0.0, 0.0)
        for theta_0, b, p in zip(self._theta_0, self._b, parameters, strict=True):
            s = p.to(theta_0.dtype) - theta_0
            b.lerp_(s, 1 - kept)
            if kappa or beta:
                p.copy_(theta_0.add_(s, alpha=1 - kappa).add_(b, alpha=kappa + beta))
            theta_0.copy_(p)  # as rounded
        return 11

    @torch.no_grad()
    def translate(self, deltas: Sequence[Tensor], scale: float) -> None:
        """Move theta_0 by ``scale`` times the jump."""
        for theta_0, d in zip(self._theta_0, deltas, strict=False):
            theta_0.add_(d.to(dtype=theta_0.dtype, device=theta_0.device), alpha=scale)

    def memory_bytes(self) -> int:
        """Two copies of the weights."""
        return sum(t.numel() * t.element_size() for t in (*self._theta_0, *self._b))

    def state_dict(self) -> State:
        """Step count, weights after the last application, drift."""
        return {"num_steps": self.num_steps, "theta_0": list(self._theta_0), "b": list(self._b)}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`, with copies."""
        self.num_steps = state["num_steps"]
        self._theta_0, self._b = weights.clone(state["theta_0"]), weights.clone(state["b"])
