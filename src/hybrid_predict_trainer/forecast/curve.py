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
        """Check and sort rows; of rows with one step the last counts (a run that was resumed wrote them again).

        Raises:
            ConfigError: not equally many, a step that is no number, or losses that are not finite and above 0.
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
        last = {step: row for row, step in enumerate(at)}
        rows = np.array(sorted(last.values(), key=lambda row: at[row]), dtype=np.intp)
        at, loss = at[rows], loss[rows]
        return Curve(at, loss, np.ones_like(at), row_noise(loss))

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


def row_noise(losses: Array) -> float:
    """Standard deviation of single rows, from third differences of their logarithms, which a smooth curve leaves at 0.

    A third difference of independent noise has the variance 1 + 9 + 9 + 1; the median absolute value times 1.4826 is
    its standard deviation if normal, whatever single outliers do (Rousseeuw & Croux, JASA 88, 1993).
    """
    if len(losses) < MIN_ROWS:
        return 0.0
    third = np.diff(np.log(losses), 3)
    return float(1.4826 * np.median(np.abs(third)) / np.sqrt(20))
