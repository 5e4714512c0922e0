"""What may find that this library does harm, and the copies that lead back from it."""

from __future__ import annotations

from ..keep.snapshot import Snapshot, snapshot_from, snapshot_state
from ..records import StateDict
from .guard import NO_ANCHOR, Guard
from .validation import Validation


class Safety:
    """Guard and validation, and two copies of the state to come back to.

    Attributes:
        guard: Watches the training loss over the whole run.
        validation: Asked where data come round again; None: there is none.
        raise_point: The start of a raise of the multiplier that is not settled yet.
        safe_point: The guard's, from when the loss was at its best.
    """

    def __init__(self, validation: Validation | None) -> None:
        """Nothing has happened yet."""
        self.guard = Guard()
        self.validation = validation
        self.raise_point: Snapshot | None = None
        self.safe_point: Snapshot | None = None

    def begin_raise(self, kept: Snapshot) -> None:
        """The multiplier was raised from this state on."""
        self.raise_point = kept

    def end_raise(self) -> None:
        """The raise is settled, or was taken back."""
        self.raise_point = None

    def keep_safe(self, kept: Snapshot) -> None:
        """The loss was at its best in this state."""
        self.safe_point = kept

    def drop_points(self) -> None:
        """There is nothing to come back to any more."""
        self.raise_point = self.safe_point = None

    def forget_weights(self) -> None:
        """The copies are of weights that nobody may come back to; a comparison under way ends without a verdict."""
        self.drop_points()
        self.guard.forget_anchor()

    def memory_bytes(self) -> int:
        """Bytes of both copies."""
        return sum(s.memory_bytes() for s in (self.raise_point, self.safe_point) if s is not None)

    def state_dict(self) -> StateDict:
        """Plain containers."""
        return {
            "guard": self.guard.state_dict(),
            "validation": None if self.validation is None else self.validation.state_dict(),
            "raise_point": snapshot_state(self.raise_point),
            "safe_point": snapshot_state(self.safe_point),
        }

    def state_without_copies(self) -> StateDict:
        """The same for a run that goes on without copies that nobody is about to come back to.

        A raise on trial and a comparison under way keep theirs.  Otherwise the guard takes a new one when the loss is
        at its best again.
        """
        state = self.state_dict()
        if not self.guard.comparing:
            state["safe_point"] = None
            state["guard"]["anchor_step"] = NO_ANCHOR
        return state

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.guard.load_state_dict(state["guard"])
        if self.validation is not None and state["validation"] is not None:
            self.validation.load_state_dict(state["validation"])
        self.raise_point = snapshot_from(state["raise_point"])
        self.safe_point = snapshot_from(state["safe_point"])
