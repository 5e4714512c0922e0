"""A jump on trial, and what is left of one that is judged in pieces."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..keep.snapshot import Snapshot
from ..records import Level, StateDict
from ..weights import algebra as weights


@dataclass(slots=True)
class Probation:
    """A jump on probation: how to take it back, and the loss it must not exceed.

    Attributes:
        snapshot: Exact state before the jump.
        basis: State of the basis before it.
        num_steps_left: Real steps until the verdict.
        loss_before, std_before: Smoothed training loss before the jump, and its standard deviation.
        predicted_loss: Of the predictor, at the end of the jump.
        claimed: Real steps that the jump stands for.
    """

    snapshot: Snapshot
    basis: StateDict
    num_schedule_steps: int
    num_steps_left: int
    loss_before: float  # smoothed training loss before the jump
    std_before: float
    predicted_loss: float
    fallback_threshold: float  # smoothed loss above which the jump is taken back whatever else
    claimed: int
    extended: bool = False  # the prediction error asked for more steps once
    losses: list[float] = field(default_factory=list)
    unread: list[Tensor] = field(default_factory=list)  # losses since: an accelerator is asked for them at the end
    worst_level: Level = Level.NORMAL
    under_way: Tensor = field(default_factory=lambda: torch.tensor(math.nan))  # loss of the step that is being made

    def begin_step(self, loss: Tensor) -> None:
        """A step of the trial is about to move the weights."""
        self.under_way = loss

    def count_step(self, loss: Tensor | None) -> None:
        """A step of the trial is over; None: it was left out."""
        self.num_steps_left -= 1
        if loss is not None:
            self.unread.append(loss)

    def on_level(self, level: Level) -> None:
        """An alarm on the way."""
        self.worst_level = max(self.worst_level, level)

    def extend(self, num_steps: int) -> None:
        """Once, for a jump in doubt: so many steps more."""
        self.extended, self.num_steps_left = True, num_steps

    def claim(self, horizon: int) -> None:
        """Another piece of the same jump claims to be worth so many steps."""
        self.claimed += horizon

    def read(self) -> None:
        """Bring the losses to the host."""
        self.losses += weights.on_host(self.unread).tolist()
        self.unread = []


def probation_state(p: Probation | None) -> StateDict | None:
    """Plain containers; its losses are read."""
    if p is None:
        return None
    p.read()
    return {
        "snapshot": p.snapshot.state_dict(), "basis": p.basis,
        "num_schedule_steps": p.num_schedule_steps, "num_steps_left": p.num_steps_left,
        "loss_before": p.loss_before, "std_before": p.std_before, "predicted_loss": p.predicted_loss,
        "fallback_threshold": p.fallback_threshold, "extended": p.extended, "claimed": p.claimed,
        "losses": list(p.losses), "worst_level": int(p.worst_level),
    }  # fmt: skip


def probation_from(state: StateDict | None) -> Probation | None:
    """Inverse of :func:`probation_state`."""
    if state is None:
        return None
    values = dict(state)
    values["snapshot"] = Snapshot.from_state_dict(values["snapshot"])
    values["worst_level"] = Level(values["worst_level"])
    return Probation(**values)


def probation_passes(probation: Probation, sigma: float) -> bool:
    """Whether the smoothed loss on probation is no worse than before the jump.

    Degraded means: more than ``sigma`` standard errors above the smoothed loss before, above the
    fallback threshold, or a critical alarm on the way.
    """
    if probation.worst_level >= Level.CRITICAL or not probation.losses:
        return False
    n = len(probation.losses)
    after = sum(probation.losses) / n
    tolerance = sigma * max(probation.std_before, 1e-6 * abs(probation.loss_before)) / math.sqrt(n)
    return after <= min(probation.loss_before + tolerance, max(probation.fallback_threshold, probation.loss_before))
