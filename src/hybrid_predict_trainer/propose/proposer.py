"""Who predicts, how far, and what came of it."""

from __future__ import annotations

from typing import Any

from ..config.settings import HybridTrainerConfig
from ..keep.failures import Failures, Place, name_of
from ..predictors import Paced, Predictor
from ..records import StateDict, Verdict
from .corrector import Correction
from .feedback import Feedback
from .segments import Segment, segment_from, segment_state
from .sources.base import Source
from .time_budget import TimeBudget


class Proposer:
    """The predictor of a run, what is learnt about its predictions, and the proposal under way.

    Attributes:
        settings: The user's, from which the predictor is chosen.
        chooses: The choice of the predictor is ours.
        predictor: Asked for proposals.
        paced: The same, if it can keep to a share of the run's time.
        time: What it takes of the wall clock.
        feedback: What its predictions have got wrong, and which horizon pays.
        horizon: Steps that the next proposal is for.
        confidence: Probability that the last proposal considered is kept and pays.
        segment: What is left of a jump in pieces.
        correction: Of the last proposal, for the record.
        refused: A proposal was refused since the last window.
        num_windows_since_proposal: Windows closed since the last proposal.
    """

    def __init__(self, settings: HybridTrainerConfig, failures: Failures, *, chooses: bool) -> None:
        """Nobody predicts before :meth:`follow` was called; what fails is counted in ``failures``."""
        self.settings, self.chooses = settings, chooses
        self._failures = failures
        self.predictor: Predictor
        self.paced: Paced | None = None
        self.time: TimeBudget
        self.feedback: Feedback
        self.horizon = 1
        self._least = self._most = 1  # horizons
        self._longest_chain = 1 << 30
        self.confidence = 0.5
        self.segment: Segment | None = None
        self.correction: Correction | None = None
        self.refused = False
        self.num_windows_since_proposal = 0

    def follow(self, config: HybridTrainerConfig, predictor: Predictor, time: TimeBudget, feedback: Feedback) -> None:
        """Ask this predictor from here on.

        Args:
            config: Settings of a run with it.
            predictor: Has observed nothing yet, or what it has is its own.
            time: Its own budget.
            feedback: What is learnt about it.
        """
        self.predictor, self.time, self.feedback = predictor, time, feedback
        self.paced = predictor if isinstance(predictor, Paced) else None  # an answer of ten microseconds
        self._least, self._most = config.min_predict_steps, max(config.max_predict_steps, 1)
        self.horizon = min(max(config.min_predict_steps, 4 * config.predictor.window), self._most)

    def begin_anew(self) -> None:
        """What was proposed by another predictor is of no use."""
        self.segment, self.correction, self.refused = None, None, False

    def keep_predictor(self) -> None:
        """The choice is over."""
        self.chooses = False

    @property
    def source(self) -> Source | None:
        """Who proposes moves of its own, if the predictor is no predictor but that."""
        return self.predictor if isinstance(self.predictor, Source) else None

    def bound_chain(self, num_proposals: int) -> None:
        """So many proposals may follow one another without a real step between them, at most."""
        self._longest_chain = num_proposals

    @property
    def asked(self) -> bool:
        """Whether the run goes on for what a source owes only: it does not wait for that, whatever was refused."""
        return self.source is not None and self.source.asked

    @property
    def goes_on(self) -> bool:
        """Whether a source may propose again right after a proposal of its own."""
        source = self.source
        return source is not None and not self.refused and source.num_in_chain < min(source.chain, self._longest_chain)

    # ---- what happens --------------------------------------------------------------------------------

    def count_proposal(self) -> None:
        """A proposal is being made."""
        self.num_windows_since_proposal = 0
        if self.source is not None:
            self.source.on_proposal()

    def window_closed(self) -> None:
        """A window was closed, and tells of the refusals before it."""
        self.refused = False
        if self.source is not None:
            self.source.on_real_step()
        self.num_windows_since_proposal += 1

    def on_data(self, num_different: int) -> None:
        """The batch of the step that begins, and so many before it in a row, were not the one before."""
        if self.source is not None:
            self.source.on_data(num_different)

    def state_confidence(self, confidence: float) -> None:
        """The proposal under way is this likely to be kept and to pay."""
        self.confidence = confidence

    def on_correction(self, correction: Correction) -> None:
        """The proposal under way was corrected by so much."""
        self.correction = correction

    def on_refused(self, refused: bool) -> None:
        """What the predictor's pairs say of the next move holds no more, or does again."""
        self.refused = refused

    def go_on_with(self, segment: Segment | None) -> None:
        """This much is left of a jump in pieces."""
        self.segment = segment

    def double_horizon(self) -> None:
        """A jump was kept."""
        self.horizon = min(2 * self.horizon, self._most)

    def halve_horizon(self) -> None:
        """A jump was taken back, or went wrong."""
        self.horizon = max(self.horizon // 2, self._least)

    def on_verdict(self, verdict: Verdict) -> None:
        """The gate has judged the proposal of a source."""
        source = self.source
        if source is not None:
            try:
                source.on_verdict(verdict)
            except Exception as error:
                self.on_failure(error)

    def overwritten(self) -> None:
        """The weights are others than any that were seen."""
        self.on_refused(True)
        if self.source is not None:
            self.source.overwritten()

    def on_failure(self, error: Exception) -> None:
        """The predictor raised: count it, and say once what happened."""
        self._failures.note(Place.PREDICTOR, error, name=name_of(self.predictor))

    def add_time(self, step_seconds: float | None) -> None:
        """A step took so long (None: it was no real one); a predictor that takes too much beside it is dropped."""
        if step_seconds is not None:
            self.time.on_step(step_seconds)
            if self.source is not None:
                self.source.add_step_seconds(step_seconds)
        if self.time.objection is not None:
            self._failures.drop(Place.PREDICTOR, self.time.objection, name_of(self.predictor))

    # ---- state -----------------------------------------------------------------------------------------

    _NUMBERS = ("horizon", "confidence", "refused", "num_windows_since_proposal")

    def state_dict(self) -> StateDict:
        """Plain containers; the predictor's own state is saved beside it."""
        numbers: dict[str, Any] = {name: getattr(self, name) for name in self._NUMBERS}
        return {
            "predictor": self.predictor.name, "feedback": self.feedback.state_dict(),
            "segment": segment_state(self.segment), **numbers,
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`; the predictor is of the same name."""
        self.feedback.load_state_dict(state["feedback"])
        self.segment = segment_from(state["segment"])
        for name in self._NUMBERS:
            setattr(self, name, state[name])
