"""A predicted step is a transaction: propose, judge, then apply or leave everything as it was."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..cost import FORWARD_UNITS
from ..judge.candidates import judge
from ..judge.probation import Probation
from ..keep.failures import Place
from ..propose.proposal import propose, propose_move
from ..propose.segments import Segment
from ..propose.sources.base import Material
from ..records import Account, Decision, PhasePrediction, Reason, StepOutcome, Verdict
from ..weights import algebra as weights
from ..weights import offload as host
from ..weights.algebra import Move
from .agreement import agreed_proposal
from .real_step import UNKNOWN

if TYPE_CHECKING:
    from .state import State


Accept = Callable[[PhasePrediction, list[Move], Move, Verdict], Verdict]


def transact(run: State, batch: Any, decision: Decision, accept: Accept) -> tuple[PhasePrediction | None, Verdict]:
    """Propose, judge, and let ``accept`` move the weights.

    Whatever raises on the way is a refusal, and everything is as it was before; so it is where the program is
    interrupted, which is passed on.

    Args:
        run: Between two real steps.
        batch: Judged on.
        decision: To predict.
        accept: Applies an accepted jump; may still refuse it.
    """
    saved: Move = []
    done = False

    def work() -> tuple[PhasePrediction | None, Verdict]:
        nonlocal saved
        with host.own_defaults():
            if run.proposer.source is not None:
                prediction, deltas, verdict = _moved(run, batch)
            else:
                prediction, deltas, verdict = agreed_proposal(run, propose(
                    run.proposer, run.windows, run.watch, run.meter, run.config, horizon=decision.horizon,
                    exact=run.full_batch,
                ))  # fmt: skip
        if verdict is None and prediction is not None:
            saved = run.judge.hold(run.subject.parameters)
            verdict = judge(run, batch, prediction, deltas, saved)
            weights.copy_(run.subject.parameters, saved)
            run.meter.add_passes(4)
            verdict = accept(prediction, deltas, saved, verdict)
        assert verdict is not None
        return prediction, verdict

    try:
        prediction, verdict = run.subject.ranks.together(work)
        done = True
        return prediction, verdict
    except Exception as error:
        run.failures.note(Place.GATE, error)
        forwards = 1.0 if saved else 0.0
        return None, Verdict(accepted=False, reason=Reason.CANNOT_EVALUATE, num_forward=forwards)
    finally:
        if saved and not done:
            weights.copy_(run.subject.parameters, saved)


def _moved(run: State, batch: Any) -> tuple[PhasePrediction | None, list[Move], Verdict | None]:
    """Ask a source for a move and book what it took; a verdict means that it is refused already."""
    planned = run.meter.planned_units if run.schedule.end is not None else 0.0  # what is over binds nobody
    room = max(planned - run.meter.cost_units, 0.0) / FORWARD_UNITS if planned else math.inf
    material = Material(
        model=run.subject.model, parameters=run.subject.parameters, movable=list(run.watch.trained.movable),
        batch=batch, exact=run.judged_exactly, decay=run.decay.value if run.penalized else None, room=room,
    )  # fmt: skip
    return propose_move(run.proposer, material, run.meter)


def run_predict(run: State, batch: Any, decision: Decision) -> StepOutcome:
    """Propose, judge, then apply the accepted multiple of the jump or nothing at all."""
    started = time.perf_counter()
    c = run.meter
    c.proposed()
    run.proposer.count_proposal()
    run.phases.count_proposal()
    before_units = c.extra_units
    outcome = StepOutcome(UNKNOWN)

    def accept(prediction: PhasePrediction, deltas: list[Move], saved: Move, verdict: Verdict) -> Verdict:
        if verdict.accepted and _is_control(run) and not _threw(run, batch, decision):
            verdict = replace(verdict, accepted=False, reason=Reason.CONTROL_SKIP)
            c.control()
        if verdict.accepted:
            outcome.applied = _accept(run, prediction, deltas, saved, verdict, decision.fallback_threshold)
            outcome.claimed = prediction.horizon
        return verdict

    prediction, verdict = transact(run, batch, decision, accept)
    loss = verdict.loss_after if verdict.accepted else verdict.loss_before
    outcome.loss = torch.tensor(loss - run.added_by_decay, device="cpu")  # a user is told his own
    outcome.verdict, outcome.prediction = verdict, prediction
    outcome.consumed = verdict.accepted
    outcome.forwards = verdict.num_forward
    c.add_forwards(verdict.num_forward)
    spent = c.extra_units - before_units
    run.judge.ledger.spend(spent)
    approved = verdict.accepted or verdict.reason is Reason.CONTROL_SKIP
    if approved and prediction is not None:
        _book(run, verdict, prediction, spent)
    if verdict.reason is not Reason.CONTROL_SKIP:
        # a way back is no progress: the base optimizer gets some steps to leave a place where nothing else helps
        run.judge.ledger.on_verdict(verdict.accepted and verdict.reason is not Reason.WAY_BACK)
    run.windows.on_verdict(approved)
    run.proposer.on_refused(not approved or verdict.reason is Reason.WAY_BACK)
    if not approved:
        run.proposer.feedback.on_refusal(spent, run.config.predictor.window)
    _next_segment(run, prediction, verdict)
    if not approved or (verdict.accepted and run.judge.probation is None):
        run.proposer.feedback.on_outcome(verdict.accepted)
    run.proposer.on_verdict(verdict)
    outcome.prediction_ms = 1e3 * (time.perf_counter() - started)
    return outcome


def _is_control(run: State) -> bool:
    """Skip a random share of approved jumps; the draw is from the run's own generator."""
    return float(torch.rand((), generator=run.judge.generator, device="cpu")) < run.config.gate.holdout_fraction


def _threw(run: State, batch: Any, decision: Decision) -> bool:
    """Whether the last real step has doubled an exact loss: staying there, for a measure's sake, may undo the run.

    Nobody has looked: a predictor that proposes at every step compares with the loss before that step.  One of Rprop's
    led from 0.08 to 29, and the jump that was skipped had been the way back.
    """
    if not run.full_batch or not decision.fallback_threshold > 0:
        return False
    evaluation = run.judge.evaluation
    try:
        loss = evaluation.attempt(lambda isolation: evaluation.shared_losses_of([batch], isolation)[0], exact=True)
    except Exception:
        return False
    run.meter.add_forwards(1)
    return not loss + run.added_by_decay <= decision.fallback_threshold


def _book(run: State, verdict: Verdict, prediction: PhasePrediction, price: float) -> None:
    """Open the ledger's account for an approved jump, applied or skipped."""
    step = run.meter.num_real_steps
    run.proposer.feedback.on_approval(step)
    run.judge.ledger.open_account(
        Account(
            step=step,
            due=step + max(run.config.predictor.window, run.config.correct_steps),
            skipped=not verdict.accepted,
            horizon=prediction.horizon,
            loss=run.windows.loss,
            pace=-run.windows.slope / abs(run.windows.loss or 1.0),
            usual=run.judge.ledger.usual_ratio,
            gain=-verdict.upper_bound / abs(verdict.loss_before or 1.0),
            price=price,
        )
    )


def _accept(
    run: State,
    prediction: PhasePrediction,
    deltas: Sequence[Move],
    saved: Move,
    verdict: Verdict,
    fallback: float,
) -> Tensor:
    """Move the weights by the recorded vector, and start probation."""
    c = run.meter
    delta = deltas[verdict.candidate]
    begins = run.config.correct_steps > 0 and run.judge.probation is None
    snapshot = run.take_snapshot() if begins else None
    run.subject.ranks.all_here()  # every rank has what it needs to come back: now all of them move
    if snapshot is not None:
        run.judge.start_probation(Probation(
            snapshot=snapshot, basis=run.windows.basis.mark(), num_schedule_steps=run.schedule.num_steps,
            num_steps_left=run.config.correct_steps,
            loss_before=run.losses.history.loss_ema.mean, std_before=run.losses.history.loss_ema.std,
            predicted_loss=max(prediction.predicted_loss, verdict.loss_after), fallback_threshold=fallback,
            claimed=prediction.horizon,
        ))  # fmt: skip
        c.add_passes(8)  # weights and two moments, read and written
    elif run.judge.probation is not None:
        run.judge.probation.claim(prediction.horizon)
    only = run.watch.trained.only
    weights.move_(only(run.subject.parameters), only(saved), only(delta), verdict.scale, c.num_jumps_proposed)
    run.jumped(delta, verdict.scale)
    c.jump(prediction.horizon)
    candidates = [prediction.coefficients, *prediction.alternatives]
    return candidates[verdict.candidate] * verdict.scale


def _next_segment(run: State, prediction: PhasePrediction | None, verdict: Verdict) -> None:
    if not verdict.accepted or prediction is None or prediction.first_fit or run.config.segments == 1:
        run.proposer.go_on_with(None)
        return
    left = run.proposer.segment.num_left if run.proposer.segment is not None else run.config.segments
    run.proposer.go_on_with(Segment(prediction, left - 1) if left > 1 else None)
