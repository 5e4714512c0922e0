"""The window of real steps that is open, and the last one closed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..config.settings import PredictorConfig
from ..keep.failures import Failures, Place
from ..records import Hindsight, Products, StateDict, Window
from ..weights import offload as host
from ..weights.algebra import Move
from ..weights.parameters import Groups
from .basis import Basis
from .history import History
from .loss_features import NUM_LOSS_FEATURES, loss_features
from .sketch import Sketch
from .window_encoder import NullObserver, Observer

#: More real steps than any run has.
NEVER = 1 << 60


class WindowRecorder:
    """Adds real steps to the open window, and closes it.

    Attributes:
        basis: Sums over the open window, displacements of the closed ones.
        groups: Of the basis: by role, or all in one.
        observer: Encodes a window for predictors that ask for it.
        observing: Whether windows are kept at all.
        last: The last window closed.
        loss: Averaged loss of that one; NaN before the first.
        slope: Change of the loss per real step, as of then.
        just_closed: The step before has closed it.
        num_closed: Windows closed so far.
        num_rest_steps: Real steps still to pass before the next window is observed.
        lr_integral: Sum of the learning rate over the open window.
        seconds: Wall time of its real steps; NaN: not all of them were timed.
        sketch: On large models: whether a basis is worth its memory; None: it is kept in any case.
        keeping: Whether the open window goes into the basis.
    """

    def __init__(self, failures: Failures) -> None:
        """Nothing is watched before :meth:`follow` was called; what fails is counted in ``failures``."""
        self._failures = failures
        self._settings: PredictorConfig
        self.basis: Basis
        self.groups: Groups
        self.observer: Observer
        self.observing = False
        self.last: Window | None = None
        self.loss = math.nan
        self.slope = 0.0
        self.just_closed = False
        self.num_closed = 0
        self.num_rest_steps = 0
        self.lr_integral = 0.0
        self.seconds = 0.0
        self.sketch: Sketch | None = None
        self.keeping = True
        self._kept = True  # so did the last one closed
        self._closing = False  # the basis is between two windows

    def follow(
        self,
        settings: PredictorConfig,
        basis: Basis,
        groups: Groups,
        observer: Observer | None,
        *,
        on_trial: bool = False,
    ) -> None:
        """Record for another predictor from here on.

        Args:
            settings: Length of a window, and of the rest after it.
            basis: Has observed nothing yet.
            groups: Of that basis.
            observer: For the predictor; None: nothing is observed.
            on_trial: The basis is kept only while displacements can be predicted, or losses are exact.
        """
        self._settings, self.basis, self.groups = settings, basis, groups
        self.observer, self.observing = observer if observer is not None else NullObserver(), observer is not None
        self.sketch = Sketch(basis.parameters) if on_trial and self.observing else None
        self.keeping = self.sketch is None

    def begin_anew(self) -> None:
        """What was observed for another predictor is of no use."""
        self.last, self.just_closed = None, False
        self.num_rest_steps, self.lr_integral = 0, 0.0

    def begin_without_basis(self) -> None:
        """A run goes on whose basis was not kept: the next step opens a window, nothing is proposed from the last."""
        self.basis.restart()
        self.restart_window()
        self.just_closed = False

    # ---- steps --------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """A step begins: what the one before it has closed is known by now."""
        self.just_closed = False

    @property
    def takes_step(self) -> bool:
        """Whether the next real step belongs to a window."""
        return self.observing and self.num_rest_steps == 0

    @property
    def is_last_step(self) -> bool:
        """Whether the next real step fills the window."""
        return self.takes_step and self.basis.num_steps + 1 >= self._settings.window

    @property
    def full(self) -> bool:
        """Whether the window can be closed."""
        return self.observing and self.basis.num_steps >= self._settings.window

    def add_step(self, lr: float, decays: Sequence[float] = ()) -> None:
        """Before the optimizer's step: add the weights and the rate it steps with; may be a step of rest.

        What raises (no memory for the sums) must not end a run.

        Args:
            lr: Of the step.
            decays: Of every parameter, where weight decay is a part of what is minimized; none: it is not.
        """
        if self.num_rest_steps > 0:
            self.num_rest_steps -= 1
            return
        if not self.observing:
            return
        last = self.is_last_step
        try:
            with host.own_defaults():
                if self.sketch is not None:
                    self.sketch.add_step()
                if self.keeping:
                    self.basis.accumulate()
                    if decays:
                        self.basis.add_decay(decays)
                    self.basis.before_step(last=last)
                else:
                    self.basis.pass_step()
        except Exception as error:
            self.on_unwatched(error)
        self.lr_integral += lr

    def add_seconds(self, seconds: float) -> None:
        """A step took so long."""
        self.seconds += seconds

    def take_seconds(self) -> float:
        """What the steps of the window took; counted from 0 from here on."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def on_unwatched(self, error: Exception) -> None:
        """A window could not be kept: the next one begins, or none if that happens again and again."""
        self._failures.note(Place.GATE, error)
        self.restart_window()
        if self._failures.exhausted(Place.GATE):
            self.num_rest_steps = NEVER

    # ---- windows --------------------------------------------------------------------------------------

    def close(
        self, history: History, step: int, *, lr: float, planned_lr: Callable[[int], float], refused: bool, exact: bool
    ) -> Window:
        """Close the window and describe it for the predictor.

        Args:
            history: Losses and norms of its steps.
            step: Real steps so far.
            lr: Of the next step.
            planned_lr: Steps ahead -> sum of the rate over them.
            refused: A proposal was refused since the last window.
            exact: Losses are exact: a predictor of curvature needs no rest.
        """
        num_steps, jumped = self.basis.num_steps, self.basis.jumped
        hindsight = self._close_basis(exact=exact)
        self.loss = history.close_window(step, num_steps)
        self.slope = history.loss_slope()
        window = Window(
            index=self.num_closed,
            num_steps=num_steps,
            num_columns=self.basis.num_columns,
            step=step,
            loss=self.loss,
            loss_slope=self.slope,
            gradient_norm=history.mean_norm(num_steps),
            learning_rate=lr,
            lr_integral=self.lr_integral,
            lr_ahead=planned_lr(num_steps),
            jumped=jumped,
            features=self._features(history, step),
            products=self.basis.products(),
            hindsight=hindsight,
            group_sizes=self.groups.sizes,
            refused=refused,
        )
        window = self.observer.complete(window, self.basis)
        if self.basis.spec.curvature and not exact:
            self.num_rest_steps = self._settings.rest_windows * self._settings.window
        self.last = window
        self.num_closed += 1
        self.lr_integral = 0.0
        return window

    def _features(self, history: History, step: int) -> Tensor:
        """The encoded loss curve, for who reads it: encoding takes as long as a step of a small model."""
        return loss_features(history.losses, step) if self.basis.spec.features else torch.zeros(NUM_LOSS_FEATURES)

    def _close_basis(self, *, exact: bool) -> Hindsight | None:
        """Close the window in the basis, if it is kept, and decide whether the next one will be."""
        if self.sketch is not None:
            self.sketch.close_window(self.basis.num_steps, jumped=self.basis.jumped)
        self._kept = self.keeping
        if not self.keeping:
            self.basis.pass_window()
            self.keeping = self.sketch is None or exact or self.sketch.predictable
            return None
        self._closing = True
        hindsight = self.basis.close_window()
        self._closing = False
        if self.sketch is not None and not exact and self.sketch.disappoints:
            self.basis.release()
            self.sketch.pause()
            self.keeping = False
            return None
        return hindsight

    def on_verdict(self, accepted: bool) -> None:
        """A proposal from the basis was judged."""
        if self.sketch is not None:
            self.sketch.on_verdict(accepted)

    def passes(self, num_steps: int) -> float:
        """Passes over the weights that a window of so many steps has cost.

        Two sums of three passes each per step; at the close one displacement and two rows of products.
        """
        if not self._kept:
            return self.observer.passes
        spec = self.basis.spec
        products = 1 if spec.differences else 1 + spec.curvature + len(spec.extras)  # vectors times all columns
        passes: float = 6 * num_steps + 10 + products * self.basis.num_filled
        return passes + self.observer.passes

    def hand_on(self) -> None:
        """All have learnt from the window: the next step may propose."""
        self.just_closed = True

    def rest(self) -> None:
        """The next real step belongs to no window."""
        self.num_rest_steps = max(self.num_rest_steps, 1)

    def interrupted(self) -> None:
        """Forget a window that is half closed."""
        if self._closing:
            self.basis.restart()
            self._closing = False

    # ---- weights that move otherwise ------------------------------------------------------------------

    def on_jump(self, delta: Move, scale: float) -> None:
        """The weights have moved by ``scale * delta``."""
        self.basis.translate(delta, scale)
        self.lr_integral = 0.0

    def on_restore(self, mark: StateDict | None) -> None:
        """The weights are earlier ones again.

        Args:
            mark: Of the basis, from when they were taken; None: the closed windows still hold.
        """
        if mark is not None:
            self.basis.revert(mark)
            if self.sketch is not None:
                self.sketch.restart_window()
            self.lr_integral = 0.0
        else:
            self.restart_window()

    def on_overwrite(self) -> None:
        """The weights are others than any that were seen: nothing that was observed holds."""
        self.basis.restart()
        if self.sketch is not None:
            self.sketch.restart()
        self.just_closed = False
        self.lr_integral = 0.0

    def restart_window(self) -> None:
        """The open window begins anew."""
        self.basis.restart_window()
        if self.sketch is not None:
            self.sketch.restart_window()
        self.lr_integral = 0.0

    # ---- state -----------------------------------------------------------------------------------------

    _NUMBERS = ("just_closed", "num_closed", "num_rest_steps", "lr_integral", "slope", "loss")

    def state_dict(self) -> StateDict:
        """Plain containers; the basis and the observer are saved with the predictor."""
        last = window_state(self.last)
        if last is not None and self.last is not None and self.basis.owns(self.last.products):
            last["products"]["BB"] = None  # saved with the basis, and as large as it on small models
        return {
            "last": last, **{name: getattr(self, name) for name in self._NUMBERS},
            "keeping": self.keeping, "sketch": None if self.sketch is None else self.sketch.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.last = window_from_state(state["last"], self.basis)
        for name in self._NUMBERS:
            setattr(self, name, state[name])
        self.keeping = state.get("keeping", True)  # of an older checkpoint: there was no choice
        if self.sketch is None:
            self.keeping = True
        elif state.get("sketch") is not None:
            self.sketch.load_state_dict(state["sketch"])
        self.seconds = math.nan


def window_state(window: Window | None) -> StateDict | None:
    """A window as plain containers."""
    if window is None:
        return None
    state: dict[str, Any] = {f.name: getattr(window, f.name) for f in fields(window)}
    state["products"] = {f.name: getattr(window.products, f.name) for f in fields(window.products)}
    state["group_sizes"] = list(window.group_sizes)
    if window.hindsight is not None:
        state["hindsight"] = {f.name: getattr(window.hindsight, f.name) for f in fields(window.hindsight)}
    return state


def window_from_state(state: StateDict | None, basis: Basis | None = None) -> Window | None:
    """Inverse of :func:`window_state`; products that are those of the basis itself are taken from there."""
    if state is None:
        return None
    values = dict(state)
    products = dict(values["products"])
    if products["BB"] is None and basis is not None:
        products["BB"] = basis.products().BB
    values["products"] = Products(**products)
    values["group_sizes"] = tuple(values["group_sizes"])
    if values["hindsight"] is not None:
        values["hindsight"] = Hindsight(**values["hindsight"])
    return Window(**values)
