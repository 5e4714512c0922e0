"""The engine that rides along: prediction for loops that somebody else owns.

:func:`attach` hooks on to an optimizer.  The loop computes losses, gradients and steps as it always did; the engine
goes through the same stations as :func:`.loop.take_step`, from the optimizer's hooks::

    note(loss, batch)    what the step is trained on: handed over, or seen by a hook on a model that returns its loss
    after_backward()     gradients are complete, unscaled and not clipped; by itself right before the step
    before_step()        the optimizer's pre-hook: multiplier and lookahead keep what they need, the rate is set
    after_step()         the post-hook: the rate is put back, the step is counted, checked and learnt from
    between_steps()      proposes, judges, applies; the post-hook calls it, or the loop (``auto=False``)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config.settings import HybridTrainerConfig
from ..distributed.processes import refuse_several_processes
from ..forecast.final_loss import Forecast
from ..judge.validation import ValFn
from ..keep import checkpoint, resume
from ..keep.background import Write
from ..keep.batch_norm import reestimate
from ..keep.housekeeping import first_good
from ..keep.periodic import PeriodicSaver
from ..keep.subject import LossFn, OutputFn, ResidualFn
from ..move.modifier import StepModifier
from ..move.schedule import count_of
from ..notices import warn
from ..predictors import Predictor
from ..records import CheckpointError, ConfigError, Decision, Phase, Reason, StateDict, StepOutcome, StepResult
from ..tell.account import Account, text
from ..tell.figures import statistics
from ..tell.sinks import Sink, Writer
from ..weights import algebra as weights
from ..weights.offload import own_defaults
from ..weights.parameters import optimizer_parameters
from . import outside
from .construction import Handed, build_run
from .correct_step import conclude
from .foretell import foretell
from .handed_in import check_handed_in
from .handover import Call, Handover, MicroBatches, StepLoss, StepResiduals, is_whole, loss_in
from .hooks import GradientWitness, on_forward, on_step, with_hooks
from .learning import enter, settle_readings
from .loop import Stopwatch, close_step, decide, look_at, prepare
from .passes import has_ended
from .pending import PendingStep
from .real_step import RealStep, count_real
from .state import State
from .transaction import execute, interrupted

#: What a model library hands to a forward that is no part of the batch: the gate takes the model's own mean.
NOT_DATA = ("num_items_in_batch",)

#: Steps at which the gradients are compared with what the backward has left, and of how many.
WITNESS_EVERY, WITNESS_STEPS = 5, 200
#: Relative difference that is rounding, of half precision too.
ROUNDING = 1e-2

#: What a loop has to call where its optimizer's step fires no hooks.
MISSING = ("engine.before_step() right before the optimizer's step", "engine.after_step() right after it")

#: Said of a second look at the gradients of one step.
TWICE = (
    "engine.after_backward() was called twice with no step of the optimizer between: call it once per step, after the "
    "last backward and before you clip"
)

#: Said of what was not handed over.
NO_BATCH = "no batch was handed over: call engine.note(loss, batch) before optimizer.step(), and do not free it before"
NO_LOSS = "no loss was handed over before optimizer.step(): call engine.note(loss, batch); the step is only counted"
NO_LOSS_FN = "there is no loss_fn for batches of type {name}: pass attach(..., loss_fn=lambda model, batch: ...)"
CHANGED = (
    "gradients were multiplied by {factor:.2g} between backward and optimizer.step(): where the loop clips, call "
    "engine.after_backward() before it does; where a scaler unscales, pass attach(..., grad_scaler=scaler)"
)
NOT_ASKED = "auto=False, and the loop does not call engine.between_steps()"


ACCUMULATING = (
    "no checkpoint in the middle of a step: gradients of some of its batches have been added up, which it would not "
    "hold; save after optimizer.step()"
)


#: Step under which the only state in a folder is written.
ONLY = 0

#: In the place of the batch of the coming step, where it was looked at before the run was resumed.
_ANY = object()


class Engine:
    """Rides along with a loop; made by :func:`attach`.

    Attributes:
        run: What the library knows of the run.
        missing: What the loop has to call itself, because no hook can; empty where nothing is missing.
        result: Of the last step or proposal; None before the first.
        account: Refusals, and the time that riding along has taken.
    """

    def __init__(self, run: State, *, auto: bool, missing: tuple[str, ...] = (), catches_up: bool = False) -> None:
        """Bind; :func:`attach` sets the hooks."""
        self.run, self.missing = run, missing
        self._catches_up = catches_up  # takes the steps that a schedule of the loop's is owed
        self.result: StepResult | None = None
        self.account = Account()
        self._auto = auto
        self._handover, self._seen = Handover(), Handover()  # by the loop; by the hook on the model's forward
        self._aside = Handover()  # likewise, in evaluation mode
        self._handles: list[Any] = []
        self._at_detach: list[Callable[[], object]] = []
        self._attached = True
        self._step: RealStep | None = None  # begun
        self._watching = ExitStack()
        self._began = (0.0, 0.0)
        self._pending: PendingStep | None = None
        self._decision: Decision | None = None  # of the real step to come
        self._batch: Any = None  # of the last step
        self._looked: list[Any] = []  # the batch of the coming step, once looked at
        self._spent = 0.0  # forwards for that
        self._consumed: Any = None  # batch that an accepted jump was judged on
        self._forward_batch: Any = None
        self._forms: set[Any] = set()  # of forwards that returned a loss
        self._inside = False  # an evaluation of our own is under way
        self._said: set[str] = set()
        self._num_looks = 0  # at gradients whose step never came, in the steps that follow one another
        self._looks_before = 0  # likewise, when the last step had been made
        self._witness: GradientWitness | None = None
        self._lack = ""  # what a judgement lacks
        self._used: tuple[Tensor, int] | None = None  # a gradient that the last step has used
        self._lost = self._unasked = False  # the last step had no loss; nobody calls between_steps()
        self._scale = self._scale_now()
        config = run.config.checkpoint
        capture = self._capture if config.async_save else None
        self._saver = (
            PeriodicSaver(config.directory, config.save_interval, self._save, capture) if config.directory else None
        )

    def connect(self, optimizer: Optimizer | None, *, watch_forward: bool) -> None:
        """Set the hooks; done by :func:`attach`.

        Args:
            optimizer: Whose step fires hooks, or None.
            watch_forward: The model may return its loss.
        """
        if optimizer is not None:
            self._handles += on_step(optimizer, self)
        if watch_forward:
            self._handles += on_forward(self.run.subject.model, self._before_forward, self._after_forward)
        if self.run.windows.observing:
            self._witness = GradientWitness(optimizer_parameters(self.run.subject.optimizer))
            self._handles.append(self._witness)
        if self.run.subject.on_cpu:  # elsewhere it is a copy of everything: not before it is needed
            self._begin()

    # ---- what the loop calls -----------------------------------------------------------------------

    def note(self, loss: Any = None, batch: Any = None) -> None:
        """Hand over the loss of a batch, and the batch, any time before ``optimizer.step()``.

        With accumulation once per micro-batch, the loss before it is divided; the batch is kept until the next step.

        Raises:
            TypeError: the loss is not a scalar.
        """
        self._check_attached()
        self._notice_overflow(undo=False)
        if loss is not None:
            self._handover.note_loss(loss)
            if isinstance(loss, Tensor) and loss.requires_grad and self._step is not None:
                self.run.windows.observer.before_backward()
        if batch is not None:
            self._handover.note_batch(batch)

    def before_backward(self) -> None:
        """Right before a backward pass, for loops that hand the loss over after it; curvature factors ask for it."""
        if self._step is not None:
            self.run.windows.observer.before_backward()

    def after_backward(self, loss: Any = None) -> bool:
        """Look at the gradients: complete, unscaled (``scaler.unscale_``) and not clipped.

        Loops that clip call it before they do; otherwise it is done right before the optimizer steps, and norms and
        curvature are those of clipped gradients.

        Returns:
            Whether the step may be taken; if not, the optimizer finds no gradients and moves nothing.
        """
        self._check_attached()
        with self.account.timed():
            self._notice_overflow(undo=False)
            if loss is not None:
                self.note(loss)
            self._dismiss_witness()
            if self._pending is not None and not (self._handover.empty and self._seen.empty):
                self._drop_pending()  # its optimizer never stepped, and another step is under way
                self._num_looks += 1
                if self._num_looks > 2:  # once or twice is a step that was given up
                    self._say(TWICE)
            if self._pending is None and self.run.config.enabled:
                self._look_at_gradients()
        return self._pending is None or self._pending.usable

    def before_step(self, loss: Any = None) -> None:
        """Right before the optimizer's step; its pre-hook calls it where it has one."""
        if not self._attached or self._inside:
            return
        with self.account.timed():
            self._close_left_open()
            self._notice_overflow(undo=False)
            known = self._pending is not None or self._handover.has_loss or self._seen.has_loss
            if loss is not None and not known:  # a closure's, where nobody has handed it over
                self._handover.note_loss(loss)
            try:
                self._prepare_step()
            except BaseException:
                self._drop_pending()
                interrupted(self.run)
                outside.remember(self.run)
                raise

    def after_step(self) -> None:
        """Right after the optimizer's step; its post-hook calls it where it has one."""
        pending = self._pending
        if not self._attached or self._inside or pending is None or not pending.armed:
            return
        with self.account.timed():
            try:
                self._finish(pending)
                self._save_if_due(stepping=True)
                if self._auto and not self._waits_for_forward():
                    self._propose_between(None)
                else:
                    self._begin()
            except BaseException:
                interrupted(self.run)
                outside.remember(self.run)
                raise

    def between_steps(self, batch: Any = None) -> StepResult | None:
        """Propose a jump if one is due, judge it, and apply it if it was accepted.

        Args:
            batch: That will be trained on next, before its first forward: losses on it are of data that the weights
                have not seen.  None: the batch of the last step.

        Returns:
            What became of the last proposal; None if none was made.  ``consumed`` says whether the batch has been used.

        Raises:
            RuntimeError: it is called between backward and the optimizer's step.
        """
        self._check_attached()
        self._notice_overflow(undo=True)
        if not (self._handover.empty and self._seen.empty):
            raise RuntimeError(
                "between_steps() was called in the middle of a step: losses were noted since the last one"
            )
        self._drop_pending()
        self._unasked = False
        try:
            result = self._propose_between(batch)
            self._save_if_due(stepping=False)
        except BaseException:
            interrupted(self.run)
            outside.remember(self.run)
            raise
        return result

    def step_skipped(self) -> None:
        """A gradient scaler has left the optimizer's step out: no hook tells.

        Noticed without it where ``attach`` was given the scaler, at the next thing the loop hands over.
        """
        self._check_attached()
        self._skip(undo=True)

    def give_up_step(self) -> None:
        """The step that losses and batches were noted for will not be taken: they are dropped.

        An epoch that ends between two steps and drops its gradients, or a batch that is left out after its loss was
        noted.  Without it they would be counted into the next step.
        """
        self._check_attached()
        self._taken()
        self._drop_pending()

    def end_epoch(self) -> None:
        """A pass over the data has ended: a schedule in epochs (``lr_interval="epoch"``) takes its step."""
        self.run.schedule.end_epoch()
        self.run.step_scheduler()

    def reestimate_batch_norm(self, batches: Iterable[Any]) -> int:
        """Running statistics of BatchNorm for the weights as they are; see :class:`.HybridTrainer`."""
        subject = self.run.subject
        with self._evaluating():
            return reestimate(subject.model, lambda batch: subject.loss_fn(subject.model, batch), batches)

    def owed_schedule_steps(self) -> int:
        """Steps that a schedule stepped by the loop is behind the clock, beyond the loop's own one per optimizer step.

        What claimed or credited steps, and the price of proposals, have advanced.  A loop that wants the schedule to
        end with the run takes them: ``for _ in range(engine.owed_schedule_steps()): scheduler.step()``.
        """
        run = self.run
        return 0 if run.schedule.owned else run.schedule.owed(run.position, run.meter.num_attempted_steps)

    def detach(self) -> None:
        """Remove all hooks; model, optimizer and rates are from here on what the loop makes of them."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        undone, self._at_detach = self._at_detach, []
        for undo in undone:
            undo()
        if self._attached:
            self._drop_pending()
            self._watching.close()
            self._step = None
            self._attached = False
            settle_readings(self.run, self.run.recorder)

    def on_detach(self, undo: Callable[[], object]) -> None:
        """Have something called by :meth:`detach`, for drivers that set hooks of their own."""
        self._at_detach.append(undo)

    def __enter__(self) -> Engine:
        """Detached at the end of the block."""
        return self

    def __exit__(self, *error: object) -> None:
        """See :meth:`detach`."""
        self.detach()

    # ---- questions -----------------------------------------------------------------------------------

    @property
    def why_not(self) -> str:
        """Why no jumps are proposed as things stand; empty where they can be."""
        run = self.run
        if not run.config.enabled:
            return "enabled = False"
        if run.config.never_predicts:
            return "these settings rule out every jump"
        if run.watch.hands_off is not None:
            return str(run.watch.hands_off)
        return NOT_ASKED if self._unasked else self._lack

    @property
    def clock(self) -> str:
        """Who moves the schedule: the configured clock, or "loop"."""
        return self.run.config.clock if self.run.schedule.owned else "loop"

    @property
    def position(self) -> int:
        """Steps of the configured clock so far."""
        return self.run.position

    @property
    def finished(self) -> bool:
        """Whether the clock has reached ``total_steps``, with no jump on probation."""
        return has_ended(self.run, self.run.schedule.end)

    def statistics(self) -> dict[str, Any]:
        """Counts and the ledger's estimate, JSON-able."""
        return statistics(self.run)

    def summary(self) -> dict[str, Any]:
        """Metrics summary in the published schema."""
        settle_readings(self.run, self.run.recorder)
        return self.run.recorder.summary(self.run)

    def report(self) -> dict[str, Any]:
        """What riding along has brought and cost, JSON-able; see :meth:`.Account.report`."""
        settle_readings(self.run, self.run.recorder)
        return self.account.report(self.run, self.why_not)

    def report_text(self) -> str:
        """The same in a few lines."""
        return text(self.report())

    @property
    def in_step(self) -> bool:
        """Whether something was handed over since the optimizer's last step: the next one is under way."""
        return not (self._handover.empty and self._seen.empty)

    def __repr__(self) -> str:
        """What it rides along with, and where it stands."""
        run = self.run
        model, optimizer = type(run.subject.model).__name__, type(run.subject.optimizer).__name__
        state = "attached" if self._attached else "detached"
        return f"Engine({model}, {optimizer}, {state}, {run.phases.current.value}, position {run.position})"

    def forecast(self, total_steps: int | None = None, *, level: float = 0.9) -> Forecast:
        """The training loss at the end of the run under the rest of its schedule, with an interval; changes nothing.

        Args:
            total_steps: End of the run on the clock; None: as ``attach`` was told.
            level: Of the interval, the share of such intervals that hold the final loss.

        Raises:
            ConfigError: the end is not known, there are fewer than 8 losses after the warm-up, prediction is off, or
                scipy is missing.
        """
        settle_readings(self.run, self.run.recorder)
        return foretell(self.run, total_steps, level)

    # ---- state ---------------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """What is the engine's own, between two steps; model, optimizer, schedule and scaler are the loop's to save.

        Raises:
            CheckpointError: something in it cannot be held.
        """
        settle_readings(self.run, self.run.recorder)
        return {**resume.own_state(self.run), "engine": self._own_state()}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`, after model, optimizer, schedule and scaler were loaded.

        Raises:
            CheckpointError: it is malformed, or of another run.  Nothing has been changed.
        """
        own = _checked(state.get("engine"))
        with own_defaults():
            resume.load_own_state(self.run, state)
        self._restart(own)

    def save_state(self, directory: str | Path) -> Path:
        """Write :meth:`state_dict` into a folder, for loops that keep the rest in a checkpoint of their own.

        The folder holds one state: that of an earlier save is replaced.

        Raises:
            CheckpointError: it could not be written; what was there before is untouched.
        """
        try:
            return checkpoint.save(directory, ONLY, {"riding": self.state_dict()})
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"cannot save the engine's state: {error}") from error

    def load_state(self, directory: str | Path) -> None:
        """Inverse of :meth:`save_state`, after the rest was loaded.

        Raises:
            CheckpointError: there is none, or it is damaged or of another run; nothing has been changed then.
        """
        path = Path(directory) / f"checkpoint_step_{ONLY}"
        parts = checkpoint.load(path).parts
        if "riding" not in parts:
            raise CheckpointError(f"{path} holds no state of an engine: load it with load_checkpoint()")
        self.load_state_dict(parts["riding"])

    def save_checkpoint(self, path: str | Path) -> Path:
        """Write a checkpoint folder below ``path``: model, optimizer, schedule, scaler, random states and ours.

        Raises:
            CheckpointError: it could not be written, or the step is not complete; older checkpoints are untouched.
        """
        if self._accumulating():
            raise CheckpointError(ACCUMULATING)
        return self._save(Path(path))

    def load_checkpoint(self, path: str | Path) -> None:
        """Continue from a checkpoint folder, bit for bit.

        Raises:
            CheckpointError: missing, damaged, or of another model; nothing has been changed then.
        """
        with own_defaults():
            found = resume.load(self.run, self.run.recorder, Path(path))
        self._restart(_checked(found.get("engine", _FRESH)))
        if self._saver is not None:
            self._saver.loaded(Path(path), self.run.meter.num_steps)

    def load_latest(self, directory: str | Path) -> None:
        """Continue from the newest good checkpoint of a folder; a damaged one is set aside with a warning.

        Raises:
            CheckpointError: there is none, or it is of another model; nothing has been changed then.
        """
        first_good(directory, self.load_checkpoint)

    def save_if_due(self) -> None:
        """Write a checkpoint below ``checkpoint.directory`` if ``save_interval`` steps have passed.

        Called by itself where the loop leaves nothing to be done after ``optimizer.step()``; loops that step a schedule
        or a scaler of their own call it (or :meth:`between_steps`) after that.
        """
        self._check_attached()
        self._save_if_due(stepping=False)

    def _save(self, directory: Path) -> Path:
        settle_readings(self.run, self.run.recorder)
        with own_defaults():
            return resume.save(self.run, self.run.recorder, directory, extra={"engine": self._own_state()})

    def _accumulating(self) -> bool:
        """Whether gradients have been added up that no step of the optimizer has used yet: no checkpoint holds them."""
        if not (self._handover.has_loss or self._seen.has_loss):
            return False
        witness = self._smallest_gradient()
        used = self._used is not None and witness is not None and witness[0] is self._used[0]
        if witness is None or (used and self._used is not None and witness[1] == self._used[1]):
            return False
        return bool((witness[0] != 0).any())

    def _smallest_gradient(self) -> tuple[Tensor, int] | None:
        """One gradient and how often it was written to: enough to see whether there was a backward since."""
        found = [p.grad for p in optimizer_parameters(self.run.subject.optimizer) if p.grad is not None]
        gradient = min(found, key=Tensor.numel, default=None)
        return None if gradient is None else (gradient, gradient._version)

    def _capture(self, directory: Path) -> Write:
        settle_readings(self.run, self.run.recorder)
        with own_defaults():
            return resume.captured(self.run, self.run.recorder, directory, extra={"engine": self._own_state()})

    def _save_if_due(self, *, stepping: bool) -> None:
        run, saver = self.run, self._saver
        theirs = run.subject.grad_scaler is not None or not run.schedule.owned  # not updated before the hook returns
        if saver is not None and not (stepping and theirs) and saver.due(run.meter.num_steps):
            saver.keep_up(run.meter.num_steps)

    def _own_state(self) -> StateDict:
        decision = self._decision
        return {
            "decision": None if decision is None else {
                "phase": decision.phase.value, "reason": decision.reason.value, "horizon": decision.horizon,
                "confidence": decision.confidence, "fallback_threshold": decision.fallback_threshold,
            },
            "looked": bool(self._looked), "spent": self._spent,
            "forms": [[number, list(names)] for number, names in sorted(self._forms)],
            "account": self.account.state_dict(),
        }  # fmt: skip

    def _restart(self, own: StateDict) -> None:
        self._drop_pending()
        for handover in (self._handover, self._seen, self._aside):
            handover.take()
        self._batch = self._consumed = self._forward_batch = self._step = None
        self._decision = None
        if own["decision"] is not None:
            found = own["decision"]
            self._decision = Decision(**{**found, "phase": Phase(found["phase"]), "reason": Reason(found["reason"])})
        self._looked, self._spent = [_ANY] if own["looked"] else [], own["spent"]
        self._forms = {(number, tuple(names)) for number, names in own["forms"]}
        self.account.load_state_dict(own["account"])
        self._scale = self._scale_now()
        if self.run.subject.on_cpu:
            self._begin()

    # ---- stations --------------------------------------------------------------------------------------

    def _check_attached(self) -> None:
        if not self._attached:
            raise RuntimeError("the engine is detached: attach() another one")

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Forwards in here are our own: no hook looks at them."""
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def _say(self, text: str) -> None:
        if text not in self._said and self.run.windows.observing:
            self._said.add(text)
            warn(text, stacklevel=4)

    def _begin(self) -> None:
        """Before a forward: keep what a step that cannot be used has to put back, and watch where that is asked."""
        run = self.run
        if not run.config.enabled:
            return
        self._watching.close()
        step = RealStep(run)
        step.begin()
        self._watching.enter_context(run.windows.observer.watching(last=step.last))
        self._began = time.perf_counter(), run.proposer.time.clock()
        self._step = step

    def _taken(self) -> tuple[Tensor | None, Any]:
        """Loss and batch of the step: what the loop handed over, else what the hook on the forward has seen."""
        found = [h.take() for h in (self._handover, self._seen, self._aside)]
        losses = [loss for loss, _ in found if loss is not None]
        batches = [batch for _, batch in found if batch is not None and is_whole(batch)]
        return (losses[0] if losses else None), (batches[0] if batches else None)

    def _look_at_gradients(self) -> None:
        """From the loop's backward to its clipping."""
        run = self.run
        refuse_several_processes()
        loss, batch = self._taken()
        if loss is None:
            self._say(NO_LOSS)
            return
        with own_defaults():
            outside.notice(run)
        with self._evaluating():
            measured = self._look(batch)
            decision = self._next_decision()
            enter(run, decision)
            prepare(run, batch, decision)
        if self._step is None:
            self._begin()
        step = self._step
        assert step is not None, "begun above"
        self._watching.close()
        step.after_backward(loss)
        self._pending = PendingStep(run, decision, step, batch, measured)

    def _look(self, batch: Any) -> float:
        """Look at the batch of a step, unless that was done before it; returns forwards spent."""
        run, looked, spent = self.run, self._looked, self._spent
        self._looked, self._spent = [], 0.0
        if (
            batch is None
            or not self._judgeable(batch)
            or (looked and (looked[0] is batch or (looked[0] is _ANY and run.full_batch)))
        ):
            return spent
        if batch is self._consumed:  # an accepted jump used it, and it is trained on all the same
            run.batches.used(False)
        return spent + look_at(run, batch)

    def _next_decision(self) -> Decision:
        """Of the real step that comes: made between the steps, or now, when it is too late for a proposal."""
        decision, self._decision = self._decision, None
        if decision is None:
            if not self._auto and self.run.meter.num_real_steps > 1 and self._consumed is None:
                self._unasked = True
                self._say(NOT_ASKED)
            decision = self._decide(can_judge=False)
        return decision

    def _decide(self, *, can_judge: bool) -> Decision:
        """What comes next; no proposal where there is nothing to judge it on."""
        run = self.run
        if not can_judge and run.windows.observing:
            run.proposer.go_on_with(None)
            phases = run.phases
            phases.force_full(1, by_alarm=phases.forced_by_alarm and phases.num_forced_full_steps > 0)
        return decide(run)

    def _prepare_step(self) -> None:
        """From the loop's clipping to its optimizer's step."""
        run = self.run
        if not run.config.enabled:
            self._prepare_plain()
            return
        if self._catches_up and not hasattr(run.schedule.scheduler, "total_steps"):  # OneCycleLR raises beyond its end
            for _ in range(self.owed_schedule_steps()):
                run.schedule.scheduler.step()
        if self._pending is not None and not (self._handover.empty and self._seen.empty):
            self._drop_pending()  # its optimizer never stepped, and another step is under way
        self._unscale()
        self._ask_witness()
        if self._pending is None:
            self._look_at_gradients()
        pending = self._pending
        if pending is None:
            decision = self._next_decision()
            enter(run, decision)
            pending = self._pending = PendingStep(run, decision, None, None, 0.0)
            self._watching.close()
            run.windows.restart_window()
            run.optimizer_step.on_skip()
        elif pending.step is not None and pending.usable:
            limit, norm = run.config.gradient_clip_norm, pending.step.norm
            if limit > 0 and norm is not None:
                torch.nn.utils.clip_grads_with_norm_(optimizer_parameters(run.subject.optimizer), limit, norm)
            pending.step.before_step()
        pending.arm()

    def _prepare_plain(self) -> None:
        """The plain loop and nothing else."""
        run = self.run
        decision = decide(run)
        enter(run, decision)
        run.schedule.begin_step()
        if run.config.gradient_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(optimizer_parameters(run.subject.optimizer), run.config.gradient_clip_norm)
        self._pending = PendingStep(run, decision, None, None, 0.0)
        self._pending.arm()

    def _dismiss_witness(self) -> None:
        if self._witness is not None:
            self._witness.remove()
            self._witness = None

    def _ask_witness(self) -> None:
        """Say once that the gradients are not those of the loss, if the loop has changed them."""
        step = self.run.meter.num_attempted_steps
        if self._witness is None or step % WITNESS_EVERY:
            return
        factor = self._witness.factor()
        if math.isfinite(self._scale):  # a scaler of the loop's
            factor *= self._scale
        if abs(factor - 1) > ROUNDING:
            self._say(CHANGED.format(factor=factor))
            self._dismiss_witness()
        elif step >= WITNESS_STEPS:
            self._dismiss_witness()

    def _unscale(self) -> None:
        """A scaler leaves it to a fused optimizer to divide by its scale: do it before the gradients are looked at."""
        optimizer: Any = self.run.subject.optimizer
        scale = getattr(optimizer, "grad_scale", None)
        if scale is None:
            return
        with torch.no_grad():
            for gradient in weights.gradients(optimizer_parameters(optimizer)):
                gradient.div_(scale.to(gradient.device))
        optimizer.grad_scale = None

    def _finish(self, pending: PendingStep) -> None:
        """From the optimizer's step to its end."""
        run = self.run
        pending.disarm()
        self._pending = None
        self._num_looks = self._looks_before = 0 if self._num_looks == self._looks_before else self._num_looks
        loss, _ = self._taken()
        self._lost = pending.step is None
        outcome = pending.end()
        if loss is not None and not run.config.enabled:
            outcome.loss = loss
        if pending.step is None and run.config.enabled:  # no loss: nothing to check or to learn from
            if run.judge.probation is not None:
                run.judge.probation.count_step(None)
            outside.remember(run)
            self._batch = self._step = None
            return
        if pending.decision.phase is Phase.CORRECT:
            conclude(run, outcome)
        outcome.forwards += pending.measured
        began, clock = self._began
        watch = Stopwatch(began, began, run.proposer.time.clock() - clock)
        self.result = close_step(run, pending.decision, outcome, watch)
        outside.remember(run)
        self._used = self._smallest_gradient()
        self._batch, self._step, self._consumed = pending.batch, None, None
        self._judgeable(pending.batch)

    def _judgeable(self, batch: Any) -> bool:
        """Whether a proposal can be judged on a batch; if not, why is said once."""
        why = ""
        loss_fn = self.run.subject.loss_fn
        if batch is None or not is_whole(batch):
            why = NO_LOSS if self._lost else NO_BATCH
        elif isinstance(loss_fn, StepLoss) and loss_fn.is_default:
            each = batch[0] if isinstance(batch, MicroBatches) else batch
            if not isinstance(each, Mapping | Call):
                why = NO_LOSS_FN.format(name=type(each).__name__)
        self._lack = why
        if why and self._auto:
            self._say(why)
        return not why

    def _propose_between(self, batch: Any) -> StepResult | None:
        """Between two steps: propose for as long as the controller asks for it, and know what comes then."""
        run = self.run
        if not run.config.enabled or not (self._handover.empty and self._seen.empty):
            return None
        with self.account.timed():
            return self._proposals(batch)

    def _proposals(self, batch: Any) -> StepResult | None:
        run, fresh = self.run, batch is not None
        result: StepResult | None = None
        judged = batch if fresh else self._batch
        judgeable = self._judgeable(judged) if run.windows.observing else False
        judged = judged if judgeable else None
        while self._decision is None:
            called = time.perf_counter()
            with own_defaults():
                outside.notice(run)
            with self._evaluating():
                if judged is not None and (fresh or run.full_batch):
                    self._spent += look_at(run, judged)
                    self._looked = [judged]
                decision = self._decide(can_judge=judgeable)
                if decision.phase is not Phase.PREDICT:
                    self._decision = decision
                    break
                result = self._propose(judged, decision, called)
            if not fresh:
                run.batches.used(True)  # another one comes next
            elif result.consumed:
                self._consumed, self._looked = judged, []
                break
        self._begin()
        return result

    def _propose(self, batch: Any, decision: Decision, called: float) -> StepResult:
        run = self.run
        enter(run, decision)
        prepare(run, batch, decision)
        outcome = execute(run, batch, decision)
        outcome.forwards, self._spent, self._looked = outcome.forwards + self._spent, 0.0, []
        self.result = close_step(run, decision, outcome, Stopwatch(called, called, None))
        self.account.note(self.result)
        outside.remember(run)
        return self.result

    # ---- what hooks do not tell ------------------------------------------------------------------------

    def _scale_now(self) -> float:
        """The scaler's scale; infinity where there is none."""
        scaler = self.run.subject.grad_scaler
        return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else math.inf

    def _notice_overflow(self, *, undo: bool) -> None:
        """A scaler that has left a step out has lowered its scale.

        Args:
            undo: Buffers may be written to: no forward of the next step has been made yet.
        """
        pending = self._pending
        if pending is not None and pending.armed:
            self._close_left_open()
            return
        before, self._scale = self._scale, self._scale_now()
        if self._scale < before:
            self._skip(undo=undo)

    def _skip(self, *, undo: bool) -> None:
        """The optimizer did not step, because the gradients had overflowed."""
        run, pending = self.run, self._pending
        if not run.config.enabled:
            self._taken()
            enter(run, decide(run))
            count_real(run)
            return
        if pending is None:
            loss, batch = self._taken()
            decision = self._next_decision()
            enter(run, decision)
            run.schedule.begin_step()
            if self._step is None:
                self._begin()
            step = self._step
            assert step is not None, "begun above"
            self._watching.close()
            step.overflow(torch.tensor(math.nan) if loss is None else loss)
            pending = PendingStep(run, decision, step, batch, self._spent)
            self._looked, self._spent = [], 0.0
        if not undo:
            run.buffers.after()
        self._finish(pending)
        self._begin()

    def _close_left_open(self) -> None:
        """The optimizer raised in its step: put the rates back, and count the step if the weights have moved."""
        pending, run = self._pending, self.run
        if pending is None or not pending.armed:
            return
        moved = pending.moved
        pending.disarm()
        self._pending = self._step = None
        if moved:
            pending.complete()
            if pending.decision.phase is Phase.CORRECT and pending.step is not None:
                conclude(run, StepOutcome(pending.step.loss))
        interrupted(run)
        outside.remember(run)

    def _drop_pending(self) -> None:
        """A step that was begun and never taken."""
        self._close_left_open()
        if self._pending is not None:
            self._pending = self._step = None
            self.run.windows.restart_window()
            self.run.optimizer_step.on_skip()

    # ---- a model that returns its loss -----------------------------------------------------------------

    def _waits_for_forward(self) -> bool:
        """Whether the next forward tells the batch that will be trained on: a better judge than the last one."""
        return bool(self._forms) and self.run.subject.model.training

    def _before_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._inside or not self._attached or not torch.is_grad_enabled():
            return
        named = {k: v for k, v in kwargs.items() if k not in NOT_DATA}
        self._forward_batch = Call(args, named) if args else named
        if not (self._handover.empty and self._seen.empty and self._aside.empty):
            return
        self._notice_overflow(undo=True)
        if self._pending is not None or not self.run.config.enabled:
            return
        if self._auto and self._waits_for_forward() and self._decision is None and _form(args, named) in self._forms:
            try:
                self._propose_between(self._forward_batch)
            except BaseException:
                interrupted(self.run)
                outside.remember(self.run)
                raise
        else:
            self._begin()

    def _after_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._inside or not self._attached or not torch.is_grad_enabled():
            return
        loss, batch = loss_in(output), self._forward_batch
        if loss is None or not loss.requires_grad or batch is None:
            return
        training = self.run.subject.model.training
        if training:
            self._forms.add(_form(args, batch.kwargs if isinstance(batch, Call) else batch))
        into = self._seen if training else self._aside  # a validation with gradients says nothing of the step
        into.note_loss(loss)
        into.note_batch(batch)
        if self._step is not None:
            self.run.windows.observer.before_backward()


def _form(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """What a forward is called with, as far as it tells whether a loss comes back."""
    return len(args), tuple(sorted(kwargs))


#: The engine's own part of a checkpoint that a trainer has written.
_FRESH: StateDict = {"decision": None, "looked": False, "spent": 0.0, "forms": []}


def _checked(own: Any) -> StateDict:
    """The engine's own part of a state.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        found = own["decision"]
        if found is not None:
            Decision(**{**found, "phase": Phase(found["phase"]), "reason": Reason(found["reason"])})
        refused = own.get("account", {"refused": {}})["refused"]  # states of the first engines have none
        account = {"refused": {str(reason): int(count) for reason, count in refused.items()}}
        checked = {"decision": found, "looked": bool(own["looked"]), "spent": float(own["spent"]), "account": account}
        return {**checked, "forms": [[int(number), [str(n) for n in names]] for number, names in own["forms"]]}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the engine's state cannot be read ({type(error).__name__}: {error})") from error


def attach(
    model: nn.Module, optimizer: Optimizer, config: HybridTrainerConfig | None = None, *,
    loss_fn: LossFn | None = None, lr_scheduler: Any = None, auto: bool = True, grad_scaler: Any = None,
    val_fn: ValFn | None = None, val_cost: float = 1.0, predictor: Predictor | None = None,
    roles: dict[str, str] | None = None, lr_interval: Literal["step", "epoch"] | None = None,
    schedule: Literal["owned", "external", "shared"] = "owned", total_steps: int | None = None,
    sinks: Sequence[Sink | Writer] = (), modifiers: Sequence[StepModifier] = (),
    residual_fn: ResidualFn | None = None, output_fn: OutputFn | None = None,
) -> Engine:  # fmt: skip
    """Ride along with a loop of your own: it keeps its forward, backward and step, the engine adds the prediction.

    Example::

        engine = attach(model, optimizer, loss_fn=loss_fn, lr_scheduler=scheduler)
        for batch in loader:
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()
            engine.note(loss, batch)
            optimizer.step()  # and no scheduler.step(): the engine does that

    Args:
        model: Any module.
        optimizer: Any optimizer whose step fires hooks; of a wrapper the optimizer inside is taken.
        config: Defaults if None.
        loss_fn: (model, batch) -> scalar tensor, for the gate; None: the model returns its loss, and a hook on its
            forward sees loss and batch.
        lr_scheduler: The schedule.
        auto: The optimizer's post-hook proposes (:meth:`Engine.between_steps`); else the loop calls it.
        grad_scaler: The loop's ``torch.amp.GradScaler``: steps that it leaves out are noticed.
        val_fn: model -> validation loss, see :class:`.HybridTrainer`.
        val_cost: What one answer of it costs, in forwards of a training batch.
        predictor: One of your own instead of ``config.predictor_type``.
        roles: Overrides of parameter roles, qualified name -> role.
        lr_interval: What one step of the schedule stands for; None: as configured.
        schedule: ``"owned"``: the engine steps it.  ``"external"``: the loop does, once per step of the optimizer, and
            may ask for :meth:`Engine.owed_schedule_steps`; a jump that is taken back leaves the schedule where it is.
            ``"shared"``: the loop does as well, and what it owes is taken right before the optimizer's next step.
        total_steps: Planned end of the run on the configured clock, for the budget; None: not known.
        sinks: Objects of your own that get every record, beside the file that ``metrics.path`` names.
        modifiers: Of your own, around every step of the optimizer (:class:`.StepModifier`).
        residual_fn: (model, batch) -> residuals, see :class:`.HybridTrainer`.
        output_fn: (model, batch) -> outputs and the loss as a function of them, likewise.

    Raises:
        ConfigError: as :class:`.HybridTrainer`; or there is an engine on this optimizer already.
    """
    check_handed_in(
        model, optimizer, config, loss_fn=loss_fn, lr_scheduler=_inner_schedule(lr_scheduler), grad_scaler=grad_scaler
    )
    if schedule not in ("owned", "external", "shared"):
        raise ConfigError(f"schedule = {schedule!r} is unknown: must be owned, external or shared")
    if schedule != "owned" and count_of(lr_scheduler) is None:
        raise ConfigError(f'schedule="{schedule}" needs the schedule to look at: pass lr_scheduler=')
    hooked = with_hooks(optimizer)
    handed = Handed(
        loss_fn=loss_fn if isinstance(loss_fn, StepLoss) else StepLoss(loss_fn),
        lr_scheduler=_inner_schedule(lr_scheduler), grad_scaler=grad_scaler,
        predictor=predictor, roles=roles, lr_interval=lr_interval, val_fn=val_fn, val_cost=val_cost,
        owns_schedule=schedule == "owned", sinks=sinks, modifiers=modifiers,
        residual_fn=None if residual_fn is None else StepResiduals(residual_fn), output_fn=output_fn,
    )  # fmt: skip
    run = build_run(model, optimizer if hooked is None else hooked, config, handed)
    if total_steps is not None:
        run.meter.plan(total_steps)
        run.schedule.plan(total_steps)
    missing = () if hooked is not None else MISSING
    run.proposer.bound_chain(1)  # the loop counts steps of its own, and waits for them
    engine = Engine(run, auto=auto, missing=missing, catches_up=schedule == "shared")
    engine.connect(hooked, watch_forward=loss_fn is None)
    if missing:
        warn(f"{type(optimizer).__name__} has no step hooks: call {' and '.join(missing)}", stacklevel=2)
    return engine


def _inner_schedule(scheduler: Any) -> Any:
    """Of a wrapper without a count of its own (accelerate's skips steps as it sees fit) the schedule inside."""
    inner = getattr(scheduler, "scheduler", None)
    return inner if inner is not None and not hasattr(scheduler, "last_epoch") else scheduler
