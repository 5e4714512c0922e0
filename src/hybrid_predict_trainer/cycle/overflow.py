"""A gradient scaler of the loop's: what it tells by its scale, and what it leaves to the optimizer."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..weights import algebra as weights
from ..weights.parameters import optimizer_parameters


class ScaleWatch:
    """Whether a scaler has left a step out since somebody asked last: no hook tells, but its scale is lower then.

    A fused optimizer is stepped all the same, and leaves the step out itself: there the hooks tell.

    Attributes:
        scale: When it was looked at last; infinity where there is no scaler.
    """

    def __init__(self, scaler: Any, optimizer: Any) -> None:
        """Look at the scale.

        Args:
            scaler: The loop's ``torch.amp.GradScaler`` or None.
            optimizer: What it steps.
        """
        self._scaler, self._optimizer = scaler, optimizer
        self.scale = self._now()

    def _now(self) -> float:
        scaler = self._scaler
        return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else math.inf

    def look(self) -> None:
        """Take the scale as it is, with no step behind it: a checkpoint was loaded."""
        self.scale = self._now()

    def lowered(self) -> bool:
        """Whether the scale is lower than when it was looked at last, and no hook has told of the step."""
        before, self.scale = self.scale, self._now()
        return self.scale < before and not getattr(self._optimizer, "_step_supports_amp_scaling", False)


@torch.no_grad()
def unscale(optimizer: Any) -> None:
    """A scaler leaves it to a fused optimizer to divide by its scale: do it before the gradients are looked at."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    for gradient in weights.gradients(optimizer_parameters(optimizer)):
        gradient.div_(scale.to(gradient.device))
    optimizer.grad_scale = None
