"""Settings by dotted key: which keys there are, what they are called besides, and values put in their places."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from ..notices import warn
from ..records import ConfigError
from .former import FORMER_KEYS

Settings = TypeVar("Settings")

#: Where the flat fields of the root stand in the file, when not under ``[training]``.
FLAT_KEYS = {
    "predictor_type": "predictor.type",
    "predictor_memory_mb": "predictor.memory_budget_mb",
    "collect_metrics": "metrics.enabled",
}

#: Other spellings that are read (never written).
ALIASES = {
    "divergence.loss_sigma_threshold": "training.divergence_threshold",
    "divergence.max_gradient_norm_multiplier": "divergence.gradient_norm_multiplier",
    "training.min_full_steps": "training.full_steps",
    "training.max_predict_length": "training.max_predict_steps",
    "training.predictor_type": "predictor.type",
    "training.predictor_memory_mb": "predictor.memory_budget_mb",
    "training.collect_metrics": "metrics.enabled",
}
TABLE_ALIASES = {
    "hybrid_trainer_config": "training",
    "predictor_config": "predictor",
    "divergence_config": "divergence",
    "metrics_config": "metrics",
    "checkpoint_config": "checkpoint",
}


def keys_of(root: type) -> dict[str, tuple[str, ...]]:
    """Every dotted TOML key -> path of attribute names in a class of settings."""
    keys: dict[str, tuple[str, ...]] = {}

    def walk(cls: type, prefix: str, path: tuple[str, ...]) -> None:
        hints = typing.get_type_hints(cls)
        for f in fields(cls):
            if is_dataclass(hints[f.name]):
                walk(typing.cast(type, hints[f.name]), f"{prefix}{f.name}.", (*path, f.name))
            elif path:
                keys[prefix + f.name] = (*path, f.name)
            else:
                keys[FLAT_KEYS.get(f.name, f"training.{f.name}")] = (f.name,)

    walk(root, "", ())
    return keys


def _canonical(key: str) -> str:
    head, _, rest = key.partition(".")
    if head in TABLE_ALIASES and rest:
        key = f"{TABLE_ALIASES[head]}.{rest}"
    return ALIASES.get(key, key)


def _warn_of_former(keys: Iterable[str]) -> None:
    former = [f"{key} is now {FORMER_KEYS[key]}" for key in keys if key in FORMER_KEYS]
    if former:
        warn(f"{', '.join(former)}; former keys go with the next minor version")


def _nearest(key: str, valid: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    if not near:  # right name in the wrong table?
        last = key.rpartition(".")[2]
        near = [k for k in valid if k.rpartition(".")[2] == last][:1]
    if not near:
        by_last = {k.rpartition(".")[2]: k for k in valid}
        near = [by_last[n] for n in difflib.get_close_matches(key.rpartition(".")[2], by_last, n=1)]
    return f"; did you mean {near[0]!r}?" if near else ""


def short(value: object) -> str:
    """A value as a message shows it: what a file says may be a page long."""
    told = repr(value)
    return told if len(told) <= 120 else f"{told[:117]}..."


def _coerce(key: str, value: Any, hint: Any) -> Any:
    """Turn a TOML value into the field's type; a bool is never a number."""
    origin = typing.get_origin(hint)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key} = {short(value)} must be a list")
        return tuple(_coerce(key, item, typing.get_args(hint)[0]) for item in value)
    if origin in (typing.Union, types.UnionType, typing.Literal):
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and (type(value) is not hint):
        names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
        raise ConfigError(f"{key} = {short(value)} must be {names[hint]}")
    return value


def with_values(config: Settings, values: Mapping[str, Any]) -> Settings:
    """Replace settings by dotted TOML key.

    Args:
        config: Is left as it is.
        values: Key -> value.

    Raises:
        ConfigError: unknown key (with the nearest valid one), wrong type, value out of range, or a
            key and its alias given with different values.
    """
    valid = keys_of(type(config))
    chosen: dict[str, Any] = {}
    _warn_of_former([_canonical(key) for key in values])
    for key, value in values.items():
        name = _canonical(key)
        name = FORMER_KEYS.get(name, name)
        if name not in valid:
            raise ConfigError(f"unknown key {short(key)}{_nearest(name[:80], valid)}")
        if name in chosen and chosen[name] != value:
            both = f"{short(chosen[name])} and {short(value)}"
            raise ConfigError(f"{key!r} and its other spelling are both set, to {both}")
        chosen[name] = value
    changed: Settings = _apply(config, {valid[k]: (k, v) for k, v in chosen.items()})
    return changed


def _apply(node: Any, changes: Mapping[tuple[str, ...], tuple[str, Any]]) -> Any:
    hints = typing.get_type_hints(type(node))
    here: dict[str, Any] = {}
    for f in fields(node):
        below = {path[1:]: change for path, change in changes.items() if path[0] == f.name}
        if () in below:
            here[f.name] = _coerce(*below[()], hints[f.name])
        elif below:
            here[f.name] = _apply(getattr(node, f.name), below)
    return replace(node, **here) if here else node
