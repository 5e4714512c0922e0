"""Loss history -> 32 loss-curve features, a pure function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NUM_LOSS_FEATURES = 32
_SPANS = (8, 16, 32, 64, 128, 256)

Array = NDArray[np.float64]


def log_scale(losses: Array) -> Array:
    """Log of positive losses (a PINN's falls over decades), symlog where any is not positive."""
    if losses.size and losses.min() > 0:
        return np.log(losses)
    return np.asarray(np.sign(losses) * np.log1p(np.abs(losses)))


@lru_cache(maxsize=_SPANS[-1])
def _centred_times(n: int) -> tuple[Array, float]:
    """(n,) times around their mean, and the sum of their squares."""
    t: Array = np.arange(n, dtype=np.float64) - (n - 1) / 2
    return t, float(t @ t)


def _trend(values: Array) -> tuple[float, float, Array]:
    """(total change of the fitted line, residual standard deviation, residuals)."""
    n = len(values)
    if n < 2:
        return 0.0, 0.0, np.zeros(n)
    t, square = _centred_times(n)
    rate = float(t @ values / square)
    residual = values - _mean(values) - rate * t
    around = residual - _mean(residual)
    return rate * (n - 1), math.sqrt(_mean(around * around)), residual


def _mean(values: Array) -> float:
    """What ``values.mean()`` comes to, at a third of its price."""
    return float(np.add.reduce(values)) / len(values)


def _autocorrelation(residual: Array) -> float:
    power = float(residual @ residual)
    return float(residual[1:] @ residual[:-1]) / power if len(residual) > 2 and power > 0 else 0.0


def _sign_change_rate(residual: Array) -> float:
    if len(residual) <= 2:
        return 0.0
    below = np.signbit(residual)
    return float(np.count_nonzero(below[1:] != below[:-1])) / (len(residual) - 1)


def loss_features(losses: Sequence[float], step: int) -> Tensor:
    """Encode a loss curve.

    Args:
        losses: Training losses of real steps, oldest first; the last 256 are used.
        step: Real steps so far.

    Returns:
        (32,) float32, in order: over spans of 8 to 256 steps the mean log-loss relative to the last
        8 steps (6), the fitted change (6), the residual spread (6); lag-1 autocorrelation of the
        detrended curve (3), its sign-change rate (3); change of slope between halves (2); best and
        worst of 64 steps relative to now (2); fill of the buffer; log-loss; exponent of a power law
        through the buffer; drawdown from the best.  Zeros for an empty history.
    """
    if not losses:
        return torch.zeros(NUM_LOSS_FEATURES)
    y = log_scale(np.asarray(losses, dtype=np.float64)[-_SPANS[-1] :])
    now = _mean(y[-8:])
    trends = {span: _trend(y[-span:]) for span in _SPANS}
    halves = []
    for span in (32, 128):
        window = y[-span:]
        middle = len(window) // 2
        halves.append(_trend(window[middle:])[0] - _trend(window[:middle])[0])
    steps = np.log(np.arange(max(step - len(y), 0) + 1, max(step - len(y), 0) + len(y) + 1))
    centred = steps - _mean(steps)
    spread = float(centred @ centred)
    values = [
        *(_mean(y[-span:]) - now for span in _SPANS),
        *(trends[span][0] for span in _SPANS),
        *(trends[span][1] for span in _SPANS),
        *(_autocorrelation(trends[span][2]) for span in (16, 64, 256)),
        *(_sign_change_rate(trends[span][2]) for span in (16, 64, 256)),
        *halves,
        float(y[-64:].min()) - now,
        float(y[-64:].max()) - now,
        len(y) / _SPANS[-1],
        now,
        float(centred @ y) / spread if spread > 0 else 0.0,
        now - float(y.min()),
    ]
    assert len(values) == NUM_LOSS_FEATURES, len(values)
    return torch.tensor(values, dtype=torch.float32)
