"""Who judges: the ledger, how exact losses are, how they can be had, and the jump on trial."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config.settings import HybridTrainerConfig
from ..keep.subject import Subject
from ..records import Level, State
from ..weights.algebra import Tensors
from .exactness import Exactness
from .ledger import Ledger
from .probation import Probation, probation_from, probation_state


class Evaluation:
    """How losses of this run can be had without a trace; found out when the first ones are asked for.

    Attributes:
        needs_grad_mode: The loss function differentiates inside (physics-informed losses).
        quiet_fails: The loss can be had in the modes of training only.
        loss_writes: The loss function writes into its batch; None: nobody looked yet.
        cuts: Whether the pieces of a batch of that layout are pieces of its loss.
    """

    def __init__(self, subject: Subject) -> None:
        """Nothing was evaluated yet."""
        self._subject = subject
        self.needs_grad_mode = False
        self.quiet_fails = False
        self.loss_writes: bool | None = None
        self.cuts: dict[str, bool] = {}

    def loss(self, batch: Any) -> Tensor:
        """Loss of a batch without a graph; falls back on grad mode for losses that differentiate inside."""
        if not self.needs_grad_mode:
            try:
                return self._loss_without_graph(batch)
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
                self.needs_grad_mode = True
        return self._loss_with_graph(batch)

    @torch.no_grad()  # not a block: an interruption at its end would leave grad mode off
    def _loss_without_graph(self, batch: Any) -> Tensor:
        return self._subject.loss_fn(self._subject.model, batch).detach()

    @torch.enable_grad()
    def _loss_with_graph(self, batch: Any) -> Tensor:
        return self._subject.loss_fn(self._subject.model, batch).detach()

    def note_quiet_fails(self) -> None:
        """A quiet forward raised where one in the modes of training did not."""
        self.quiet_fails = True

    def note_writes(self, writes: bool) -> None:
        """The loss function was seen to write into its batch, or not to."""
        self.loss_writes = writes

    def note_cut(self, layout: str, holds: bool) -> None:
        """The losses of two halves of a batch of this layout give the whole's, or do not."""
        self.cuts[layout] = holds

    _NAMES = ("needs_grad_mode", "quiet_fails", "loss_writes")

    def state_dict(self) -> State:
        """Plain containers."""
        return {"cuts": dict(self.cuts), **{name: getattr(self, name) for name in self._NAMES}}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.cuts = dict(state["cuts"])
        for name in self._NAMES:
            setattr(self, name, state[name])


class Judge:
    """What decides over jumps, and remembers what became of them.

    Attributes:
        ledger: What jumps have cost and returned.
        exactness: Whether two losses of a batch are the same.
        evaluation: How losses can be had.
        probation: The jump on trial.
        generator: Draws what is skipped as a control.
        num_rollbacks: Jumps taken back in a row.
        held: The weights while a proposal is judged.
    """

    def __init__(self, config: HybridTrainerConfig, subject: Subject) -> None:
        """Nothing was judged yet."""
        self.ledger = Ledger(config.gate)
        self.exactness = Exactness()
        self.evaluation = Evaluation(subject)
        self.probation: Probation | None = None
        self.generator = torch.Generator().manual_seed(config.seed)
        self.num_rollbacks = 0
        self.held: Tensors = []

    def follow(self, config: HybridTrainerConfig) -> None:
        """Judge by other settings from here on."""
        self.ledger.follow(config.gate)

    def hold(self, parameters: Tensors) -> None:
        """These are the weights that a proposal starts from."""
        self.held = parameters

    def release(self) -> None:
        """The proposal is over."""
        self.held = []

    # ---- the jump on trial ----------------------------------------------------------------------------

    def start_probation(self, probation: Probation) -> None:
        """A jump was made."""
        self.probation = probation

    def end_probation(self) -> None:
        """The jump stays, or was taken back."""
        self.probation = None

    def note_level(self, level: Level) -> None:
        """An alarm while a jump may be on trial."""
        if self.probation is not None:
            self.probation.note_level(level)

    def kept(self) -> None:
        """A jump was kept."""
        self.num_rollbacks = 0

    def taken_back(self, max_rollbacks: int) -> None:
        """A jump was taken back; after more than ``max_rollbacks`` in a row no more are proposed."""
        self.num_rollbacks += 1
        if self.num_rollbacks > max_rollbacks:
            self.ledger.switch_off()  # it keeps failing: plain training from here

    # ---- state ------------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """Plain containers."""
        return {
            "ledger": self.ledger.state_dict(), "exactness": self.exactness.state_dict(),
            "evaluation": self.evaluation.state_dict(), "probation": probation_state(self.probation),
            "generator": self.generator.get_state(), "num_rollbacks": self.num_rollbacks,
        }  # fmt: skip

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.ledger.load_state_dict(state["ledger"])
        self.exactness.load_state_dict(state["exactness"])
        self.evaluation.load_state_dict(state["evaluation"])
        self.probation = probation_from(state["probation"])
        self.generator.set_state(state["generator"])
        self.num_rollbacks = state["num_rollbacks"]
