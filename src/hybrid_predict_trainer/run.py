"""The mutable state of one run, bundled: what executors act on and checkpoints save."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import weights
from .adaptation import Adaptation
from .basis import Basis
from .batches import Fingerprint
from .config import HybridTrainerConfig
from .corrector import Correction
from .counters import Counters
from .divergence import Monitor
from .features import loss_features
from .history import History, Readout
from .ledger import Ledger
from .lookahead import DriftLookahead, Lookahead, NoLookahead
from .observer import NullObserver, Observer, observer_for
from .phases import controller_for
from .predictors import Predictor, build
from .predictors._common import window_from_state, window_state
from .records import Level, Phase, PhasePrediction, State, Window
from .snapshot import BufferGuard, HasState, Snapshot
from .step_scale import CHECK_STEPS, LearnedScale, StepScale, UnitScale
from .switchback import Switchback

LossFn = Callable[[nn.Module, Any], Tensor]


@dataclass(slots=True)
class Probation:
    """A jump on trial: how to take it back, and what it must not be worse than."""

    snapshot: Snapshot
    basis: State
    num_schedule_steps: int
    num_steps_left: int
    loss_before: float  # smoothed training loss before the jump
    std_before: float
    predicted_loss: float
    fallback_threshold: float  # smoothed loss above which the jump is taken back whatever else
    claimed: int
    extended: bool = False  # the prediction error asked for more steps once
    losses: list[float] = field(default_factory=list)
    unread: list[Tensor] = field(default_factory=list)  # losses since: an accelerator is asked for them at the end
    worst_level: Level = Level.NORMAL

    def read(self) -> None:
        """Bring the losses to the host."""
        self.losses += weights.on_host(self.unread).tolist()
        self.unread = []


@dataclass(slots=True)
class Segment:
    """What is left of a jump that is checked in several pieces."""

    prediction: PhasePrediction
    num_left: int


class Run:
    """Model, optimizer and everything the library knows about training them."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, config: HybridTrainerConfig, loss_fn: LossFn,
        lr_scheduler: Any = None, grad_scaler: Any = None, roles: dict[str, str] | None = None,
        predictor: Predictor | None = None,
    ) -> None:  # fmt: skip
        """Bind everything; no memory beyond Python objects is taken before training starts."""
        self.model, self.optimizer, self.config = model, optimizer, config
        self.loss_fn, self.lr_scheduler, self.grad_scaler = loss_fn, lr_scheduler, grad_scaler
        self.parameters, self.groups = weights.predicted_parameters(model, optimizer, roles)
        self.on_cpu = all(p.device.type == "cpu" for p in self.parameters)
        self.predictor = (
            predictor if predictor is not None else build(config, self.groups.num_groups, self.groups.num_weights)
        )
        if self.predictor.spec.pooled:
            self.groups = self.groups.pooled()
        self.basis = Basis(
            self.parameters, self.groups, self.predictor.spec,
            dtype=config.predictor.basis_dtype, offload=config.predictor.offload,
        )  # fmt: skip
        self.controller = controller_for(config)
        self.observing = not config.never_predicts
        self.scale: StepScale = UnitScale()
        # both raise the noise that weights settle with, and count on a schedule to take it out again
        annealed = self.observing and lr_scheduler is not None
        if annealed and (config.max_learned_scale > 1 or config.min_learned_scale < 1):
            # on an accelerator a check waits for the device: as often as losses are read, no more
            steps = CHECK_STEPS if self.on_cpu else max(CHECK_STEPS, config.divergence.check_interval_steps)
            self.scale = LearnedScale(
                self.groups, config.max_learned_scale, config.min_learned_scale, steps,
                untrained=weights.untrained(self.parameters, self.groups.names),
            )  # fmt: skip
        self.observer: Observer = NullObserver()
        if self.observing:
            self.observer = observer_for(
                config.encoder, self.predictor, model, self.parameters, self.groups, self.predictor.spec, grad_scaler
            )
        self.lookahead: Lookahead = NoLookahead()
        if annealed and (config.lookahead > 0 or config.smoothing > 0):
            self.lookahead = DriftLookahead(config.lookahead, config.smoothing, config.drift)
        self.switchback = Switchback(config.gate.control_fraction)
        self.peak_rate = 0.0  # highest learning rate so far
        self.history = History()
        self.readout = Readout(config.divergence.check_interval_steps)
        self.monitor = Monitor(config.divergence, config.divergence_threshold)
        self.ledger = Ledger(config.gate)
        self.adaptation = Adaptation(config, self.predictor.spec, self.groups.num_groups)
        self.counters = Counters()
        self.buffers = BufferGuard(model)
        self.generator = torch.Generator().manual_seed(config.seed)

        self.stated_confidence = 0.5  # of the last proposal considered
        self.refused = False  # since the last window
        self.phase = Phase.WARMUP
        self.horizon = min(max(config.min_predict_steps, 4 * config.predictor.window), max(config.max_predict_steps, 1))
        self.window_just_closed = False
        self.num_windows = 0
        self.num_windows_since_proposal = 0
        self.num_real_steps_since_predict = 0
        self.num_rest_steps = 0  # real steps still to pass before the next window is observed
        self.num_forced_full_steps = 0
        self.forced_by_alarm = False
        self.num_predictor_failures = 0
        self.num_schedule_steps = 0
        self.lr_integral = 0.0  # over the open window
        self.window_seconds = 0.0  # wall time of its real steps; NaN: not all of them were timed
        self.loss_slope = 0.0
        self.window_loss = float("nan")
        self.window: Window | None = None  # the last one closed
        self.correction: Correction | None = None  # of the last proposal, for the record
        self.probation: Probation | None = None
        self.segment: Segment | None = None
        self.anchor: Snapshot | None = None  # for non-finite steps seen late
        self.old_anchor: Snapshot | None = None  # the last one: only its memory is of use
        self.anchor_real_steps = self.anchor_schedule_steps = 0  # where it was taken
        self.last_batch: Fingerprint | None = None  # None after a resume: then same_batch stands
        self.same_batch = False  # the last two batches were the very same tensors
        self.batch_free = False  # the last step did not consume its batch
        self.needs_grad_mode = False  # the loss function differentiates inside (PINNs)

    # ---- small readings -------------------------------------------------------------------------

    @property
    def others(self) -> list[HasState]:
        """What a snapshot holds beside model and optimizer: scheduler and scaler where given, lookahead and scale."""
        given = [o for o in (self.lr_scheduler, self.grad_scaler) if o is not None]
        return [*given, self.lookahead, self.scale]

    @property
    def learning_rate(self) -> float:
        """Of the first group that has one."""
        return float(self.optimizer.param_groups[0].get("lr", 0.0))

    @property
    def deterministic(self) -> bool:
        """Whether the gate's losses are exact: every batch is the same one."""
        exact = self.config.gate.exact
        return self.same_batch if exact == "auto" else exact == "always"

    def note_batch(self, batch: Any) -> None:
        """Compare a batch with the one before."""
        current = Fingerprint(batch)
        # a refused proposal's batch is given again: that says nothing of the data
        if self.last_batch is not None and not self.batch_free:
            self.same_batch = current.matches(self.last_batch)
        self.last_batch = current

    @property
    def position(self) -> int:
        """Of the schedule and the end of the run, in steps of the configured clock."""
        return self.counters.position(self.config.clock, self.ledger.num_credited_steps)

    def take_snapshot(self) -> Snapshot:
        """Exact copy of model, optimizer, scheduler, scaler and RNG."""
        return self._snapshot(None)

    def _snapshot(self, into: Snapshot | None) -> Snapshot:
        return Snapshot.take(self.model, self.optimizer, self.others, offload=self.config.predictor.offload, into=into)

    def set_anchor(self) -> None:
        """Take the anchor here, in the memory of the last one."""
        self.anchor, self.old_anchor = self._snapshot(self.old_anchor), None
        self.anchor_real_steps, self.anchor_schedule_steps = self.counters.num_real_steps, self.num_schedule_steps

    def drop_anchor(self) -> None:
        """There is none any more."""
        if self.anchor is not None:
            self.anchor, self.old_anchor = None, self.anchor

    def restore(self, snapshot: Snapshot, *, rng: bool = True) -> None:
        """The one call that puts a snapshot back."""
        snapshot.restore(self.model, self.optimizer, self.others, rng=rng)

    def evaluate_loss(self, batch: Any) -> Tensor:
        """Loss of a batch without a graph; falls back on grad mode for losses that differentiate inside."""
        if not self.needs_grad_mode:
            try:
                with torch.no_grad():
                    return self.loss_fn(self.model, batch).detach()
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
                self.needs_grad_mode = True
        with torch.enable_grad():
            return self.loss_fn(self.model, batch).detach()

    def step_scheduler(self) -> None:
        """Bring the learning-rate schedule to the clock's position."""
        target = self.position
        # OneCycleLR raises beyond its end, which the last steps on probation may pass
        target = min(target, getattr(self.lr_scheduler, "total_steps", None) or target)
        if self.lr_scheduler is not None:
            for _ in range(max(0, target - self.num_schedule_steps)):
                self.lr_scheduler.step()
        self.num_schedule_steps = max(self.num_schedule_steps, target)

    def planned_lr(self, num_steps: int) -> float:
        """Sum of the learning rate over the next steps; exact for ``LambdaLR``, else held constant."""
        schedule = self.lr_scheduler
        if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            base, factor, now = schedule.base_lrs[0], schedule.lr_lambdas[0], schedule.last_epoch
            return float(sum(base * factor(now + i) for i in range(num_steps)))
        return self.learning_rate * num_steps

    def note_predictor_failure(self, error: Exception) -> None:
        """Count, and say once what happened."""
        self.num_predictor_failures += 1
        if self.num_predictor_failures == 1:
            warnings.warn(
                f"predictor {self.predictor.name!r} failed ({type(error).__name__}: {error}); training goes on",
                stacklevel=2,
            )

    # ---- windows -----------------------------------------------------------------------------------

    def close_window(self) -> Window:
        """Close the basis window and describe it for the predictor."""
        num_steps, jumped = self.basis.num_steps, self.basis.jumped
        hindsight = self.basis.close_window()
        step = self.counters.num_real_steps
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

    _SCALARS = (
        "horizon", "refused", "window_just_closed", "num_windows", "num_windows_since_proposal", "num_rest_steps",
        "num_real_steps_since_predict", "num_forced_full_steps", "forced_by_alarm", "num_predictor_failures",
        "num_schedule_steps", "lr_integral", "loss_slope", "window_loss", "peak_rate", "same_batch", "needs_grad_mode",
        "anchor_real_steps", "anchor_schedule_steps",
    )  # fmt: skip

    def state_dict(self) -> State:
        """What the library itself remembers (model, optimizer and schedule are saved beside it)."""
        return {
            "phase": self.phase.value,
            "scalars": {name: getattr(self, name) for name in self._SCALARS},
            "counters": self.counters.state_dict(),
            "history": self.history.state_dict(),
            "monitor": self.monitor.state_dict(),
            "ledger": self.ledger.state_dict(),
            "window": window_state(self.window),
            "adaptation": self.adaptation.state_dict(),
            "scale": self.scale.state_dict(),
            "lookahead": self.lookahead.state_dict(),
            "switchback": self.switchback.state_dict(),
            "confidence": self.stated_confidence,
            "generator": self.generator.get_state(),
            "probation": _probation_state(self.probation),
            "segment": _segment_state(self.segment),
            "anchor": None if self.anchor is None else self.anchor.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.phase = Phase(state["phase"])
        for name in self._SCALARS:
            setattr(self, name, state["scalars"][name])
        self.counters.load_state_dict(state["counters"])
        self.history.load_state_dict(state["history"])
        self.monitor.load_state_dict(state["monitor"])
        self.ledger.load_state_dict(state["ledger"])
        self.window = window_from_state(state["window"])
        self.adaptation.load_state_dict(state["adaptation"])
        self.scale.load_state_dict(state["scale"])
        self.lookahead.load_state_dict(_placed(state["lookahead"], self.parameters))
        self.switchback.load_state_dict(state["switchback"])
        self.stated_confidence = state["confidence"]
        self.generator.set_state(state["generator"])
        self.probation = _probation_from(state["probation"])
        self.segment = _segment_from(state["segment"])
        self.window_seconds = float("nan")
        self.anchor = None if state["anchor"] is None else Snapshot.from_state_dict(state["anchor"])
        self.old_anchor = None
        self.last_batch = None


def _placed(state: State, parameters: Sequence[Tensor]) -> State:
    """Lists of one tensor per parameter brought to its device: those of a checkpoint are in host memory."""

    def moved(value: Any) -> Any:
        per_parameter = isinstance(value, list) and len(value) == len(parameters)
        return [t.to(p.device) for t, p in zip(value, parameters, strict=True)] if per_parameter else value

    return {name: moved(value) for name, value in state.items()}


def _probation_state(p: Probation | None) -> State | None:
    if p is None:
        return None
    p.read()
    return {
        "snapshot": p.snapshot.state_dict(), "basis": p.basis,
        "num_schedule_steps": p.num_schedule_steps, "num_steps_left": p.num_steps_left,
        "loss_before": p.loss_before, "std_before": p.std_before, "predicted_loss": p.predicted_loss,
        "fallback_threshold": p.fallback_threshold, "extended": p.extended, "claimed": p.claimed,
        "losses": list(p.losses), "worst_level": int(p.worst_level),
    }  # fmt: skip


def _probation_from(state: State | None) -> Probation | None:
    if state is None:
        return None
    values = dict(state)
    values["snapshot"] = Snapshot.from_state_dict(values["snapshot"])
    values["worst_level"] = Level(values["worst_level"])
    return Probation(**values)


def _segment_state(s: Segment | None) -> State | None:
    if s is None:
        return None
    p = s.prediction
    return {
        "num_left": s.num_left, "coefficients": p.coefficients, "horizon": p.horizon,
        "predicted_loss": p.predicted_loss, "predicted_reduction": p.predicted_reduction,
        "confidence": p.confidence, "max_scale": p.max_scale, "alternatives": list(p.alternatives),
    }  # fmt: skip


def _segment_from(state: State | None) -> Segment | None:
    if state is None:
        return None
    values = dict(state)
    num_left = values.pop("num_left")
    values["alternatives"] = tuple(values["alternatives"])
    return Segment(PhasePrediction(**values), num_left)
