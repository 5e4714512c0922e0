"""Low-pass lookahead: every few real steps part of what the optimizer computed is replaced by what was predicted.

A jump is tested and applied at once.  On one pass over new data the drift of the weights is too small
against the noise of any test, and a jump along it makes the loss worse at first: it holds the walls of
the valley too, which the next steps have to come down again.  Spread over many steps the same motion
helps, because in between the optimizer damps what does not belong to the drift.

Every n steps, with theta_0 the weights after the last application (at first those the run began with) and
Lambda the sum of the n learning rates,

    s = theta - theta_0                                               displacement that was computed
    b <- gamma^n b + (1 - gamma^n) s / Lambda                         drift, per unit of learning rate
    theta <- theta_0 + (1 - kappa) s + (delta kappa + beta_t) Lambda b        ... and part of it predicted.

kappa takes out of s what is not drift (along an unstable direction the weights swing to and fro, and a learning
rate that suits the rest is too large there), delta puts the drift back.  Lookahead (arXiv 1907.08610) is
kappa = 1/2, delta = 0: it pays for its calm with half of the drift, and where a run is too short to know its drift
that is cheap.  beta carries the drift on (EMA-Nesterov, arXiv 2605.25395); beta_t = beta lr / lr_max: the
schedule's decay takes it out with the rate.  The drift is one per unit of learning rate, because in a decay the
last seventy steps were longer than the next ones will be.  b starts at zero, so that the first steps are shortened
by kappa as a longer warm-up would shorten them; correcting that bias was worse in trials.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from . import weights
from .records import State
from .weights import Tensors

#: Steps between two applications: per step the same motion would cost three times the passes.
EVERY = 3
#: gamma per step: the drift of the last seventy steps.
GAMMA = 0.986


class Lookahead(Protocol):
    """What a run needs of a motion between real steps."""

    @property
    def num_steps(self) -> int:
        """Real steps counted since it began; 0: there is no motion, or not yet."""
        ...

    def before_step(self, parameters: Sequence[Tensor]) -> int:
        """Before a real step: remember where the run began; returns passes over the weights."""
        ...

    def after_step(
        self, parameters: Sequence[Tensor], rate: float, *, pull: float, strength: float, along: Sequence[Tensor] = ()
    ) -> int:
        """Count a real step and move the weights if it is time; returns passes over the weights."""
        ...

    def forget(self) -> None:
        """This run has no use for it (any more): hold nothing."""
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

    num_steps = 0

    def before_step(self, parameters: Sequence[Tensor]) -> int:
        """Nothing."""
        return 0

    def after_step(
        self, parameters: Sequence[Tensor], rate: float, *, pull: float, strength: float, along: Sequence[Tensor] = ()
    ) -> int:
        """Nothing."""
        return 0

    def forget(self) -> None:
        """Nothing."""

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

    def __init__(
        self, beta: float, kappa: float = 0.0, delta: float = 1.0, *, every: int = EVERY, gamma: float = GAMMA
    ) -> None:
        """Nothing is known of the drift yet.

        Args:
            beta: share of the drift added.
            kappa: share of a displacement that is taken out of it.
            delta: share of that which the drift stands for.
            every: steps between applications, n.
            gamma: of the drift's mean, per step.
        """
        self.beta, self.kappa, self.delta, self.every, self.gamma = beta, kappa, delta, every, gamma
        self.num_steps = 0
        self._rates = 0.0  # Lambda so far
        self._theta_0: Tensors = []
        self._b: Tensors = []

    def before_step(self, parameters: Sequence[Tensor]) -> int:
        """At the first real step: theta_0."""
        if self._theta_0:
            return 0
        self._theta_0 = [p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in parameters]
        if self.beta > 0 or self.kappa * self.delta > 0:  # of any use
            self._b = [torch.zeros_like(t) for t in self._theta_0]
        return 3

    @torch.no_grad()
    def after_step(
        self, parameters: Sequence[Tensor], rate: float, *, pull: float, strength: float, along: Sequence[Tensor] = ()
    ) -> int:
        """Every ``every`` steps: update b and move the weights.

        Args:
            parameters: Moved in place.
            rate: Learning rate of the step, the learned scale included.
            pull: kappa_t / kappa, in [0, 1].
            strength: beta_t / beta, in [0, 1]: the schedule's rate against its peak.
            along: Copies of earlier weights that are moved by the same, so that what was a step remains one.

        Returns:
            Passes over the weights.
        """
        self.num_steps += 1
        self._rates += rate
        if self.num_steps % self.every:
            return 0
        rates, self._rates = self._rates, 0.0
        # without a rate (its group is frozen, or has none) the drift cannot be told, and what is taken out not put back
        kappa = self.kappa * pull if rates > 0 or not self._b else 0.0
        share = (self.delta * kappa + self.beta * strength) * rates
        before = weights.clone(parameters) if along and (kappa or share) else []
        if self._b:
            self._move_with_drift(parameters, kappa, share, rates)
        else:
            for theta_0, p in zip(self._theta_0, parameters, strict=True):
                if kappa:
                    p.copy_(theta_0.lerp_(p.to(theta_0.dtype), 1 - kappa))
                theta_0.copy_(p)  # as rounded
        for earlier, old, p in zip(along, before, parameters, strict=bool(before)):
            earlier.add_(p - old)
        return (11 if self._b else 4) + (5 if before else 0)

    def _move_with_drift(self, parameters: Sequence[Tensor], kappa: float, share: float, rates: float) -> None:
        kept = self.gamma**self.every
        for theta_0, b, p in zip(self._theta_0, self._b, parameters, strict=True):
            s = p.to(theta_0.dtype) - theta_0
            if rates > 0:
                b.lerp_(s / rates, 1 - kept)
            if kappa or share:
                p.copy_(theta_0.add_(s, alpha=1 - kappa).add_(b, alpha=share))
            theta_0.copy_(p)  # as rounded

    def forget(self) -> None:
        """Let both copies go; what comes later begins anew."""
        self.num_steps, self._rates, self._theta_0, self._b = 0, 0.0, [], []

    @torch.no_grad()
    def translate(self, deltas: Sequence[Tensor], scale: float) -> None:
        """Move theta_0 by ``scale`` times the jump."""
        for theta_0, d in zip(self._theta_0, deltas, strict=False):
            theta_0.add_(d.to(dtype=theta_0.dtype, device=theta_0.device), alpha=scale)

    def memory_bytes(self) -> int:
        """Two copies of the weights; one where the drift is of no use."""
        return sum(t.numel() * t.element_size() for t in (*self._theta_0, *self._b))

    def state_dict(self) -> State:
        """Step count, learning rates since the last application, weights after it, drift."""
        return {
            "num_steps": self.num_steps, "rates": self._rates, "theta_0": list(self._theta_0), "b": list(self._b),
        }  # fmt: skip

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`, with copies."""
        self.num_steps, self._rates = state["num_steps"], state["rates"]
        self._theta_0, self._b = weights.clone(state["theta_0"]), weights.clone(state["b"])
