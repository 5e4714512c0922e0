"""The state of one run: its owners, each of which alone assigns what it holds."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from .. import former_names
from ..config.settings import AUTO, HybridTrainerConfig
from ..cost import CostMeter
from ..judge.judge import Judge
from ..judge.labels import SAMPLES_PER_WEIGHT
from ..judge.safety import Safety
from ..judge.switchback import Switchback
from ..judge.validation import Validation
from ..keep.buffers import BufferGuard
from ..keep.failures import Failures, Place
from ..keep.loss_modules import with_modules_beside
from ..keep.model_state import Origin
from ..keep.object_state import HasState, stateful
from ..keep.rollback import RollbackPoint
from ..keep.snapshot import Snapshot
from ..keep.subject import LossFn, Subject
from ..move.modifier import StepModifier
from ..move.optimizer_memory import left_alone
from ..move.optimizer_step import Around, OptimizerStep, lookahead_for, modifiers_for, multiplier_for, recipe_for
from ..move.schedule import LrSchedule, scheduled_settings_stay
from ..observe.data import Batches
from ..observe.divergence import Monitor
from ..observe.history import Losses
from ..observe.window import WindowRecorder
from ..predictors import Predictor
from ..propose.proposer import Proposer
from ..propose.sources.stream import ENOUGH
from ..records import StateDict, Window
from ..tell.recorder import Metrics
from ..tell.sinks import NullSink
from ..weights.algebra import LARGE, Move
from ..weights.decay import CoupledDecay
from ..weights.trained import Watch
from .phases import PhaseState, controller_for
from .predictor_choice import parts_for, settings_for, settled

__all__ = ["LossFn", "State"]


class State:
    """Everything the library knows about one run, by owner.

    Attributes:
        config: Settings; those that the user left open as they were chosen.
        recorder: Told what happens; nothing comes back.
        subject: Model, optimizer and loss; changed by nobody.
        origin: What the model was when the run began; changed by nobody.
        failures: What went wrong in prediction, by place.
        meter: What was done, and what it cost.
        schedule: The learning-rate schedule on the run's clock.
        watch: Which weights may be moved, and who else has moved them.
        losses: Losses and gradient norms of the real steps.
        decay: What weight decay adds to the loss.
        batches: What is known of the data.
        monitor: Alarms on those losses.
        phases: Where the run is in its cycle.
        windows: The open window, and the last one closed.
        proposer: Who predicts.
        judge: Who decides over jumps.
        optimizer_step: The optimizer's step and what is around it.
        safety: What may find that all this does harm, and the way back.
        rollback: The point to go back to where readings come late.
        buffers: Undoes what a forward did to buffers.
    """

    def __init__(
        self, subject: Subject, config: HybridTrainerConfig, lr_scheduler: Any = None, *,
        predictor: Predictor | None = None, validation: Validation | None = None, owns_schedule: bool = True,
        modifiers: Sequence[StepModifier] = (),
    ) -> None:  # fmt: skip
        """Bind everything; no memory beyond Python objects is taken before training starts.

        Args:
            subject: What is trained.
            config: The user's settings.
            lr_scheduler: Or None.
            predictor: The user's own; None: the one that is named in the settings.
            validation: Or None.
            owns_schedule: We step it; else the caller's loop does.
            modifiers: What the user has handed in to be around the optimizer's step.
        """
        asked, config = config, settled(config)
        self.subject, self.config = subject, config
        self.origin = Origin.of(subject.model, subject.optimizer, config.checkpoint.include_frozen)
        self.failures = Failures()
        self.recorder = Metrics(NullSink(), log_interval=config.metrics.log_interval, failures=self.failures)
        self.meter = CostMeter()
        self.schedule = LrSchedule(lr_scheduler, config.lr_interval, owned=owns_schedule)
        hands_off = None if config.never_predicts else left_alone(subject.optimizer)
        look_every = 1 if subject.on_cpu else max(config.divergence.check_interval_steps, 1)
        self.watch = Watch(subject.parameters, subject.optimizer, look_every, hands_off)
        self.decay = CoupledDecay(subject.optimizer, subject.parameters)
        self.losses = Losses(config.divergence.check_interval_steps)
        self.batches = Batches(subject.views, self.failures)
        self.monitor = Monitor(config.divergence, config.divergence_threshold)
        self.phases = PhaseState(controller_for(config))
        self.windows = WindowRecorder(self.failures)
        chooses = asked.predictor_type == AUTO and predictor is None and not config.never_predicts
        self.proposer = Proposer(asked, self.failures, chooses=chooses)
        self.judge = Judge(config, subject, self.failures)
        self.safety = Safety(validation)
        self.rollback = RollbackPoint()
        self.buffers = BufferGuard(with_modules_beside(subject.loss_fn, subject.model))
        self.follow(config, predictor)
        anneals = lr_scheduler is not None
        recipe = recipe_for(subject, self.watch, config)
        scale = multiplier_for(subject, self.watch, config, recipe, self.judge.generator, anneals=anneals)
        around = Around(
            scale=scale,
            lookahead=lookahead_for(subject, config, observing=self.windows.observing, anneals=anneals),
            switchback=Switchback(config.block_holdout), drifts=config.lookahead.drift > 0,
            of_settings=modifiers_for(subject, recipe, config, scale, self.schedule), modifiers=modifiers,
            decay_follows=config.decay_follows_multiplier,
        )  # fmt: skip
        self.optimizer_step = OptimizerStep(subject, self.watch, self.schedule, around, self.failures)

    # ---- which predictor ------------------------------------------------------------------------

    def follow(self, config: HybridTrainerConfig, predictor: Predictor | None = None) -> None:
        """Take a predictor and all that depends on it; nothing has changed if that raises.

        Args:
            config: Settings of the run from here on.
            predictor: The user's own; None: the one that is named in the settings.
        """
        parts = parts_for(self.subject, config, predictor, self.failures, hands_off=self.watch.hands_off is not None)
        self.config = config
        self.phases.follow(controller_for(config))
        self.windows.follow(config.predictor, parts.basis, parts.groups, parts.observer, on_trial=parts.on_trial)
        self.proposer.follow(config, parts.predictor, parts.time, parts.feedback)

    def choose(self, name: str) -> None:
        """Go over to another predictor: what was observed for the old one is dropped."""
        self.follow(settings_for(self.proposer.settings, name))
        self.judge.follow(self.config)
        self.windows.begin_anew()
        self.proposer.begin_anew()

    def adopt(self, predictor: str) -> None:
        """Go over to the predictor that a checkpoint was written with, where the choice is ours."""
        if self.proposer.chooses and predictor != self.proposer.predictor.name:
            self.choose(predictor)

    # ---- small readings -------------------------------------------------------------------------

    @property
    def others(self) -> list[HasState]:
        """What a snapshot holds beside model and optimizer: our scheduler, the scaler, and what is around the step."""
        schedule = (
            [] if self.schedule.scheduler is None or not self.schedule.owned else [stateful(self.schedule.scheduler)]
        )
        scaler = [] if self.subject.grad_scaler is None else [self.subject.grad_scaler]
        around = self.optimizer_step
        remembering = [modifier for modifier in around.modifiers if modifier.remembers]
        return [*schedule, *scaler, around.lookahead, around.scale, *remembering]

    @property
    def learning_rate(self) -> float:
        """Of the first group that has one: the schedule's, times what recovery has lowered it by."""
        return self.schedule.rate(self.subject.optimizer)

    @property
    def moving(self) -> bool:
        """Whether anything of this library has a hand in the weights or in their rate."""
        return self.optimizer_step.moving or self.meter.num_jumps_accepted > 0

    @property
    def watches_data(self) -> bool:
        """Whether it matters that the data come round again."""
        return self._recurrence_matters and not self.batches.free

    @property
    def _recurrence_matters(self) -> bool:
        validation = self.safety.validation
        jumps = validation is not None and validation.guards_jumps and not self.config.never_predicts
        return self.optimizer_step.scale.may_grow or jumps

    @property
    def full_batch(self) -> bool:
        """Whether losses are exact: every batch is the same one, and two losses of it agree."""
        exact = self.config.gate.exact
        if exact != "auto":
            return exact == "always"
        # where nothing is judged nobody measures
        return self.batches.same and (self.judge.exactness.agreed is True or not self.windows.observing)

    @property
    def penalized(self) -> bool:
        """Whether weight decay is a part of what jumps and losses are judged by; see :mod:`..weights.decay`."""
        whole = self.config.step == "optimizer"  # matrices that Muon or SOAP steps for Adam have none of its decay
        return whole and self.decay.present and self.windows.observing and self.full_batch

    @property
    def added_by_decay(self) -> float:
        """What weight decay adds to a judged loss at the present weights; nothing to a score of the user's own."""
        if not self.penalized or self.subject.judge_fn is not None:
            return 0.0
        with torch.no_grad():
            return float(self.decay.value())

    @property
    def by_heart(self) -> bool:
        """Whether the training loss cannot tell learning from learning by heart.

        That is known of labels (:mod:`..judge.labels`) and found out of numbers (:mod:`..judge.noise`).  Nothing is
        made faster then, unless a validation loss says where to stop; of labels weight decay does so, too.
        """
        if not self.full_batch or self.validated:
            return False
        known = bool(self.judge.of_labels) and self.few_samples and not self.decay.present
        return self.judge.noise.found or known

    @property
    def validated(self) -> bool:
        """Whether a validation loss has a word on jumps."""
        return self.safety.validation is not None and self.safety.validation.answers

    @property
    def few_samples(self) -> bool:
        """Whether the batch that comes again has few samples for so many weights; see :mod:`..judge.labels`."""
        num_samples = self.judge.num_samples
        return num_samples is not None and num_samples < SAMPLES_PER_WEIGHT * self.subject.groups.num_weights

    @property
    def proposes_nothing(self) -> bool:
        """Whether jumps would learn by heart, and the user has neither chosen the predictor nor asked for exactness."""
        return self.by_heart and self.proposer.chooses and self.config.gate.exact == "auto"

    @property
    def judged_exactly(self) -> bool:
        """Whether a proposal is judged by losses without noise: those of one batch, for a source also of a new one."""
        return self.full_batch or (self.meets_new_batches and self.judge.exactness.agreed is True)

    @property
    def meets_new_batches(self) -> bool:
        """Whether batches are new, and there is a source that has something to say of a batch of its own."""
        source = self.proposer.source
        takes = source is not None and source.takes_fresh and self.config.gate.exact == "auto"
        return takes and self.batches.same_batch.num_different >= ENOUGH

    @property
    def num_predictor_failures(self) -> int:
        """How often the predictor raised."""
        return self.failures.counts[Place.PREDICTOR]

    @property
    def position(self) -> int:
        """Of the schedule and the end of the run, in steps of the configured clock."""
        return self.meter.position(self.config.clock, self.judge.ledger.num_credited_steps)

    def planned_lr(self, num_steps: int) -> float:
        """Sum of the learning rate over the next steps; exact for ``LambdaLR``, else held constant."""
        return self.schedule.planned(self.learning_rate, num_steps)

    # ---- what concerns several owners -----------------------------------------------------------

    def see(self, batch: Any) -> None:
        """Look at the batch of the step that begins."""
        compare = self.config.enabled and self.config.gate.exact != "never"
        self.batches.see(batch, compare=compare, remember=self._recurrence_matters)
        if self.batches.same and self.judge.num_samples is None:
            self.judge.count_samples(batch)
        self.proposer.on_data(self.batches.same_batch.num_different if compare else 0)

    def step_scheduler(self) -> None:
        """Bring the learning-rate schedule to the clock's position."""
        self.schedule.advance(self.position)

    def close_window(self) -> Window:
        """Close the window and describe it for the predictor."""
        window = self.windows.close(
            self.losses.history, self.meter.num_real_steps, lr=self.learning_rate, planned_lr=self.planned_lr,
            refused=self.proposer.refused, exact=self.full_batch,
        )  # fmt: skip
        self.proposer.window_closed()
        return window

    @property
    def parks_copies(self) -> bool:
        """Whether copies to come back to, which are rarely taken and rarely used, are kept in host memory."""
        return self.config.predictor.offload or self.subject.groups.num_weights > LARGE

    def take_snapshot(self) -> Snapshot:
        """Exact copy of model, optimizer, scheduler, scaler and RNG."""
        return Snapshot.take(self.subject.model, self.subject.optimizer, self.others, offload=self.parks_copies)

    def snapshot_into(self, into: Snapshot | None) -> Snapshot:
        """The same at the start of every reading interval, in the memory of a copy that is needed no more."""
        offload = self.config.predictor.offload
        return Snapshot.take(self.subject.model, self.subject.optimizer, self.others, offload=offload, into=into)

    def restore(self, snapshot: Snapshot, *, rng: bool = True) -> None:
        """The one call that puts a snapshot back; :meth:`restored` is to follow.

        A schedule that the caller's loop steps stays where it is, with the rates that it has set.
        """
        optimizer = self.subject.optimizer
        with nullcontext() if self.schedule.owned else scheduled_settings_stay(optimizer):
            snapshot.restore(self.subject.model, optimizer, self.others, rng=rng)
        self.watch.writes.record()  # this write is the run's own
        self.schedule.resynchronize()

    # ---- events: the weights were moved by something else than an optimizer's step --------------

    @property
    def _remembering(self) -> tuple[WindowRecorder, OptimizerStep]:
        """What remembers weights, or steps between them."""
        return self.windows, self.optimizer_step

    def jumped(self, delta: Move, scale: float) -> None:
        """A jump has moved the weights by ``scale * delta``."""
        for part in self._remembering:
            part.on_jump(delta, scale)

    def restored(self, mark: StateDict | None = None) -> None:
        """Weights, and what was saved with them, are earlier ones again.

        Args:
            mark: Of the basis, from when they were saved; None: its closed windows still hold.
        """
        for part in self._remembering:
            part.on_restore(mark)

    def overwritten(self) -> None:
        """The weights are others than any that were seen: what was learnt from those before holds no more.

        A jump on trial stays: the way back leads to weights from before what has happened since.
        """
        for part in self._remembering:
            part.on_overwrite()
        self.proposer.overwritten()
        self.end_probation()

    def came_back(self) -> None:
        """The weights are those of a copy from long before, and what is around the step has come back with them."""
        self.windows.on_overwrite()
        self.optimizer_step.on_restore(None)
        self.proposer.overwritten()
        self.end_probation()

    def end_probation(self) -> None:
        """A jump on trial stays, without a verdict; what is left of it in pieces is dropped."""
        self.proposer.go_on_with(None)
        if self.judge.probation is not None:
            self.judge.end_probation()
            self.judge.ledger.cancel_account()

    # ---- state ----------------------------------------------------------------------------------

    #: Owners whose state is the library's own, in the order in which it is taken back.
    OWNERS = (
        "phases", "meter", "losses", "monitor", "windows", "proposer", "judge", "optimizer_step", "schedule", "safety",
        "rollback", "batches", "failures", "watch",
    )  # fmt: skip

    def state_dict(self) -> StateDict:
        """What the library itself remembers (model, optimizer and schedule are saved beside it)."""
        return {name: getattr(self, name).state_dict() for name in self.OWNERS}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`; the predictor's own state is taken back beside it, after :meth:`adopt`."""
        self.adopt(state["proposer"]["predictor"])
        for name in self.OWNERS:
            getattr(self, name).load_state_dict(state[name])

    # ---- former names ---------------------------------------------------------------------------

    if not TYPE_CHECKING:  # the type checker is to know none of them

        def __getattr__(self, name: str) -> Any:
            """A former attribute, from the owner that has it today."""
            if name.startswith("__"):
                raise AttributeError(name)
            return operator.attrgetter(former_names.place_of(name))(self)

        def __setattr__(self, name: str, value: Any) -> None:
            """Set an attribute; a former one where it is today."""
            if name in former_names.ATTRIBUTES:
                owner, _, last = former_names.place_of(name).rpartition(".")
                setattr(operator.attrgetter(owner)(self) if owner else self, last, value)
            else:
                super().__setattr__(name, value)
