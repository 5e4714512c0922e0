"""How sure a decision has to be where it is asked for again and again.

A trial is judged at most once per look, and a share of the error that its whole run may make is spent at each (alpha
spending: Lan & DeMets, Biometrika 70, 1983; here the same for all looks, whose sum is the whole by Bonferroni whatever
their dependence).  The error that counts is that the later winner is pruned, which is an event of one trial, so that
the number of trials does not enter.  Nor does the number of complete competitors: each of them ends above the winner,
so that whichever of them it loses to, its own forecast was wrong by more than its quantile.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

from ..records import ConfigError
from .curves import LOOKS
from .ends import End


def spent_at_a_look(confidence: float) -> float:
    """The error that one look may make.

    Args:
        confidence: 1 - the probability that a winner is pruned at any look of its run.

    Raises:
        ConfigError: not between 0.5 and 1.
    """
    if not 0.5 <= confidence < 1:
        raise ConfigError(f"confidence must be at least 0.5 and below 1, not {confidence:g}")
    return (1 - confidence) / (len(LOOKS) - 1)


def optimistic(end: End, error: float) -> float:
    """The value that the end lies below with probability ``error``; nothing is known: minus infinity."""
    return _at(end, error)


def pessimistic(end: End, error: float) -> float:
    """The value that the end lies above with probability ``error``; nothing is known: infinity."""
    return _at(end, 1 - error)


def _at(end: End, share: float) -> float:
    if end.scale == 0.0:
        return end.mean
    if not math.isfinite(end.scale):
        return -math.inf if share < 0.5 else math.inf
    return end.mean + end.scale * float(special().stdtrit(end.degrees, share))


def probability_below(end: End, value: float) -> float:
    """That a trial ends below a value."""
    if end.scale == 0.0:
        return float(end.mean < value)
    if not math.isfinite(end.scale):
        return 0.5
    return float(special().stdtr(end.degrees, (value - end.mean) / end.scale))


def special() -> Any:
    """``scipy.special``, which only a sweep needs."""
    try:
        return importlib.import_module("scipy.special")
    except ModuleNotFoundError:
        raise ConfigError('sweeps need scipy; run: pip install "hybrid-predict-trainer[sweep]"') from None
