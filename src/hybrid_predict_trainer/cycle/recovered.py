"""The record of what a step recovered from."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from ..keep.failures import Failures, Place
from ..records import Action, Alarm, Level, Reason, StepOutcome
from ..recovery import (
    Continue,
    ForceFullPhase,
    NumericalInstability,
    PredictionDivergence,
    PredictorTrainingFailed,
    Recovery,
    RecoveryAction,
    ReducePredictRatio,
    RollbackAndRetry,
)
from .alarms import rate_is_lowered
from .state import State

#: What a horizon is multiplied by where a prediction was wrong; :meth:`.Proposer.halve_horizon`.
HALF = 0.5
#: Refusals that are a failure, and not a judgement.
FAILED = frozenset({Reason.PREDICTOR_FAILED, Reason.CANNOT_EVALUATE, Reason.NOT_FINITE, Reason.WRONG_SHAPE})


def recovery_of(run: State, outcome: StepOutcome, alarm: Alarm) -> Recovery | None:
    """What was done about what went wrong in a step; None where nothing did.

    Args:
        run: After the step, all responses made.
        outcome: Of the step.
        alarm: The worst of its alarms.
    """
    step, failed = run.meter.num_steps, _failed_since(run.failures)
    if outcome.kept is False and outcome.probation is not None:
        back = RollbackAndRetry(run.meter.num_real_steps, run.learning_rate)
        error = PredictionDivergence(outcome.probation[1], outcome.promised, step)
        return Recovery(step=step, action=back, error=error)
    if alarm.level >= Level.WARNING:
        if alarm.signal == "prediction_error" and outcome.probation is not None:
            found = PredictionDivergence(outcome.probation[1], outcome.promised, step)
            return Recovery(step=step, action=_done(run, outcome, alarm), error=found)
        told = f"step {step}: {alarm.signal} {alarm.value:.6g}, threshold {alarm.threshold:.6g}"
        action = _done(run, outcome, alarm)
        return Recovery(step=step, action=action, error=NumericalInstability(told, step, action))
    if failed or (outcome.verdict is not None and outcome.verdict.reason in FAILED):
        reason = outcome.verdict.reason.value if outcome.verdict is not None else ""
        told = run.failures.first.get(Place.PREDICTOR, reason)
        return Recovery(step=step, action=Continue(), error=PredictorTrainingFailed(told, step))
    return None


#: How many failures of a predictor have been told; what was before the first look is history.
_TOLD: WeakKeyDictionary[Failures, int] = WeakKeyDictionary()


def _failed_since(failures: Failures) -> bool:
    """Whether the predictor has failed since the last look."""
    count = failures.counts[Place.PREDICTOR]
    before = _TOLD.get(failures, count)
    _TOLD[failures] = count
    return count > before


def _done(run: State, outcome: StepOutcome, alarm: Alarm) -> RecoveryAction:
    if alarm.action is Action.REDUCE_HORIZON:
        return ReducePredictRatio(HALF)
    if alarm.level is Level.CRITICAL and rate_is_lowered(run):
        return RollbackAndRetry(run.meter.num_real_steps, run.learning_rate)
    if run.phases.num_forced_full_steps:
        return ForceFullPhase(run.phases.num_forced_full_steps)
    return Continue()
