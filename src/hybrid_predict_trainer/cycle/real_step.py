"""A real step in four stations, which any loop can drive.

``begin`` -> (forward and backward, by whoever owns the loop) -> ``after_backward`` -> ``step_optimizer`` -> ``end``.

:func:`run_full` is one such driver: it calls the stations in a row.  A loop that owns forward, backward and the
optimizer's step calls them from hooks.
"""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..cost import PASS_UNITS
from ..judge.labels import is_of_labels
from ..records import Decision, Phase, StepOutcome
from ..weights import algebra as weights
from ..weights.offload import activations_on_host
from ..weights.parameters import optimizer_parameters
from ..weights.shards import local_gradients
from . import outside
from .motions import after_optimizer, before_optimizer
from .state import State

# ---- real steps ---------------------------------------------------------------------------------


def run_plain(run: State, batch: Any, decision: Decision) -> StepOutcome:
    """The plain loop and nothing else: what ``enabled = False`` runs."""
    run.subject.optimizer.zero_grad(set_to_none=True)
    loss = _forward(run, batch)
    _backward(run, loss)
    if run.config.gradient_clip_norm > 0:
        torch.nn.utils.clip_grad_norm_(optimizer_parameters(run.subject.optimizer), run.config.gradient_clip_norm)
    _optimizer_step(run)
    count_real(run)
    return StepOutcome(loss.detach(), forwards=1, backwards=1)


#: The loss of a step before anybody knows it; never written to.
UNKNOWN = torch.tensor(math.nan, device="cpu", dtype=torch.float32)


class RealStep:
    """One real step, observed; the stations are called in the order in which they stand here.

    Attributes:
        loss: Of the step, without a graph; NaN before :meth:`after_backward`.
        norm: Global norm of the gradients before clipping; None before :meth:`after_backward`.
        usable: Whether loss and gradients let this step touch the weights.
    """

    def __init__(self, run: State) -> None:
        """Nothing has begun.

        Args:
            run: Between two steps.
        """
        self.run = run
        self.loss = UNKNOWN
        self.norm: Tensor | None = None
        self.decay: Tensor | None = None
        self.usable = True
        self.last = False  # it fills the window
        self._passes: float = 0.0
        self._rate = 0.0  # of the optimizer's step

    def begin(self) -> None:
        """Before the forward: keep what a step that cannot be used has to put back."""
        run = self.run
        if run.subject.on_cpu:
            run.buffers.before()
        else:  # no step is skipped before it is taken: the anchor has the buffers too
            _keep_anchor(run)
        self.last = run.windows.is_last_step

    def after_backward(self, loss: Tensor) -> bool:
        """Gradients are complete, unscaled and not clipped: look at them.

        Args:
            loss: Of the step, shape ().

        Returns:
            Whether the step may touch the weights; if not, the optimizer must not step.
        """
        run = self.run
        self.loss = loss.detach()
        if run.judge.of_labels is None and loss.grad_fn is not None:
            run.judge.on_labels(is_of_labels(loss))
        # with those that are not predicted (complex ones)
        self.norm = weights.global_norm(local_gradients(optimizer_parameters(run.subject.optimizer)))
        ranks = run.subject.ranks
        if not ranks.alone:  # a loss that is not finite on one rank is finite on none
            norm = self.norm.double()
            both = ranks.mean_of(torch.stack([self.loss.double(), norm.square() if ranks.sharded else norm]))
            norm = (both[1] * ranks.size).sqrt() if ranks.sharded else both[1]  # of parts: their squares add up
            self.loss, self.norm = both[0].to(self.loss.dtype), norm.to(self.norm.dtype)
        self.usable = _usable(run, self.loss, self.norm)
        run.windows.observer.after_backward(run.losses.history, usable=self.usable)
        if not self.usable:
            return False
        run.buffers.after()
        run.optimizer_step.scale_search.found()
        outside.on_training(run)
        decays: list[float] = []
        if run.penalized:  # both are of the weights that the loss was computed with
            with torch.no_grad():
                self.decay, decays = run.decay.value(), run.decay.factors()
        run.windows.add_step(run.learning_rate, decays)
        return True

    def overflow(self, loss: Tensor) -> None:
        """Instead of :meth:`after_backward` where a scaler of the loop's has left the step out."""
        self.loss, self.norm, self.usable = loss.detach(), torch.full_like(loss, math.inf), False
        self.run.windows.observer.after_backward(self.run.losses.history, usable=False)

    def before_step(self) -> None:
        """Gradients are clipped, the optimizer is about to step: multiplier and lookahead keep what they need."""
        run = self.run
        self._passes = before_optimizer(run)
        self._rate = run.learning_rate
        if run.judge.probation is not None:
            run.judge.probation.begin_step(self.judged)

    def step_optimizer(self) -> None:
        """The optimizer's own step, for drivers that own it."""
        self.before_step()
        _optimizer_step(self.run)

    def end(self) -> StepOutcome:
        """The optimizer has stepped: multiplier and lookahead do their part, and the step is counted."""
        run = self.run
        passes = self._passes + after_optimizer(run, self._rate)
        run.meter.add_passes(passes)
        run.judge.ledger.observe(passes * PASS_UNITS)
        count_real(run)
        return StepOutcome(self.loss, self.norm, self.decay, forwards=1, backwards=1)

    @property
    def judged(self) -> Tensor:
        """See :attr:`.StepOutcome.judged`."""
        return StepOutcome(self.loss, decay=self.decay).judged

    def skip(self) -> StepOutcome:
        """Instead of ``step_optimizer`` and ``end`` where the step cannot be used.

        Buffers are as before, weights and optimizer were never touched.  A scaler is the driver's to update.
        """
        assert self.norm is not None, "skip() before after_backward()"
        run = self.run
        run.buffers.undo()
        run.optimizer_step.on_skip()
        overflowed = math.isfinite(float(self.loss)) and not math.isfinite(float(self.norm))
        searching = run.optimizer_step.scale_search.look(overflowed=overflowed)
        run.meter.skipped()
        run.step_scheduler()
        return StepOutcome(self.loss, self.norm, skipped=True, searching=searching, forwards=1, backwards=1)


def run_full(run: State, batch: Any, decision: Decision) -> StepOutcome:
    """One real step with forward and backward of its own: the stations in a row."""
    step = RealStep(run)
    step.begin()
    run.subject.optimizer.zero_grad(set_to_none=True)
    with run.windows.observer.watching(last=step.last):
        loss = _forward(run, batch)
        run.windows.observer.before_backward()
        _backward(run, loss)
    if not step.after_backward(loss):
        if run.subject.grad_scaler is not None:
            run.subject.grad_scaler.update()  # shrinks its scale if it saw an overflow; the optimizer is not stepped
        run.subject.optimizer.zero_grad(set_to_none=True)
        return step.skip()
    if run.config.gradient_clip_norm > 0:
        assert step.norm is not None
        clip(run, run.config.gradient_clip_norm, step.norm)
    step.step_optimizer()
    return step.end()


def _forward(run: State, batch: Any) -> Tensor:
    """The loss of a batch with its graph.

    Raises:
        TypeError: see :func:`checked_loss`.
    """
    subject = run.subject
    with activations_on_host(subject.model.parameters()) if run.config.activation_offload else nullcontext():
        return checked_loss(subject.loss_fn(subject.stepped, batch))


def clip(run: State, limit: float, norm: Tensor) -> None:
    """Scale gradients down to a norm of ``limit``.

    Args:
        run: Whose optimizer holds them.
        limit: Above 0.
        norm: Of all of them, shape ().
    """
    parameters = optimizer_parameters(run.subject.optimizer)
    if run.subject.gathering:
        factor = torch.clamp(limit / (norm + 1e-6), max=1.0)  # as torch does for whole ones
        for gradient in local_gradients(parameters):
            gradient.mul_(factor.to(gradient))
    else:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)


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


def _backward(run: State, loss: Tensor) -> None:
    scaler = run.subject.grad_scaler
    (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is not None:
        scaler.unscale_(run.subject.optimizer)


def _optimizer_step(run: State) -> None:
    run.optimizer_step.step(run.position)


def count_real(run: State) -> None:
    """Count a real step, and bring the schedule to the clock."""
    run.meter.real_step()
    run.phases.count_real_step()
    run.step_scheduler()


def _usable(run: State, loss: Tensor, norm: Tensor) -> bool:
    """Whether a step may touch the weights.  On an accelerator this is found out later (anchor)."""
    if not run.subject.on_cpu:
        return True
    if not (math.isfinite(float(loss)) and math.isfinite(float(norm))):
        return False
    baseline = run.losses.history.norm_baseline.mean
    limit = run.config.divergence.critical_multiplier * baseline
    # where losses are exact the next batch has the same gradient: a step that is skipped for it is skipped for ever
    if run.judged_exactly or run.monitor.lasts:
        return True
    return run.phases.current is Phase.WARMUP or not baseline > 0 or float(norm) <= limit


def _keep_anchor(run: State) -> None:
    """Accelerators: an exact copy at the start of every reading interval."""
    if run.rollback.point is None:
        run.rollback.take(run.snapshot_into, run.meter.num_real_steps, run.schedule.num_steps)
        run.meter.add_passes(6)


def settle_rollback_point(run: State, *, finite: bool) -> None:
    """The interval's readings are in: go back to its start if any was not finite."""
    if run.rollback.point is not None and not finite:
        # the scaler keeps what it learnt: with the scale that overflowed the interval would be lost again, for ever
        scaler = None if run.subject.grad_scaler is None else copy.deepcopy(run.subject.grad_scaler.state_dict())
        run.restore(run.rollback.point, rng=False)
        run.restored()
        if run.subject.grad_scaler is not None:
            run.subject.grad_scaler.load_state_dict(scaler)
        run.meter.lost(run.meter.num_real_steps - run.rollback.num_real_steps)
        run.schedule.go_back(run.rollback.num_schedule_steps)
        run.step_scheduler()  # the lost steps were spent
    run.rollback.drop()
