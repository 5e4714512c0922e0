"""One function per phase: the only place where weights are moved or restored.

``real_step`` is the plain loop with observation between backward and optimizer step.
``run_predict`` is a transaction: propose, judge, then either the recorded vector is applied or
everything is as it was.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..judge.ledger import PASS_UNITS, STEP_UNITS, Account
from ..judge.probation import Probation, Segment
from ..keep.optimizer_state import optimizer_parameters
from ..observe.divergence import prediction_error
from ..propose.proposal import transact
from ..records import Action, Alarm, Decision, Level, Phase, PhasePrediction, Reason, Verdict
from ..weights import algebra as weights
from ..weights.algebra import Tensors
from . import outside
from .motions import after_optimizer, before_optimizer
from .state import Run


@dataclass(slots=True)
class Execution:
    """What one executor did, for the monitor and the record."""

    loss: Tensor
    gradient_norm: Tensor | None = None
    skipped: bool = False
    searching: bool = False  # skipped because a gradient scaler is looking for its scale
    verdict: Verdict | None = None
    prediction: PhasePrediction | None = None
    applied: Tensor | None = None  # (G, K) coefficients of the accepted jump, its scale included
    consumed: bool = True  # False: the batch may be used again, nothing was learnt from it
    kept: bool | None = None  # verdict of a finished probation
    probation: tuple[float, float] | None = None  # (loss before, loss after) of a finished probation
    forwards: float = 0.0
    backwards: int = 0
    claimed: int = 0
    prediction_ms: float = 0.0
    alarm: Alarm = field(default_factory=Alarm)  # of the loss on probation against the predicted one


# ---- real steps ---------------------------------------------------------------------------------


def run_plain(run: Run, batch: Any, decision: Decision) -> Execution:
    """The plain loop and nothing else: what ``enabled = False`` runs."""
    run.optimizer.zero_grad(set_to_none=True)
    loss = checked_loss(run.loss_fn(run.model, batch))
    _backward(run, loss)
    if run.config.gradient_clip_norm > 0:
        torch.nn.utils.clip_grad_norm_(optimizer_parameters(run.optimizer), run.config.gradient_clip_norm)
    _optimizer_step(run)
    count_real(run)
    return Execution(loss.detach(), forwards=1, backwards=1)


def run_full(run: Run, batch: Any, decision: Decision) -> Execution:
    """One real step, observed."""
    if run.on_cpu:
        run.buffers.before()
    else:  # no step is skipped before it is taken: the anchor has the buffers too
        _keep_anchor(run)
    run.optimizer.zero_grad(set_to_none=True)
    observed = run.observing and run.num_rest_steps == 0
    last = observed and run.basis.num_steps + 1 >= run.config.predictor.window
    with run.observer.watching(last=last):
        loss = checked_loss(run.loss_fn(run.model, batch))
        run.observer.before_backward()
        _backward(run, loss)
    trained = optimizer_parameters(run.optimizer)  # with those that are not predicted (complex ones)
    norm = weights.global_norm(weights.gradients(trained))
    usable = _usable(run, loss.detach(), norm)
    run.observer.after_backward(run.history, usable=usable)
    if not usable:
        return _skip(run, loss, norm)
    run.buffers.after()
    run.scale_search.found()
    outside.note_training(run)
    if run.num_rest_steps > 0:
        run.num_rest_steps -= 1
    elif observed:
        run.watch_step(last=last)
        run.lr_integral += run.learning_rate
    if run.config.gradient_clip_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(trained, run.config.gradient_clip_norm, norm)
    passes = before_optimizer(run)
    rate = run.learning_rate
    if run.probation is not None:
        run.probation.under_way = loss.detach()
    _optimizer_step(run)
    passes += after_optimizer(run, rate)
    run.counters.num_passes += passes
    run.ledger.observe(passes * PASS_UNITS)
    count_real(run)
    return Execution(loss.detach(), norm, forwards=1, backwards=1)


def checked_loss(loss: Any) -> Tensor:
    """The loss, if it is a scalar tensor with a graph.

    Raises:
        TypeError: it is not; the message says what was returned.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a scalar tensor, not {type(loss).__name__}")
    if loss.numel() != 1:
        raise TypeError(f"loss_fn must return a scalar tensor, not one of shape {tuple(loss.shape)}: take its mean")
    if not loss.requires_grad:
        raise TypeError("loss_fn returned a tensor without a graph: do not detach the loss or compute it under no_grad")
    return loss if loss.dim() == 0 else loss.reshape(())


def _backward(run: Run, loss: Tensor) -> None:
    scaler = run.grad_scaler
    (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is not None:
        scaler.unscale_(run.optimizer)


def _optimizer_step(run: Run) -> None:
    scaler = run.grad_scaler
    with run.schedule.applied(run.optimizer, run.position), run.scale.applied(run.optimizer):
        if scaler is None:
            run.optimizer.step()
        else:
            scaler.step(run.optimizer)
            scaler.update()


def count_real(run: Run) -> None:
    """Count a real step, and bring the schedule to the clock."""
    c = run.counters
    c.num_attempted_steps += 1
    c.num_real_steps += 1
    c.num_forward += 1
    c.num_backward += 1
    run.num_real_steps_since_predict += 1
    run.num_forced_full_steps = max(0, run.num_forced_full_steps - 1)
    run.step_scheduler()


def _usable(run: Run, loss: Tensor, norm: Tensor) -> bool:
    """Whether a step may touch the weights.  On an accelerator this is found out later (anchor)."""
    if not run.on_cpu:
        return True
    if not (math.isfinite(float(loss)) and math.isfinite(float(norm))):
        return False
    baseline = run.history.norm_baseline.mean
    limit = run.config.divergence.critical_multiplier * baseline
    # where every batch is the same a step that is skipped for its gradient is skipped for ever
    return run.deterministic or run.phase is Phase.WARMUP or not baseline > 0 or float(norm) <= limit


def _skip(run: Run, loss: Tensor, norm: Tensor) -> Execution:
    """A step that does not count: buffers as before, weights and optimizer never touched."""
    run.buffers.undo()
    run.scale.forget()
    if run.grad_scaler is not None:
        run.grad_scaler.update()  # shrinks its scale if it saw an overflow; the optimizer is not stepped
    searching = run.scale_search.look(overflowed=math.isfinite(float(loss.detach())) and not math.isfinite(float(norm)))
    run.optimizer.zero_grad(set_to_none=True)
    c = run.counters
    c.num_attempted_steps += 1
    c.num_skipped_steps += 1
    c.num_forward += 1
    c.num_backward += 1
    run.step_scheduler()
    return Execution(loss.detach(), norm, skipped=True, searching=searching, forwards=1, backwards=1)


def _keep_anchor(run: Run) -> None:
    """Accelerators: an exact copy at the start of every reading interval."""
    if run.anchor is None:
        run.set_anchor()
        run.counters.num_passes += 6


def settle_anchor(run: Run, *, finite: bool) -> None:
    """The interval's readings are in: go back to its start if any was not finite."""
    if run.anchor is not None and not finite:
        # the scaler keeps what it learnt: with the scale that overflowed the interval would be lost again, for ever
        scaler = None if run.grad_scaler is None else copy.deepcopy(run.grad_scaler.state_dict())
        run.restore(run.anchor, rng=False)
        run.switchback.note_jump()
        if run.grad_scaler is not None:
            run.grad_scaler.load_state_dict(scaler)
        run.basis.restart_window()
        run.scale.forget()
        run.lr_integral = 0.0
        c = run.counters
        c.num_skipped_steps += c.num_real_steps - run.anchor_real_steps
        c.num_real_steps = run.anchor_real_steps
        run.num_schedule_steps = run.anchor_schedule_steps
        run.step_scheduler()  # the lost steps were spent
    run.drop_anchor()


# ---- predicted steps ------------------------------------------------------------------------------


def run_predict(run: Run, batch: Any, decision: Decision) -> Execution:
    """Propose, judge, then apply the accepted multiple of the jump or nothing at all."""
    started = time.perf_counter()
    c = run.counters
    c.num_jumps_proposed += 1
    run.num_windows_since_proposal = 0
    run.num_real_steps_since_predict = 0
    before_units = c.extra_units
    execution = Execution(torch.tensor(math.nan, device="cpu"))

    def accept(prediction: PhasePrediction, deltas: list[Tensors], saved: Tensors, verdict: Verdict) -> Verdict:
        if verdict.accepted and _is_control(run):
            verdict = replace(verdict, accepted=False, reason=Reason.CONTROL_SKIP)
            c.num_controls += 1
        if verdict.accepted:
            execution.applied = _accept(run, prediction, deltas, saved, verdict, decision.fallback_threshold)
            execution.claimed = prediction.horizon
        return verdict

    prediction, verdict = transact(run, batch, decision, run.segment, accept)
    loss = verdict.loss_after if verdict.accepted else verdict.loss_before
    execution.loss = torch.tensor(loss, device="cpu")
    execution.verdict, execution.prediction = verdict, prediction
    execution.consumed = verdict.accepted
    execution.forwards = verdict.num_forward
    c.num_forward += verdict.num_forward
    spent = c.extra_units - before_units
    run.ledger.spend(spent)
    approved = verdict.accepted or verdict.reason is Reason.CONTROL_SKIP
    if approved and prediction is not None:
        _book(run, verdict, prediction, spent)
    if verdict.reason is not Reason.CONTROL_SKIP:
        # a way back is no progress: the base optimizer gets some steps to leave a place where nothing else helps
        run.ledger.note_verdict(verdict.accepted and verdict.reason is not Reason.WAY_BACK)
    run.refused = not approved or verdict.reason is Reason.WAY_BACK
    if not approved:
        run.adaptation.note_refusal(spent, run.config.predictor.window)
    _next_segment(run, prediction, verdict)
    if not approved or (verdict.accepted and run.probation is None):
        run.adaptation.note_outcome(verdict.accepted)
    execution.prediction_ms = 1e3 * (time.perf_counter() - started)
    return execution


def _is_control(run: Run) -> bool:
    """Skip a random share of approved jumps; the draw is from the run's own generator."""
    return float(torch.rand((), generator=run.generator, device="cpu")) < run.config.gate.control_fraction


def _book(run: Run, verdict: Verdict, prediction: PhasePrediction, price: float) -> None:
    """Open the ledger's account for an approved jump, applied or skipped."""
    step = run.counters.num_real_steps
    run.adaptation.note_approval(step)
    run.ledger.open_account(
        Account(
            step=step,
            due=step + max(run.config.predictor.window, run.config.correct_steps),
            skipped=not verdict.accepted,
            horizon=prediction.horizon,
            loss=run.window_loss,
            pace=-run.loss_slope / abs(run.window_loss or 1.0),
            usual=run.ledger.usual_ratio,
            gain=-verdict.upper_bound / abs(verdict.loss_before or 1.0),
            price=price,
        )
    )


def _accept(
    run: Run, prediction: PhasePrediction, deltas: Sequence[Tensors], saved: Tensors, verdict: Verdict, fallback: float
) -> Tensor:
    """Move the weights by the recorded vector, and start probation."""
    c = run.counters
    delta = deltas[verdict.candidate]
    if run.config.correct_steps > 0 and run.probation is None:
        run.probation = Probation(
            snapshot=run.take_snapshot(), basis=run.basis.mark(), num_schedule_steps=run.num_schedule_steps,
            num_steps_left=run.config.correct_steps,
            loss_before=run.history.loss_ema.mean, std_before=run.history.loss_ema.std,
            predicted_loss=max(prediction.predicted_loss, verdict.loss_after), fallback_threshold=fallback,
            claimed=prediction.horizon,
        )  # fmt: skip
        c.num_passes += 8  # weights and two moments, read and written
    elif run.probation is not None:
        run.probation.claimed += prediction.horizon
    only = run.trained.only
    weights.move_(only(run.parameters), only(saved), only(delta), verdict.scale)
    run.basis.translate(delta, verdict.scale)
    run.lookahead.translate(delta, verdict.scale)
    run.switchback.note_jump()
    run.scale.forget()
    run.lr_integral = 0.0
    c.num_jumps_accepted += 1
    c.num_claimed_steps += prediction.horizon
    candidates = [prediction.coefficients, *prediction.alternatives]
    return candidates[verdict.candidate] * verdict.scale


def _next_segment(run: Run, prediction: PhasePrediction | None, verdict: Verdict) -> None:
    if not verdict.accepted or prediction is None or prediction.first_fit or run.config.segments == 1:
        run.segment = None
        return
    left = run.segment.num_left if run.segment is not None else run.config.segments
    run.segment = Segment(prediction, left - 1) if left > 1 else None


# ---- correction -------------------------------------------------------------------------------------


def run_correct(run: Run, batch: Any, decision: Decision) -> Execution:
    """A real step on probation; :func:`conclude` says what comes of it."""
    assert run.probation is not None, "CORRECT without a jump on probation"
    return run_full(run, batch, decision)


def conclude(run: Run, execution: Execution) -> None:
    """After a step on probation: the last one keeps the jump or takes it back."""
    probation = run.probation
    if probation is None:  # another set of weights is trained from this step on: there is no way back
        return
    probation.num_steps_left -= 1
    if execution.skipped and not execution.searching:
        probation.worst_level = Level.CRITICAL
    elif not execution.skipped:
        probation.unread.append(execution.loss)
    if probation.num_steps_left > 0 and probation.worst_level < Level.CRITICAL:
        return
    probation.read()
    after = sum(probation.losses) / len(probation.losses) if probation.losses else math.inf
    execution.alarm = probation_alarm(run, probation, after)
    if _extended(run, probation, execution.alarm, after):
        return
    execution.probation = (probation.loss_before, after)
    execution.kept = probation_passes(probation, run.config.divergence_threshold)
    if execution.kept:
        run.monitor.num_rollbacks = 0
        run.adaptation.note_outcome(True)
        run.horizon = min(2 * run.horizon, max(run.config.max_predict_steps, 1))
    else:
        _roll_back(run, probation)
    run.probation = None


def probation_alarm(run: Run, probation: Probation, after: float) -> Alarm:
    """Prediction error of the smoothed loss on probation; from a warning on the next horizon is halved."""
    d = run.config.divergence
    alarm = prediction_error(
        after, probation.predicted_loss, d.prediction_error_caution, d.prediction_error_threshold,
        d.prediction_error_critical, noise=probation.std_before / math.sqrt(max(len(probation.losses), 1)),
    )  # fmt: skip
    return replace(alarm, action=Action.REDUCE_HORIZON) if alarm.level >= Level.WARNING else alarm


def _extended(run: Run, probation: Probation, alarm: Alarm, after: float) -> bool:
    """Whether a jump in doubt gets as many steps again, once; one beyond doubt is marked critical.

    Twice the predicted loss is critical only if nothing is left of the gain: a jump to a hundredth of
    the loss that bounces to a tenth was still a good one.
    """
    if after <= probation.loss_before or alarm.level < Level.WARNING:
        return False
    if alarm.level is Level.CRITICAL:
        probation.worst_level = Level.CRITICAL
        return False
    if probation.extended:
        return False
    probation.extended, probation.num_steps_left = True, run.config.correct_steps
    return True


def probation_passes(probation: Probation, sigma: float) -> bool:
    """Whether the smoothed loss on probation is no worse than before the jump.

    Degraded means: more than ``sigma`` standard errors above the smoothed loss before, above the
    fallback threshold, or a critical alarm on the way.
    """
    if probation.worst_level >= Level.CRITICAL or not probation.losses:
        return False
    n = len(probation.losses)
    after = sum(probation.losses) / n
    tolerance = sigma * max(probation.std_before, 1e-6 * abs(probation.loss_before)) / math.sqrt(n)
    return after <= min(probation.loss_before + tolerance, max(probation.fallback_threshold, probation.loss_before))


def _roll_back(run: Run, probation: Probation) -> None:
    """Everything as it was before the jump, bit for bit; the steps since are lost and paid for."""
    c = run.counters
    run.restore(probation.snapshot)
    run.switchback.note_jump()
    run.basis.revert(probation.basis)
    run.scale.forget()
    run.drop_anchor()  # it holds weights after the jump
    run.num_schedule_steps = probation.num_schedule_steps
    run.lr_integral = 0.0
    for account in run.ledger.cancel_account():
        run.adaptation.note_taken_back(account, len(probation.losses), run.config.predictor.window)
    run.ledger.note_verdict(False)
    run.ledger.spend(len(probation.losses) * STEP_UNITS)
    run.adaptation.note_outcome(False)
    run.monitor.num_rollbacks += 1
    if run.monitor.num_rollbacks > run.config.divergence.max_rollbacks:
        run.ledger.switched_off = True  # it keeps failing: plain training from here
    run.horizon = max(run.horizon // 2, run.config.min_predict_steps)
    c.num_claimed_steps -= probation.claimed
    c.num_rollbacks += 1
    c.num_passes += 8
    run.step_scheduler()  # the steps on probation were spent, the claimed ones were not made


Executor = Callable[[Run, Any, Decision], Execution]

EXECUTORS: dict[Phase, Executor] = {
    Phase.WARMUP: run_full,
    Phase.FULL: run_full,
    Phase.PREDICT: run_predict,
    Phase.CORRECT: run_correct,
}
