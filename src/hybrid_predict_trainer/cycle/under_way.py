"""The real step under way in a loop that somebody else owns: from before its forward to behind its optimizer."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..distributed.processes import refuse_other_processes
from ..records import Phase, StepOutcome, StepResult
from ..weights.offload import own_defaults
from ..weights.parameters import optimizer_parameters
from ..weights.shards import local
from ..weights.trained import sign
from . import outside
from .correct_step import conclude
from .handover import Intake
from .hooks import OwnForwards
from .learning import enter
from .loop import Stopwatch, close_step, decide, prepare
from .overflow import ScaleWatch, unscale
from .pending import PendingStep
from .proposals import Proposals
from .real_step import RealStep, clip, count_real
from .said import NO_LOSS, TWICE, SaidOnce
from .state import State
from .transaction import interrupted
from .withdrawal import judge_pair, measured_pair
from .witness import ClippingWatch


class StepUnderWay:
    """Goes through the stations of :class:`.RealStep` as the loop comes to them.

    Attributes:
        pending: The step once its gradients were looked at, until its optimizer has stepped; else None.
        clipping: Looks whether the loop changes gradients unseen.
    """

    def __init__(self, run: State, intake: Intake, proposals: Proposals, own: OwnForwards, said: SaidOnce) -> None:
        """Nothing has begun.

        Args:
            run: Of the engine.
            intake: What the loop has handed over.
            proposals: Know what was decided of the step.
            own: Told of forwards of our own.
            said: What was said already.
        """
        self._run, self._intake, self._proposals, self._own, self._said = run, intake, proposals, own, said
        self.pending: PendingStep | None = None
        self.clipping = ClippingWatch(run, said)
        self._scale = ScaleWatch(run.subject.grad_scaler, run.subject.optimizer)
        self._step: RealStep | None = None  # begun
        self._watching = ExitStack()
        self._began = (0.0, 0.0)
        self._num_looks = 0  # at gradients whose step never came, in the steps that follow one another
        self._looks_before = 0  # likewise, when the last step had been made
        self._used: tuple[Tensor, int] | None = None  # a gradient that the last step has used

    # ---- before the forward, and the backward ----------------------------------------------------------

    def begin(self) -> None:
        """Before a forward: keep what a step that cannot be used has to put back, and watch where that is asked."""
        run = self._run
        if not run.config.enabled:
            return
        self._watching.close()
        step = RealStep(run)
        step.begin()
        self._watching.enter_context(run.windows.observer.watching(last=step.last))
        self._began = time.perf_counter(), run.proposer.time.clock()
        self._step = step

    def before_backward(self) -> None:
        """Right before a backward pass, or where the next is to come."""
        if self._step is not None:
            self._run.windows.observer.before_backward()

    # ---- from the backward to the optimizer's step -----------------------------------------------------

    def look_before_clipping(self) -> None:
        """The loop shows its gradients: complete, unscaled and not clipped."""
        self.clipping.dismiss()
        if self.pending is not None and not self._intake.empty:
            self.drop()  # its optimizer never stepped, and another step is under way
            self._num_looks += 1
            if self._num_looks > 2:  # once or twice is a step that was given up
                self._said.say(TWICE)
        if self.pending is None and self._run.config.enabled:
            self._look_at_gradients()

    @property
    def usable(self) -> bool:
        """Whether the optimizer may step."""
        return self.pending is None or self.pending.usable

    def _look_at_gradients(self) -> None:
        run = self._run
        refuse_other_processes(run.subject.ranks)
        loss, batch = self._intake.take()
        if not run.subject.ranks.alone:
            loss, batch = self._on_every_rank(loss, batch)
        if loss is None:
            self._said.say(NO_LOSS)
            return
        with own_defaults():
            outside.notice(run)
        with self._own.evaluating():
            measured = self._proposals.look(batch)
            decision = self._proposals.next_decision()
            enter(run, decision)
            prepare(run, decision)
            comparing = run.safety.guard.comparing
            pair = measured_pair(run, batch) if comparing else None
        step = self._begun()
        self._watching.close()
        run.judge.on_labels(self._intake.of_labels)
        step.after_backward(loss)
        self.pending = PendingStep(run, decision, step, batch, measured)
        if comparing:
            self.pending.on_pair(pair)

    def _on_every_rank(self, loss: Tensor | None, batch: Any) -> tuple[Tensor | None, Any]:
        """Loss and batch, unless some rank has none: what one cannot look at none does."""
        lacking = [loss is None, batch is None or not self._proposals.judgeable(batch)]
        no_loss, no_batch = self._run.subject.ranks.means(lambda: [float(lacks) for lacks in lacking])
        return (None if no_loss > 0 else loss), (None if no_batch > 0 else batch)

    def _begun(self) -> RealStep:
        if self._step is None:
            self.begin()
        assert self._step is not None, "begun above"
        return self._step

    def prepare(self) -> None:
        """From the loop's clipping to its optimizer's step."""
        run = self._run
        if self.pending is not None and not self._intake.empty:
            self.drop()  # its optimizer never stepped, and another step is under way
        unscale(run.subject.optimizer)
        self.clipping.look(self._scale.scale)
        if self.pending is None:
            self._look_at_gradients()
        pending = self.pending
        if pending is None:
            decision = self._proposals.next_decision()
            enter(run, decision)
            pending = self.pending = PendingStep(run, decision, None, None, 0.0)
            self._watching.close()
            run.windows.restart_window()
            run.optimizer_step.on_skip()
        elif pending.step is not None and pending.usable:
            limit, norm = run.config.gradient_clip_norm, pending.step.norm
            if limit > 0 and norm is not None:
                clip(run, limit, norm)
            pending.step.before_step()
        pending.arm()

    def prepare_plain(self) -> None:
        """The same where prediction is off: the plain loop and nothing else."""
        run = self._run
        decision = decide(run)
        enter(run, decision)
        run.schedule.begin_step()
        if run.config.gradient_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(optimizer_parameters(run.subject.optimizer), run.config.gradient_clip_norm)
        self.pending = PendingStep(run, decision, None, None, 0.0)
        self.pending.arm()

    # ---- behind the optimizer's step -------------------------------------------------------------------

    def finish(self, pending: PendingStep) -> StepResult | None:
        """From the optimizer's step to its end.

        Args:
            pending: The step; the optimizer has made it, or a scaler has left it out.

        Returns:
            What came of it; None where it was only counted.
        """
        run = self._run
        pending.disarm()
        self.pending = None
        self._intake.on_step()
        self._num_looks = self._looks_before = 0 if self._num_looks == self._looks_before else self._num_looks
        loss, _ = self._intake.take()
        lost = pending.step is None
        outcome = pending.end()
        if loss is not None and not run.config.enabled:
            outcome.loss = loss
        if lost and run.config.enabled:  # no loss: nothing to check or to learn from
            if run.judge.probation is not None:
                run.judge.probation.count_step(None)
            outside.remember(run)
            self._proposals.on_step(None, lost=True)
            self._step = None
            return None
        if pending.decision.phase is Phase.CORRECT:
            conclude(run, outcome)
        outcome.forwards += pending.measured
        began, clock = self._began
        watch = Stopwatch(began, began, run.proposer.time.clock() - clock)
        with self._own.evaluating():  # a validation loss may be asked
            result = close_step(run, pending.decision, outcome, watch)
        if pending.compares:  # not before: the gradients that the optimizer has used were those of the present weights
            judge_pair(run, pending.pair)
        outside.remember(run)
        self._used = self._smallest_gradient()
        self._step = None
        self._proposals.on_step(pending.batch, lost=lost)
        self._proposals.judgeable(pending.batch)
        return result

    # ---- steps that were not made ----------------------------------------------------------------------

    def notice_overflow(self, *, undo: bool) -> StepResult | None:
        """See whether a scaler has left a step out.

        Args:
            undo: Buffers may be written to: no forward of the next step has been made yet.

        Returns:
            What came of the step that was left out; None where there is none.
        """
        if self.pending is not None and self.pending.armed:
            self.close_left_open()
            return None
        return self.skip(undo=undo) if self._scale.lowered() else None

    def skip(self, *, undo: bool) -> StepResult | None:
        """The optimizer did not step, because the gradients had overflowed."""
        run, pending = self._run, self.pending
        if not run.config.enabled:
            self._intake.take()
            enter(run, decide(run))
            count_real(run)
            return None
        if pending is None:
            loss, batch = self._intake.take()
            decision = self._proposals.next_decision()
            enter(run, decision)
            run.schedule.begin_step()
            step = self._begun()
            self._watching.close()
            step.overflow(torch.tensor(math.nan) if loss is None else loss)
            pending = PendingStep(run, decision, step, batch, self._proposals.taken_price())
        if not undo:
            run.buffers.after()
        result = self.finish(pending)
        self.begin()
        return result

    def close_left_open(self) -> None:
        """The optimizer raised in its step: put the rates back, and count the step if the weights have moved."""
        pending, run = self.pending, self._run
        if pending is None or not pending.armed:
            return
        moved = pending.moved
        pending.disarm()
        self.pending = self._step = None
        if moved:
            pending.complete()
            if pending.decision.phase is Phase.CORRECT and pending.step is not None:
                conclude(run, StepOutcome(pending.step.loss))
        interrupted(run)
        outside.remember(run)

    def drop(self) -> None:
        """A step that was begun and never taken."""
        self.close_left_open()
        if self.pending is not None:
            self.pending = self._step = None
            self._run.windows.restart_window()
            self._run.optimizer_step.on_skip()

    def end(self) -> None:
        """The loop rides alone from here on."""
        self.drop()
        self._watching.close()
        self._step = None

    def restart(self) -> None:
        """A checkpoint was loaded: nothing is under way."""
        self.drop()
        self._intake.take()
        self._step = None
        self._scale.look()

    # ---- gradients that are added up -------------------------------------------------------------------

    def accumulating(self) -> bool:
        """Whether gradients have been added up that no step of the optimizer has used yet: no checkpoint holds them."""
        if self.pending is not None and self.pending.step is not None:  # looked at, and not stepped with yet
            return self.pending.usable
        if not self._intake.has_loss:
            return False
        witness = self._smallest_gradient()
        used = self._used is not None and witness is not None and witness[0] is self._used[0]
        if witness is None or (used and self._used is not None and witness[1] == self._used[1]):
            return False
        used_by_any = bool((local(witness[0]) != 0).any())
        ranks = self._run.subject.ranks
        return ranks.any(used_by_any) if ranks.sharded else used_by_any

    def _smallest_gradient(self) -> tuple[Tensor, int] | None:
        """One gradient and how often it was written to: enough to see whether there was a backward since."""
        found = [p.grad for p in optimizer_parameters(self._run.subject.optimizer) if p.grad is not None]
        gradient = min(found, key=Tensor.numel, default=None)
        return None if gradient is None else (gradient, sign(gradient)[0])
