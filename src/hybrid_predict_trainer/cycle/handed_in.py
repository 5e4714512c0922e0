"""What a user hands in, checked before anything is bound: one line for each slip, which says what is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..config.settings import HybridTrainerConfig
from ..move.modifier import StepModifier
from ..records import ConfigError
from ..weights.parameters import check_values

#: What the methods of a predictor are called; see :class:`..predictors.Predictor`.
PREDICTOR = ("observe", "predict", "state_dict", "load_state_dict")
SCALER = ("scale", "step", "update", "state_dict", "load_state_dict")


def check_handed_in(
    model: Any, optimizer: Any, config: Any = None, *, loss_fn: Any = None, lr_scheduler: Any = None,
    grad_scaler: Any = None, others: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Types, and whether what was handed in belongs together.

    Args:
        model: To be a module.
        optimizer: To be an optimizer of parameters of that model.
        config: To be settings.
        loss_fn: To be callable, or None.
        lr_scheduler: To be a schedule of that optimizer, or None.
        grad_scaler: To be a ``torch.amp.GradScaler``, or None.
        others: predictor, val_fn, sinks, modifiers, judge_fn by name, as far as there are any.

    Raises:
        ConfigError: it is not.
    """
    _check_model(model, optimizer)
    if config is not None and not isinstance(config, HybridTrainerConfig):
        raise ConfigError(f"config is {_name(config)}, not a HybridTrainerConfig: {_cure_of_config(config)}")
    if loss_fn is not None and not callable(loss_fn):
        raise ConfigError(f"loss_fn is {_name(loss_fn)}: pass a function (model, batch) -> scalar loss")
    _check_schedule(lr_scheduler, optimizer)
    if grad_scaler is not None and _lacks(grad_scaler, SCALER):
        raise ConfigError(f"grad_scaler is {_name(grad_scaler)}: pass the torch.amp.GradScaler itself, or nothing")
    _check_others(**(others or {}))


def _check_model(model: Any, optimizer: Any) -> None:
    if not isinstance(model, nn.Module):
        order = " (the model comes first, then the optimizer)" if isinstance(optimizer, nn.Module) else ""
        raise ConfigError(f"model is {_name(model)}, not a torch.nn.Module{order}")
    groups = getattr(optimizer, "param_groups", None)
    if groups is None or not hasattr(optimizer, "step"):
        raise ConfigError(
            f"optimizer is {_name(optimizer)}, not an optimizer: pass torch.optim.AdamW(model.parameters(), lr=...)"
        )
    own = {id(p) for p in model.parameters()}
    held = [p for group in groups for p in group["params"]]
    if held and own and not any(id(p) in own for p in held):
        raise ConfigError(
            "none of the optimizer's parameters is the model's: make the optimizer from model.parameters(), after the "
            "model was moved, wrapped or loaded"
        )
    check_values(held)


def _cure_of_config(config: Any) -> str:
    if isinstance(config, Mapping):
        return "say with_values(HybridTrainerConfig(), {...}) for settings by name"
    return "pass it by name (loss_fn=...)" if callable(config) else "pass HybridTrainerConfig(...) or load_config(path)"


def _check_schedule(scheduler: Any, optimizer: Any) -> None:
    if scheduler is None:
        return
    if isinstance(scheduler, type | str | Optimizer) or not hasattr(scheduler, "step"):
        raise ConfigError(f"lr_scheduler is {_name(scheduler)}: pass a schedule that was made for this optimizer")
    groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", None)
    if isinstance(groups, list) and not {id(g) for g in groups} & {id(g) for g in optimizer.param_groups}:
        raise ConfigError("lr_scheduler belongs to another optimizer: make it for the one that is passed")


def _check_others(
    predictor: Any = None, val_fn: Any = None, sinks: Any = (), modifiers: Any = (), judge_fn: Any = None
) -> None:
    if judge_fn is not None and not callable(judge_fn):
        raise ConfigError(f"judge_fn is {_name(judge_fn)}: pass a function (model, batch) -> score of each sample")
    if isinstance(predictor, str | type):
        named = f', or HybridTrainerConfig(predictor_type="{predictor}")' if isinstance(predictor, str) else ""
        raise ConfigError(f"predictor is {_name(predictor)}: pass an object{named}")
    if predictor is not None and _lacks(predictor, PREDICTOR):
        raise ConfigError(f"predictor is {_name(predictor)}, which has no {_lacks(predictor, PREDICTOR)[0]}()")
    if val_fn is not None and not callable(val_fn):
        raise ConfigError(f"val_fn is {_name(val_fn)}: pass a function model -> validation loss")
    _check_list("sinks", sinks, lambda each: hasattr(each, "write"), "objects with a method write(record)")
    _check_list("modifiers", modifiers, lambda each: isinstance(each, StepModifier), "objects made from StepModifier")


def _check_list(name: str, given: Any, fits: Callable[[Any], bool], wanted: str) -> None:
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise ConfigError(f"{name} is {_name(given)}: pass a list of {wanted}")
    for each in given if isinstance(given, Sequence) else ():
        if isinstance(each, type) or not fits(each):
            raise ConfigError(f"{name} holds {_name(each)}: pass {wanted}")


def _lacks(thing: Any, methods: Sequence[str]) -> list[str]:
    return [name for name in methods if not callable(getattr(thing, name, None))]


def _name(thing: Any) -> str:
    """In a message: a string as it is, a class as one, of anything else its type."""
    if isinstance(thing, str):
        return repr(thing)
    return f"the class {thing.__name__}" if isinstance(thing, type) else f"a {type(thing).__name__}"
