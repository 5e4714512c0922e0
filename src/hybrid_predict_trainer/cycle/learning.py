"""The stations of one step around its outcome: preview -> (decide, execute) -> monitor -> observe -> describe."""

from __future__ import annotations

import math
import time

from ..cost import PASS_UNITS
from ..judge.switchback import NUM_LOSSES
from ..keep.failures import Place
from ..keep.finiteness import whereabouts
from ..move.multiplier import Advice
from ..move.multiplier import Reading as ScaleReading
from ..observe.history import Reading
from ..propose.proposal import fits
from ..records import Action, Alarm, Decision, Level, Phase, StepOutcome, StepResult, Window
from ..recovery import NumericalInstability
from ..tell.recorder import Metrics
from .alarms import respond
from .jump_check import ask
from .motions import on_motion_failure
from .real_step import settle_rollback_point
from .state import State
from .withdrawal import follow_advice, follow_request, rescue


def enter(run: State, decision: Decision) -> None:
    """Go over to the decided phase.

    Raises:
        IllegalTransitionError: the controller asked for one that is not in the table.
    """
    run.phases.enter(decision.phase)
    if decision.phase is not Phase.PREDICT:
        run.proposer.go_on_with(None)  # what is left of a jump in pieces is not continued later
        run.proposer.feedback.drop_preview()
    run.windows.begin_step()
    run.meter.begin_step(decision.phase)


def monitor(run: State, metrics: Metrics, outcome: StepOutcome) -> Alarm:
    """Read the losses that are due, check them, respond to the worst alarm.

    Raises:
        DivergenceError: too many steps in a row were not finite.
    """
    if not run.config.enabled or run.phases.current is Phase.PREDICT:
        return Alarm()
    if outcome.searching:  # the scaler has left the step out
        return Alarm()
    run.losses.push(run.meter.num_attempted_steps, outcome.loss, outcome.gradient_norm, outcome.decay)
    window_full = run.windows.full
    alarm = read(run, metrics, force=window_full)
    if alarm.action is Action.ABORT and rescue(run):
        return alarm
    if alarm.action is Action.ABORT:
        raise NumericalInstability(
            f"{int(alarm.value)} steps in a row had no usable loss or gradient ({alarm.signal}); "
            f"{whereabouts(run.subject.model, run.subject.optimizer)}.  Lower the learning rate, check the data of "
            "these batches, or load a checkpoint",
            run.meter.num_steps,
        )
    if alarm.level >= Level.WARNING:
        respond(run, alarm)
    if outcome.alarm.level >= Level.WARNING:
        metrics.on_alarm(run, outcome.alarm)
        respond(run, outcome.alarm)
    return max(alarm, outcome.alarm, key=lambda a: a.level)


def read(run: State, metrics: Metrics, *, force: bool) -> Alarm:
    """Check all readings that are due (or all there are) and return the worst alarm."""
    readings = run.losses.read(force=force)
    alarms = [_check(run, metrics, reading) for reading in readings]
    if readings and not run.subject.on_cpu:
        settle_rollback_point(run, finite=all(r.finite for r in readings))
    return max(alarms, key=lambda alarm: alarm.level, default=Alarm())


def settle_readings(run: State, metrics: Metrics) -> None:
    """Read what an accelerator still holds back."""
    read(run, metrics, force=True)
    metrics.flush()


def _check(run: State, metrics: Metrics, reading: Reading) -> Alarm:
    warming_up = run.phases.current is Phase.WARMUP
    if not run.subject.on_cpu and run.optimizer_step.scale_search.look(overflowed=reading.overflowed):
        return Alarm()
    if not run.judged_exactly and run.monitor.outgrown(reading, run.losses.history):
        run.losses.history.begin_norms_anew(float(reading.gradient_norm or 0.0))
    alarm = run.monitor.check(reading, run.losses.history, warming_up=warming_up, exact=run.judged_exactly)
    if alarm.level < Level.CRITICAL and reading.finite:
        run.losses.keep(reading, warming_up=warming_up, position=run.position, rate=run.learning_rate)
    if alarm.level >= Level.WARNING:
        metrics.on_alarm(run, alarm)
    elif alarm.quiet:
        metrics.on_recovery()
    return alarm


#: Steps that the smoothed loss averages over: its standard error is that of a mean of so many losses.
EMA_STEPS = 39


def rescale(run: State, outcome: StepOutcome) -> None:
    """After a real step: let the learned multiplier look at it, and the guard."""
    if not outcome.backwards or outcome.skipped or not run.windows.observing or run.failures.exhausted(Place.MOTION):
        return
    try:
        _look(run)
    except Exception as error:  # no memory for a state to come back to, say: then there is no way back from a raise
        on_motion_failure(run, error)


def _look(run: State) -> None:
    loss = run.losses.history.loss_ema
    reading = ScaleReading(
        lr=run.learning_rate,
        loss=loss.mean,
        noise=loss.std / math.sqrt(EMA_STEPS),
        newest=run.losses.newest(NUM_LOSSES),
        exact=run.full_batch,
        allowed=not run.safety.guard.withdrawn and not blind(run) and (run.full_batch or run.schedule.anneals),
    )
    if blind(run) and run.optimizer_step.scale.learned > 1:
        run.optimizer_step.scale.level()
        run.safety.end_raise()
    follow_advice(run, validated(run, run.optimizer_step.scale.check(reading)))
    if not run.losses.readout.waiting and reading.newest:
        moving = run.moving and run.judge.probation is None
        step = run.meter.num_real_steps
        follow_request(run, run.safety.guard.watch(reading.newest[-1], step, exact=reading.exact, moving=moving))
    run.optimizer_step.scale.rest(run.safety.guard.comparing)


def blind(run: State) -> bool:
    """Whether no loss at hand can tell a faster start from a faster overfitting: nothing is raised then."""
    asked = run.safety.validation is not None and not run.safety.validation.failed
    return run.by_heart or (run.batches.recurrence.recurs and not run.full_batch and not asked)


def validated(run: State, advice: Advice) -> Advice:
    """Where data come round again the validation loss has the last word on a raise, if there is one."""
    validation, step = run.safety.validation, run.meter.num_real_steps
    if (
        validation is None
        or validation.failed
        or not run.batches.recurrence.recurs
        or run.optimizer_step.scale.learned == 1
    ):
        return advice
    if advice is Advice.RAISED:
        before = validation.before_raise
        validation.begin_raise(ask(run, validation))
        # where an earlier raise was settled in the same breath its state is still there
        worse = run.safety.raise_point is not None and validation.before_raise > before
        if validation.before_raise == math.inf and not worse:  # nobody can tell
            run.optimizer_step.scale.level()
            run.safety.end_raise()
            return Advice.NOTHING
    elif advice is Advice.SETTLED:
        answer = ask(run, validation)
        worse = answer > validation.before_raise or answer == math.inf
    else:
        worse = validation.due(step) and ask(run, validation) == math.inf
    return run.optimizer_step.scale.withdraw(for_good=True) if worse or validation.rising else advice


def judge_lookahead(run: State, outcome: StepOutcome) -> None:
    """After a real step: let the trial of the lookahead look at it.

    Where losses are read late a block ends when all of its own are there.
    """
    if not outcome.backwards or outcome.skipped or not run.optimizer_step.lookahead.num_steps:
        return
    try:
        run.optimizer_step.on_loss(run.losses, run.judge.generator)
    except Exception as error:
        on_motion_failure(run, error)


def observe(run: State, metrics: Metrics, outcome: StepOutcome, began: float) -> None:
    """Close the window when it is full: the predictor learns, the ledger settles.

    Args:
        run: After the step and its check.
        metrics: Of that run.
        outcome: The step.
        began: When the step began, by ``time.perf_counter``.
    """
    if not run.windows.observing or run.phases.current is Phase.PREDICT:
        return
    started = time.perf_counter()
    run.windows.add_seconds(started - began)
    if not run.windows.full:
        if not run.windows.basis.num_steps and ended(run):
            run.windows.rest()
        return
    loss_before = run.windows.loss
    try:
        window = run.close_window()
    except Exception as error:  # no memory for the columns
        run.windows.on_unwatched(error)
        return
    encoded = time.perf_counter()
    cosine = run.proposer.feedback.learn(window)
    learn(run, window)
    updated = time.perf_counter()
    run.judge.ledger.on_window(window.loss / loss_before if loss_before else math.nan, jumped=window.jumped)
    settled = run.judge.ledger.settle(run.meter.num_real_steps, window.loss)
    for account in settled:
        run.proposer.feedback.on_settled(account, window.num_steps, exact=run.full_batch)
    metrics.on_outcomes(run, settled)
    passes = run.windows.passes(window.num_steps)
    run.meter.add_passes(passes)
    run.judge.ledger.observe(passes * PASS_UNITS)
    run.windows.hand_on()
    if ended(run):
        run.windows.rest()
    run.buffers.forget()
    metrics.on_health(run)
    metrics.on_window(1e3 * (encoded - started), 1e3 * (updated - encoded), cosine)


def ended(run: State) -> bool:
    """Whether nobody will look at another window: losses are exact, and jumps have ended for good.

    Sixty columns and their products may take a third of a step.
    """
    off = run.judge.ledger.switched_off or run.safety.guard.withdrawn or run.proposes_nothing
    return off and run.full_batch and run.judge.probation is None and not run.judge.ledger.open


def learn(run: State, window: Window) -> None:
    """Show the predictor a window and ask for its forecast of the next; one that keeps failing is left alone."""
    if run.failures.exhausted(Place.PREDICTOR) or not run.windows.keeping:  # a window that nothing was kept of
        return
    window_seconds = run.windows.take_seconds()
    try:
        if run.proposer.paced is not None:
            run.proposer.paced.pace(window_seconds)
        with run.proposer.time.call():
            run.proposer.predictor.observe(window)
        if run.proposer.source is None and run.proposer.feedback.forecasts and run.proposer.predictor.ready:
            with run.proposer.time.call():
                forecast = run.proposer.predictor.predict(window.num_steps)
            if fits(run.windows, forecast):
                run.proposer.feedback.on_forecast(window, forecast)
    except Exception as error:
        run.proposer.on_failure(error)


def describe(run: State, decision: Decision, outcome: StepOutcome, alarm: Alarm, started: float) -> StepResult:
    """What the caller gets to see of a step."""
    verdict, prediction = outcome.verdict, outcome.prediction
    error = None
    if verdict is not None and verdict.accepted and prediction is not None:
        error = abs(verdict.loss_after - prediction.predicted_loss) / max(abs(verdict.loss_after), 1e-12)
    return StepResult(
        loss_tensor=outcome.loss,
        phase=decision.phase,
        was_predicted=verdict is not None and verdict.accepted,
        prediction_error=error,
        confidence=run.proposer.confidence,
        step_time_ms=1e3 * (time.perf_counter() - started),
        step=run.meter.num_steps,
        reason=(verdict.reason if verdict is not None else decision.reason).value,
        gradient_norm_tensor=outcome.gradient_norm,
        skipped=outcome.skipped,
        num_forward=outcome.forwards,
        num_backward=outcome.backwards,
        num_claimed_steps=outcome.claimed,
        verdict=verdict,
        alarm=alarm,
        consumed=outcome.consumed,
    )
