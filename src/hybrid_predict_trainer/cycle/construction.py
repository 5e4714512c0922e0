"""A run from what a user hands in, checked: what a trainer and an engine that rides along are both built from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..config.settings import AUTO, EXACT, NEED_RESIDUALS, HybridTrainerConfig
from ..distributed.processes import Shared, shared_by
from ..judge.validation import ValFn, Validation
from ..keep import resume
from ..keep.subject import JudgeFn, LossFn, OutputFn, ResidualFn, Subject
from ..move.modifier import StepModifier
from ..notices import warn
from ..observe.window_encoder import NullObserver
from ..predictors import Predictor
from ..records import ConfigError
from ..tell.sinks import NullSink, Sink, Writer, sink_of
from ..weights.decay import has_coupled_decay
from ..weights.offload import own_defaults
from ..weights.parameters import optimizer_parameters
from .handed_in import check_handed_in
from .hooks import is_attached, with_hooks
from .state import State


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """``model(**batch).loss`` for mappings, as the model libraries return it.

    Raises:
        TypeError: the batch is not a mapping: then a ``loss_fn`` is needed.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batches are {type(batch).__name__}: pass loss_fn=lambda model, batch: ... (the default needs mappings)"
        )
    output = model(**batch)
    loss = output["loss"] if isinstance(output, Mapping) else output.loss
    assert isinstance(loss, Tensor), "the model's output has no loss: pass loss_fn"
    return loss


#: What the first argument of a loss of (model, batch) is called, and the second one of (output, target).
_MODELS = ("model", "module", "net", "network", "m")
_TARGETS = ("target", "targets", "label", "labels", "y_true")


class PairLoss:
    """A loss of (output, target), such as ``nn.MSELoss()``, for batches that are pairs of input and target."""

    def __init__(self, loss: Callable[[Any, Any], Tensor]) -> None:
        """Bind."""
        self.loss = loss

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Loss of a batch.

        Raises:
            TypeError: the batch is no pair.
        """
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError(
                f"loss_fn = {self.loss!r} compares an output with a target, and the batch is no pair (input, target) "
                f"but a {type(batch).__name__}: pass loss_fn=lambda model, batch: ..."
            )
        return self.loss(model(batch[0]), batch[1])


def of_model_and_batch(loss_fn: Any) -> Any:
    """A loss function as (model, batch) -> loss; losses of (output, target) are known by their second argument."""
    if loss_fn is None or isinstance(loss_fn, PairLoss):
        return loss_fn
    try:
        called = loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn
        names = list(inspect.signature(called).parameters)
    except (TypeError, ValueError):  # built in
        return loss_fn
    pair = len(names) > 1 and names[1] in _TARGETS and names[0] not in _MODELS
    return PairLoss(loss_fn) if pair else loss_fn


@dataclass(frozen=True, slots=True, kw_only=True)
class Handed:
    """What a user may hand in beside model, optimizer and settings; see :class:`.HybridTrainer`.

    Attributes:
        owns_schedule: We step the schedule; else the caller's loop does.
    """

    loss_fn: LossFn | None = None
    lr_scheduler: Any = None
    grad_scaler: Any = None
    predictor: Predictor | None = None
    roles: dict[str, str] | None = None
    lr_interval: Literal["step", "epoch"] | None = None
    val_fn: ValFn | None = None
    val_cost: float = 1.0
    sinks: Sequence[Sink | Writer] = ()
    modifiers: Sequence[StepModifier] = ()
    owns_schedule: bool = True
    residual_fn: ResidualFn | None = None
    output_fn: OutputFn | None = None
    judge_fn: JudgeFn | None = None


def build_run(model: nn.Module, optimizer: Optimizer, config: HybridTrainerConfig | None, handed: Handed) -> State:
    """Check what was handed in, and bind it; nothing is changed before the first step.

    Raises:
        ConfigError: something is of the wrong type or does not belong to the rest; the optimizer needs a closure
            (LBFGS) or has an engine already; the schedule needs a metric; nothing can be trained; or prediction is on
            and ranks cannot agree (see :func:`.shared_by`).
    """
    check_handed_in(
        model, optimizer, config, loss_fn=handed.loss_fn, lr_scheduler=handed.lr_scheduler,
        grad_scaler=handed.grad_scaler,
        others={
            "predictor": handed.predictor, "val_fn": handed.val_fn, "sinks": handed.sinks,
            "modifiers": handed.modifiers, "judge_fn": handed.judge_fn,
        },
    )  # fmt: skip
    hooked = with_hooks(optimizer)
    if hooked is not None and is_attached(hooked):
        raise ConfigError("an engine rides along with this optimizer already: detach() it first")
    config = config if config is not None else HybridTrainerConfig()
    if handed.lr_interval is not None:
        config = replace(config, lr_interval=handed.lr_interval)
    shared = shared_by(model, optimizer_parameters(optimizer), predicts=config.enabled)
    if isinstance(optimizer, LBFGS):
        raise ConfigError(
            "LBFGS evaluates the loss several times per step through a closure and cannot be wrapped; "
            "use Adam or SGD: the secant predictor supplies the curvature"
        )
    if isinstance(handed.lr_scheduler, ReduceLROnPlateau) and handed.owns_schedule:
        raise ConfigError(
            "ReduceLROnPlateau needs a metric at every step and cannot follow the trainer's clock; use another "
            "schedule, or step it yourself and pass lr_scheduler=None"
        )
    if not handed.val_cost >= 0:
        raise ConfigError(f"val_cost = {handed.val_cost!r} is out of range: forwards of a training batch, at least 0")
    _check_residuals(config, handed, optimizer)
    validation = None if handed.val_fn is None else Validation(handed.val_fn, handed.val_cost)
    _check_sources(config, handed, shared)
    with own_defaults():
        subject = Subject.of(
            shared.model or model, optimizer, of_model_and_batch(handed.loss_fn) or default_loss,
            handed.grad_scaler, handed.roles, residual_fn=handed.residual_fn, output_fn=handed.output_fn, shared=shared,
        )  # fmt: skip
        subject = replace(subject, judge_fn=handed.judge_fn)
        run = State(
            subject, config, handed.lr_scheduler, predictor=handed.predictor, validation=validation,
            owns_schedule=handed.owns_schedule, modifiers=handed.modifiers,
        )  # fmt: skip
    _check_sharded(run)
    # one file of records, not one per rank
    run.recorder.write_to(sink_of(config, handed.sinks) if shared.ranks.first else NullSink())
    if config.checkpoint.directory:
        resume.warn_unless_savable(run, run.recorder)
    return run


def _check_sources(config: HybridTrainerConfig, handed: Handed, shared: Shared) -> None:
    """What a source proposes from its own batch is another move on every rank.

    Raises:
        ConfigError: there are several ranks, and a source of proposals.
    """
    if shared.ranks.alone or config.never_predicts or handed.predictor is not None:
        return
    if config.predictor_type in NEED_RESIDUALS:
        raise ConfigError(
            f"predictor.type = {config.predictor_type!r} solves for the residuals of one process's batch, and there "
            f"are {shared.ranks.size} processes: choose another predictor, or train in one process"
        )
    form = config.predictor.quasi_newton.form
    if form != "limited" and config.predictor_type in (AUTO, EXACT):
        raise ConfigError(
            f"predictor.quasi_newton.form = {form!r} steps on one process's batch, and there are {shared.ranks.size} "
            'processes: set it to "limited"'
        )


def _check_sharded(run: State) -> None:
    """What looks at whole matrices or asks a scaler of one process cannot do so with parts.

    Raises:
        ConfigError: weights are sharded, and settings or a gradient scaler ask for that.
    """
    subject = run.subject
    if not subject.gathering or not run.config.enabled:
        return
    if subject.grad_scaler is not None:
        raise ConfigError(
            "a gradient scaler with sharded weights (fully_shard) is not supported: train in bfloat16 "
            "(MixedPrecisionPolicy), or set enabled=False"
        )
    if run.windows.observing and not isinstance(run.windows.observer, NullObserver):
        raise ConfigError(
            "encoder.health, encoder.low_rank, encoder.kfac and predictors that ask for them look at whole matrices, "
            "and weights are sharded (fully_shard): choose another predictor, and leave these at their defaults"
        )


#: What to do where closed form would leave weight decay out.
CURE_OF_DECAY = "take AdamW, whose decay is not, or weight_decay=0 and a penalty in the loss and its residuals"


def _check_residuals(config: HybridTrainerConfig, handed: Handed, optimizer: Optimizer) -> None:
    """What looks at residuals needs a function that has them, and that they are all there is to the gradient.

    Raises:
        ConfigError: there is none, there are two, it is no function, or the optimizer adds weight decay.
    """
    for name in ("residual_fn", "output_fn"):
        value = getattr(handed, name)
        if value is not None and not callable(value):
            raise ConfigError(f"{name} must be a function (model, batch) -> ..., not {type(value).__name__}")
    if handed.residual_fn is not None and handed.output_fn is not None:
        raise ConfigError("residual_fn and output_fn are two ways to say the same: pass one of them")
    needs = not config.never_predicts and handed.predictor is None and config.predictor_type in NEED_RESIDUALS
    if needs and handed.residual_fn is None and handed.output_fn is None:
        raise ConfigError(
            f"predictor.type = {config.predictor_type!r} needs residuals: pass residual_fn=lambda model, batch: ... of "
            "shape (R,) or (R, C) whose mean square is the loss, or output_fn= with a convex loss"
        )
    if not has_coupled_decay(optimizer):
        return
    added = f"{type(optimizer).__name__} adds its weight_decay to the gradient, which closed form would leave out"
    if needs:
        raise ConfigError(f"predictor.type = {config.predictor_type!r}: {added}: {CURE_OF_DECAY}")
    chooses = not config.never_predicts and handed.predictor is None and config.predictor_type == AUTO
    if chooses and (handed.residual_fn is not None or handed.output_fn is not None):
        warn(f"residuals are not solved for: {added}; {CURE_OF_DECAY}")
