"""The point to go back to where readings come late: on an accelerator a step is known to be bad some steps later."""

from __future__ import annotations

from collections.abc import Callable

from ..records import StateDict
from .snapshot import Snapshot, snapshot_from, snapshot_state


class RollbackPoint:
    """A copy of the state at the start of a reading interval, and where it was taken.

    Attributes:
        point: The copy, None between intervals.
        spare: The last one that was dropped: only its memory is of use.
        num_real_steps: Of the run when it was taken.
        num_schedule_steps: Of the schedule, likewise.
    """

    def __init__(self) -> None:
        """There is none yet."""
        self.point: Snapshot | None = None
        self.spare: Snapshot | None = None
        self.num_real_steps = self.num_schedule_steps = 0

    def take(
        self, snapshot_into: Callable[[Snapshot | None], Snapshot], num_real_steps: int, num_schedule_steps: int
    ) -> None:
        """Take it here, in the memory of the last one.

        Args:
            snapshot_into: Copies the run, into a copy that is needed no more if there is one.
            num_real_steps: So far.
            num_schedule_steps: Likewise.
        """
        self.point, self.spare = snapshot_into(self.spare), None
        self.num_real_steps, self.num_schedule_steps = num_real_steps, num_schedule_steps

    def drop(self) -> None:
        """There is none any more."""
        if self.point is not None:
            self.point, self.spare = None, self.point

    def memory_bytes(self) -> int:
        """Bytes of both copies."""
        return sum(s.memory_bytes() for s in (self.point, self.spare) if s is not None)

    def state_dict(self) -> StateDict:
        """Plain containers."""
        return {
            "point": snapshot_state(self.point),
            "num_real_steps": self.num_real_steps,
            "num_schedule_steps": self.num_schedule_steps,
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.point, self.spare = snapshot_from(state["point"]), None
        self.num_real_steps, self.num_schedule_steps = state["num_real_steps"], state["num_schedule_steps"]
