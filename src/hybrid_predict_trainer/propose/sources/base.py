"""A second kind of proposals: from the model, a batch and its residuals, not from products of past displacements."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...records import BasisSpec, PhasePrediction, StateDict, Verdict, Window
from ...weights.algebra import Tensors

#: Steps that a run goes on for a proposal that it owes, at most: the first ones may have to be real.
MOST_ASKED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What a source may look at.

    Attributes:
        model: In the modes of a real step.
        parameters: Those of the run.
        movable: Which of them may be moved now.
        batch: That the proposal will be judged on.
        exact: Every batch is the same, and losses are exact.
        decay: What weight decay adds to the loss, with a graph; None: nothing.
        room: Forwards that are left until the run's planned end; infinite where there is none.
    """

    model: nn.Module
    parameters: list[Tensor]
    movable: list[bool]
    batch: Any
    exact: bool
    decay: Callable[[], Tensor] | None = None
    room: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A proposed move, with what it has cost.

    Attributes:
        prediction: What it claims.
        delta: One tensor per parameter of the run, zero where nothing may be moved.
        num_forward, num_backward: Passes through the model that it took.
        num_matrix_forwards: Price of its matrix work, in forwards.
    """

    prediction: PhasePrediction
    delta: Tensors
    num_forward: float
    num_backward: float
    num_matrix_forwards: float


class Source:
    """Proposes moves of its own.

    It stands where a predictor does, with its name, its wish for a basis and its state, and is never asked to predict.

    Attributes:
        name: As in ``predictor.type``.
        spec: As little as there can be: windows tell it nothing.
        chain: Proposals that may follow one another without a real step between them.
        num_in_chain: Proposals since the last real step.
        allowance: Forwards that a proposal may be worth; the least that it can be is made whatever this says.
    """

    name: str
    spec: BasisSpec
    chain: int
    num_in_chain = 0
    allowance = math.inf
    takes_fresh = False  # it has something to say where every batch is a new one
    _num_asked = 0  # times that a run that might have ended went on for what it owes, since the last proposal

    def allow(self, forwards: float) -> None:
        """A proposal may be worth so many forwards from here on."""
        self.allowance = forwards

    def on_proposal(self) -> None:
        """It is about to propose."""
        self.num_in_chain, self._num_asked = self.num_in_chain + 1, 0

    def on_real_step(self) -> None:
        """A real step has moved the weights."""
        self.num_in_chain = 0

    def on_data(self, num_different: int) -> None:
        """The batch of the step that begins, and so many before it in a row, were not the one before."""

    def add_step_seconds(self, seconds: float) -> None:
        """A real step took so long."""

    def on_asked(self) -> None:
        """A run that might have ended goes on for the proposal that it owes."""
        self._num_asked += 1

    @property
    def asked(self) -> bool:
        """Whether the run goes on for the proposal that it owes only."""
        return self._num_asked > 0

    @property
    def owes(self) -> bool:
        """Whether a real step has left weights that a proposal would lead back to: a run does not end there."""
        return self.num_in_chain == 0 and self._num_asked < MOST_ASKED and self.knows_better

    def propose(self, material: Material) -> Move:
        """A move from the present weights, which are as before when this returns or raises."""
        raise NotImplementedError

    def least_price(self, material: Material) -> float:
        """Forwards that the smallest proposal is predicted to be worth."""
        raise NotImplementedError

    def know(self, best: Tensors, loss: float, *, stale: bool) -> None:
        """Somebody else has found better weights.

        Args:
            best: One tensor per parameter that may be moved.
            loss: There.
            stale: It is that of another batch.
        """
        raise NotImplementedError

    def on_verdict(self, verdict: Verdict) -> None:
        """What the gate said of the last move."""

    @property
    def regime(self) -> str:
        """What kind of training this is, as far as the source can tell."""
        return "unknown"

    @property
    def knows_better(self) -> bool:
        """Whether a proposal would lead back to weights that were better than those that a real step leaves."""
        return False

    def overwritten(self) -> None:
        """The weights are others than any that were seen."""

    # ---- as a predictor ----------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Always: nothing has to be observed first."""
        return True

    def observe(self, window: Window) -> None:
        """Windows tell nothing that residuals do not."""

    def predict(self, horizon: int) -> PhasePrediction:
        """Never asked.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a source proposes moves")

    def memory_bytes(self) -> int:
        """Bytes held between proposals."""
        return 0

    def state_dict(self) -> StateDict:
        """Everything learnt, as plain containers, scalars and tensors."""
        raise NotImplementedError

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        raise NotImplementedError
