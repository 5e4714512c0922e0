"""What the controller may look at before it decides, and the preview of a proposal."""

from __future__ import annotations

from dataclasses import dataclass

from ..judge.budget import price
from ..keep.failures import Place
from ..propose.confidence import Evidence
from ..records import Phase
from .phases import Signals
from .state import Run

#: How many times its prediction a gain may turn out to be.
OPTIMISM = 4.0


#: What a proposal is expected to cost before any was made, in forwards.
USUAL_PRICE_EXACT, USUAL_PRICE_NOISY = 5.0, 2.5


def signals(run: Run) -> Signals:
    """Everything the controller may look at."""
    due = run.windows.just_closed and run.phases.current is Phase.FULL and run.phases.num_forced_full_steps == 0
    # where losses are exact a test says at once what a proposal is worth: a closed window is enough
    num_full_steps = 0 if run.full_batch else run.config.full_steps
    due = due and run.phases.num_real_steps_since_predict >= num_full_steps and run.judge.ledger.wait_windows == 0
    due = due and predictor_ready(run) and affordable(run)
    horizon = min(run.proposer.horizon, max(run.config.max_predict_steps, 1))
    prospect = consider(run, horizon) if due else None
    probation = run.judge.probation
    return Signals(
        phase=run.phases.current,
        num_real_steps=run.meter.num_attempted_steps,
        num_real_steps_since_predict=run.phases.num_real_steps_since_predict,
        loss_ema_stable=run.losses.history.loss_ema_stable,
        baseline_known=run.losses.history.norm_baseline.count > 0,
        window_just_closed=run.windows.just_closed,
        predictor_ready=run.windows.just_closed and predictor_ready(run),
        confidence=run.proposer.confidence,
        num_outcomes=run.proposer.feedback.record.num_outcomes,
        num_windows_since_proposal=run.proposer.num_windows_since_proposal,
        horizon=horizon if prospect is None else prospect.horizon,
        affordable=run.windows.just_closed and affordable(run),
        promising=prospect is not None and prospect.promising,
        num_windows_to_wait=run.judge.ledger.wait_windows,
        switched_off=run.judge.ledger.switched_off or run.safety.guard.comparing,
        num_full_steps_due=num_full_steps,
        num_forced_full_steps=run.phases.num_forced_full_steps,
        forced_by_alarm=run.phases.forced_by_alarm,
        num_probation_steps=0 if probation is None or run.proposer.segment is not None else probation.num_steps_left,
        num_segments_left=0 if run.proposer.segment is None else run.proposer.segment.num_left,
        fallback_threshold=2 * run.windows.loss,
    )


@dataclass(frozen=True, slots=True)
class Prospect:
    """What a proposal now could be."""

    horizon: int  # 0: the bandit would rather not
    promising: bool


def consider(run: Run, horizon: int) -> Prospect:
    """Look at a proposal before any forward is spent on it: horizon, promise, confidence."""
    adaptation, window = run.proposer.feedback, run.windows.last
    noise = run.losses.history.loss_ema.std / (abs(run.losses.history.loss_ema.mean) or 1.0)
    try:
        if adaptation.uses_bandit and window is not None:
            horizon = adaptation.choose_horizon(
                window,
                confidence=run.proposer.confidence,
                persistence=run.judge.ledger.persistence,
                spread=run.losses.history.loss_ema.std,
            )
        with run.proposer.time.call():
            prediction = run.proposer.predictor.predict(max(horizon, 1))
        reduction, raw = float(prediction.predicted_reduction), float(prediction.confidence)
        usual = USUAL_PRICE_EXACT if run.full_batch else USUAL_PRICE_NOISY
        cost = price(run)(usual)
        evidence = Evidence(
            raw=raw if 0 < raw < 1 else 0.5,
            record=adaptation.record.confidence,
            reduction=reduction,
            price=cost,
            noise=noise,
        )
        run.proposer.state_confidence(adaptation.state_confidence(evidence))
    except Exception as error:
        run.proposer.note_failure(error)
        return Prospect(horizon, promising=False)
    if run.proposer.time.objection is not None:  # it took too long, and is dropped at the end of this step
        return Prospect(horizon, promising=False)
    # Where losses are exact a test is worth its price in the long run.  Under noise most proposals of a
    # young model promise less than a twentieth of what their test costs; the benefit of the doubt is a
    # factor, because the gate may lengthen a jump and so find more than was predicted.
    return Prospect(horizon, promising=run.full_batch or OPTIMISM * reduction >= cost)


def predictor_ready(run: Run) -> bool:
    """Whether the predictor has something to say; one that raises has not."""
    try:
        return (
            run.windows.observing
            and run.windows.basis.ready
            and not run.failures.exhausted(Place.PREDICTOR)
            and not run.failures.exhausted(Place.GATE)
            and not run.failures.exhausted(Place.FEEDBACK)
            and (run.full_batch or not run.failures.exhausted(Place.PIECES))
            and run.proposer.predictor.ready
        )
    except Exception as error:
        run.proposer.note_failure(error)
        return False


def affordable(run: Run) -> bool:
    """Whether the budget allows a proposal, what the rest of a planned run will cost to watch included."""
    usual = USUAL_PRICE_EXACT if run.full_batch else USUAL_PRICE_NOISY
    spent, planned = run.meter.cost_units, run.meter.planned_units
    left = max(planned - spent, 0.0)
    to_watch = left * run.judge.ledger.watched_units / max(spent, 1.0)
    return run.judge.ledger.affordable(usual, spent, reserve=to_watch, planned_units=planned)
