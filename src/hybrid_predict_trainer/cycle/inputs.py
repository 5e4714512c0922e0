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
    due = run.window_just_closed and run.phases.current is Phase.FULL and run.phases.num_forced_full_steps == 0
    # where losses are exact a test says at once what a proposal is worth: a closed window is enough
    num_full_steps = 0 if run.deterministic else run.config.full_steps
    due = due and run.phases.num_real_steps_since_predict >= num_full_steps and run.ledger.wait_windows == 0
    due = due and predictor_ready(run) and affordable(run)
    horizon = min(run.horizon, max(run.config.max_predict_steps, 1))
    prospect = consider(run, horizon) if due else None
    probation = run.probation
    return Signals(
        phase=run.phases.current,
        num_real_steps=run.meter.num_attempted_steps,
        num_real_steps_since_predict=run.phases.num_real_steps_since_predict,
        loss_ema_stable=run.history.loss_ema_stable,
        baseline_known=run.history.norm_baseline.count > 0,
        window_just_closed=run.window_just_closed,
        predictor_ready=run.window_just_closed and predictor_ready(run),
        confidence=run.stated_confidence,
        num_outcomes=run.adaptation.record.num_outcomes,
        num_windows_since_proposal=run.num_windows_since_proposal,
        horizon=horizon if prospect is None else prospect.horizon,
        affordable=run.window_just_closed and affordable(run),
        promising=prospect is not None and prospect.promising,
        num_windows_to_wait=run.ledger.wait_windows,
        switched_off=run.ledger.switched_off or run.guard.comparing,
        num_full_steps_due=num_full_steps,
        num_forced_full_steps=run.phases.num_forced_full_steps,
        forced_by_alarm=run.phases.forced_by_alarm,
        num_probation_steps=0 if probation is None or run.segment is not None else probation.num_steps_left,
        num_segments_left=0 if run.segment is None else run.segment.num_left,
        fallback_threshold=2 * run.window_loss,
    )


@dataclass(frozen=True, slots=True)
class Prospect:
    """What a proposal now could be."""

    horizon: int  # 0: the bandit would rather not
    promising: bool


def consider(run: Run, horizon: int) -> Prospect:
    """Look at a proposal before any forward is spent on it: horizon, promise, confidence."""
    adaptation, window = run.adaptation, run.window
    noise = run.history.loss_ema.std / (abs(run.history.loss_ema.mean) or 1.0)
    try:
        if adaptation.uses_bandit and window is not None:
            horizon = adaptation.choose_horizon(
                window,
                confidence=run.stated_confidence,
                persistence=run.ledger.persistence,
                spread=run.history.loss_ema.std,
            )
        with run.time.call():
            prediction = run.predictor.predict(max(horizon, 1))
        reduction, raw = float(prediction.predicted_reduction), float(prediction.confidence)
        usual = USUAL_PRICE_EXACT if run.deterministic else USUAL_PRICE_NOISY
        cost = price(run)(usual)
        evidence = Evidence(
            raw=raw if 0 < raw < 1 else 0.5,
            record=adaptation.record.confidence,
            reduction=reduction,
            price=cost,
            noise=noise,
        )
        run.stated_confidence = adaptation.state_confidence(evidence)
    except Exception as error:
        run.note_predictor_failure(error)
        return Prospect(horizon, promising=False)
    if run.time.objection is not None:  # it took too long, and is dropped at the end of this step
        return Prospect(horizon, promising=False)
    # Where losses are exact a test is worth its price in the long run.  Under noise most proposals of a
    # young model promise less than a twentieth of what their test costs; the benefit of the doubt is a
    # factor, because the gate may lengthen a jump and so find more than was predicted.
    return Prospect(horizon, promising=run.deterministic or OPTIMISM * reduction >= cost)


def predictor_ready(run: Run) -> bool:
    """Whether the predictor has something to say; one that raises has not."""
    try:
        return (
            run.observing
            and run.basis.ready
            and not run.failures.exhausted(Place.PREDICTOR)
            and not run.failures.exhausted(Place.GATE)
            and not run.failures.exhausted(Place.FEEDBACK)
            and (run.deterministic or not run.failures.exhausted(Place.PIECES))
            and run.predictor.ready
        )
    except Exception as error:
        run.note_predictor_failure(error)
        return False


def affordable(run: Run) -> bool:
    """Whether the budget allows a proposal, what the rest of a planned run will cost to watch included."""
    usual = USUAL_PRICE_EXACT if run.deterministic else USUAL_PRICE_NOISY
    left = max(run.ledger.planned_units - run.meter.cost_units, 0.0)
    to_watch = left * run.ledger.watched_units / max(run.meter.cost_units, 1.0)
    return run.ledger.affordable(usual, run.meter.cost_units, reserve=to_watch)
