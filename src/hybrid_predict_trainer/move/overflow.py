"""Gradients that overflow because a gradient scaler is looking for its scale.

A ``GradScaler`` begins with a scale that is too large on purpose, and lowers it at every gradient that is not finite
until none is; later it raises it now and then to see whether it still is.  Such a step is left out by the scaler
itself and says nothing of the run, unless the loss is not finite either or the search does not end.
"""

from __future__ import annotations

import math
from typing import Any

#: Scale below which a gradient that still is not finite has another reason: half precision ends at 65,504 and float32
#: at 3.4e38, so loss gradients of up to 1e8 and 1e42 would have found theirs.
LEAST_SCALE = 1e-4


class ScaleSearch:
    """Tells a scaler's search from a divergence.

    Attributes:
        scale: The scaler's at the last gradient that was not finite; infinity after one that was.
    """

    def __init__(self, scaler: Any) -> None:
        """Bind to a scaler, or to None: then nothing is a search."""
        enabled = getattr(scaler, "is_enabled", None)
        self._scaler = scaler if callable(enabled) and enabled() and hasattr(scaler, "get_scale") else None
        self.scale = math.inf

    def found(self) -> None:
        """The gradients of a step were finite."""
        self.scale = math.inf

    def look(self, *, overflowed: bool) -> bool:
        """Note a step that cannot be used; returns whether it belongs to a search: the scale goes on falling.

        Args:
            overflowed: Whether the loss was finite and its gradient was not.
        """
        if self._scaler is None or not overflowed:
            return False
        before, self.scale = self.scale, float(self._scaler.get_scale())
        return LEAST_SCALE <= self.scale < before
