"""An observer that cannot end a run: what raises is counted and said once, and after three times it is left alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from ..keep.failures import Failures, Place
from ..records import StateDict, Window
from .basis import Basis
from .history import History
from .window_encoder import Observer


class GuardedObserver:
    """Passes every question on, and answers itself where that raises.

    What is asked within a step (the first six methods) is guarded.  What is asked between steps for a report or a
    checkpoint raises to whoever asked.
    """

    def __init__(self, inner: Observer, failures: Failures) -> None:
        """Args: inner: who watches.  failures: of the run, where they are counted."""
        self.inner, self._failures = inner, failures

    @property
    def _left_alone(self) -> bool:
        return self._failures.exhausted(Place.OBSERVER)

    def watching(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a real step; what raises in those is passed on."""
        if self._left_alone:
            return nullcontext()
        try:
            inner = self.inner.watching(last=last)
        except Exception as error:
            self._failures.note(Place.OBSERVER, error)
            return nullcontext()
        return inner if isinstance(inner, nullcontext) else self._entered(inner)

    @contextmanager
    def _entered(self, inner: AbstractContextManager[None]) -> Iterator[None]:
        try:
            inner.__enter__()
        except Exception as error:
            self._failures.note(Place.OBSERVER, error)
            yield
            return
        try:
            yield
        finally:
            try:
                inner.__exit__(None, None, None)
            except Exception as error:
                self._failures.note(Place.OBSERVER, error)

    def before_backward(self) -> None:
        """The backward pass of the loss comes next."""
        if self._left_alone:
            return
        try:
            self.inner.before_backward()
        except Exception as error:
            self._failures.note(Place.OBSERVER, error)

    def after_backward(self, history: History, *, usable: bool) -> None:
        """Gradients are there."""
        if self._left_alone:
            return
        try:
            self.inner.after_backward(history, usable=usable)
        except Exception as error:
            self._failures.note(Place.OBSERVER, error)

    def complete(self, window: Window, basis: Basis) -> Window:
        """The window with its encoding; as it is where that cannot be had."""
        if self._left_alone:
            return window
        try:
            return self.inner.complete(window, basis)
        except Exception as error:
            self._failures.note(Place.OBSERVER, error)
            return window

    def new_health(self) -> dict[str, Any] | None:
        """The health report of the window that has just closed, if there is one."""
        if self._left_alone:
            return None
        try:
            return self.inner.new_health()
        except Exception as error:
            self._failures.note(Place.OBSERVER, error)
            return None

    @property
    def passes(self) -> float:
        """Cost per window in passes over the weights."""
        if self._left_alone:
            return 0.0
        try:
            return self.inner.passes
        except Exception as error:
            self._failures.note(Place.OBSERVER, error)
            return 0.0

    # ---- between steps -------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """For the run's summary."""
        return self.inner.summary()

    def memory_bytes(self) -> int:
        """Bytes held."""
        return self.inner.memory_bytes()

    def state_dict(self) -> StateDict:
        """Everything learnt."""
        return self.inner.state_dict()

    def check_state(self, state: StateDict) -> None:
        """Raise if the state is one that :meth:`load_state_dict` cannot take."""
        self.inner.check_state(state)

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.inner.load_state_dict(state)
