"""Whether gradients reach the optimizer as the backward has left them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..weights.parameters import optimizer_parameters
from .said import CHANGED, SaidOnce
from .state import State

#: Steps at which the gradients are compared with what the backward has left, and of how many.
WITNESS_EVERY, WITNESS_STEPS = 5, 200
#: Relative difference that is rounding, of half precision too.
ROUNDING = 1e-2


class ClippingWatch:
    """Says once that the gradients are not those of the loss, if the loop has changed them unseen."""

    def __init__(self, run: State, said: SaidOnce) -> None:
        """Nobody looks yet.

        Args:
            run: Of the engine.
            said: Where it is said.
        """
        self._run, self._said = run, said
        self._witness: GradientWitness | None = None

    def begin(self) -> GradientWitness:
        """Look from here on; returns what stops it when it is removed."""
        self._witness = GradientWitness(optimizer_parameters(self._run.subject.optimizer))
        return self._witness

    def dismiss(self) -> None:
        """Look no more: the loop shows its gradients before it clips."""
        if self._witness is not None:
            self._witness.remove()
            self._witness = None

    def look(self, scale: float) -> None:
        """Right before the optimizer's step.

        Args:
            scale: Of the loop's scaler, by which its losses were multiplied; infinity where there is none.
        """
        step = self._run.meter.num_attempted_steps
        if self._witness is None or step % WITNESS_EVERY:
            return
        factor = self._witness.factor()
        if math.isfinite(scale):
            factor *= scale
        if abs(factor - 1) > ROUNDING:
            self._said.say(CHANGED.format(factor=factor))
            self.dismiss()
        elif step >= WITNESS_STEPS:
            self.dismiss()


class GradientWitness:
    """Looks whether gradients reach the optimizer as the backward has left them, by one small parameter.

    Clipped gradients have other norms than the loss, and differences of them are no curvature.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        """Watch the smallest leaf.

        Args:
            parameters: That are trained.
        """
        leaves = [p for p in parameters if p.is_leaf and p.requires_grad and p.is_floating_point() and p.numel()]
        self._parameter = min(leaves, key=lambda p: p.numel(), default=None)
        self._left: Tensor | None = None
        self._handle: RemovableHandle | None = None
        if self._parameter is not None:
            self._handle = self._parameter.register_post_accumulate_grad_hook(self._note)

    @torch.no_grad()
    def _note(self, parameter: Tensor) -> None:
        self._left = None if parameter.grad is None else parameter.grad.detach().clone()

    @torch.no_grad()
    def factor(self) -> float:
        """By what the gradient was multiplied since the backward; 1 where that cannot be told."""
        left, now = self._left, None if self._parameter is None else self._parameter.grad
        if left is None or now is None or now.layout is not torch.strided or left.shape != now.shape:
            return 1.0
        before = float(left.double().norm())
        ratio = float(now.double().norm()) / before if before > 0 else 1.0
        return ratio if math.isfinite(ratio) and ratio > 0 else 1.0

    def remove(self) -> None:
        """Look no more."""
        if self._handle is not None:
            self._handle.remove()
        self._left = self._handle = None
