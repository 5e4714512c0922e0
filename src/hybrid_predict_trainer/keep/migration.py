"""Checkpoints of older formats, brought to the present one before they are checked.

Format 2 knew neither names of the optimizer's parameters nor what hangs on it besides, and library state that came
later.  What is missing is taken from the live run, which then begins anew in that respect; what has another form today,
too.
"""

from __future__ import annotations

import copy
from typing import Any

from ..records import CheckpointError, State
from . import schema

#: What format 3 knows of the model beside its state; nothing in format 2.
NOTHING_KNOWN: State = {"frozen": {}, "buffers": {}, "hidden": {}}


def upgraded(parts: dict[str, State], live: dict[str, State], format_version: int) -> dict[str, State]:
    """The parts of a checkpoint as the present format has them.

    Args:
        parts: As read.
        live: Parts of the run that is to take them.
        format_version: Of the checkpoint.
    """
    if format_version >= 3:
        return parts
    own = dict(parts["trainer"])
    own["model"] = NOTHING_KNOWN
    for name in ("run", "metrics"):
        own[name] = _filled(own[name], live["trainer"][name], (name,))
    return {**parts, "trainer": own}


def _filled(saved: Any, live: Any, path: tuple[object, ...]) -> Any:
    """``saved`` with what it lacks from ``live``, and without what nobody reads today."""
    if isinstance(saved, dict) and isinstance(live, dict) and all(type(key) is str for key in live) and live:
        return {
            key: _filled(saved[key], v, (*path, key)) if key in saved else copy.deepcopy(v) for key, v in live.items()
        }
    try:
        schema.check(saved, live, path)
    except CheckpointError:
        return copy.deepcopy(live)
    return saved
