"""Low-pass lookahead: every few real steps part of what the optimizer computed is replaced by what was predicted.

A jump is tested and applied at once.  In one-pass training the drift is too small for any test, and a jump along it
first raises the loss, because it also moves along directions of high curvature.  Spread over many steps the same motion
helps: in between, the optimizer damps those directions.

Every n steps, with theta_0 the weights after the last application (at first those the run began with) and
Lambda the sum of the n learning rates,

    s = theta - theta_0                                               displacement that was computed
    b <- gamma^n b + (1 - gamma^n) s / Lambda                         drift, per unit of learning rate
    a <- sum gamma'^i <s, Lambda b> / sum gamma'^i |Lambda b|^2, in [0, 1]      the share of the drift that went on
    theta <- theta_0 + (1 - kappa) s + a (delta kappa + beta_t) Lambda b      ... and part of it predicted.

kappa, the damping, removes what is not drift: the oscillation along directions for which the learning rate is too
large.  delta puts the drift back.  Lookahead (arXiv 1907.08610) is kappa = 1/2, delta = 0: it damps oscillation and
also halves the drift, which is cheap where a run is too short to know its drift.  beta, the extrapolation, carries the
drift on (EMA-Nesterov, arXiv 2605.25395); beta_t = beta lr / lr_max, so that the schedule's decay removes it with the
rate.  The drift is one per unit of learning rate, because in a decay the last seventy steps were longer than the next
ones will be.  a is the least-squares prediction of the newest displacements from the drift before them: 0.2 to 0.9 in
ordinary training, zero or below where the weights have turned a corner.  Without it physics-informed networks on new
points ended two to six times as high (LOG.md).  b starts at zero, so that the first steps are shortened by kappa as a
longer warm-up would shorten them; correcting that bias was worse in trials.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..records import StateDict
from ..weights import algebra as weights
from ..weights.algebra import Tensors
from ..weights.shards import itself, total_over
from .drift_storage import Narrow, Storage, Stored, fetched, size_of

#: Steps between two applications: per step the same motion would cost three times the passes.
EVERY = 3
#: gamma per step: the drift of the last seventy steps.
GAMMA = 0.986
#: gamma' per application: a is measured over the last ten or so.
GAMMA_CONTINUED = 0.9
#: What is remembered is kept as it is.
AS_IS = Storage()


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
        self, parameters: Sequence[Tensor], rate: float, *, pull: float, strength: float,
        along: Sequence[Tensor] = (), movable: Sequence[bool] = (),
    ) -> int:  # fmt: skip
        """Count a real step and move the weights if it is time; returns passes over the weights."""
        ...

    def begin_anew(self, parameters: Sequence[Tensor], places: Sequence[int]) -> None:
        """What is known of these parameters is of no use any more: they begin where they are, without a drift."""
        ...

    def follow(self, parameters: Sequence[Tensor]) -> None:
        """The weights may have been written to: what they moved since the last application is not known."""
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

    def state_dict(self) -> StateDict:
        """Everything a resume needs."""
        ...

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        ...


class NoLookahead:
    """The null object."""

    num_steps = 0

    def before_step(self, parameters: Sequence[Tensor]) -> int:
        """Nothing."""
        return 0

    def after_step(
        self, parameters: Sequence[Tensor], rate: float, *, pull: float, strength: float,
        along: Sequence[Tensor] = (), movable: Sequence[bool] = (),
    ) -> int:  # fmt: skip
        """Nothing."""
        return 0

    def begin_anew(self, parameters: Sequence[Tensor], places: Sequence[int]) -> None:
        """Nothing."""

    def follow(self, parameters: Sequence[Tensor]) -> None:
        """Nothing."""

    def forget(self) -> None:
        """Nothing."""

    def translate(self, deltas: Sequence[Tensor], scale: float) -> None:
        """Nothing."""

    def memory_bytes(self) -> int:
        """None."""
        return 0

    def state_dict(self) -> StateDict:
        """Nothing."""
        return {}

    def load_state_dict(self, state: StateDict) -> None:
        """Nothing."""


class DriftLookahead:
    """Lookahead with a drift: every n steps theta <- theta_0 + (1 - kappa) s + a (delta kappa + beta_t) Lambda b.

    Holds two weight copies: theta_0 and the drift b, which is in weights per unit of learning rate.  kappa = 1/2,
    delta = 0, beta = 0 is Lookahead (arXiv 1907.08610); kappa = 0 is an outer momentum as in EMA-Nesterov (arXiv
    2605.25395).
    """

    def __init__(
        self, beta: float, kappa: float = 0.0, delta: float = 1.0, *, every: int = EVERY, gamma: float = GAMMA,
        storage: Storage = AS_IS,
    ) -> None:  # fmt: skip
        """Nothing is known of the drift yet.

        Args:
            beta: Extrapolation: weight of the drift that is added, at least 0.
            kappa: Damping: share of each displacement that is removed, in [0, 1].
            delta: How much of the removed share the drift replaces, in [0, 1].
            every: steps between applications, n.
            gamma: of the drift's mean, per step.
            storage: of what is remembered.
        """
        self.storage = storage
        self.beta, self.kappa, self.delta, self.every, self.gamma = beta, kappa, delta, every, gamma
        self.num_steps = 0
        self._rates = 0.0  # Lambda so far
        self._sums = torch.zeros(2)  # of <s, Lambda b> and of |Lambda b|^2, older ones less
        self._theta_0: Tensors = []
        self._b: list[Stored] = []
        # of an application that is being written: steps, weights, theta_0, b, earlier weights, sums
        self._landing: tuple[int, Tensors, Tensors, list[Stored], Tensors, Tensor] | None = None

    def before_step(self, parameters: Sequence[Tensor]) -> int:
        """At the first real step: theta_0."""
        if self._theta_0:
            return 0
        self._theta_0 = [p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in parameters]
        if self.beta > 0 or self.kappa * self.delta > 0:  # of any use
            self._b = [self.storage.put_drift(torch.zeros_like(t)) for t in self._theta_0]
        self._theta_0 = [self.storage.put(t) for t in self._theta_0]
        return 3

    @torch.no_grad()
    def after_step(
        self, parameters: Sequence[Tensor], rate: float, *, pull: float, strength: float,
        along: Sequence[Tensor] = (), movable: Sequence[bool] = (),
    ) -> int:  # fmt: skip
        """Every ``every`` steps: update b and move the weights.

        Args:
            parameters: Moved in place.
            rate: Learning rate of the step, the learned scale included.
            pull: kappa_t / kappa, in [0, 1].
            strength: beta_t / beta, in [0, 1]: the schedule's rate against its peak.
            along: Copies of earlier weights that are moved by the same, so that what was a step remains one.
            movable: Which parameters are moved, none given: all.  The others are left bit for bit where they are.

        Returns:
            Passes over the weights.
        """
        if self._landing is not None:
            return self._land(parameters, along)
        num_steps, rates = self.num_steps + 1, self._rates + rate
        if num_steps % self.every:
            self.num_steps, self._rates = num_steps, rates
            return 0
        # without a rate (its group is frozen, or has none) the drift cannot be told, and what is taken out not put back
        kappa = self.kappa * pull if rates > 0 or not self._b else 0.0
        share = (self.delta * kappa + self.beta * strength) * rates
        # built first, then written from what was built: where that is interrupted it can be done again
        s: Tensors = []
        sums = self._summed(parameters, rates, s) if share and self._b else self._sums
        moved, theta_0, drift = self._moved(
            parameters, movable or [True] * len(parameters), kappa, share * went_on(sums) if share else 0.0, rates, s
        )
        earlier = []
        if along and moved:
            triples = zip(along, moved, parameters, strict=True)
            earlier = [e.add(weights.like_sampled(m, e) - weights.like_sampled(p, e)) for e, m, p in triples]
        self._landing = (num_steps, moved, theta_0, drift, earlier, sums)
        return self._land(parameters, along)

    def _moved(
        self, parameters: Sequence[Tensor], movable: Sequence[bool], kappa: float, share: Tensor | float,
        rates: float, displacements: Tensors,
    ) -> tuple[Tensors, Tensors, list[Stored]]:  # fmt: skip
        """The weights where they are moved, theta_0 and b after an application; nothing that is held is written.

        Args:
            parameters: theta.
            movable: Which of them are moved.
            kappa: Of this application.
            share: a (delta kappa + beta_t) Lambda.
            rates: Lambda.
            displacements: s where it is known already, to be used up: its memory becomes that of the moved weights.
        """
        kept = self.gamma**self.every
        moved, new_theta_0 = [], []
        drift: list[Stored] = []
        moves_on = isinstance(share, Tensor) or share != 0
        displacements.reverse()
        for i, (kept_0, p) in enumerate(zip(self._theta_0, parameters, strict=True)):
            theta_0 = fetched(kept_0, p.device)
            s = displacements.pop() if displacements else p.detach().to(theta_0.dtype) - theta_0
            b = fetched(self._b[i], p.device) if self._b else None
            if b is not None and rates > 0:
                towards = s / rates
                # widened, it is nobody else's
                b = b.lerp_(towards, 1 - kept) if isinstance(self._b[i], Narrow) else b.lerp(towards, 1 - kept)
            target = p.detach()
            if kappa or (b is not None and moves_on):
                if not movable[i]:
                    target = target.clone()
                elif b is None:
                    target = theta_0.lerp(p.detach().to(theta_0.dtype), 1 - kappa).to(p.dtype)
                else:
                    target = torch.add(theta_0, s, alpha=1 - kappa, out=s).add_(_times(b, share)).to(p.dtype)
                moved.append(target)
            new_theta_0.append(self.storage.put(target.to(theta_0.dtype, copy=not moved)))  # as rounded
            if b is not None:
                drift.append(self.storage.put_drift(b))
        return moved, new_theta_0, drift

    def _land(self, parameters: Sequence[Tensor], along: Sequence[Tensor]) -> int:
        """Write what an application has built; may be begun again."""
        assert self._landing is not None
        num_steps, moved, theta_0, drift, earlier, sums = self._landing
        if moved:
            weights.copy_(parameters, moved)
        if earlier:
            weights.copy_(along, earlier)
        self._sums, self._theta_0, self._b = sums, theta_0, drift
        self._rates, self.num_steps, self._landing = 0.0, num_steps, None  # last: now it is done
        return (16 if drift else 4) + (5 if earlier else 0)

    @torch.no_grad()
    def begin_anew(self, parameters: Sequence[Tensor], places: Sequence[int]) -> None:
        """theta_0 is where these parameters are, and b is zero."""
        for i in places if self._theta_0 else ():
            self._theta_0[i].copy_(parameters[i])
            if self._b:
                b = fetched(self._b[i], parameters[i].device)
                self._b[i] = self.storage.put_drift(torch.zeros_like(b))

    @torch.no_grad()
    def follow(self, parameters: Sequence[Tensor]) -> None:
        """theta_0 is where the parameters are; the drift is kept."""
        for theta_0, p in zip(self._theta_0, parameters, strict=False):
            theta_0.copy_(p)

    def _summed(self, parameters: Sequence[Tensor], rates: float, displacements: Tensors) -> Tensor:
        """The sums that a is made of, (2,), with this displacement; on the weights' device: nobody waits for them.

        Args:
            parameters: theta.
            rates: Lambda.
            displacements: Takes s.
        """
        device = parameters[0].device
        before, total = self._sums.to(device) * GAMMA_CONTINUED, total_over(parameters)
        sums = before if total is itself else torch.zeros_like(before)
        for kept_0, kept, p in zip(self._theta_0, self._b, parameters, strict=True):
            theta_0, b = fetched(kept_0, p.device), fetched(kept, p.device)
            displacement = p.detach().to(theta_0.dtype) - theta_0
            displacements.append(displacement)
            s, flat = displacement.reshape(-1), b.reshape(-1)
            sums = sums + torch.stack([rates * torch.dot(s, flat), rates**2 * torch.dot(flat, flat)]).to(device)
        return sums if total is itself else before + total(sums)

    def forget(self) -> None:
        """Let both copies go; what comes later begins anew."""
        self.num_steps, self._rates, self._theta_0, self._b, self._landing = 0, 0.0, [], [], None
        self._sums = torch.zeros(2)

    @torch.no_grad()
    def translate(self, deltas: Sequence[Tensor], scale: float) -> None:
        """Move theta_0 by ``scale`` times the jump."""
        # all at once: an interruption finds none of them moved or all
        self._theta_0 = [
            t.add(d.to(dtype=t.dtype, device=t.device), alpha=scale)
            for t, d in zip(self._theta_0, deltas, strict=False)
        ]

    def memory_bytes(self) -> int:
        """Two copies of the weights, of large models one and a half; one where the drift is of no use."""
        return sum(map(size_of, (*self._theta_0, *self._b)))

    def state_dict(self) -> StateDict:
        """Step count, learning rates since the last application, weights after it, drift."""
        return {
            "num_steps": self.num_steps, "rates": self._rates,
            "sums": self._sums if self._theta_0 else None,  # they become as wide as the weights
            "theta_0": list(self._theta_0), "b": [b.state_dict() if isinstance(b, Narrow) else b for b in self._b],
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`, with copies."""
        self.num_steps, self._rates = state["num_steps"], state["rates"]
        sums = state.get("sums")  # none in format 2
        self._sums = torch.zeros(2) if sums is None else sums.clone()
        self._theta_0 = [self.storage.put(t) for t in weights.clone(state["theta_0"])]
        self._b = [self.storage.put_state(b) for b in state["b"]]


def went_on(sums: Tensor) -> Tensor:
    """a in [0, 1], shape (): the share of the foretold displacement that was made; 1 where nothing was foretold.

    Args:
        sums: (2,), of <s, Lambda b> and of |Lambda b|^2.
    """
    made, foretold = sums.unbind()
    return torch.where(foretold > 0, made / foretold, torch.ones_like(made)).clamp(0, 1).nan_to_num(0.0)


def _times(b: Tensor, share: Tensor | float) -> Tensor:
    return b * (share.to(b) if isinstance(share, Tensor) else share)
