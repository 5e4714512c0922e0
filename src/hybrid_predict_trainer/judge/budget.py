"""What asking may cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..cost import FORWARD_UNITS, STEP_UNITS

if TYPE_CHECKING:
    from ..cycle.state import Run


def price(run: Run) -> Callable[[float], float]:
    """Forwards -> loss that the same cost in real training would have bought, over the persistence."""
    pace = max(-run.windows.slope, 0.0)
    persistence = max(run.judge.ledger.persistence, run.config.gate.min_persistence)
    return lambda forwards: forwards * FORWARD_UNITS / STEP_UNITS * pace / persistence
