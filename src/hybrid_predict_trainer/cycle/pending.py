"""A real step of a loop that somebody else owns, from its gradients to its end."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..records import Decision, StepOutcome
from ..weights.parameters import optimizer_parameters
from .real_step import RealStep, count_real
from .state import State
from .transaction import finish_real, versions_of
from .withdrawal import Pair


class PendingStep:
    """A real step from its gradients to its end.

    Attributes:
        decision: What it is.
        step: Its stations; None where no loss was handed over, and it is only counted.
        batch: It is trained on, None if there is none.
        measured: Forwards spent on looking at the batch.
        armed: The optimizer is stepping.
        compares: The guard compares in this step.
        pair: What it compares, if it does.
    """

    def __init__(self, run: State, decision: Decision, step: RealStep | None, batch: Any, measured: float) -> None:
        """Remember where the weights stand."""
        self.decision, self.step, self.batch, self.measured = decision, step, batch, measured
        self.armed = self.compares = False
        self.pair: Pair = None
        self._run, self._versions = run, versions_of(run.subject.parameters)
        self._num_attempted = run.meter.num_attempted_steps
        self._done = run.optimizer_step.scale.num_steps, run.optimizer_step.lookahead.num_steps
        self._rates = ExitStack()
        self._withheld: list[tuple[Tensor, Tensor]] = []

    @property
    def usable(self) -> bool:
        """Whether the optimizer may step."""
        return self.step is None or self.step.usable

    def on_pair(self, pair: Pair) -> None:
        """The guard compares these losses once the optimizer has stepped."""
        self.compares, self.pair = True, pair

    @property
    def moved(self) -> bool:
        """Whether the optimizer has moved the weights."""
        return versions_of(self._run.subject.parameters) != self._versions

    def arm(self) -> None:
        """The optimizer steps next: its rates are set; where the step is left out it finds no gradients."""
        self.armed = True
        if self.usable:
            self._rates = self._run.optimizer_step.rates(self._run.position)
            return
        for parameter in optimizer_parameters(self._run.subject.optimizer):
            if parameter.grad is not None:
                self._withheld.append((parameter, parameter.grad))
                parameter.grad = None

    def disarm(self) -> None:
        """The optimizer has stepped, or has raised: rates and gradients are the loop's again."""
        self._rates.close()
        for parameter, gradient in self._withheld:
            parameter.grad = gradient
        self._withheld = []

    def end(self) -> StepOutcome:
        """What came of it; a step whose weights have moved is carried to its end even if that is interrupted."""
        run, step = self._run, self.step
        if step is None:
            count_real(run)
            return StepOutcome(torch.tensor(math.nan, device="cpu"), forwards=1, backwards=1)
        if not step.usable:
            return step.skip()
        try:
            return step.end()
        except BaseException:
            self.complete()
            raise

    def complete(self) -> None:
        """Count a step whose weights have moved, unless it was."""
        if self._run.meter.num_attempted_steps == self._num_attempted:
            finish_real(self._run, *self._done)
