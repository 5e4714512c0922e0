"""Pieces several predictors share: null loss forecast, remembering the last window."""

from __future__ import annotations

#: Where a sparse loss trajectory is given, as fractions of the horizon.
TRAJECTORY_POINTS = (0.25, 0.5, 0.75, 1.0)


def linear_loss_trajectory(loss: float, slope: float, horizon: int) -> tuple[tuple[int, float], ...]:
    """Last loss continued along its slope, never below zero for a positive loss."""
    floor = 0.0 if loss > 0 else float("-inf")
    steps = sorted({max(1, round(f * horizon)) for f in TRAJECTORY_POINTS})
    return tuple((step, max(loss + slope * step, floor)) for step in steps)
