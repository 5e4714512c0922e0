"""What else is to be around the optimizer's step: the base class of what a user hands in."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..records import StateDict
from ..weights.algebra import Move


class StepModifier:
    """Does something right before or right after every step of the optimizer; by itself nothing.

    A subclass overrides what it needs.  It is called in real steps only, never inside a jump and never where
    ``enabled`` is false.  It writes to the parameters and to their gradients, in place.  What it remembers between
    steps is in :meth:`state_dict`: a rollback and a checkpoint put that back together with the weights.  If it raises,
    training goes on without it for that step, as with everything that is around the step.

    Attributes:
        remembers: Its state changes while a run goes on, so that a rollback has to put it back.
    """

    remembers = True

    def before_step(self, parameters: Sequence[Tensor]) -> int:
        """After backward and clipping, right before the optimizer's step.

        Args:
            parameters: What is trained, as the optimizer lists it; gradients are unscaled.

        Returns:
            Passes over all weights that this took, to be charged.
        """
        return 0

    def after_step(self, parameters: Sequence[Tensor]) -> int:
        """Right after the optimizer's step on ``parameters``; returns passes, as :meth:`before_step`."""
        return 0

    def on_skip(self) -> None:
        """The step is left out after :meth:`before_step`, and :meth:`after_step` does not come."""

    def on_jump(self, delta: Move, scale: float) -> None:
        """The weights have moved by ``scale * delta`` without a step: copies of weights move along."""

    def on_restore(self) -> None:
        """The weights are earlier ones again, and what :meth:`state_dict` held then has been put back."""

    def forget(self) -> None:
        """Begin anew: the weights are others than any seen before, or something around the step has failed."""

    def state_dict(self) -> StateDict:
        """Plain containers and tensors; what a snapshot holds is copied by whoever takes it."""
        return {}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`, which made ``state``."""

    def end(self) -> None:
        """All motions of this library are withdrawn; what a user has handed in is his, and is not told."""

    @classmethod
    def saved_with(cls, state: StateDict) -> str:
        """The setting that a checkpoint with this state was written under, in words."""
        return cls.__name__

    def not_saved(self) -> None:
        """The run is one that was saved without this: by itself it begins anew."""

    def memory_bytes(self) -> int:
        """Bytes that are held between steps."""
        return 0
