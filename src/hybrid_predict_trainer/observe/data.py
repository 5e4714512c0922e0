"""What is known of the data: is the batch the one before, and do samples come round again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..keep.failures import Failures, Place
from ..records import StateDict
from ..weights import real_views
from ..weights.real_views import ParameterView
from .recurrence import Recurrence
from .same_batch import SameBatch


class Batches:
    """Looks at every batch before it is used.

    Attributes:
        same_batch: Whether a batch is the one before.
        recurrence: Whether samples were seen before.
        free: The last step learnt nothing from its batch, which is to be given again.
    """

    def __init__(self, views: Sequence[ParameterView], failures: Failures) -> None:
        """Nothing was seen yet.

        Args:
            views: Of complex weights; they follow them where somebody moved them.
            failures: Count what looking at a batch raises.
        """
        self.same_batch = SameBatch()
        self.recurrence = Recurrence()
        self.free = False
        self._differs_elsewhere = False  # on another rank the last two batches were not the same one
        self._views, self._failures = views, failures

    @property
    def same(self) -> bool:
        """Whether the last two batches were the same one."""
        return self.same_batch.same and not self._differs_elsewhere

    def see(self, batch: Any, *, compare: bool, remember: bool) -> None:
        """Look at a batch; it may be any object, and looking at it may raise anything.

        Args:
            batch: Of the step that begins.
            compare: Whether it matters that it is the one before.
            remember: Whether it matters that its samples were seen before.
        """
        if self._failures.exhausted(Place.DATA):
            return
        try:
            if self._views:
                real_views.follow(self._views)
            if compare:
                self.same_batch.see(batch, again=self.free)
            if remember and not self.free:
                self.recurrence.see(batch)
        except Exception as error:
            self.same_batch.forget()
            self._failures.note(Place.DATA, error)

    def agree(self, *, differ: bool, recur: bool) -> None:
        """What the ranks together have seen.

        Args:
            differ: On some rank the batch is not the one before.
            recur: On some rank samples were seen before.
        """
        self._differs_elsewhere = differ
        if recur:
            self.recurrence.announce()

    def used(self, consumed: bool) -> None:
        """The step with the last batch is over.

        Args:
            consumed: It learnt from the batch.
        """
        self.free = not consumed

    def state_dict(self) -> StateDict:
        """Plain containers."""
        return {
            "same_batch": self.same_batch.state_dict(), "recurrence": self.recurrence.state_dict(), "free": self.free,
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.same_batch.load_state_dict(state["same_batch"])
        self.recurrence.load_state_dict(state["recurrence"])
        self.free = state["free"]
