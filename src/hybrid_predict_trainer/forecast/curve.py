"""A loss curve: checked, and averaged into blocks where it has more rows than a fit needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..records import ConfigError

Array = NDArray[np.float64]

#: Blocks that a curve is averaged into.
MAX_BLOCKS = 200
#: A log that goes back in more than this share of its rows is in no order.
OUT_OF_ORDER = 0.2
#: Fewest rows after the warm-up that say anything about a slope.
MIN_ROWS = 8


@dataclass(frozen=True, slots=True)
class Curve:
    """Losses of a run by step, in rising order of steps.

    Attributes:
        steps: (n,) optimizer steps taken when the loss was measured.
        losses: (n,) above 0.
        sizes: (n,) rows that each entry is the mean of.
        noise: standard deviation of the logarithm of a single row's loss about its neighbours.
    """

    steps: Array
    losses: Array
    sizes: Array
    noise: float

    @staticmethod
    def of(steps: Sequence[float] | Array, losses: Sequence[float] | Array) -> Curve:
        """Check and sort rows; of those that a resumed run wrote again the last count (:func:`latest`).

        Raises:
            ConfigError: not equally many, a step that is no number, steps that begin anew in every epoch, or losses
                that are not finite and above 0.
        """
        at, loss = np.asarray(steps, dtype=np.float64), np.asarray(losses, dtype=np.float64)
        if at.shape != loss.shape or at.ndim != 1:
            raise ConfigError(f"{at.size} steps cannot be paired with {loss.size} losses")
        if not np.isfinite(at).all() or (at < 0).any():
            raise ConfigError("a step is negative or no number: every row needs the step that its loss belongs to")
        bad = ~np.isfinite(loss)
        if bad.any():
            raise ConfigError(
                f"the loss at step {at[bad][0]:g} is not finite: the run has diverged there; "
                "leave out the rows from there on to see what was to be expected"
            )
        if (loss <= 0).any():
            raise ConfigError(
                f"the loss at step {at[loss <= 0][0]:g} is {loss[loss <= 0][0]:g}: the law is one of positive losses"
            )
        rows = latest(at)
        at, loss = at[rows], loss[rows]
        return Curve(at, loss, np.ones_like(at), row_noise(loss))

    def scaled(self, factor: float) -> Curve:
        """The losses in other units."""
        return Curve(self.steps, self.losses * factor, self.sizes, self.noise)

    def until(self, step: float) -> Curve:
        """The rows up to a step."""
        return self._rows(self.steps <= step)

    def since(self, step: float) -> Curve:
        """The rows from a step on."""
        return self._rows(self.steps >= step)

    def _rows(self, kept: NDArray[np.bool_]) -> Curve:
        return Curve(self.steps[kept], self.losses[kept], self.sizes[kept], self.noise)

    def blocks(self, most: int = MAX_BLOCKS) -> Curve:
        """Means over neighbouring rows, at most ``most`` of them."""
        count = len(self.steps)
        if count <= most:
            return self
        edges = np.linspace(0, count, most + 1).astype(np.intp)[:-1]
        sizes = np.add.reduceat(self.sizes, edges)
        steps = np.add.reduceat(self.steps * self.sizes, edges) / sizes
        return Curve(steps, np.add.reduceat(self.losses * self.sizes, edges) / sizes, sizes, self.noise)


def latest(steps: Array) -> NDArray[np.intp]:
    """The rows of a log that count, in rising order of their steps, each step once.

    Where a log goes back the run was resumed: what stood there from that step on belongs to another continuation, at
    whatever steps.  A log that goes back all the time is in no order (the newest row first, several writers); of equal
    steps the last row counts.

    Args:
        steps: (n,) as they were written, finite.

    Raises:
        ConfigError: the steps begin anew several times and never go further, as a count within each epoch does.
    """
    back = resumed_at(steps)
    counts = np.ones(len(steps), dtype=bool)
    if len(back):
        _refuse_epochs(steps, back)
        ends = np.full(len(steps), np.inf)
        ends[back - 1] = steps[back]  # a row counts if it lies before all that later parts begin with
        counts = steps < np.minimum.accumulate(ends[::-1])[::-1]
    kept = np.flatnonzero(counts)
    order = kept[np.argsort(steps[kept], kind="stable")]
    last = np.append(steps[order][1:] != steps[order][:-1], True)[: len(order)]
    found: NDArray[np.intp] = order[last]
    return found


def resumed_at(steps: Array) -> NDArray[np.intp]:
    """Rows whose step lies before that of the row above; none where a log is in no order."""
    moves = np.diff(steps)
    back = np.flatnonzero(moves < 0) + 1
    found: NDArray[np.intp] = back if len(back) <= OUT_OF_ORDER * np.count_nonzero(moves) else back[:0]
    return found


def _refuse_epochs(steps: Array, back: NDArray[np.intp]) -> None:
    """Refuse parts that all begin anew and end alike, and a last one that does not go beyond them.

    Raises:
        ConfigError: that is so.
    """
    if len(back) < 2:
        return
    firsts, lasts = steps[back], steps[np.append(back - 1, len(steps) - 1)]
    spacing = float(np.median(np.abs(np.diff(steps))))
    anew = firsts.max() <= steps.min() + spacing  # and not where a checkpoint lay, each time
    if anew and np.ptp(lasts[:-1]) <= spacing and lasts[-1] <= lasts[:-1].max() + spacing:
        raise ConfigError(
            f"the steps begin anew {len(back)} times and never go beyond {lasts.max():g}, as a count within each epoch "
            "does: a forecast needs the optimizer steps of the whole run"
        )


def row_noise(losses: Array) -> float:
    """Standard deviation of single rows, from third differences of their logarithms, which a smooth curve leaves at 0.

    A third difference of independent noise has the variance 1 + 9 + 9 + 1; the median absolute value times 1.4826 is
    its standard deviation if normal, whatever single outliers do (Rousseeuw & Croux, JASA 88, 1993).
    """
    if len(losses) < MIN_ROWS:
        return 0.0
    third = np.diff(np.log(losses), 3)
    return float(1.4826 * np.median(np.abs(third)) / np.sqrt(20))
