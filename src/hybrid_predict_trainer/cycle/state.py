"""The mutable state of one run, bundled: what executors act on and checkpoints save."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import former_names
from ..config.settings import AUTO, NOISY, HybridTrainerConfig
from ..cost import CostMeter
from ..judge.exactness import Exactness
from ..judge.guard import Guard
from ..judge.ledger import Ledger
from ..judge.probation import Probation, probation_from, probation_state
from ..judge.switchback import Switchback
from ..judge.validation import Validation
from ..keep.buffers import BufferGuard
from ..keep.failures import Failures, Place, name_of
from ..keep.loss_modules import with_modules_beside
from ..keep.model_state import Origin
from ..keep.object_state import HasState, stateful
from ..keep.rollback import RollbackPoint
from ..keep.snapshot import Snapshot, snapshot_from, snapshot_state
from ..move.group_warmup import is_inside_a_block
from ..move.lookahead import DriftLookahead, Lookahead, NoLookahead
from ..move.lr_multiplier import CHECK_STEPS, LearnedScale
from ..move.multiplier import orthogonalizes
from ..move.optimizer_memory import left_alone
from ..move.overflow import ScaleSearch
from ..move.schedule import LrSchedule
from ..move.unit_scale import StepScale, UnitScale
from ..observe.basis import Basis
from ..observe.divergence import Monitor
from ..observe.history import History, Readout
from ..observe.loss_features import loss_features
from ..observe.recurrence import Recurrence
from ..observe.same_batch import SameBatch
from ..observe.window import window_from_state, window_state
from ..observe.window_encoder import Observer
from ..predictors import Predictor
from ..propose.corrector import Correction
from ..propose.feedback import Adaptation
from ..propose.segments import Segment, segment_from, segment_state
from ..propose.time_budget import TimeBudget
from ..records import Phase, State, Window
from ..weights import offload as host
from ..weights import real_views
from ..weights.algebra import Tensors
from ..weights.parameters import predicted_parameters, untrained
from ..weights.trained import Trained, Writes
from .phases import PhaseState, controller_for
from .predictor_choice import bind, choose, settings_for

#: More real steps than any run has.
NEVER = 1 << 60

LossFn = Callable[[nn.Module, Any], Tensor]


class Run:
    """Model, optimizer and everything the library knows about training them."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, config: HybridTrainerConfig, loss_fn: LossFn,
        lr_scheduler: Any = None, grad_scaler: Any = None, roles: dict[str, str] | None = None,
        predictor: Predictor | None = None, validation: Validation | None = None,
    ) -> None:  # fmt: skip
        """Bind everything; no memory beyond Python objects is taken before training starts."""
        self.model, self.optimizer, self.config = model, optimizer, config
        self.loss_fn, self.grad_scaler = loss_fn, grad_scaler
        self.schedule = LrSchedule(lr_scheduler, config.lr_interval)
        self.parameters, self.groups = predicted_parameters(model, optimizer, roles)
        self.views = [p for p in self.parameters if isinstance(p, real_views.RealView)]
        self.on_cpu = all(p.device.type == "cpu" for p in self.parameters)
        self.trained = Trained(self.parameters, optimizer)
        self.writes = Writes(self.parameters, 1 if self.on_cpu else max(config.divergence.check_interval_steps, 1))
        # why only the optimizer may move weights; None: it is not so
        self.hands_off = None if config.never_predicts else left_alone(optimizer)
        self.role_groups = self.groups
        self.settings = config  # the user's; ``config`` is what they come to where the predictor is chosen
        self.chooses = config.predictor_type == AUTO and predictor is None and not config.never_predicts
        self.failures = Failures()
        self.phases = PhaseState(controller_for(config))
        self.predictor: Predictor
        self.time: TimeBudget
        self.basis: Basis
        self.observing: bool
        self.observer: Observer
        self.adaptation: Adaptation
        self.horizon: int
        bind(self, settings_for(config, NOISY) if config.predictor_type == AUTO else config, predictor)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.guard = Guard()
        self.recurrence = Recurrence()
        self.validation = validation
        self.scale: StepScale = UnitScale()
        # both raise the noise that weights settle with, and count on a schedule to take it out again
        annealed = not config.never_predicts and lr_scheduler is not None
        least = config.min_learned_scale if self.hands_off is None else 1.0
        if annealed and (config.max_learned_scale > 1 or least < 1):
            # on an accelerator a check waits for the device: as often as losses are read, no more
            steps = CHECK_STEPS if self.on_cpu else max(CHECK_STEPS, config.divergence.check_interval_steps)
            self.scale = LearnedScale(
                self.groups, 1.0 if orthogonalizes(optimizer) else config.max_learned_scale, least, steps,
                untrained=untrained(self.parameters, self.groups.names),
                control_fraction=config.gate.control_fraction, generator=self.generator,
            )  # fmt: skip
        self.lookahead: Lookahead = NoLookahead()
        # it gains on networks of blocks; physics-informed ones, and SGD over epochs, are the worse for it (LOG.md)
        suited = config.lookahead_scope == "all" or any(is_inside_a_block(role) for role in self.role_groups.roles)
        if annealed and self.observing and suited and (config.lookahead > 0 or config.smoothing > 0):
            self.lookahead = DriftLookahead(config.lookahead, config.smoothing, config.drift)
        self.switchback = Switchback(config.gate.control_fraction)
        self.history = History()
        self.readout = Readout(config.divergence.check_interval_steps)
        self.scale_search = ScaleSearch(grad_scaler)
        self.monitor = Monitor(config.divergence, config.divergence_threshold)
        self.ledger = Ledger(config.gate)
        self.meter = CostMeter()
        self.buffers = BufferGuard(with_modules_beside(loss_fn, model))
        self.origin = Origin.of(model, optimizer, config.checkpoint.include_frozen)

        self.stated_confidence = 0.5  # of the last proposal considered
        self.refused = False  # since the last window
        self.window_just_closed = False
        self.num_windows = 0
        self.num_windows_since_proposal = 0
        self.num_rest_steps = 0  # real steps still to pass before the next window is observed
        self.lr_integral = 0.0  # over the open window
        self.window_seconds = 0.0  # wall time of its real steps; NaN: not all of them were timed
        self.loss_slope = 0.0
        self.window_loss = float("nan")
        self.window: Window | None = None  # the last one closed
        self.correction: Correction | None = None  # of the last proposal, for the record
        self.probation: Probation | None = None
        self.segment: Segment | None = None
        self.closing = False  # the window is being closed
        self.held: Tensors = []  # the weights while a proposal is judged
        self.rollback = RollbackPoint()
        self.raise_point: Snapshot | None = None  # the start of a raise of the multiplier that is not settled yet
        self.safe_point: Snapshot | None = None  # the guard's anchor
        self.data = SameBatch()
        self.exactness = Exactness()
        self.cuts: dict[str, bool] = {}  # whether the pieces of a batch of that layout are pieces of its loss
        self.batch_free = False  # the last step did not consume its batch
        self.needs_grad_mode = False  # the loss function differentiates inside (PINNs)
        self.quiet_fails = False  # the loss can be had in the modes of training only
        self.loss_writes: bool | None = None  # the loss function writes into its batch; None: nobody looked yet

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

    # ---- small readings -------------------------------------------------------------------------

    @property
    def others(self) -> list[HasState]:
        """What a snapshot holds beside model and optimizer: scheduler and scaler where given, lookahead and scale."""
        schedule = [] if self.schedule.scheduler is None else [stateful(self.schedule.scheduler)]
        scaler = [] if self.grad_scaler is None else [self.grad_scaler]
        return [*schedule, *scaler, self.lookahead, self.scale]

    @property
    def learning_rate(self) -> float:
        """Of the first group that has one: the schedule's, times what recovery has lowered it by."""
        return self.schedule.rate(self.optimizer)

    @property
    def moving(self) -> bool:
        """Whether anything of this library has a hand in the weights or in their rate."""
        drifting = self.lookahead.num_steps > 0 and not self.switchback.switched_off
        return drifting or self.scale.learned > 1 or self.scale.shortening or self.meter.num_jumps_accepted > 0

    @property
    def watches_data(self) -> bool:
        """Whether it matters that the data come round again."""
        return self.scale.may_grow and not self.batch_free

    @property
    def deterministic(self) -> bool:
        """Whether the gate's losses are exact: every batch is the same one."""
        exact = self.config.gate.exact
        if exact != "auto":
            return exact == "always"
        # where nothing is judged nobody measures
        return self.same_batch and (self.exactness.agreed is True or not self.observing)

    @property
    def same_batch(self) -> bool:
        """Whether the last two batches were the same one."""
        return self.data.same

    @property
    def num_predictor_failures(self) -> int:
        """How often the predictor raised."""
        return self.failures.counts[Place.PREDICTOR]

    def note_batch(self, batch: Any) -> None:
        """Look at a batch: is it the one before, do its samples come round again?

        Views of complex weights follow them where somebody moved them.  A batch may be any object, and looking at it
        may raise anything.
        """
        if self.failures.exhausted(Place.DATA):
            return
        try:
            real_views.follow(self.views)
            if self.config.enabled and self.config.gate.exact != "never":
                self.data.see(batch, again=self.batch_free)
            if self.watches_data:
                self.recurrence.see(batch)
        except Exception as error:
            self.data.forget()
            self.failures.note(Place.DATA, error)

    @property
    def position(self) -> int:
        """Of the schedule and the end of the run, in steps of the configured clock."""
        return self.meter.position(self.config.clock, self.ledger.num_credited_steps)

    def take_snapshot(self) -> Snapshot:
        """Exact copy of model, optimizer, scheduler, scaler and RNG."""
        return self.snapshot_into(None)

    def snapshot_into(self, into: Snapshot | None) -> Snapshot:
        """The same, in the memory of a copy that is needed no more."""
        return Snapshot.take(self.model, self.optimizer, self.others, offload=self.config.predictor.offload, into=into)

    def restore(self, snapshot: Snapshot, *, rng: bool = True) -> None:
        """The one call that puts a snapshot back."""
        snapshot.restore(self.model, self.optimizer, self.others, rng=rng)
        self.writes.record()  # this write is the run's own
        self.schedule.resynchronize()

    def evaluate_loss(self, batch: Any) -> Tensor:
        """Loss of a batch without a graph; falls back on grad mode for losses that differentiate inside."""
        if not self.needs_grad_mode:
            try:
                return self._loss_without_graph(batch)
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
                self.needs_grad_mode = True
        return self._loss_with_graph(batch)

    @torch.no_grad()  # not a block: an interruption at its end would leave grad mode off
    def _loss_without_graph(self, batch: Any) -> Tensor:
        return self.loss_fn(self.model, batch).detach()

    @torch.enable_grad()
    def _loss_with_graph(self, batch: Any) -> Tensor:
        return self.loss_fn(self.model, batch).detach()

    def step_scheduler(self) -> None:
        """Bring the learning-rate schedule to the clock's position."""
        self.schedule.advance(self.position)

    def planned_lr(self, num_steps: int) -> float:
        """Sum of the learning rate over the next steps; exact for ``LambdaLR``, else held constant."""
        return self.schedule.planned(self.learning_rate, num_steps)

    def note_predictor_failure(self, error: Exception) -> None:
        """Count, and say once what happened."""
        self.failures.note(Place.PREDICTOR, error, name=name_of(self.predictor))

    def note_time(self, step_seconds: float | None) -> None:
        """A step took so long (None: it was no real one); a predictor that takes too much beside it is dropped."""
        if step_seconds is not None:
            self.time.note_step(step_seconds)
        if self.time.objection is not None:
            self.failures.drop(Place.PREDICTOR, self.time.objection, name_of(self.predictor))

    # ---- windows -----------------------------------------------------------------------------------

    def watch_step(self, *, last: bool) -> None:
        """Add a real step to the open window; what raises (no memory for the sums) must not end a run."""
        try:
            with host.own_defaults():
                self.basis.accumulate()
                self.basis.before_step(last=last)
        except Exception as error:
            self.note_unwatched(error)

    def note_unwatched(self, error: Exception) -> None:
        """A window could not be kept: the next one begins, or none if that happens again and again."""
        self.failures.note(Place.GATE, error)
        self.basis.restart_window()
        self.lr_integral = 0.0
        if self.failures.exhausted(Place.GATE):
            self.num_rest_steps = NEVER

    def close_window(self) -> Window:
        """Close the basis window and describe it for the predictor."""
        num_steps, jumped = self.basis.num_steps, self.basis.jumped
        self.closing = True
        hindsight = self.basis.close_window()
        self.closing = False
        step = self.meter.num_real_steps
        self.window_loss = self.history.close_window(step, num_steps)
        self.loss_slope = self.history.loss_slope()
        window = Window(
            index=self.num_windows,
            num_steps=num_steps,
            num_columns=self.basis.num_columns,
            step=step,
            loss=self.window_loss,
            loss_slope=self.loss_slope,
            gradient_norm=self.history.mean_norm(num_steps),
            learning_rate=self.learning_rate,
            lr_integral=self.lr_integral,
            lr_ahead=self.planned_lr(num_steps),
            jumped=jumped,
            features=loss_features(self.history.losses, step),
            products=self.basis.products(),
            hindsight=hindsight,
            group_sizes=self.groups.sizes,
            refused=self.refused,
        )
        self.refused = False
        window = self.observer.complete(window, self.basis)
        if self.predictor.spec.curvature and not self.deterministic:
            self.num_rest_steps = self.config.predictor.rest_windows * self.config.predictor.window
        self.window = window
        self.num_windows += 1
        self.num_windows_since_proposal += 1
        self.lr_integral = 0.0
        return window

    # ---- state ----------------------------------------------------------------------------------------

    def adopt(self, predictor: str) -> None:
        """Go over to the predictor that a checkpoint was written with, where the choice is ours."""
        if self.chooses and predictor != self.predictor.name:
            choose(self, predictor)

    _SCALARS = (
        "horizon", "refused", "window_just_closed", "num_windows", "num_windows_since_proposal", "num_rest_steps",
        "num_real_steps_since_predict", "num_forced_full_steps", "forced_by_alarm",
        "num_schedule_steps", "lr_integral", "loss_slope", "window_loss", "peak_rate", "needs_grad_mode",
        "quiet_fails", "batch_free", "loss_writes", "anchor_real_steps", "anchor_schedule_steps",
    )  # fmt: skip

    def state_dict(self) -> State:
        """What the library itself remembers (model, optimizer and schedule are saved beside it)."""
        return {
            "predictor": self.predictor.name,
            "phase": self.phases.current.value,
            "scalars": {name: operator.attrgetter(_place(name))(self) for name in self._SCALARS},
            "counters": self.meter.state_dict(),
            "history": self.history.state_dict(),
            "monitor": self.monitor.state_dict(),
            "ledger": self.ledger.state_dict(),
            "window": window_state(self.window),
            "adaptation": self.adaptation.state_dict(),
            "scale": self.scale.state_dict(),
            "lookahead": self.lookahead.state_dict(),
            "switchback": self.switchback.state_dict(),
            "schedule": self.schedule.state_dict(),
            "confidence": self.stated_confidence,
            "generator": self.generator.get_state(),
            "probation": probation_state(self.probation),
            "segment": segment_state(self.segment),
            "anchor": snapshot_state(self.rollback.point),
            "guard": self.guard.state_dict(),
            "recurrence": self.recurrence.state_dict(),
            "validation": None if self.validation is None else self.validation.state_dict(),
            "raise_point": snapshot_state(self.raise_point),
            "safe_point": snapshot_state(self.safe_point),
            "data": self.data.state_dict(),
            "exactness": self.exactness.state_dict(),
            "failures": self.failures.state_dict(),
            "cuts": dict(self.cuts),
            "trained": self.trained.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`; the predictor's own state is taken back beside it, after :meth:`adopt`."""
        self.adopt(state["predictor"])
        self.phases.current = Phase(state["phase"])
        for name in self._SCALARS:
            owner, _, last = _place(name).rpartition(".")
            setattr(operator.attrgetter(owner)(self) if owner else self, last, state["scalars"][name])
        self.meter.load_state_dict(state["counters"])
        self.history.load_state_dict(state["history"])
        self.monitor.load_state_dict(state["monitor"])
        self.ledger.load_state_dict(state["ledger"])
        self.window = window_from_state(state["window"])
        self.adaptation.load_state_dict(state["adaptation"])
        self.scale.load_state_dict(state["scale"])
        self.lookahead.load_state_dict(_placed(state["lookahead"], self.parameters))
        self.switchback.load_state_dict(state["switchback"])
        self.schedule.load_state_dict(state.get("schedule", {}))  # of an older checkpoint: rates were not lowered
        self.stated_confidence = state["confidence"]
        self.generator.set_state(state["generator"])
        self.probation = probation_from(state["probation"])
        self.segment = segment_from(state["segment"])
        self.window_seconds = float("nan")
        self.rollback.point, self.rollback.spare = snapshot_from(state["anchor"]), None
        self.guard.load_state_dict(state["guard"])
        self.recurrence.load_state_dict(state["recurrence"])
        if self.validation is not None and state["validation"] is not None:
            self.validation.load_state_dict(state["validation"])
        self.raise_point = snapshot_from(state["raise_point"])
        self.safe_point = snapshot_from(state["safe_point"])
        self.data.load_state_dict(state["data"])
        self.exactness.load_state_dict(state["exactness"])
        self.failures.load_state_dict(state["failures"])
        self.cuts = dict(state["cuts"])
        self.trained.load_state_dict(state["trained"])
        self.writes.record()


def _place(name: str) -> str:
    return former_names.ATTRIBUTES.get(name, name)


def _placed(state: State, parameters: Sequence[Tensor]) -> State:
    """Lists of one tensor per parameter brought to its device: those of a checkpoint are in host memory."""

    def moved(value: Any) -> Any:
        per_parameter = isinstance(value, list) and len(value) == len(parameters)
        return [t.to(p.device) for t, p in zip(value, parameters, strict=True)] if per_parameter else value

    return {name: moved(value) for name, value in state.items()}
