"""One function per phase: the only place where weights are moved or restored.

``real_step`` is the plain loop with observation between backward and optimizer step.
``run_predict`` is a transaction: propose, judge, then either the recorded vector is applied or
everything is as it was.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from ..cost import PASS_UNITS
from ..records import Decision, Execution, Phase
from ..weights import algebra as weights
from ..weights.parameters import optimizer_parameters
from . import outside
from .motions import after_optimizer, before_optimizer
from .state import Run

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


# ---- correction -------------------------------------------------------------------------------------
