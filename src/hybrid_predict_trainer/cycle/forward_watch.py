"""A model that returns its loss: a hook on its forward sees what the step is trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..records import StateDict
from .handover import Call, Intake, loss_in
from .hooks import OwnForwards
from .state import State

#: What a model library hands to a forward that is no part of the batch: the gate takes the model's own mean.
NOT_DATA = ("num_items_in_batch",)


class ForwardWatch:
    """Takes loss and batch from the model's forwards."""

    def __init__(
        self, run: State, intake: Intake, own: OwnForwards, begins: Callable[[Any, bool], None],
        replaced: Callable[[], None],
    ) -> None:  # fmt: skip
        """Nothing was seen yet.

        Args:
            run: Of the engine.
            intake: Where losses and batches go.
            own: Forwards that are none of the loop's.
            begins: Called with the batch at the first forward of a step, and whether such forwards return a loss.
            replaced: Called where the weights were trained by somebody else's step.
        """
        self._run, self._intake, self._own, self._begins, self._replaced = run, intake, own, begins, replaced
        self._batch: Any = None  # of the forward under way
        self._forms: set[Any] = set()  # of forwards that returned a loss

    @property
    def tells_next_batch(self) -> bool:
        """Whether the next forward tells the batch that will be trained on: a better judge than the last one."""
        return bool(self._forms) and self._run.subject.model.training

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model's pre-forward hook."""
        if self._own.under_way or not torch.is_grad_enabled():
            return
        named = {k: v for k, v in kwargs.items() if k not in NOT_DATA}
        self._batch = Call(args, named) if args else named
        if self._intake.empty and self._intake.aside.empty:
            self._begins(self._batch, _form(args, named) in self._forms)

    def after(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> bool:
        """The model's forward hook; returns whether a loss was found."""
        if self._own.under_way or not torch.is_grad_enabled():
            return False
        loss, batch = loss_in(output), self._batch
        if loss is None or not loss.requires_grad or batch is None:
            return False
        training = self._run.subject.model.training
        if training:
            self._forms.add(_form(args, batch.kwargs if isinstance(batch, Call) else batch))
        if self._intake.arrives():
            self._replaced()
        into = self._intake.seen if training else self._intake.aside
        into.take_loss(loss)
        into.take_batch(batch)
        return True

    def state_dict(self) -> StateDict:
        """Plain containers."""
        return {"forms": [[number, list(names)] for number, names in sorted(self._forms)]}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self._batch = None
        self._forms = {(number, tuple(names)) for number, names in state["forms"]}


def _form(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """What a forward is called with, as far as it tells whether a loss comes back."""
    return len(args), tuple(sorted(kwargs))
