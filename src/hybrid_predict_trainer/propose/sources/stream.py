"""Batches that are new at every step: who goes on, jumps or plain steps, and how long a curvature is remembered.

A batch that nobody has fitted yet tells the loss of the weights as they are, without the flattery of the batch that
they were fitted to.  Real steps and jumps alike begin with such a batch, so both are measured by the same thing: how
fast the logarithm of that loss falls per forward spent.  They take turns in blocks; the one that is slower is tried
again after a number of blocks of the other that doubles each time it loses.  Cost decides, not a clock: a resumed run
decides alike.

How long to remember.  A jump lowers the loss of its own batch by more than that of the next one, because the batch has
noise, or too few samples to determine the weights.  Where next to nothing of the gain is left on the next batches, the
curvature is averaged over more of them: H_t = H_{t-1} + (A'A - H_{t-1}) / t, and the step is
d = -(H_t + damping)^-1 A'rho / t, which on a linear model is recursive least squares: the solution for all samples seen
(Ljung, System Identification, 1999, section 11.2).  With t at its bound T it is an exponential average over T batches.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from ...records import StateDict

JUMP, PLAIN = "jump", "plain"
#: Jumps of a block, and real steps of one at least.
NUM_JUMPS, NUM_STEPS = 8, 16
#: Price of a real step, in forwards.
REAL_STEP = 3.0
#: Weight of the newest block in an arm's rate.
NEWEST = 0.5
#: Blocks of the other arm between two trials: at first (jumps are what was asked for), and at most.
FIRST_WAIT, MOST_WAIT = {JUMP: 1, PLAIN: 4}, 32
#: Share of the fitted reduction that has to be left on the next batches; below, more of them are remembered.
KEPT = 0.1
#: Longest memory, in batches.
LONGEST = 256
#: Batches that are new one after the other, from which on they are expected to be.
ENOUGH = 2


@dataclass(slots=True)
class _Arm:
    """What is known of jumps, or of plain steps.

    Attributes:
        rate: Fall of the logarithm of the fresh loss per forward; None before the first block.
        wait: Blocks of the other arm before the next trial.
    """

    rate: float | None = None
    wait: int = 1

    def note(self, rate: float) -> None:
        """A block has ended."""
        self.rate = rate if self.rate is None else (1 - NEWEST) * self.rate + NEWEST * rate

    def tried(self) -> None:
        """It is tried; the next trial, should it lose, comes later."""
        self.wait = min(2 * self.wait, MOST_WAIT)

    def leads(self, wait: int) -> None:
        """It is the faster one: should it fall behind, it is tried again soon."""
        self.wait = wait


@dataclass(slots=True)
class _Block:
    """Fresh losses before each of its steps, and what the steps have cost by then.

    Attributes:
        costs, losses: Of every step.
        spent: So far, in forwards.
        fitted: Sum of the reductions on the jumps' own batches.
    """

    costs: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    spent: float = 0.0
    fitted: float = 0.0

    def add(self, loss: float, cost: float) -> None:
        """A step from a fresh loss, that cost so much."""
        self.costs.append(self.spent)
        self.losses.append(loss)
        self.spent += cost

    def fit(self, reduction: float) -> None:
        """A jump has lowered the loss of its own batch by so much."""
        self.fitted += max(reduction, 0.0)

    def slope(self) -> float:
        """Least-squares fall of the logarithm of the loss per forward; 0 where nothing can be said."""
        pairs = [(c, math.log(v)) for c, v in zip(self.costs, self.losses, strict=True) if v > 0 and math.isfinite(v)]
        if len(pairs) < 2:
            return 0.0
        mean_c, mean_l = (sum(p[i] for p in pairs) / len(pairs) for i in (0, 1))
        spread = sum((c - mean_c) ** 2 for c, _ in pairs)
        return -sum((c - mean_c) * (v - mean_l) for c, v in pairs) / spread if spread > 0 else 0.0


class Stream:
    """Takes turns between jumps and plain steps where batches are new.

    Attributes:
        fresh: Batches are new at every step.
        arm: Whose block this is.
        memory: Batches that the curvature is averaged over at most, 1: none but this.
        kept: Share of the fitted reduction that was left on the next batches in the last block of jumps; NaN before.
    """

    def __init__(self) -> None:
        """Nothing was seen."""
        self.fresh = False
        self.arm = JUMP
        self.memory = 1
        self.kept = math.nan
        self._arms = {name: _Arm(wait=wait) for name, wait in FIRST_WAIT.items()}
        self._block = _Block()
        self._num_blocks = 0  # of this arm in a row

    def on_data(self, num_different: int) -> None:
        """So many batches in a row were not the one before."""
        self.fresh = num_different >= ENOUGH

    @property
    def jumping(self) -> bool:
        """Whether it is the jumps' turn."""
        return not self.fresh or self.arm == JUMP

    @property
    def block_begins(self) -> bool:
        """Whether the jump that comes is the first one of its block."""
        return not self._block.losses

    @property
    def block_ends(self) -> bool:
        """Whether the jump that comes is the last one of its block."""
        return len(self._block.losses) + 1 >= NUM_JUMPS

    def on_jump(self, loss: float, after: float, cost: float) -> None:
        """A jump was computed.

        Args:
            loss: Of its batch before.
            after: Of its batch at its end.
            cost: In forwards.
        """
        if self.arm != JUMP:  # a run that ends went on for the way back to better weights
            return
        self._block.add(loss, cost)
        self._block.fit(loss - after)
        if len(self._block.losses) >= NUM_JUMPS:
            self._judge_memory()
            self._end_block()

    def on_failure(self) -> None:
        """No jump could be had, or the block's jumps have left the weights worse than they found them."""
        if self.arm == JUMP:
            self._judge_memory()
            self._end_block(lost=True)

    def on_step(self, loss: float) -> None:
        """A real step was made while it was their turn; its loss is that before it."""
        if self.arm != PLAIN:
            return
        self._block.add(loss, REAL_STEP)
        if len(self._block.losses) >= NUM_STEPS:
            self._end_block()

    def _judge_memory(self) -> None:
        losses = self._block.losses
        if len(losses) < 2 or not self._block.fitted > 0:
            return
        half = len(losses) // 2
        before, behind = sum(losses[:half]) / half, sum(losses[-half:]) / half
        # of a fall by halves the second half has seen half the block's jumps
        self.kept = 2 * (before - behind) / self._block.fitted
        if self.kept < KEPT:
            self.memory = min(2 * self.memory, LONGEST)

    def _end_block(self, *, lost: bool = False) -> None:
        """Who is next: whoever is faster, or the other one where it is due."""
        own, other_name = self._arms[self.arm], PLAIN if self.arm == JUMP else JUMP
        other, slope = self._arms[other_name], self._block.slope()
        own.note(min(slope, 0.0) if lost else slope)
        self._num_blocks += 1
        if other.rate is None:
            self._turn(other_name)
            return
        assert own.rate is not None, "just noted"
        if own.rate >= other.rate:  # it goes on, until the other is due
            own.leads(FIRST_WAIT[self.arm])
            if self._num_blocks >= other.wait:
                other.tried()
                self._turn(other_name)
            else:
                self._block = _Block()
        else:
            self._turn(other_name)

    def _turn(self, name: str) -> None:
        self.arm, self._block, self._num_blocks = name, _Block(), 0

    def state_dict(self) -> StateDict:
        """Plain containers."""
        return {
            "fresh": self.fresh, "arm": self.arm, "memory": self.memory, "kept": self.kept,
            "arms": {name: asdict(arm) for name, arm in self._arms.items()}, "block": asdict(self._block),
            "num_blocks": self._num_blocks,
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.fresh, self.arm, self.memory = state["fresh"], state["arm"], state["memory"]
        self.kept, self._num_blocks = state["kept"], state["num_blocks"]
        self._arms = {name: _Arm(**values) for name, values in state["arms"].items()}
        block: dict[str, Any] = dict(state["block"])
        self._block = _Block(**{**block, "costs": list(block["costs"]), "losses": list(block["losses"])})
