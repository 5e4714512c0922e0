"""The lookahead on trial: blocks of real steps with the motion and, drawn by lot, some without it.

A jump is tested before it is made.  The motion between steps cannot be: what it takes out of a displacement lowers
the next loss whether or not anything is won, and what it adds raises it at first.  So a random share of blocks is the
control group, as in a switchback experiment, and what is compared is what is left afterwards: with L_i the mean
training loss of block i,

    y_i = log L_{i+1} - log L_{i-1},

whose two blocks both have the motion, whatever block i had (controls are never neighbours).  L is the mean of a block's
latter half: what the motion does for as long as it is there comes and goes within a few steps of its first half.
If y of the blocks with the motion is higher than that of the controls, and by more than chance allows, the motion
ends for the rest of the run.

Gains of a few percent of the progress are far below the noise of such blocks: this finds out harm, not worth.  That
needs some two thousand steps, so the first blocks have no controls, and a short run loses nothing to them; nor are
they compared with later ones, because a loss falls fastest at first.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Sequence

import torch

from .gate import t_quantile
from .records import State

#: Real steps of a block: a few applications of the motion; and how many of its last losses are its mean.
BLOCK_STEPS = 24
NUM_LOSSES = 12
#: Blocks before the first control.
NUM_FREE_BLOCKS = 10
#: Comparisons of either kind that a verdict needs, and its one-sided level: one of two hundred, because it is
#: asked again at every block.
MIN_COMPARISONS = 6
LEVEL = 0.005
#: Newest comparisons of either kind that are kept; controls are rare: theirs cover some hundred thousand steps.
MAX_COMPARISONS = 1000


class Switchback:
    """Which blocks move, and what became of them."""

    def __init__(self, control_fraction: float) -> None:
        """Args: control_fraction: share of the later blocks that go without the motion; 0: no trial."""
        self.control_fraction = control_fraction
        self.moving = True  # whether the present block has the motion
        self.switched_off = False
        self.num_blocks = 0
        self._num_steps = 0  # in the present block
        self._moved = False  # whether there was anything for the motion to do in it
        self._blocks: deque[tuple[float, bool]] = deque(maxlen=2)  # the two before it: log L_i, whether it moved
        self._spoiled = 0  # blocks whose comparison a jump has spoiled, the present one included
        self._changes = _comparisons((), ())  # y_i by whether block i had the motion

    def note_jump(self) -> None:
        """Something else has moved the weights: no comparison across this block says anything of the motion."""
        self._spoiled = 3

    def note_motion(self) -> None:
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
        mean = _mean(losses) if losses else math.nan
        now = (math.log(mean) if mean > 0 else math.nan, self.moving)
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
        bound = self.excess_bound()
        self.switched_off = self.switched_off or (bound is not None and bound > 0)
        drawn = self.num_blocks >= NUM_FREE_BLOCKS and self.moving
        self.moving = not self.switched_off and not (
            drawn and float(torch.rand((), generator=generator)) < self.control_fraction
        )

    @property
    def effect(self) -> float | None:
        """Mean share of the loss that a block's motion takes off, against the controls; None: too few comparisons."""
        if min(len(changes) for changes in self._changes.values()) < MIN_COMPARISONS:
            return None
        return _mean(self._changes[False]) - _mean(self._changes[True])

    def excess_bound(self) -> float | None:
        """Lower bound of what the motion adds to the logarithm of the loss (Welch); None: too few comparisons."""
        effect = self.effect
        if effect is None:
            return None
        variances = [_variance(v) / len(v) for v in self._changes.values()]
        error = math.sqrt(sum(variances))
        freedom = sum(variances) ** 2 / sum(
            v**2 / (len(y) - 1) for v, y in zip(variances, self._changes.values(), strict=True)
        ) if error > 0 else math.inf  # fmt: skip
        return -effect - t_quantile(LEVEL, int(min(freedom, 1e6))) * error

    def state_dict(self) -> State:
        """Plain containers."""
        return {
            "moving": self.moving, "switched_off": self.switched_off, "num_blocks": self.num_blocks,
            "num_steps": self._num_steps, "moved": self._moved, "spoiled": self._spoiled,
            "blocks": [list(block) for block in self._blocks],
            "with": list(self._changes[True]), "without": list(self._changes[False]),
        }  # fmt: skip

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.moving, self.switched_off = state["moving"], state["switched_off"]
        self.num_blocks, self._num_steps, self._moved = state["num_blocks"], state["num_steps"], state["moved"]
        self._blocks = deque(((float(loss), bool(moved)) for loss, moved in state["blocks"]), maxlen=2)
        self._spoiled = state["spoiled"]
        self._changes = _comparisons(state["with"], state["without"])


def _comparisons(moved: Iterable[float], still: Iterable[float]) -> dict[bool, deque[float]]:
    return {True: deque(moved, MAX_COMPARISONS), False: deque(still, MAX_COMPARISONS)}


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values)


def _variance(values: Collection[float]) -> float:
    mean = _mean(values)
    return sum((v - mean) ** 2 for v in values) / (len(values) - 1)
