"""The lookahead on trial: blocks of real steps with the motion and, drawn by lot, some without it.

A jump is tested before it is made.  The motion between steps cannot be: what it takes out of a displacement lowers
the next loss whether or not anything is won, and what it adds raises it at first.  So a random share of blocks is the
control group, as in a switchback experiment, and what is compared is what is left afterwards: with L_i the mean
training loss of block i,

    y_i = log L_{i+1} - log L_{i-1},

whose two blocks both have the motion, whatever block i had (controls are never neighbours).  L is the mean of a block's
latter half: what the motion does for as long as it is there comes and goes within a few steps of its first half.
If y of the blocks with the motion is higher than that of the controls, and by more than chance allows, the motion
ends for the rest of the run; if it is lower, the trial ends, and with it the holdout.  The interval that decides is
valid however often it is looked at (:mod:`..numerics.sequential`).

The trial finds harm, not benefit: a gain of a few percent is far below the noise between blocks.  Harm takes some two
thousand steps to find.  The first blocks have no holdout, so that a short run loses nothing to them; nor are they
compared with later ones, because a loss falls fastest at first.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

import torch

from ..numerics.sequential import difference_interval, mean
from ..records import StateDict

#: Real steps of a block: a few applications of the motion; and how many of its last losses are its mean.
BLOCK_STEPS = 24
NUM_LOSSES = 12
#: Blocks before the first control.
NUM_FREE_BLOCKS = 10
#: Comparisons of either kind that a verdict needs, and its level: of finding harm or worth, ever, where there is none.
MIN_COMPARISONS = 6
LEVEL = 0.05
#: Newest comparisons of either kind that are kept; controls are rare: theirs cover some hundred thousand steps.
MAX_COMPARISONS = 1000


class Switchback:
    """A switchback experiment (Bojinov, Simchi-Levi & Zhao, Management Science 69, 2023) over blocks of real steps.

    Attributes:
        holdout_fraction: Share of the later blocks that are held out, in [0, 0.5]; 0: no trial.
        moving: Whether the present block has the motion.
        switched_off: Harm was found: no block has the motion any more.
        proved: Benefit was found: no block is held out any more.
        num_blocks: Blocks closed so far.
    """

    def __init__(self, holdout_fraction: float) -> None:
        """Args: holdout_fraction: share of the later blocks that go without the motion; 0: no trial."""
        self.holdout_fraction = holdout_fraction
        self.moving = True  # whether the present block has the motion
        self.switched_off = False
        self.proved = False  # it does good: no more controls
        self.num_blocks = 0
        self._num_steps = 0  # in the present block
        self._moved = False  # whether there was anything for the motion to do in it
        self._blocks: deque[tuple[float, bool]] = deque(maxlen=2)  # the two before it: log L_i, whether it moved
        self._spoiled = 0  # blocks whose comparison a jump has spoiled, the present one included
        self._changes = _comparisons((), ())  # y_i by whether block i had the motion

    def switch_off(self) -> None:
        """The motion ends."""
        self.switched_off = True

    def on_jump(self) -> None:
        """Something else has moved the weights: no comparison across this block says anything of the motion."""
        self._spoiled = 3

    def restart(self) -> None:
        """The motion has changed: comparisons so far were about another one."""
        self._changes = _comparisons((), ())
        self.proved, self._spoiled = False, 3

    def on_motion(self) -> None:
        """There is something for the motion to do in this block, whether or not it may."""
        self._moved = True

    def count_step(self) -> bool:
        """A real step was made; returns whether the block is full."""
        self._num_steps += 1
        return self._num_steps >= BLOCK_STEPS

    def close_block(self, losses: Sequence[float], generator: torch.Generator) -> None:
        """Compare the blocks around the one before this one, and draw what the next is.

        Args:
            losses: Of this block's last steps.
            generator: The run's own.
        """
        if not self._moved:  # a rate that rises, steps that are being lengthened: there was nothing to try
            self._spoiled = 3
        level = mean(losses) if losses else math.nan
        now = (math.log(level) if level > 0 else math.nan, self.moving)
        if len(self._blocks) == 2 and not self._spoiled:
            before, between = self._blocks
            change = now[0] - before[0]
            comparable = self.num_blocks > NUM_FREE_BLOCKS  # the one between could have been a control
            if math.isfinite(change) and before[1] and now[1] and comparable:
                self._changes[between[1]].append(change)
        self._blocks.append(now)
        self._spoiled = max(self._spoiled - 1, 0)
        self._num_steps, self._moved = 0, False
        self.num_blocks += 1
        low, high = self.excess()
        self.switched_off = self.switched_off or low > 0
        self.proved = self.proved or high < 0
        drawn = self.num_blocks >= NUM_FREE_BLOCKS and self.moving and not self.proved
        self.moving = not self.switched_off and not (
            drawn and float(torch.rand((), generator=generator)) < self.holdout_fraction
        )

    @property
    def effect(self) -> float | None:
        """Mean share of the loss that a block's motion takes off, against the controls; None: too few comparisons."""
        if min(len(changes) for changes in self._changes.values()) < MIN_COMPARISONS:
            return None
        return mean(self._changes[False]) - mean(self._changes[True])

    def excess(self) -> tuple[float, float]:
        """Bounds of what the motion adds to the logarithm of the loss; all reals: too few comparisons."""
        if self.effect is None:
            return -math.inf, math.inf
        interval = difference_interval(self._changes[True], self._changes[False], LEVEL)
        return interval.low, interval.high

    def state_dict(self) -> StateDict:
        """Plain containers."""
        return {
            "moving": self.moving, "switched_off": self.switched_off, "proved": self.proved,
            "num_blocks": self.num_blocks,
            "num_steps": self._num_steps, "moved": self._moved, "spoiled": self._spoiled,
            "blocks": [list(block) for block in self._blocks],
            "with": list(self._changes[True]), "without": list(self._changes[False]),
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.moving, self.switched_off, self.proved = state["moving"], state["switched_off"], state["proved"]
        self.num_blocks, self._num_steps, self._moved = state["num_blocks"], state["num_steps"], state["moved"]
        self._blocks = deque(((float(loss), bool(moved)) for loss, moved in state["blocks"]), maxlen=2)
        self._spoiled = state["spoiled"]
        self._changes = _comparisons(state["with"], state["without"])


def _comparisons(moved: Iterable[float], still: Iterable[float]) -> dict[bool, deque[float]]:
    return {True: deque(moved, MAX_COMPARISONS), False: deque(still, MAX_COMPARISONS)}
