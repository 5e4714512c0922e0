"""A gradient scaler of the loop's: what it tells by its scale, and what it leaves to the optimizer."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..weights import algebra as weights
from ..weights.parameters import optimizer_parameters


class ScaleWatch:
    """Whether a scaler has left a step out since somebody asked last: no hook tells, but its scale is lower then.

    Attributes:
        scale: When it was looked at last; infinity where there is no scaler.
    """

    def __init__(self, scaler: Any) -> None:
        """Look at the scale.

        Args:
            scaler: The loop's ``torch.amp.GradScaler`` or None.
        """
        self._scaler = scaler
        self.scale = self._now()

    def _now(self) -> float:
        scaler = self._scaler
        return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else math.inf

    def look(self) -> None:
        """Take the scale as it is, with no step behind it: a checkpoint was loaded."""
        self.scale = self._now()

    def lowered(self) -> bool:
        """Whether the scale is lower than when it was looked at last."""
        before, self.scale = self.scale, self._now()
        return self.scale < before


@torch.no_grad()
def unscale(optimizer: Any) -> None:
    """A scaler leaves it to a fused optimizer to divide by its scale: do it before the gradients are looked at."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    for gradient in weights.gradients(optimizer_parameters(optimizer)):
        gradient.div_(scale.to(gradient.device))
    optimizer.grad_scale = None
