"""What the controller may look at before it decides, and the preview of a proposal."""

from __future__ import annotations

from dataclasses import dataclass

from ..judge.budget import price
from ..keep.failures import Place
from ..propose.confidence import Evidence
from ..records import Phase
from .phases import Signals
from .state import State

#: How many times its prediction a gain may turn out to be.
OPTIMISM = 4.0


#: What a proposal is expected to cost before any was made, in forwards.
USUAL_PRICE_EXACT, USUAL_PRICE_NOISY = 5.0, 2.5


@dataclass(frozen=True, slots=True)
class Preview:
    """What a proposal now could be; the only questions to the predictor before a decision are behind it."""

    horizon: int  # 0: the bandit would rather not
    ready: bool = False  # the predictor has something to say
    promising: bool = False


def preview_proposal(run: State) -> Preview:
    """Ask the predictor, once, if a proposal may be due.

    This is no query: it draws the bandit's arm and states a confidence, and a second call would do so again.
    """
    windows, phases = run.windows, run.phases
    horizon = min(run.proposer.horizon, max(run.config.max_predict_steps, 1))
    if not windows.just_closed:
        return Preview(horizon)
    due = phases.current is Phase.FULL and phases.num_forced_full_steps == 0
    due = due and phases.num_real_steps_since_predict >= num_full_steps_due(run)
    due = due and windows_to_wait(run) == 0 and not run.proposes_nothing and predictor_ready(run) and affordable(run)
    promising = False
    if due:
        horizon, promising = _considered(run, horizon)
    # asked after the prediction: the predictor may have failed in it for the last time
    return Preview(horizon, ready=predictor_ready(run), promising=promising)


def windows_to_wait(run: State) -> int:
    """Before the next proposal; none where a run goes on for the way back to better weights only."""
    return 0 if run.proposer.asked else run.judge.ledger.wait_windows


def goes_on(run: State) -> bool:
    """Whether a source that has just proposed may do so again."""
    return run.proposer.goes_on and predictor_ready(run) and affordable(run)


def num_full_steps_due(run: State) -> int:
    """Full steps between two proposals: where losses are exact a test says at once what one is worth."""
    return 0 if run.judged_exactly else run.config.full_steps


def inputs(run: State, preview: Preview) -> Signals:
    """Everything the controller may look at; two calls give the same."""
    proposer, phases, probation, closed = run.proposer, run.phases, run.judge.probation, run.windows.just_closed
    return Signals(
        phase=phases.current,
        num_real_steps=run.meter.num_attempted_steps,
        num_real_steps_since_predict=phases.num_real_steps_since_predict,
        loss_ema_stable=run.losses.history.loss_ema_stable,
        baseline_known=run.losses.history.norm_baseline.count > 0,
        window_just_closed=closed,
        predictor_ready=preview.ready,
        confidence=proposer.confidence,
        num_outcomes=proposer.feedback.record.num_outcomes,
        num_windows_since_proposal=proposer.num_windows_since_proposal,
        horizon=preview.horizon,
        affordable=closed and affordable(run),
        promising=preview.promising,
        num_windows_to_wait=windows_to_wait(run),
        switched_off=run.judge.ledger.switched_off or run.safety.guard.comparing or run.proposes_nothing,
        num_full_steps_due=num_full_steps_due(run),
        num_forced_full_steps=phases.num_forced_full_steps,
        forced_by_alarm=phases.forced_by_alarm,
        num_probation_steps=0 if probation is None or proposer.segment is not None else probation.num_steps_left,
        goes_on=phases.current is Phase.PREDICT and goes_on(run),
        num_segments_left=0 if proposer.segment is None else proposer.segment.num_left,
        fallback_threshold=2 * run.windows.loss,
    )


def _considered(run: State, horizon: int) -> tuple[int, bool]:
    """Look at a proposal before any forward is spent on it: its horizon, and whether it promises enough."""
    if run.proposer.source is not None:  # what it would propose costs as much to know as to propose
        return horizon, run.judged_exactly
    feedback, window, loss = run.proposer.feedback, run.windows.last, run.losses.history.loss_ema
    try:
        if feedback.uses_bandit and window is not None:
            horizon = feedback.choose_horizon(
                window,
                confidence=run.proposer.confidence,
                persistence=run.judge.ledger.persistence,
                spread=loss.std,
            )
        with run.proposer.time.call():
            prediction = run.proposer.predictor.predict(max(horizon, 1))
        reduction, raw = float(prediction.predicted_reduction), float(prediction.confidence)
        usual = USUAL_PRICE_EXACT if run.full_batch else USUAL_PRICE_NOISY
        cost = price(run.judge.ledger, run.windows.slope)(usual)
        evidence = Evidence(
            raw=raw if 0 < raw < 1 else 0.5,
            record=feedback.record.confidence,
            reduction=reduction,
            price=cost,
            noise=loss.std / (abs(loss.mean) or 1.0),
        )
        run.proposer.state_confidence(feedback.state_confidence(evidence))
    except Exception as error:
        run.proposer.on_failure(error)
        return horizon, False
    if run.proposer.time.objection is not None:  # it took too long, and is dropped at the end of this step
        return horizon, False
    # Where losses are exact a test is worth its price in the long run.  Under noise most proposals of a
    # young model promise less than a twentieth of what their test costs; the benefit of the doubt is a
    # factor, because the gate may lengthen a jump and so find more than was predicted.
    return horizon, run.full_batch or OPTIMISM * reduction >= cost


def predictor_ready(run: State) -> bool:
    """Whether the predictor has something to say; one that raises has not."""
    source = run.proposer.source
    try:
        return (
            run.windows.observing
            and (run.windows.basis.ready if source is None else any(run.watch.trained.movable))
            and ended_by(run) is None
            and run.proposer.predictor.ready
        )
    except Exception as error:
        run.proposer.on_failure(error)
        return False


def ended_by(run: State) -> Place | None:
    """What has failed so often that nothing is proposed any more; None if nothing has."""
    for place in (Place.PREDICTOR, Place.GATE, Place.FEEDBACK):
        if run.failures.exhausted(place):
            return place
    return Place.PIECES if not run.judged_exactly and run.failures.exhausted(Place.PIECES) else None


def why_ended(run: State) -> str:
    """Why nothing is proposed any more, whatever the loop does; empty where something is."""
    if not run.config.enabled:
        return "enabled = False"
    if run.config.never_predicts:
        return "these settings rule out every jump"
    if run.watch.hands_off is not None:
        return str(run.watch.hands_off)
    if run.safety.guard.withdrawn:
        return "everything was withdrawn, because the loss stood above its best"
    place = Place.WEIGHTS if run.failures.exhausted(Place.WEIGHTS) else ended_by(run)
    if place is not None:
        return run.failures.reason(place)
    if run.safety.validation is not None and run.safety.validation.jumps.ended_jumps:
        return "jumps were ended: the validation loss (val_fn) rose while they took the training loss down"
    if run.judge.ledger.switched_off:
        return "jumps were switched off: they did not pay, or were taken back again and again"
    if run.proposes_nothing and run.judge.noise.found:
        return "what is left of the training loss looks like noise: pass val_fn= to have new data judge jumps"
    if run.proposes_nothing:
        return (
            "there are few labels for so many weights, and the training loss cannot tell learning from learning by "
            "heart: pass val_fn=, or let the optimizer add weight decay to the gradient"
        )
    return ""


def affordable(run: State) -> bool:
    """Whether the budget allows a proposal, what the rest of a planned run will cost to watch included."""
    usual = USUAL_PRICE_EXACT if run.judged_exactly else USUAL_PRICE_NOISY
    spent, planned = run.meter.cost_units, run.meter.planned_units
    left = max(planned - spent, 0.0)
    to_watch = left * run.judge.ledger.watched_units / max(spent, 1.0)
    return run.judge.ledger.affordable(usual, spent, reserve=to_watch, planned_units=planned)
