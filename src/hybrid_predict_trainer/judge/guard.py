"""The guard over a run: does its loss stand above its best for good, and is that this library's doing?

Everything that moves weights or rates is tested where it acts, on the scale of its own effect.  What gets past those
tests a little at a time is seen here.  Losses are averaged over blocks, and blocks over a window of ``WINDOW_BLOCKS``;
when the window's mean stands above the lowest one so far by more than its noise for ``PATIENCE_BLOCKS`` blocks in a
row, the guard raises an alarm.  All motions rest from there on, and for the next batches the present weights and those
of the rollback point, a copy from a time when the loss was at its best, are compared on the same data: pairs, because
data that have become harder would accuse everybody.  If the present weights are worse, the rollback point's state comes
back.  In either case the run goes on as the plain loop.

Exact losses have judged every jump, so what lifts such a run off its best are the steps in between: after jumps to
where gradients are small an adaptive optimizer's steps are too long for the curvature there (its stability bound,
Cohen et al. 2022, arXiv 2207.14484).  The first time the state comes back with a smaller rate, and jumps go on.

The lowest of many means is lower than their true best by chance; of K means, by sqrt(2 log K) of their standard errors
at most, which the threshold allows for.  Where losses are exact their logarithms are averaged, and the excess must be
``EXACT_EXCESS``: jumps land far below what the next steps of an optimizer can hold.

Pure bookkeeping: losses come in, requests come out.  The owner of the weights carries them out
(:mod:`..cycle.withdrawal`).
"""

from __future__ import annotations

import math
from collections import deque
from enum import StrEnum

from ..numerics.sequential import mean, mean_interval
from ..records import StateDict

#: Losses of a block, blocks of a window, and blocks in a row that must stand above the best.
BLOCK_STEPS, WINDOW_BLOCKS, PATIENCE_BLOCKS = 32, 4, 3
#: Standard errors of a difference of two means, beyond what the choice of the lowest explains; and its least share.
SIGMAS, LEAST_EXCESS = 3.0, 0.01
EXACT_EXCESS = math.log(3.0)
#: Real steps between two anchors at least, and the share of the run so far.
ANCHOR_STEPS, ANCHOR_SHARE = 64, 1 / 16
#: Pairs of losses that are compared at most, and the level of the comparison.
MAX_PAIRS, LEVEL = 16, 0.05
#: Times that a run with exact losses gets a second try.
MAX_RETRIES = 1
#: For real steps at the anchor: there is none.
NO_ANCHOR = -1


class Request(StrEnum):
    """What the guard asks for."""

    NOTHING = "nothing"
    ANCHOR = "anchor"  # keep the state as it is now
    COMPARE = "compare"  # rest all motions and compare with the anchor
    WITHDRAW = "withdraw"  # end all motions; the weights stay
    RETRY = "retry"  # the anchor's state comes back; smaller steps of the optimizer, jumps go on
    RESTORE = "restore"  # end all motions; the anchor's state comes back


class Guard:
    """A change-point test on block means of the training loss, then a paired test against the rollback point.

    Losses are in the units of the loss (their logarithms where losses are exact); the comparison's interval is valid
    however often it is looked at (:mod:`..numerics.sequential`).
    """

    def __init__(self) -> None:
        """Nothing is known yet."""
        self.withdrawn = False  # the run is the plain loop from here on
        self.comparing = False
        self.num_alarms = 0
        self.num_restored = 0
        self.num_retries = 0
        self.anchor_step = NO_ANCHOR  # real steps at the anchor
        self._losses: list[float] = []  # of the open block
        self._blocks: deque[float] = deque(maxlen=WINDOW_BLOCKS)
        self._noise = deque[float](maxlen=8 * WINDOW_BLOCKS)  # variance of one loss, block by block
        self._best = math.inf  # lowest mean of a window
        self._best_block = math.inf
        self._num_windows = 0
        self._num_above = 0  # windows in a row above the best
        self._differences: list[float] = []  # present minus anchor
        self._exact = False  # whether the losses that raised the alarm had no noise

    def watch(self, loss: float, step: int, *, exact: bool, moving: bool) -> Request:
        """Take the loss of a real step.

        Args:
            loss: Finite.
            step: Real steps so far, this one included.
            exact: Whether losses have no noise.
            moving: Whether anything of this library moves weights or rates; if not, no harm can be its own.
        """
        if self.withdrawn or self.comparing:
            return Request.NOTHING
        self._losses.append(math.log(loss) if exact and loss > 0 else loss)
        if len(self._losses) < BLOCK_STEPS:
            return Request.NOTHING
        block, spread = mean(self._losses), _difference_variance(self._losses)
        self._losses = []
        self._blocks.append(block)
        self._noise.append(spread)
        at_its_best = math.isfinite(self.noise) and block <= self._best_block + math.sqrt(self.noise / BLOCK_STEPS)
        self._best_block = min(self._best_block, block)
        if self._stands_above(exact=exact) and moving and self.anchor_step >= 0:
            self.num_alarms += 1
            self.comparing = True
            self._differences, self._exact = [], exact
            return Request.COMPARE
        old_enough = step - self.anchor_step >= max(ANCHOR_STEPS, ANCHOR_SHARE * step)
        if moving and at_its_best and (self.anchor_step < 0 or old_enough):
            self.anchor_step = step
            return Request.ANCHOR
        return Request.NOTHING

    @property
    def noise(self) -> float:
        """Variance of one loss about its trend; NaN before the first block."""
        return mean(self._noise) if self._noise else math.nan

    def _stands_above(self, *, exact: bool) -> bool:
        """Whether the newest windows all stand above the best one."""
        if len(self._blocks) < WINDOW_BLOCKS:
            return False
        window = mean(self._blocks)
        self._num_windows += 1
        error = math.sqrt(2 * self.noise / (BLOCK_STEPS * WINDOW_BLOCKS))
        limit = (SIGMAS + math.sqrt(2 * math.log(self._num_windows))) * error
        least = EXACT_EXCESS if exact else LEAST_EXCESS * abs(self._best)
        above = window > self._best + max(limit, least) if math.isfinite(self._best) else False
        self._num_above = self._num_above + 1 if above else 0
        self._best = min(self._best, window)
        return self._num_above >= PATIENCE_BLOCKS

    def forget_anchor(self) -> None:
        """The anchor is void; a comparison under way ends without a verdict."""
        self.anchor_step, self.comparing = NO_ANCHOR, False

    def begin_anew(self) -> None:
        """An earlier state has come back at somebody else's word: what was seen since does not count as its best."""
        self.forget_anchor()
        self._losses, self._num_above, self._num_windows = [], 0, 0
        self._blocks.clear()
        self._best = self._best_block = math.inf

    def compare(self, present: float, anchor: float) -> Request:
        """Take a pair of losses on one batch; not finite: the worst there is.

        Args:
            present: At the present weights.
            anchor: At the anchor's.
        """
        if math.isfinite(anchor) and not math.isfinite(present):
            return self._restore()
        self._differences.append(present - anchor)
        interval = mean_interval(self._differences, LEVEL)
        if interval.low > 0:
            return self._retry() if self._exact and self.num_retries < MAX_RETRIES else self._restore()
        if interval.high < 0 or len(self._differences) >= MAX_PAIRS or not math.isfinite(interval.mean):
            return self.withdraw()
        return Request.NOTHING

    def withdraw(self) -> Request:
        """End the comparison, and all motions with it."""
        self.withdrawn, self.comparing = True, False
        return Request.WITHDRAW

    def _retry(self) -> Request:
        self.comparing = False
        self.num_retries += 1
        self.num_restored += 1
        self._losses, self._num_above = [], 0
        self._blocks.clear()
        return Request.RETRY

    def _restore(self) -> Request:
        self.withdraw()
        self.num_restored += 1
        return Request.RESTORE

    def rescue(self) -> bool:
        """The run is dead: whether an anchor can come back, which is then asked for; all motions end."""
        possible = self.anchor_step >= 0 and not self.withdrawn
        if possible:
            self.num_alarms += 1
            self._restore()
        return possible

    _NAMES = (
        "withdrawn", "comparing", "num_alarms", "num_restored", "num_retries", "anchor_step", "_best", "_best_block",
        "_num_windows", "_num_above", "_exact",
    )  # fmt: skip

    def state_dict(self) -> StateDict:
        """Plain containers; the anchor is saved by its owner."""
        state: StateDict = {name.lstrip("_"): getattr(self, name) for name in self._NAMES}
        lists = {"losses": self._losses, "blocks": self._blocks, "noise": self._noise, "differences": self._differences}
        return {**state, **{name: list(values) for name, values in lists.items()}}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        for name in self._NAMES:
            setattr(self, name, state[name.lstrip("_")])
        self._losses, self._differences = list(state["losses"]), list(state["differences"])
        self._blocks = deque(state["blocks"], maxlen=WINDOW_BLOCKS)
        self._noise = deque(state["noise"], maxlen=8 * WINDOW_BLOCKS)


def _difference_variance(losses: list[float]) -> float:
    """Variance about the trend, from successive differences (von Neumann 1941)."""
    pairs = zip(losses[1:], losses, strict=False)
    return sum((b - a) * (b - a) for b, a in pairs) / (2 * (len(losses) - 1))  # of huge losses infinite, no error
