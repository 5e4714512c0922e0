"""Counts and clocks: what a run did, what it cost, where its schedule stands."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

from .config.settings import Clock
from .records import State

#: Cost of one optimizer step in forwards: forward 1, backward 2, update 0.1 (specification).
FORWARD_UNITS = 1.0
BACKWARD_UNITS = 2.0
UPDATE_UNITS = 0.1
STEP_UNITS = FORWARD_UNITS + BACKWARD_UNITS + UPDATE_UNITS
#: One pass over the weights (reading or writing every weight once) in forwards: an estimate for batches of
#: some 2,000 tokens (an update of seven passes at the specification's 0.1 would make it 0.014).  What it is on a given
#: machine shows in the wall-clock beside the cost.
PASS_UNITS = 0.002


@dataclass(slots=True)
class Counters:
    """Plain counts; every figure in summaries is computed from these."""

    num_steps: int = 0  # calls of step()
    num_attempted_steps: int = 0  # forward and backward computed
    num_real_steps: int = 0  # of these, those that moved the weights
    num_skipped_steps: int = 0  # of these, those that were not finite
    num_claimed_steps: int = 0  # sum of accepted Y
    num_forward: float = 0.0  # in full batches
    num_backward: int = 0
    num_passes: float = 0.0  # over the weights, for snapshots, proposals and moves
    num_jumps_proposed: int = 0
    num_jumps_accepted: int = 0
    num_controls: int = 0  # approved, skipped for the ledger
    num_rollbacks: int = 0
    num_divergence_events: int = 0
    num_outside_writes: int = 0  # times that somebody else had changed the weights between two steps
    warmup_steps: int = 0  # steps by phase
    full_steps: int = 0
    predict_steps: int = 0
    correct_steps: int = 0

    @property
    def extra_units(self) -> float:
        """Cost beyond the attempted real steps, in forwards."""
        return FORWARD_UNITS * (self.num_forward - self.num_attempted_steps) + PASS_UNITS * self.num_passes

    @property
    def cost_units(self) -> float:
        """Total cost in forwards: forward 1, backward 2, update 0.1, pass over the weights 0.002."""
        return STEP_UNITS * self.num_attempted_steps + self.extra_units

    @property
    def cost_steps(self) -> int:
        """Whole optimizer steps the cost so far would have bought.

        Attempted steps are counted as integers, so that without prediction it is exactly their
        number: a float quotient would lose the bitwise equality with the plain loop.
        """
        return self.num_attempted_steps + math.floor(self.extra_units / STEP_UNITS + 1e-9)

    @property
    def backward_reduction_pct(self) -> float:
        """Backward passes avoided, if every claimed step were worth a real one (a diagnostic)."""
        total = self.num_backward + self.num_claimed_steps
        return 100.0 * self.num_claimed_steps / total if total else 0.0

    def position(self, clock: Clock, num_credited_steps: float) -> int:
        """Where the learning-rate schedule and the end of the run stand, in steps."""
        if clock == "cost":
            return self.cost_steps
        if clock == "credited":
            return self.num_attempted_steps + math.floor(num_credited_steps)
        return self.num_attempted_steps + self.num_claimed_steps

    def state_dict(self) -> State:
        """Plain numbers."""
        return asdict(self)

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        for f in fields(self):
            setattr(self, f.name, state[f.name])
