"""Which trials cannot win, which one is to go on, and how sure the best one is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .curves import TrialCurve
from .ends import End
from .looks import optimistic, pessimistic, probability_below


@dataclass(frozen=True, slots=True)
class Bar:
    """What a trial has to beat.

    Attributes:
        value: the best trial's pessimistic end; infinite where nothing is known of any.
        key: of that trial.
        exact: it is complete, so that the value is no forecast.
        lowest: lowest value that any trial has shown, at whatever step.
    """

    value: float
    key: int | None
    exact: bool
    lowest: float


def bar_of(curves: Sequence[TrialCurve], ends: Sequence[End], error: float, competing: Sequence[bool]) -> Bar:
    """The best of the trials that will have an end.

    Args:
        curves: Of the search.
        ends: Of its trials.
        error: That one look may make.
        competing: False for trials that will never be complete: pruned, failed, or given up.
    """
    best = Bar(math.inf, None, False, math.inf)
    for curve, end, counts in zip(curves, ends, competing, strict=True):
        lowest = min(best.lowest, float(curve.values.min()) if counts and len(curve.values) else math.inf)
        exact = end.scale == 0.0
        value = end.mean if exact else pessimistic(end, error / 2)
        if counts and value < best.value:
            best = Bar(value, curve.key, exact, lowest)
        else:
            best = Bar(best.value, best.key, best.exact, lowest)
    return best


def cannot_win(curve: TrialCurve, end: End, bar: Bar, error: float, min_gain: float = 0.0) -> bool:
    """Whether a trial's optimistic end is worse than the bar.

    The best so far, by its forecast or by the value that it shows now, is never told to stop.

    Args:
        curve: Of the trial.
        end: Of the trial.
        bar: To beat.
        error: That this look may make.
        min_gain: By which it has to be beaten, on the scale of the values (a share, where they are logarithms).
    """
    if end.look in (0.0, 1.0) or bar.key is None or bar.key == curve.key:
        return False
    if not len(curve.values) or float(curve.values[-1]) <= min(bar.value, bar.lowest):
        return False
    return optimistic(end, error if bar.exact else error / 2) > bar.value - min_gain


def most_promising(
    curves: Sequence[TrialCurve], ends: Sequence[End], going: Sequence[int], quantile: float, new: Sequence[int] = ()
) -> int:
    """Index of the trial to go on with: those of which nothing is known first, then the best optimistic end.

    Args:
        curves: Of the search.
        ends: Of its trials.
        going: Indices of those that may go on, at least one.
        quantile: Of the end that counts; 0.5 is what is expected.
        new: Indices of those that nobody has begun; they do not go first.
    """

    def rank(i: int) -> tuple[float, float, int]:
        if ends[i].look == 0.0 and i not in new:
            return -math.inf, curves[i].share, i
        return optimistic(ends[i], quantile), curves[i].share, i

    return min(going, key=rank)


def chances(ends: Sequence[End], draws: int = 4000, seed: int = 0) -> list[float]:
    """Probability of each trial to have the best end, their errors taken as independent; 0 where nothing is known."""
    import numpy as np

    known = [i for i, end in enumerate(ends) if math.isfinite(end.scale)]
    found = [0.0] * len(ends)
    if not known:
        return found
    rng = np.random.default_rng(seed)
    drawn = np.empty((len(known), draws))
    for row, i in enumerate(known):
        end = ends[i]
        drawn[row] = end.mean
        if end.scale > 0:
            drawn[row] += end.scale * rng.standard_t(min(end.degrees, 1e6), size=draws)
    wins = np.bincount(drawn.argmin(axis=0), minlength=len(known)) / draws
    for row, i in enumerate(known):
        found[i] = float(wins[row])
    return found


__all__ = ["Bar", "bar_of", "cannot_win", "chances", "most_promising", "probability_below"]
