"""Which phase comes next, and why: a transition table and controllers that return decisions.

Deciding changes nothing; the trainer applies what comes back, so a decision can be tested from a
table of signals without a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..config.settings import HybridTrainerConfig
from ..records import Decision, HybridError, Phase, Reason, StateDict

LEGAL: dict[Phase, frozenset[Phase]] = {
    Phase.WARMUP: frozenset({Phase.WARMUP, Phase.FULL}),
    Phase.FULL: frozenset({Phase.FULL, Phase.PREDICT}),
    Phase.PREDICT: frozenset({Phase.PREDICT, Phase.CORRECT, Phase.FULL}),
    Phase.CORRECT: frozenset({Phase.CORRECT, Phase.FULL}),
}


class IllegalTransitionError(HybridError):
    """A controller asked for a transition that is not in the table."""


def validate_transition(source: Phase, target: Phase) -> None:
    """Raise unless the table allows ``source -> target``.

    Raises:
        IllegalTransitionError: it does not.
    """
    if target not in LEGAL[source]:
        allowed = ", ".join(sorted(p.value for p in LEGAL[source]))
        raise IllegalTransitionError(f"{source.value} -> {target.value} is not a legal transition (legal: {allowed})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """Everything a controller may look at."""

    phase: Phase  # of the last step
    num_real_steps: int
    num_real_steps_since_predict: int
    loss_ema_stable: bool
    baseline_known: bool
    window_just_closed: bool
    predictor_ready: bool
    confidence: float
    num_outcomes: int
    num_windows_since_proposal: int
    horizon: int
    affordable: bool
    promising: bool  # the predicted gain may pay for the test
    num_windows_to_wait: int
    switched_off: bool
    num_full_steps_due: int  # real steps between proposals, at least
    num_forced_full_steps: int
    forced_by_alarm: bool
    num_probation_steps: int  # still to run
    num_segments_left: int
    goes_on: bool  # a source of proposals has more to say without a real step
    fallback_threshold: float


class Controller(Protocol):
    """Decides the next phase."""

    def decide(self, signals: Signals) -> Decision:
        """Return the next phase with its reason."""


@dataclass(frozen=True, slots=True)
class NeverPredict:
    """Null object: warm-up, then full steps for ever."""

    warmup_steps: int

    def decide(self, signals: Signals) -> Decision:
        """Never anything but a real step."""
        if signals.phase is Phase.WARMUP and signals.num_real_steps < self.warmup_steps:
            return Decision(phase=Phase.WARMUP, reason=Reason.WARMING_UP)
        return Decision(phase=Phase.FULL, reason=Reason.NEVER)


@dataclass(frozen=True, slots=True)
class PhaseController:
    """The four-phase cycle."""

    config: HybridTrainerConfig

    def decide(self, signals: Signals) -> Decision:
        """Apply the rules of the cycle, hardest first."""
        c, s = self.config, signals
        if s.phase is Phase.WARMUP:
            if s.num_real_steps < c.warmup_steps:
                return Decision(phase=Phase.WARMUP, reason=Reason.WARMING_UP)
            # a run whose loss never settles must not be stuck in warm-up for ever
            patience = 4 * max(c.warmup_steps, 1)
            if not (s.loss_ema_stable and s.baseline_known) and s.num_real_steps < patience:
                return Decision(phase=Phase.WARMUP, reason=Reason.BASELINE_UNSTABLE)
            return self._full(Reason.WINDOW_OPEN)
        if s.num_probation_steps > 0:
            return Decision(phase=Phase.CORRECT, reason=Reason.PROBATION, confidence=s.confidence)
        if s.num_segments_left > 0 and s.phase is Phase.PREDICT:
            if s.confidence >= c.divergence.confidence_exit:
                return self._predict(s, Reason.SEGMENT)
            phase = Phase.CORRECT if c.correct_steps else Phase.FULL
            return Decision(phase=phase, reason=Reason.NOT_CONFIDENT, confidence=s.confidence)
        if s.goes_on and s.phase is Phase.PREDICT and s.num_forced_full_steps == 0 and not s.switched_off:
            return self._predict(s, Reason.CONFIDENT)
        reason = self._objection(s)
        if reason is not None:
            return self._full(reason, s.confidence)
        exploring = self._exploring(s)
        return self._predict(s, Reason.EXPLORING if exploring else Reason.CONFIDENT)

    def _objection(self, s: Signals) -> Reason | None:
        """First reason against predicting now."""
        if s.num_forced_full_steps > 0:
            return Reason.RECENT_ALARM if s.forced_by_alarm else Reason.FORCED_FULL
        if s.phase in (Phase.PREDICT, Phase.CORRECT) or not s.window_just_closed:
            return Reason.WINDOW_OPEN
        if s.num_real_steps_since_predict < s.num_full_steps_due:
            return Reason.WINDOW_OPEN
        if s.switched_off:
            return Reason.SWITCHED_OFF
        if not s.predictor_ready:
            return Reason.NOT_READY
        if s.num_windows_to_wait > 0:
            return Reason.BACKING_OFF
        if not s.affordable:
            return Reason.OVER_BUDGET
        if s.horizon == 0:
            return Reason.WAITING
        if not s.promising:
            return Reason.NOT_PROMISING
        if s.confidence < self.config.confidence_threshold and not self._exploring(s):
            return Reason.NOT_CONFIDENT
        return None

    def _exploring(self, s: Signals) -> bool:
        """Few outcomes, or none for long: confidence is not worth much, a proposal is."""
        return (
            s.num_outcomes < self.config.explore_outcomes
            or s.num_windows_since_proposal >= self.config.gate.max_backoff
        )

    @staticmethod
    def _full(reason: Reason, confidence: float = 0.0) -> Decision:
        return Decision(phase=Phase.FULL, reason=reason, confidence=confidence)

    @staticmethod
    def _predict(s: Signals, reason: Reason) -> Decision:
        return Decision(
            phase=Phase.PREDICT, reason=reason, horizon=s.horizon, confidence=s.confidence,
            fallback_threshold=s.fallback_threshold,
        )  # fmt: skip


def controller_for(config: HybridTrainerConfig) -> Controller:
    """The cycle, or the null object where the settings rule out every jump."""
    return (
        NeverPredict(config.warmup_steps if config.enabled else 0) if config.never_predicts else PhaseController(config)
    )


class PhaseState:
    """Where a run is in its cycle.

    Attributes:
        current: The phase of the step under way, or of the last one.
        controller: Says which one comes next.
        num_forced_full_steps: Real steps still to come without a proposal.
        forced_by_alarm: An alarm asked for them, not the user.
        num_real_steps_since_predict: Real steps since the last proposal.
    """

    def __init__(self, controller: Controller) -> None:
        """A run begins with its warm-up."""
        self.current = Phase.WARMUP
        self.controller = controller
        self.num_forced_full_steps = 0
        self.forced_by_alarm = False
        self.num_real_steps_since_predict = 0

    def follow(self, controller: Controller) -> None:
        """Ask another controller from here on."""
        self.controller = controller

    def enter(self, phase: Phase) -> None:
        """Go over to a phase.

        Raises:
            IllegalTransitionError: it is not in the table.
        """
        if phase is not self.current:
            validate_transition(self.current, phase)
        self.current = phase

    def force_full(self, num_steps: int, *, by_alarm: bool) -> None:
        """No proposals for the next real steps."""
        self.num_forced_full_steps = max(self.num_forced_full_steps, num_steps)
        self.forced_by_alarm = by_alarm

    def count_proposal(self) -> None:
        """A proposal is being made."""
        self.num_real_steps_since_predict = 0

    def count_real_step(self) -> None:
        """A real step was taken."""
        self.num_real_steps_since_predict += 1
        self.num_forced_full_steps = max(0, self.num_forced_full_steps - 1)

    _COUNTS = ("num_forced_full_steps", "forced_by_alarm", "num_real_steps_since_predict")

    def state_dict(self) -> StateDict:
        """Plain numbers."""
        return {"current": self.current.value, **{name: getattr(self, name) for name in self._COUNTS}}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.current = Phase(state["current"])
        for name in self._COUNTS:
            setattr(self, name, state[name])
