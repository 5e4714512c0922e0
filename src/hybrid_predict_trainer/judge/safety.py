"""What may find that this library does harm, and the copies that lead back from it."""

from __future__ import annotations

from ..keep.snapshot import Snapshot, snapshot_from, snapshot_state
from ..records import StateDict
from .guard import NO_ANCHOR, Guard
from .validation import Validation


class Safety:
    """Guard and validation, and three copies of the state to come back to.

    Attributes:
        guard: Watches the training loss over the whole run.
        validation: Asked where data come round again; None: there is none.
        raise_point: The start of a raise of the multiplier that is not settled yet.
        safe_point: The guard's, from when the loss was at its best.
        best_point: Of the validation's best answer about jumps, or the last in which no noise was found.
    """

    def __init__(self, validation: Validation | None) -> None:
        """Nothing has happened yet."""
        self.guard = Guard()
        self.validation = validation
        self.raise_point: Snapshot | None = None
        self.safe_point: Snapshot | None = None
        self.best_point: Snapshot | None = None

    def begin_raise(self, kept: Snapshot) -> None:
        """The multiplier was raised from this state on."""
        self.raise_point = kept

    def end_raise(self) -> None:
        """The raise is settled, or was taken back."""
        self.raise_point = None

    def keep_safe(self, kept: Snapshot) -> None:
        """The loss was at its best in this state."""
        self.safe_point = kept

    def keep_best(self, kept: Snapshot) -> None:
        """The validation loss was at its best in this state, as far as jumps are concerned, or noise was not met."""
        self.best_point = kept

    def drop_best(self) -> None:
        """Nobody will come back to the best answer's state."""
        self.best_point = None

    def begin_anew(self) -> None:
        """An earlier state has come back: what was seen and kept since is of weights that did harm."""
        self.raise_point = self.safe_point = self.best_point = None
        self.guard.begin_anew()

    def drop_points(self) -> None:
        """There is nothing to come back to any more."""
        self.raise_point = self.safe_point = self.best_point = None
        if self.validation is not None:
            self.validation.jumps.forget()

    def forget_weights(self) -> None:
        """The copies are of weights that nobody may come back to; a comparison under way ends without a verdict."""
        self.drop_points()
        self.guard.forget_anchor()

    def memory_bytes(self) -> int:
        """Bytes of the copies."""
        return sum(point.memory_bytes() for point in self.points)

    @property
    def points(self) -> list[Snapshot]:
        """The copies that there are."""
        return [p for p in (self.raise_point, self.safe_point, self.best_point) if p is not None]

    def state_dict(self) -> StateDict:
        """Plain containers."""
        return {
            "guard": self.guard.state_dict(),
            "validation": None if self.validation is None else self.validation.state_dict(),
            "raise_point": snapshot_state(self.raise_point),
            "safe_point": snapshot_state(self.safe_point),
            "best_point": snapshot_state(self.best_point),
        }

    def state_without_copies(self) -> StateDict:
        """The same for a run that goes on without copies that nobody is about to come back to.

        A raise on trial and a comparison under way keep theirs, and so does the validation: no later state can tell
        what jumps have done since.  Otherwise the guard takes a new one when the loss is at its best again.
        """
        state = self.state_dict()
        if not self.guard.comparing:
            state["safe_point"] = None
            state["guard"]["anchor_step"] = NO_ANCHOR
        return state

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.guard.load_state_dict(state["guard"])
        if self.validation is not None:
            if state["validation"] is None:  # saved without one
                self.validation.jumps.forget()
            else:
                self.validation.load_state_dict(state["validation"])
        self.raise_point = snapshot_from(state["raise_point"])
        self.safe_point = snapshot_from(state["safe_point"])
        self.best_point = snapshot_from(state["best_point"])
