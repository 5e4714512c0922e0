"""Counts and clocks: what a run did, what it cost, where its schedule stands."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from .config.settings import Clock
from .records import Phase, StateDict

#: Cost of one optimizer step in forwards: forward 1, backward 2, update 0.1 (specification).
FORWARD_UNITS = 1.0
BACKWARD_UNITS = 2.0
UPDATE_UNITS = 0.1
STEP_UNITS = FORWARD_UNITS + BACKWARD_UNITS + UPDATE_UNITS
#: One pass over the weights (reading or writing every weight once) in forwards: an estimate for batches of
#: some 2,000 tokens (an update of seven passes at the specification's 0.1 would make it 0.014).  What it is on a given
#: machine shows in the wall-clock beside the cost.
PASS_UNITS = 0.002
#: Passes of AdamW's own update: it reads gradient, weight and two moments, and writes all but the gradient.
UPDATE_PASSES = 7
#: A pass at the price of the update's own.  Runs decide by :data:`PASS_UNITS`, benchmarks judge them by this one.
FAIR_PASS_UNITS = UPDATE_UNITS / UPDATE_PASSES


@dataclass(slots=True)
class CostMeter:
    """What a run did and what it cost: plain counts, from which every figure of a summary is computed.

    Nobody else writes them: who did something says so by one of the methods.
    """

    num_steps: int = 0  # calls of step()
    num_attempted_steps: int = 0  # forward and backward computed
    num_real_steps: int = 0  # of these, those that moved the weights
    num_skipped_steps: int = 0  # of these, those that were not finite
    num_claimed_steps: int = 0  # sum of accepted Y
    num_forward: float = 0.0  # in full batches
    num_backward: int = 0
    num_passes: float = 0.0  # over the weights, for snapshots, proposals and moves
    num_priced_passes: float = 0.0  # of these, work of another kind that has a price of its own
    num_jumps_proposed: int = 0
    num_jumps_accepted: int = 0
    num_controls: int = 0  # approved, skipped for the ledger
    num_rollbacks: int = 0
    num_divergence_events: int = 0
    num_outside_writes: int = 0  # times that somebody else had changed the weights between two steps
    steps_by_phase: dict[Phase, int] = field(default_factory=lambda: dict.fromkeys(Phase, 0))

    planned_units: float = 0.0  # cost of the whole run, where it is known

    # ---- what happens ------------------------------------------------------------------------------

    def plan(self, num_steps: int) -> None:
        """The run is to cost as much as so many steps."""
        self.planned_units = num_steps * STEP_UNITS

    def begin_step(self, phase: Phase) -> None:
        """A step of a phase begins."""
        self.num_steps += 1
        self.steps_by_phase[phase] += 1

    def real_step(self) -> None:
        """Forward and backward were computed, and the weights have moved."""
        self._attempted()
        self.num_real_steps += 1

    def skipped(self) -> None:
        """Forward and backward were computed, and the step was left out."""
        self._attempted()
        self.num_skipped_steps += 1

    def _attempted(self) -> None:
        self.num_attempted_steps += 1
        self.num_forward += 1
        self.num_backward += 1

    def lost(self, num_steps: int) -> None:
        """The last so many real steps were taken back: they were spent and count as skipped."""
        self.num_skipped_steps += num_steps
        self.num_real_steps -= num_steps

    def add_forwards(self, num_forwards: float) -> None:
        """Forwards beside those of real steps, in full batches."""
        self.num_forward += num_forwards

    def add_passes(self, num_passes: float) -> None:
        """Passes over the weights beside the optimizer's own."""
        self.num_passes += num_passes

    def add_priced(self, units: float) -> None:
        """Work that is no pass, at its price in forwards."""
        passes = units / PASS_UNITS
        self.num_passes += passes
        self.num_priced_passes += passes

    def proposed(self) -> None:
        """A jump was proposed."""
        self.num_jumps_proposed += 1

    def jump(self, horizon: int) -> None:
        """A jump that claims to be worth ``horizon`` steps was applied."""
        self.num_jumps_accepted += 1
        self.num_claimed_steps += horizon

    def jump_undone(self, horizon: int) -> None:
        """A jump was taken back, and what it claimed with it."""
        self.num_claimed_steps -= horizon
        self.num_rollbacks += 1

    def control(self) -> None:
        """An approved jump was not applied, for the comparison."""
        self.num_controls += 1

    def divergence_event(self) -> None:
        """An alarm was raised."""
        self.num_divergence_events += 1

    def outside_write(self) -> None:
        """Somebody else had changed the weights."""
        self.num_outside_writes += 1

    # ---- what it comes to ----------------------------------------------------------------------------

    @property
    def extra_units(self) -> float:
        """Cost beyond the attempted real steps, in forwards."""
        return FORWARD_UNITS * (self.num_forward - self.num_attempted_steps) + PASS_UNITS * self.num_passes

    @property
    def cost_units(self) -> float:
        """Total cost in forwards: forward 1, backward 2, update 0.1, pass over the weights 0.002."""
        return STEP_UNITS * self.num_attempted_steps + self.extra_units

    @property
    def fair_cost_units(self) -> float:
        """Total cost in forwards with every pass at the price of the optimizer's own: what benchmarks divide by."""
        return self.cost_units + (FAIR_PASS_UNITS - PASS_UNITS) * (self.num_passes - self.num_priced_passes)

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

    def state_dict(self) -> StateDict:
        """Plain numbers; those by phase as ``<phase>_steps``."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "steps_by_phase"}
        return plain | {_key(phase): n for phase, n in self.steps_by_phase.items()}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        for f in fields(self):
            if f.name != "steps_by_phase":
                setattr(self, f.name, state[f.name])
        self.steps_by_phase = {phase: state[_key(phase)] for phase in Phase}


def _key(phase: Phase) -> str:
    return f"{phase.value}_steps"
