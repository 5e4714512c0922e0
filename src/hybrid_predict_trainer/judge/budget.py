"""What asking may cost."""

from __future__ import annotations

from collections.abc import Callable

from ..cost import FORWARD_UNITS, STEP_UNITS
from .ledger import Ledger


def price(ledger: Ledger, slope: float) -> Callable[[float], float]:
    """Forwards -> loss that the same cost in real training would have bought, over the persistence.

    Args:
        ledger: What jumps have returned.
        slope: Of the loss, per real step.
    """
    pace = max(-slope, 0.0)
    persistence = max(ledger.persistence, ledger.config.min_persistence)
    return lambda forwards: forwards * FORWARD_UNITS / STEP_UNITS * pace / persistence
