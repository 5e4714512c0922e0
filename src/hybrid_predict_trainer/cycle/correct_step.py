"""A real step on probation, and what comes of it: the jump is kept, tried longer, or taken back."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ..cost import STEP_UNITS
from ..judge.probation import Probation, probation_passes
from ..observe.divergence import prediction_error
from ..records import Action, Alarm, Decision, Level, StepOutcome
from .real_step import run_full
from .state import State


def run_correct(run: State, batch: Any, decision: Decision) -> StepOutcome:
    """A real step on probation; :func:`conclude` says what comes of it."""
    assert run.judge.probation is not None, "CORRECT without a jump on probation"
    return run_full(run, batch, decision)


def conclude(run: State, outcome: StepOutcome) -> None:
    """After a step on probation: the last one keeps the jump or takes it back."""
    probation = run.judge.probation
    if probation is None:  # another set of weights is trained from this step on: there is no way back
        return
    probation.count_step(None if outcome.skipped else outcome.judged)
    if outcome.skipped and not outcome.searching:
        probation.on_level(Level.CRITICAL)
    if probation.num_steps_left > 0 and probation.worst_level < Level.CRITICAL:
        return
    probation.read()
    after = sum(probation.losses) / len(probation.losses) if probation.losses else math.inf
    outcome.alarm = probation_alarm(run, probation, after)
    if _extended(run, probation, outcome.alarm, after):
        return
    outcome.probation, outcome.promised = (probation.loss_before, after), probation.predicted_loss
    outcome.kept = probation_passes(probation, run.config.divergence_threshold)
    if outcome.kept:
        run.judge.kept()
        run.proposer.feedback.on_outcome(True)
        run.proposer.double_horizon()
    else:
        _roll_back(run, probation)
    run.judge.end_probation()


def probation_alarm(run: State, probation: Probation, after: float) -> Alarm:
    """Prediction error of the smoothed loss on probation; from a warning on the next horizon is halved."""
    d = run.config.divergence
    alarm = prediction_error(
        after, probation.predicted_loss, d.prediction_error_caution, d.prediction_error_threshold,
        d.prediction_error_critical, noise=probation.std_before / math.sqrt(max(len(probation.losses), 1)),
    )  # fmt: skip
    return replace(alarm, action=Action.REDUCE_HORIZON) if alarm.level >= Level.WARNING else alarm


def _extended(run: State, probation: Probation, alarm: Alarm, after: float) -> bool:
    """Whether a jump in doubt gets as many steps again, once; one beyond doubt is marked critical.

    Twice the predicted loss is critical only if nothing is left of the gain: a jump to a hundredth of
    the loss that bounces to a tenth was still a good one.
    """
    if after <= probation.loss_before or alarm.level < Level.WARNING:
        return False
    if alarm.level is Level.CRITICAL:
        probation.on_level(Level.CRITICAL)
        return False
    if probation.extended:
        return False
    probation.extend(run.config.correct_steps)
    return True


def _roll_back(run: State, probation: Probation) -> None:
    """Everything as it was before the jump, bit for bit; the steps since are lost and paid for."""
    run.restore(probation.snapshot)
    run.restored(probation.basis)
    run.rollback.drop()  # it holds weights after the jump
    run.schedule.go_back(probation.num_schedule_steps)
    for account in run.judge.ledger.cancel_account():
        run.proposer.feedback.on_taken_back(account, len(probation.losses), run.config.predictor.window)
    run.judge.ledger.on_verdict(False)
    run.judge.ledger.spend(len(probation.losses) * STEP_UNITS)
    run.proposer.feedback.on_outcome(False)
    run.judge.taken_back(run.config.divergence.max_rollbacks)
    run.proposer.halve_horizon()
    run.meter.jump_undone(probation.claimed)
    run.meter.add_passes(8)
    run.step_scheduler()  # the steps on probation were spent, the claimed ones were not made
