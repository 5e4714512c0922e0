"""A closed window, turned to plain containers and back."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ..records import Hindsight, Products, State, Window


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
