"""The nouns of the system: frozen records that flow from one module to the next.

Shape letters used everywhere: ``G`` parameter groups, ``K`` basis columns, ``Y`` horizon in real
optimizer steps, ``N`` steps of a window.  ``theta`` are the weights, ``x`` the averaged weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .recovery import Recovery

#: What ``state_dict`` methods return: nested plain containers, scalars and tensors, never pickled.
StateDict = dict[str, Any]
#: Its name until version 0.2.
State = StateDict


class Phase(StrEnum):
    """The four phases of the cycle."""

    WARMUP = "warmup"
    FULL = "full"
    PREDICT = "predict"
    CORRECT = "correct"

    @property
    def computes_backward(self) -> bool:
        """Whether a step of this phase runs a backward pass."""
        return self is not Phase.PREDICT


class Origin(StrEnum):
    """The point at which the gate compares losses; an accepted jump always moves theta itself.

    Raw weights carry an oscillation that hides a small gain under minibatch noise; their window
    mean does not.  With the whole data set in every batch there is no noise and theta is judged.
    """

    CURRENT = "current"  # theta, the raw weights
    AVERAGE = "average"  # x, the mean of the last window


class Reason(StrEnum):
    """Why a decision or a verdict came out as it did; the value is what a user reads."""

    WARMING_UP = "warm-up is not over"
    BASELINE_UNSTABLE = "the loss has not settled yet, warm-up goes on"
    WINDOW_OPEN = "the window is not full yet"
    FORCED_FULL = "full steps were forced"
    NEVER = "prediction is off"
    SWITCHED_OFF = "prediction does not pay on this run and has been switched off"
    NOT_READY = "the predictor has not seen enough windows"
    NOT_CONFIDENT = "confidence is below the threshold"
    OVER_BUDGET = "the overhead budget does not allow a proposal yet"
    BACKING_OFF = "waiting after refused proposals"
    RECENT_ALARM = "a recent divergence alarm forces full steps"
    NOT_PROMISING = "the predicted gain is below the price of testing it"
    WAITING = "the bandit expects more of real steps"
    CONFIDENT = "confident, affordable and due"
    EXPLORING = "too few outcomes to know: trying"
    SEGMENT = "next segment of the jump"
    PROBATION = "a jump is on probation"
    # verdicts
    WAY_BACK = "no multiple of the step lowers the loss; the weights go back to the start of the last real step"
    ACCEPTED = "the loss fell by more than the jump cost"
    NOT_FINITE = "the proposal holds NaN or infinity"
    WRONG_SHAPE = "the proposal has the wrong shape"
    PREDICTOR_FAILED = "the predictor raised an error"
    CANNOT_EVALUATE = "the proposal could not be evaluated"
    CANNOT_CUT = "the batch cannot be cut into pieces that would show the noise of its loss"
    LOSS_NOT_FINITE = "the loss at the candidate is not finite"
    TOO_LONG = "the jump leaves the trust radius"
    ZERO_JUMP = "the proposal does not move the weights"
    NO_DESCENT = "no length of the jump lowers the loss"
    NOT_SIGNIFICANT = "the improvement is not significant at its price"
    MODEL_DISAGREES = "the measured reduction is far from the predicted one"
    CONTROL_SKIP = "approved, but held out to measure what jumps are worth"
    # probation
    KEPT = "probation passed"
    DEGRADED = "the loss degraded on probation, the jump was taken back"


class Level(IntEnum):
    """Severity of a divergence signal."""

    NORMAL = 0
    CAUTION = 1
    WARNING = 2
    CRITICAL = 3


class Action(StrEnum):
    """What the trainer does about an alarm."""

    CONTINUE = "continue"
    REDUCE_HORIZON = "reduce_predict_ratio"
    CORRECT = "correct"
    FORCE_FULL = "force_full_phase"
    SKIP_STEP = "skip_step"
    ROLLBACK = "rollback_and_retry"
    ABORT = "abort"


class HybridError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigError(HybridError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""


class DivergenceError(HybridError, RuntimeError):
    """The run cannot be saved by rolling back; the message says what to do."""


class CheckpointError(HybridError, RuntimeError):
    """A checkpoint is missing, damaged or belongs to another run."""


class DamagedCheckpointError(CheckpointError):
    """What a folder holds is not what was written there: the one before may be used instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the controller wants the next step to be, and why."""

    phase: Phase
    reason: Reason
    horizon: int = 0  # Y; 0 unless phase is PREDICT
    confidence: float = 0.0
    fallback_threshold: float = math.inf  # loss above which a predicted phase is abandoned


@cache
def _wanted(lag: bool, optimizer: bool, gradient: bool) -> tuple[str, ...]:
    """Names of the extra columns; asked for a dozen times a step."""
    named = (("lag", lag), ("optimizer", optimizer), ("gradient", gradient))
    return tuple(name for name, wanted in named if wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class BasisSpec:
    """Which directions a predictor needs kept.

    Columns are ordered: ``num_displacements`` window displacements, newest first, then (with
    ``differences``) the gradient differences that belong to them, then ``lag`` (x - theta),
    ``optimizer`` (the base optimizer's own update direction) and ``gradient``.
    """

    num_displacements: int = 2
    lag: bool = False
    optimizer: bool = False
    gradient: bool = False
    curvature: bool = False  # observe gradient differences, so that S'Y is known
    differences: bool = False  # keep them as columns too, and no products of the extras: twice the memory
    pooled: bool = False  # one model over all weights: products are summed over groups, G is 1
    features: bool = True  # encode the loss curve of every window; without, a window's ``features`` are zeros

    @property
    def extras(self) -> tuple[str, ...]:
        """Names of the columns behind the displacements."""
        return _wanted(self.lag, self.optimizer, self.gradient)

    @property
    def num_columns(self) -> int:
        """K."""
        return self.first_extra + len(self.extras)

    @property
    def first_extra(self) -> int:
        """Index of the first column behind displacements and differences."""
        return self.num_displacements * (2 if self.differences else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Products:
    """Inner products of the basis per parameter group: all a predictor sees of weight space.

    ``b_k`` are the K columns; all tensors are float64 on the CPU.  Columns not yet observed are
    zero in every product; BY and Bg are kept for displacement columns and only if the predictor's
    :class:`BasisSpec` asks for curvature.

    With ``differences`` the ring holds hundreds of columns; sorting them at every step would take longer than the step.
    The products therefore stay in ring order: ``newest`` is the slot of the newest displacement.  Valid in BB are only
    |s|^2, s'y for every y newer than s, each s with the y just before it, and all of Y'Y.  BY is empty.
    """

    BB: Tensor  # (G, K, K)  b_k . b_l
    BY: Tensor  # (G, K, K)  b_k . y_l   y_l the gradient difference that belongs to displacement l
    Bg: Tensor  # (G, K)     b_k . g     g the mean gradient of the last window
    gg: Tensor  # (G,)       g . g
    newest: int = 0

    @property
    def num_groups(self) -> int:
        """G."""
        return self.BB.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hindsight:
    """The last window's displacement T seen through the basis as it was one window ago."""

    BB: Tensor  # (G, K, K)  Gram matrix of that earlier basis
    BT: Tensor  # (G, K)     its inner products with T
    TT: Tensor  # (G,)       T . T


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """One closed window of N real steps: what predictors observe.

    Losses are in units of the training loss, slopes in loss per real step, learning rates as in the optimizer's first
    group.  Tensors are float64 on the CPU unless said otherwise.  See :class:`Products` for the letters.
    """

    index: int
    num_steps: int  # N
    num_columns: int  # displacement columns that hold data, <= K
    step: int  # real steps at the end of the window
    loss: float  # mean training loss over the window
    loss_slope: float  # change of the loss per real step, from the windows before
    gradient_norm: float  # mean over the window
    learning_rate: float  # at the end
    lr_integral: float  # sum of the learning rate over the window
    lr_ahead: float  # planned sum of the learning rate per step over the next N steps
    jumped: bool  # a jump was accepted since the window before: the displacement is not pure drift
    features: Tensor  # (F,) encoded loss curve
    products: Products
    hindsight: Hindsight | None  # None for the first windows and across a jump
    group_sizes: tuple[int, ...]
    refused: bool = False  # no multiple of the last proposal helped: what the predictor believed was wrong
    encoding: Tensor | None = None  # (F,) standardised encoded state; None unless the predictor asks for it


@dataclass(frozen=True, slots=True, kw_only=True)
class PhasePrediction:
    """A forecast: the displacement of the weights over the next Y real steps, and the loss there.

    The displacement of group g is ``sum_k coefficients[g, k] * b_k`` with the K basis columns b_k.  ``alternatives``
    are other coefficients (G, K) of the same model, more damped ones say, that the gate may try in their order beside
    ``coefficients``.  Losses and reductions are in units of the training loss, ``confidence`` is a probability.
    """

    coefficients: Tensor  # (G, K)
    horizon: int  # Y
    predicted_loss: float
    loss_trajectory: tuple[tuple[int, float], ...] = ()  # sparse (step ahead, loss)
    loss_interval: tuple[float, float] = (-math.inf, math.inf)
    confidence: float = 0.0
    predicted_reduction: float = 0.0  # of the model's own loss, >= 0
    alternatives: tuple[Tensor, ...] = ()
    max_scale: float = 2.0  # the gate may lengthen the jump up to this factor
    first_fit: bool = False  # where losses are exact: take the first candidate that lowers the loss, not the best
    way_back: bool = False  # the last alternative leads back to the mean weights of the window
    epistemic: float = 0.0  # spread between members
    aleatoric: float = 0.0  # spread within one


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The gate's decision on a proposal, with what it measured.

    Losses, ``upper_bound`` and ``price`` are in units of the training loss; ``scale`` is a multiple of the proposal;
    NaN where something was not measured.
    """

    accepted: bool
    reason: Reason
    scale: float = 0.0  # accepted multiple a of the proposal
    candidate: int = 0  # which of the proposal's coefficient sets
    loss_before: float = math.nan
    loss_after: float = math.nan
    upper_bound: float = math.nan  # of the paired loss difference
    price: float = 0.0  # in loss units
    num_forward: float = 0.0  # in full-batch forwards
    origin: Origin = Origin.CURRENT

    @property
    def gain(self) -> float:
        """Measured reduction of the loss; 0 unless both losses are known."""
        gain = self.loss_before - self.loss_after
        return gain if math.isfinite(gain) else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """The most severe divergence signal of a step."""

    level: Level = Level.NORMAL
    action: Action = Action.CONTINUE
    signal: str = ""
    value: float = 0.0
    threshold: float = 0.0

    @property
    def quiet(self) -> bool:
        """Whether nothing is wrong."""
        return self.level is Level.NORMAL


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """What a prediction got wrong, with the state it was made in."""

    features: Tensor  # (F,)
    coefficients: Tensor  # (G, K) hindsight minus predicted
    loss: float  # actual minus predicted
    horizon: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one call of ``HybridTrainer.step`` did.

    ``loss`` and ``gradient_norm`` are read from the device when they are asked for, so that a loop
    which does not look at them never waits for the device.

    Attributes:
        loss_tensor: Scalar loss of this batch, before the step; of the accepted point where ``was_predicted``.
        phase: Of this step.
        was_predicted: A jump was accepted and the weights have moved by it.
        prediction_error: |measured - predicted loss| / |measured|; None without an accepted jump.
        confidence: Stated probability, in [0, 1], that the next jump is kept and pays.
        step: Calls of ``step`` so far, this one included.
        reason: One sentence: why this phase, or why the verdict.
        num_forward: Forwards of a whole batch that this step took, halves counted as halves.
        num_claimed_steps: Real steps that an accepted jump stands for.
        verdict: Of the gate; None where nothing was proposed.
        alarm: The most severe divergence signal.
        recovery: What was wrong in this step, and what was done about it; None where nothing was.
    """

    loss_tensor: Tensor
    phase: Phase
    was_predicted: bool
    prediction_error: float | None
    confidence: float
    step_time_ms: float
    step: int
    reason: str
    gradient_norm_tensor: Tensor | None = None
    skipped: bool = False  # a non-finite step that did not touch the weights
    num_forward: float = 0.0
    num_backward: int = 0
    num_claimed_steps: int = 0
    verdict: Verdict | None = None
    alarm: Alarm = field(default_factory=Alarm)
    metrics: Mapping[str, float] | None = None
    consumed: bool = True  # False: nothing was learnt from the batch, it may be used again
    recovery: Recovery | None = None

    @property
    def loss(self) -> float:
        """The loss of this step's batch (waits for the device)."""
        return float(self.loss_tensor)

    @property
    def gradient_norm(self) -> float | None:
        """Global gradient norm, None where no backward pass ran (waits for the device)."""
        return None if self.gradient_norm_tensor is None else float(self.gradient_norm_tensor)


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochResult:
    """What one pass over a loader did."""

    num_steps: int
    mean_loss: float
    final_loss: float
    phase_counts: Mapping[str, int]
    num_real_steps: int
    num_claimed_steps: int
    num_credited_steps: float
    num_forward: float
    num_backward: int
    num_jumps_proposed: int
    num_jumps_accepted: int
    backward_reduction_pct: float
    cost_units: float
    epoch_time_s: float
    stopped_early: bool = False


def zeros_like_coefficients(num_groups: int, num_columns: int) -> Tensor:
    """Coefficients (G, K) of the jump that goes nowhere."""
    return torch.zeros(num_groups, num_columns, dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class Account:
    """One approved jump, applied or skipped as a control."""

    step: int  # real steps when it was approved
    due: int  # real steps when it is settled
    skipped: bool
    horizon: int
    loss: float  # averaged training loss before
    pace: float  # share of the loss that a real step takes off
    usual: float  # ratio of the loss over a window without a jump, lately
    gain: float  # share of the loss that the gate proved the jump takes off
    price: float = 0.0  # of the proposal, in units
    left: float = math.nan  # share still there when settled
    credited: float = 0.0  # steps

    @property
    def known(self) -> bool:
        """Whether it has been settled with finite numbers."""
        return math.isfinite(self.left) and math.isfinite(self.gain)


@dataclass(slots=True)
class StepOutcome:
    """What one executor did, for the monitor and the record."""

    loss: Tensor
    gradient_norm: Tensor | None = None
    decay: Tensor | None = None  # what weight decay adds to it in what is judged by; None: nothing
    skipped: bool = False
    searching: bool = False  # skipped because a gradient scaler is looking for its scale
    verdict: Verdict | None = None
    prediction: PhasePrediction | None = None
    applied: Tensor | None = None  # (G, K) coefficients of the accepted jump, its scale included
    consumed: bool = True  # False: the batch may be used again, nothing was learnt from it
    kept: bool | None = None  # verdict of a finished probation
    probation: tuple[float, float] | None = None  # (loss before, loss after) of a finished probation
    promised: float = math.nan  # loss that the jump of a finished probation was to lead to
    forwards: float = 0.0
    backwards: int = 0
    claimed: int = 0
    prediction_ms: float = 0.0
    alarm: Alarm = field(default_factory=Alarm)  # of the loss on probation against the predicted one

    @property
    def judged(self) -> Tensor:
        """The loss with what weight decay adds to it, where that is judged by; shape ()."""
        return self.loss if self.decay is None else self.loss + self.decay.to(self.loss)
