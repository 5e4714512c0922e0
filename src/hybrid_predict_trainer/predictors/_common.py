"""Pieces several predictors share: null loss forecast, remembering the last window."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ..records import Hindsight, Products, State, Window

#: Where a sparse loss trajectory is given, as fractions of the horizon.
TRAJECTORY_POINTS = (0.25, 0.5, 0.75, 1.0)


def linear_loss_trajectory(loss: float, slope: float, horizon: int) -> tuple[tuple[int, float], ...]:
    """Last loss continued along its slope, never below zero for a positive loss."""
    floor = 0.0 if loss > 0 else float("-inf")
    steps = sorted({max(1, round(f * horizon)) for f in TRAJECTORY_POINTS})
    return tuple((step, max(loss + slope * step, floor)) for step in steps)


def window_state(window: Window | None) -> State | None:
    """A window as plain containers."""
    if window is None:
        return None
    state: dict[str, Any] = {f.name: getattr(window, f.name) for f in fields(window)}
    state["products"] = {f.name: getattr(window.products, f.name) for f in fields(window.products)}
    state["group_sizes"] = list(window.group_sizes)
    if window.hindsight is not None:
        state["hindsight"] = {f.name: getattr(window.hindsight, f.name) for f in fields(window.hindsight)}
    return state


def window_from_state(state: State | None) -> Window | None:
    """Inverse of :func:`window_state`."""
    if state is None:
        return None
    values = dict(state)
    values["products"] = Products(**values["products"])
    values["group_sizes"] = tuple(values["group_sizes"])
    if values["hindsight"] is not None:
        values["hindsight"] = Hindsight(**values["hindsight"])
    return Window(**values)
