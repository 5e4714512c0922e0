"""Who judges: the ledger, how exact losses are, how they can be had, and the jump on trial."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config.settings import HybridTrainerConfig
from ..cost import FORWARD_UNITS, CostMeter
from ..keep.failures import Failures, Place
from ..keep.subject import Subject
from ..notices import warn
from ..observe.batches import num_samples
from ..records import Level, StateDict
from ..weights.algebra import Together, copied_together
from .evaluation import Evaluation
from .exactness import Agreement, Exactness
from .ledger import Ledger
from .noise import NoiseCheck
from .probation import Probation, probation_from, probation_state


class Judge:
    """What decides over jumps, and remembers what became of them.

    Attributes:
        ledger: What jumps have cost and returned.
        exactness: Whether two losses of a batch are the same.
        evaluation: How losses can be had.
        probation: The jump on trial.
        generator: Draws what is skipped as a control.
        num_rollbacks: Jumps taken back in a row.
        of_labels: Whether the loss is one of labels; None: nobody has looked.
        num_samples: Of the batches that come again and again, on all ranks; None: none does, as far as is known.
        noise: Whether what is left of a loss of numbers is noise.
        held: The weights while a proposal is judged.
    """

    def __init__(self, config: HybridTrainerConfig, subject: Subject, failures: Failures) -> None:
        """Nothing was judged yet; what raises is counted in ``failures``."""
        self._settings, self._subject, self._failures = config.gate, subject, failures
        self.ledger = Ledger(config.gate)
        self.exactness = Exactness()
        self.evaluation = Evaluation(subject, failures)
        self.probation: Probation | None = None
        self.generator = torch.Generator().manual_seed(config.seed)
        self.num_rollbacks = 0
        self.of_labels: bool | None = None
        self.num_samples: int | None = None
        self.noise = NoiseCheck()
        self.held: Sequence[Tensor] = []
        self._spare: Sequence[Tensor] = ()  # memory of the last one, of small models

    def follow(self, config: HybridTrainerConfig) -> None:
        """Judge by other settings from here on."""
        self._settings = config.gate
        self.ledger.follow(config.gate)

    def asks_for_exactness(self, meter: CostMeter, *, same: bool, observing: bool) -> bool:
        """Whether it is about to matter that losses are exact, and not known.

        Args:
            meter: Of the run.
            same: The batch is the one before.
            observing: Windows are kept, and jumps may be proposed.
        """
        setting = self._settings.exact
        if not observing or setting == "never" or self._settings.overhead_budget_exact == 0:
            return False
        asked = self.exactness.agreed is None if setting == "always" else same
        if not asked or self._failures.exhausted(Place.GATE):
            return False
        return self.exactness.due(meter.num_attempted_steps, self._subject.model)

    def measure_exactness(self, batch: Any, meter: CostMeter) -> float:
        """Measure whether losses are exact; returns forwards spent.

        Args:
            batch: Of the step that begins.
            meter: Of the run.
        """
        setting = self._settings.exact
        try:
            agreement = self._agreement(batch)
        except Exception as error:
            self._failures.note(Place.GATE, error)
            agreement = Agreement(exact=False)
        self.exactness.note(agreement, meter.num_attempted_steps, self._subject.model)
        meter.add_forwards(agreement.num_forward)
        self.ledger.observe(agreement.num_forward * FORWARD_UNITS)
        if setting == "always" and not agreement.exact:
            warn(
                'gate.exact = "always", but two losses of the same batch differ: dropout, random numbers in the loss '
                "or noise are taken for progress",
            )
        return agreement.num_forward

    def _agreement(self, batch: Any) -> Agreement:
        """What evaluations have in common, on every rank."""
        ranks = self._subject.ranks
        if ranks.alone:
            return self.evaluation.agreement(batch)

        def found() -> list[float]:
            own = self.evaluation.agreement(batch)
            return [own.exact, own.noise, own.num_forward, own.finite]

        exact, noise, forwards, finite = ranks.means(found)
        noise, forwards = noise * ranks.size, math.ceil(forwards)
        return Agreement(exact=exact == 1, noise=noise, num_forward=forwards, finite=finite == 1)

    def on_labels(self, of_labels: bool | None) -> None:
        """Whether the loss of a step was one of labels; None: that could not be told."""
        if self.of_labels is None:
            self.of_labels = of_labels

    def count_samples(self, batch: Any) -> None:
        """This batch comes again, and one as large on every other rank."""
        self.num_samples = num_samples(batch) * self._subject.ranks.size

    def hold(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """These are the weights that a proposal starts from; returns the copy that is held."""
        held, self._spare = copied_together(parameters, self._spare), ()
        self.held = held
        return held

    def release(self) -> None:
        """The proposal is over."""
        if isinstance(self.held, Together):
            self._spare = self.held
        self.held = []

    # ---- the jump on trial ----------------------------------------------------------------------------

    def start_probation(self, probation: Probation) -> None:
        """A jump was made."""
        self.probation = probation

    def end_probation(self) -> None:
        """The jump stays, or was taken back."""
        self.probation = None

    def on_level(self, level: Level) -> None:
        """An alarm while a jump may be on trial."""
        if self.probation is not None:
            self.probation.on_level(level)

    def kept(self) -> None:
        """A jump was kept."""
        self.num_rollbacks = 0

    def taken_back(self, max_rollbacks: int) -> None:
        """A jump was taken back; after more than ``max_rollbacks`` in a row no more are proposed."""
        self.num_rollbacks += 1
        if self.num_rollbacks > max_rollbacks:
            self.ledger.switch_off()  # it keeps failing: plain training from here

    # ---- state ------------------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """Plain containers."""
        return {
            "ledger": self.ledger.state_dict(), "exactness": self.exactness.state_dict(),
            "evaluation": self.evaluation.state_dict(), "probation": probation_state(self.probation),
            "generator": self.generator.get_state(), "num_rollbacks": self.num_rollbacks,
            "of_labels": self.of_labels, "num_samples": self.num_samples, "noise": self.noise.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.ledger.load_state_dict(state["ledger"])
        self.exactness.load_state_dict(state["exactness"])
        self.evaluation.load_state_dict(state["evaluation"])
        self.probation = probation_from(state["probation"])
        self.generator.set_state(state["generator"])
        self.num_rollbacks = state["num_rollbacks"]
        self.of_labels, self.num_samples = state["of_labels"], state["num_samples"]
        if state["noise"] is None:  # of an older build
            self.noise = NoiseCheck()
        else:
            self.noise.load_state_dict(state["noise"])
