"""The engine that rides along: prediction for loops that somebody else owns.

:func:`attach` hooks on to an optimizer.  The loop computes losses, gradients and steps as it always did; the engine
goes through the same stations as :func:`.loop.take_step`, from the optimizer's hooks::

    note(loss, batch)    what the step is trained on: handed over, or seen by a hook on a model that returns its loss
    after_backward()     gradients are complete, unscaled and not clipped; by itself right before the step
    before_step()        the optimizer's pre-hook: multiplier and lookahead keep what they need, the rate is set
    after_step()         the post-hook: the rate is put back, the step is counted, checked and learnt from
    between_steps()      proposes, judges, applies; the post-hook calls it, or the loop (``auto=False``)

Who holds what: :class:`.Intake` what was handed over, :class:`.ForwardWatch` what a hook on the model has seen,
:class:`.StepUnderWay` the real step, :class:`.Proposals` what is decided between two, :class:`.EngineKeeper` the
checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..config.settings import HybridTrainerConfig
from ..forecast.final_loss import Forecast
from ..forecast.stopping import StopWhen
from ..judge.validation import ValFn
from ..keep.batch_norm import reestimate
from ..keep.subject import JudgeFn, LossFn, OutputFn, ResidualFn
from ..move.modifier import StepModifier
from ..move.recipe import Recipe
from ..move.schedule import count_of
from ..notices import warn
from ..predictors import Predictor
from ..records import ConfigError, StateDict, StepResult
from ..tell.account import Account, format_text
from ..tell.figures import statistics
from ..tell.sinks import Sink, Writer
from . import outside
from .construction import Handed, build_run
from .foretell import foretell, planned
from .forward_watch import ForwardWatch
from .handed_in import check_handed_in
from .handover import Intake, StepLoss, StepResiduals, StepScores
from .hooks import OwnForwards, on_forward, on_step, with_hooks
from .inputs import why_ended
from .keeping import EngineKeeper
from .learning import settle_readings
from .passes import has_ended
from .proposals import Proposals
from .said import LATE, MID_STEP, NOT_ASKED, PAST_END, SaidOnce
from .state import State
from .transaction import interrupted
from .under_way import StepUnderWay

#: What a loop has to call where its optimizer's step fires no hooks.
MISSING = ("engine.before_step() right before the optimizer's step", "engine.after_step() right after it")


class Engine:
    """Rides along with a loop; made by :func:`attach`.

    Attributes:
        run: What the library knows of the run.
        missing: What the loop has to call itself, because no hook can; empty where nothing is missing.
        result: Of the last step or proposal; None before the first.
        account: Refusals, and the time that riding along has taken.
    """

    def __init__(self, run: State, *, auto: bool, missing: tuple[str, ...] = (), catches_up: bool = False) -> None:
        """Bind; :func:`attach` sets the hooks.

        Args:
            run: State of the run.
            auto: Proposals are made by itself, after the optimizer's step.
            missing: Motions that have been left out, with what they lack.
            catches_up: The engine takes the steps that a schedule of the loop's is owed.
        """
        self.run, self.missing = run, missing
        self._auto = auto
        self._catches_up = catches_up  # takes the steps that a schedule of the loop's is owed
        self.result: StepResult | None = None
        self.account = Account()
        self._handles: list[Any] = []
        self._at_detach: list[Callable[[], object]] = []
        self._attached = True
        self._intake = Intake(run.subject.parameters, on_cpu=run.subject.on_cpu)
        self._own, self._said = OwnForwards(), SaidOnce(run)
        self._proposals = Proposals(run, self._own, self._said, auto=auto)
        self._step = StepUnderWay(run, self._intake, self._proposals, self._own, self._said)
        self._forward = ForwardWatch(run, self._intake, self._own, self._forward_begins, self._proposals.on_replaced)
        self._keeper = EngineKeeper(run, self)

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
        if self.run.windows.observing and self.run.subject.ranks.alone:  # several have another gradient
            self._handles.append(self._step.clipping.begin())
        if self.run.subject.on_cpu:  # elsewhere it is a copy of everything: not before it is needed
            self._step.begin()

    # ---- what the loop calls -----------------------------------------------------------------------

    def note(self, loss: Any = None, batch: Any = None) -> None:
        """Hand over the loss of a batch, and the batch, any time before ``optimizer.step()``.

        With accumulation once per micro-batch, the loss before it is divided; the batch is kept until the next step.

        Raises:
            TypeError: the loss is not a scalar.
        """
        self._check_attached()
        late = loss is not None and self._intake.is_late(loss)  # before a step that was left out is closed below
        self._notice_overflow(undo=False)
        if self._intake.arrives():
            self._proposals.on_replaced()
        if loss is not None:
            self._intake.loop.take_loss(loss)
            if late:
                self._said.say(LATE)
            if isinstance(loss, Tensor) and loss.requires_grad:
                self._step.before_backward()
        if batch is not None:
            self._intake.loop.take_batch(batch)

    def before_backward(self) -> None:
        """Right before a backward pass, for loops that hand the loss over after it; curvature factors ask for it."""
        self._step.before_backward()

    def after_backward(self, loss: Any = None) -> bool:
        """Look at the gradients: complete, unscaled (``scaler.unscale_``) and not clipped.

        Loops that clip call it before they do; otherwise it is done right before the optimizer steps, and norms and
        curvature are those of clipped gradients.

        Args:
            loss: Of this batch, where :meth:`note` was not called.

        Returns:
            Whether the step may be taken; if not, the optimizer finds no gradients and moves nothing.
        """
        self._check_attached()
        with self.account.timed():
            self._notice_overflow(undo=False)
            if loss is not None:
                self.note(loss)
            self._step.look_before_clipping()
        return self._step.usable

    def before_step(self, loss: Any = None) -> None:
        """Right before the optimizer's step; its pre-hook calls it where it has one.  ``loss``: a closure's."""
        if not self._attached or self._own.under_way:
            return
        with self.account.timed():
            self._step.close_left_open()
            self._notice_overflow(undo=False)
            known = self._step.pending is not None or self._intake.has_loss
            if loss is not None and not known:  # a closure's, where nobody has handed it over
                self._intake.loop.take_loss(loss)
            try:
                if not self.run.config.enabled:
                    self._step.prepare_plain()
                else:
                    if self.finished:
                        self._said.say(PAST_END.format(end=self.run.schedule.end))
                    self._catch_up()
                    self._step.prepare()
            except BaseException:
                self._step.drop()
                self._interrupted()
                raise

    def _catch_up(self) -> None:
        """A schedule of the loop's takes what it is owed."""
        scheduler = self.run.schedule.scheduler
        if self._catches_up and not hasattr(scheduler, "total_steps"):  # OneCycleLR raises beyond its end
            for _ in range(self.owed_schedule_steps()):
                scheduler.step()

    def after_step(self) -> None:
        """Right after the optimizer's step; its post-hook calls it where it has one."""
        pending = self._step.pending
        if not self._attached or self._own.under_way or pending is None or not pending.armed:
            return
        with self.account.timed():
            try:
                self._came_of(self._step.finish(pending))
                self._keeper.save_if_due(stepping=True)
                if self._auto and not self._forward.tells_next_batch:
                    self._propose_between(None)
                else:
                    self._step.begin()
            except BaseException:
                self._interrupted()
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
        if not self._intake.empty:
            raise RuntimeError(
                "between_steps() was called in the middle of a step: losses were noted since the last one"
            )
        self._step.drop()
        self._proposals.asked()
        try:
            result = self._propose_between(batch)
            self._keeper.save_if_due(stepping=False)
        except BaseException:
            self._interrupted()
            raise
        return result

    def step_skipped(self) -> None:
        """A gradient scaler has left the optimizer's step out: no hook tells.

        Noticed without it where ``attach`` was given the scaler, at the next thing the loop hands over.
        """
        self._check_attached()
        self._came_of(self._step.skip(undo=True))

    def give_up_step(self) -> None:
        """The step that losses and batches were noted for will not be taken: they are dropped.

        An epoch that ends between two steps and drops its gradients, or a batch that is left out after its loss was
        noted.  Without it they would be counted into the next step.
        """
        self._check_attached()
        self._intake.take()
        self._step.drop()

    def end_epoch(self) -> None:
        """A pass over the data has ended: a schedule in epochs (``lr_interval="epoch"``) takes its step."""
        self.run.schedule.end_epoch()
        self.run.step_scheduler()

    def reestimate_batch_norm(self, batches: Iterable[Any]) -> int:
        """Running statistics of BatchNorm for the weights as they are; see :class:`.HybridTrainer`.

        Args:
            batches: What they are estimated from.

        Returns:
            The number of modules whose statistics are new.
        """
        subject = self.run.subject
        with self._own.evaluating():
            found = reestimate(subject.model, lambda batch: subject.loss_fn(subject.model, batch), batches)
        subject.reshard()
        return found

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
            self._step.end()
            self._attached = False
            settle_readings(self.run, self.run.recorder)

    def on_detach(self, undo: Callable[[], object]) -> None:
        """Have ``undo`` called by :meth:`detach`, for drivers that set hooks of their own."""
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
        return why_ended(self.run) or (NOT_ASKED if self._proposals.unasked else self._proposals.lack)

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
        return format_text(self.report())

    @property
    def in_step(self) -> bool:
        """Whether something was handed over since the optimizer's last step: the next one is under way."""
        return not self._intake.empty

    def __repr__(self) -> str:
        """What it rides along with, and where it stands."""
        run = self.run
        model, optimizer = type(run.subject.model).__name__, type(run.subject.optimizer).__name__
        state = "attached" if self._attached else "detached"
        return f"Engine({model}, {optimizer}, {state}, {run.phases.current.value}, position {run.position})"

    def recipe(self) -> Recipe:
        """Step sizes of this run to take home: factors by role, and the learned multiplier of all of them.

        ``recipe().param_groups(model, lr)`` are parameter groups for a plain script, and ``recipe().save(path)`` is a
        file that ``training.recipe`` of another run takes.
        """
        return self.run.optimizer_step.recipe

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

    def should_stop(self, rule: StopWhen) -> bool:
        """Whether the forecast of the final loss says that going on is not worth it; ask between steps.

        Args:
            rule: What the run has to bring; a new one for every run.

        Raises:
            ConfigError: ``attach`` was not told ``total_steps``, or prediction is off: no losses are kept then.
        """
        run = self.run
        if not run.config.enabled:
            raise ConfigError("StopWhen needs losses, and with enabled = False none are kept")
        end = run.schedule.end
        if end is None:
            raise ConfigError("StopWhen needs the end of the run: attach(..., total_steps=...)")
        return rule.ask(run.position, end, lambda level: self.forecast(end, level=level), lambda: planned(run, end))

    # ---- state ---------------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """What is the engine's own, between two steps; model, optimizer, schedule and scaler are the loop's to save.

        In the middle of a step it is said once that what belongs to that step is not in it.

        Raises:
            CheckpointError: something in it cannot be held.
        """
        self._say_if_mid_step()
        return self._keeper.state_dict()

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`, after model, optimizer, schedule and scaler were loaded.

        Args:
            state: What it returned.

        Raises:
            CheckpointError: it is malformed, or of another run.  Nothing has been changed.
        """
        self._keeper.load_state_dict(state)

    def save_state(self, directory: str | Path) -> Path:
        """Write :meth:`state_dict` into a folder, for loops that keep the rest in a checkpoint of their own.

        The folder holds one state: that of an earlier save is replaced.

        Args:
            directory: The folder; it is made.

        Raises:
            CheckpointError: it could not be written; what was there before is untouched.
        """
        self._say_if_mid_step()
        return self._keeper.save_state(directory)

    def load_state(self, directory: str | Path) -> None:
        """Inverse of :meth:`save_state`, after the rest was loaded.

        Args:
            directory: The folder that it wrote.

        Raises:
            CheckpointError: there is none, or it is damaged or of another run; nothing has been changed then.
        """
        self._keeper.load_state(directory)

    def save_checkpoint(self, path: str | Path) -> Path:
        """Write a checkpoint folder below ``path``: model, optimizer, schedule, scaler, random states and ours.

        Raises:
            CheckpointError: it could not be written, or the step is not complete; older checkpoints are untouched.
        """
        return self._keeper.save_checkpoint(path)

    def load_checkpoint(self, path: str | Path) -> None:
        """Continue from a checkpoint folder, bit for bit.

        Args:
            path: Folder of one checkpoint.

        Raises:
            CheckpointError: missing, damaged, or of another model; nothing has been changed then.
        """
        self._keeper.load_checkpoint(path)

    def load_latest(self, directory: str | Path) -> None:
        """Continue from the newest good checkpoint of a folder; a damaged one is set aside with a warning.

        Args:
            directory: Folder of checkpoints.

        Raises:
            CheckpointError: there is none, or it is of another model; nothing has been changed then.
        """
        self._keeper.load_latest(directory)

    def save_if_due(self) -> None:
        """Write a checkpoint below ``checkpoint.directory`` if ``save_interval`` steps have passed.

        Called by itself where the loop leaves nothing to be done after ``optimizer.step()``; loops that step a schedule
        or a scaler of their own call it (or :meth:`between_steps`) after that.
        """
        self._check_attached()
        self._keeper.save_if_due(stepping=False)

    # ---- what the keeper asks --------------------------------------------------------------------------

    def own_state(self) -> StateDict:
        """What no owner of the run's holds, for :class:`.EngineKeeper`."""
        return {
            **self._proposals.state_dict(), **self._forward.state_dict(), "account": self.account.state_dict(),
        }  # fmt: skip

    def restart(self, own: StateDict) -> None:
        """Inverse of :meth:`own_state`, which made ``own``: go on from there."""
        self._step.restart()
        self._proposals.load_state_dict(own)
        self._forward.load_state_dict(own)
        self.account.load_state_dict(own["account"])
        if self.run.subject.on_cpu:
            self._step.begin()

    def accumulating(self) -> bool:
        """Whether gradients have been added up that no step of the optimizer has used yet."""
        return self._step.accumulating()

    # ---- stations --------------------------------------------------------------------------------------

    def _say_if_mid_step(self) -> None:
        """A framework that saves in the middle of a step loses gradients of its own as well: that ends no run."""
        if self.accumulating():
            self._said.say(MID_STEP)

    def _check_attached(self) -> None:
        if not self._attached:
            raise RuntimeError("the engine is detached: attach() another one")

    def _notice_overflow(self, *, undo: bool) -> None:
        self._came_of(self._step.notice_overflow(undo=undo))

    def _came_of(self, result: StepResult | None) -> None:
        if result is not None:
            self.result = result

    def _interrupted(self) -> None:
        interrupted(self.run)
        outside.remember(self.run)

    def _propose_between(self, batch: Any) -> StepResult | None:
        """Between two steps: propose for as long as the controller asks for it, and begin the step that comes then."""
        if not self.run.config.enabled or not self._intake.empty:
            return None
        result: StepResult | None = None
        with self.account.timed():
            for result in self._proposals.made(batch):
                self.result = result
                self.account.note(result)
            self._step.begin()
        return result

    # ---- a model that returns its loss -----------------------------------------------------------------

    def _before_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._attached:
            self._forward.before(args, kwargs)

    def _forward_begins(self, batch: Any, returns_loss: bool) -> None:
        """The first forward of a step: nothing was handed over since the last one."""
        self._notice_overflow(undo=True)
        if self._step.pending is not None or not self.run.config.enabled:
            return
        undecided = self._auto and self._forward.tells_next_batch and self._proposals.decision is None
        if not undecided or not returns_loss:
            self._step.begin()
            return
        try:
            self._propose_between(batch)
        except BaseException:
            self._interrupted()
            raise

    def _after_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._attached and self._forward.after(args, kwargs, output):
            self._step.before_backward()


def attach(
    model: nn.Module, optimizer: Optimizer, config: HybridTrainerConfig | None = None, *,
    loss_fn: LossFn | None = None, lr_scheduler: Any = None, auto: bool = True, grad_scaler: Any = None,
    val_fn: ValFn | None = None, val_cost: float = 1.0, predictor: Predictor | None = None,
    roles: dict[str, str] | None = None, lr_interval: Literal["step", "epoch"] | None = None,
    schedule: Literal["owned", "external", "shared"] = "owned", total_steps: int | None = None,
    sinks: Sequence[Sink | Writer] = (), modifiers: Sequence[StepModifier] = (),
    residual_fn: ResidualFn | None = None, output_fn: OutputFn | None = None, judge_fn: JudgeFn | None = None,
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
        val_fn: model -> validation loss, with the last word on raises and on jumps where data come round again, see
            :class:`.HybridTrainer`.
        val_cost: What one answer of it costs, in forwards of a training batch.
        predictor: One of your own instead of ``config.predictor_type``.
        roles: Overrides of parameter roles, qualified name -> role.
        lr_interval: What one step of the schedule stands for; None: as configured.
        schedule: ``"owned"``: the engine steps it.  ``"external"``: the loop does, once per step of the optimizer, and
            may ask for :meth:`Engine.owed_schedule_steps`; a jump that is taken back leaves the schedule where it is.
            ``"shared"``: the loop does as well, and what it owes is taken right before the optimizer's next step.
            Either way a ``ReduceLROnPlateau`` stays the loop's: it is owed nothing.
        total_steps: Planned end of the run on the configured clock, for the budget; None: not known.
        sinks: Objects of your own that get every record, beside the file that ``metrics.path`` names.
        modifiers: Of your own, around every step of the optimizer (:class:`.StepModifier`).
        residual_fn: (model, batch) -> residuals, see :class:`.HybridTrainer`.
        output_fn: (model, batch) -> outputs and the loss as a function of them, likewise.
        judge_fn: (model, batch) -> score of each sample, higher is better, likewise.

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
    if config is not None and config.activation_offload:
        raise ConfigError(
            "training.activation_offload is for forwards that HybridTrainer makes: in a loop of your own, put yours "
            "under torch.autograd.graph.save_on_cpu(pin_memory=True)"
        )
    if schedule != "owned" and isinstance(_inner_schedule(lr_scheduler), ReduceLROnPlateau):
        lr_scheduler, schedule = None, "owned"  # it follows a metric that the loop knows, and no clock
    hooked = with_hooks(optimizer)
    handed = Handed(
        loss_fn=loss_fn if isinstance(loss_fn, StepLoss) else StepLoss(loss_fn),
        lr_scheduler=_inner_schedule(lr_scheduler), grad_scaler=grad_scaler,
        predictor=predictor, roles=roles, lr_interval=lr_interval, val_fn=val_fn, val_cost=val_cost,
        owns_schedule=schedule == "owned", sinks=sinks, modifiers=modifiers,
        residual_fn=None if residual_fn is None else StepResiduals(residual_fn), output_fn=output_fn,
        judge_fn=StepScores(judge_fn) if callable(judge_fn) else judge_fn,
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
        warn(f"{type(optimizer).__name__} has no step hooks: call {' and '.join(missing)}")
    return engine


def _inner_schedule(scheduler: Any) -> Any:
    """Of a wrapper without a count of its own (accelerate's skips steps as it sees fit) the schedule inside."""
    inner = getattr(scheduler, "scheduler", None)
    return inner if inner is not None and not hasattr(scheduler, "last_epoch") else scheduler
