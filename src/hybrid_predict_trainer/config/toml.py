"""TOML in and out: strict keys, one clear line per mistake.

Tables and names follow the published schema (``[training] [predictor] [predictor.<kind>]
[divergence] [metrics] [checkpoint]``, and ``[gate] [lookahead]``).  Names of the older methodology document
and of earlier versions (:mod:`.former`, with one line of warning) are read as aliases; the canonical ones are written.
"""

from __future__ import annotations

import difflib
import functools
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from ..notices import warn
from ..records import ConfigError
from ..safe_files import UnusableFileError, read_text
from .former import FORMER_KEYS
from .presets import PRESETS
from .settings import HybridTrainerConfig

#: Largest file that is read: a config is a page, not a data set.
MAX_TOML_BYTES = 100_000
#: Longest key that is read, in parts.  Ours have three; reading a key takes time like the square of its parts.
MAX_KEY_PARTS = 8
_KEY_PART = r"""(?:[\w-]+|"[^"\n]*"|'[^'\n]*')"""
_LONG_KEY = re.compile(rf"(?<![\w-]){_KEY_PART}(?:[ \t]*\.[ \t]*{_KEY_PART}){{{MAX_KEY_PARTS}}}")

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


def valid_keys() -> dict[str, tuple[str, ...]]:
    """Every dotted TOML key -> path of attribute names in :class:`HybridTrainerConfig`."""
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

    walk(HybridTrainerConfig, "", ())
    return keys


def parse(text: str) -> dict[str, Any]:
    """TOML text -> its tables.

    Raises:
        ConfigError: not TOML, too long, nested too deep, or a key of more than :data:`MAX_KEY_PARTS` parts.
    """
    if len(text) > MAX_TOML_BYTES:
        raise ConfigError(f"{len(text)} characters are too many for a configuration (at most {MAX_TOML_BYTES})")
    if _LONG_KEY.search(text):
        raise ConfigError(f"a key has more than {MAX_KEY_PARTS} parts")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError("not valid TOML: nested too deep") from None
    except ValueError as error:  # a number of more digits than Python reads is one, too
        raise ConfigError(f"not valid TOML: {error}") from None


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key.

    Raises:
        ConfigError: tables nested deeper than any key of ours.
    """
    if prefix.count(".") > MAX_KEY_PARTS:
        raise ConfigError(f"a key has more than {MAX_KEY_PARTS} parts: {prefix[:40]}...")
    flat: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def _canonical(key: str) -> str:
    head, _, rest = key.partition(".")
    if head in TABLE_ALIASES and rest:
        key = f"{TABLE_ALIASES[head]}.{rest}"
    return ALIASES.get(key, key)


def _warn_of_former(keys: Iterable[str]) -> None:
    former = [f"{key} is now {FORMER_KEYS[key]}" for key in keys if key in FORMER_KEYS]
    if former:
        warn(f"{', '.join(former)}; former keys go with the next minor version", stacklevel=3)


def _nearest(key: str, valid: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    if not near:  # right name in the wrong table?
        last = key.rpartition(".")[2]
        near = [k for k in valid if k.rpartition(".")[2] == last][:1]
    if not near:
        by_last = {k.rpartition(".")[2]: k for k in valid}
        near = [by_last[n] for n in difflib.get_close_matches(key.rpartition(".")[2], by_last, n=1)]
    return f"; did you mean {near[0]!r}?" if near else ""


def _short(value: object) -> str:
    """A value as a message shows it: what a file says may be a page long."""
    told = repr(value)
    return told if len(told) <= 120 else f"{told[:117]}..."


def _coerce(key: str, value: Any, hint: Any) -> Any:
    """Turn a TOML value into the field's type; a bool is never a number."""
    origin = typing.get_origin(hint)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key} = {_short(value)} must be a list")
        return tuple(_coerce(key, item, typing.get_args(hint)[0]) for item in value)
    if origin in (typing.Union, types.UnionType, typing.Literal):
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and (type(value) is not hint):
        names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
        raise ConfigError(f"{key} = {_short(value)} must be {names[hint]}")
    return value


def with_values(config: HybridTrainerConfig, values: Mapping[str, Any]) -> HybridTrainerConfig:
    """Replace settings by dotted TOML key.

    Raises:
        ConfigError: unknown key (with the nearest valid one), wrong type, value out of range, or a
            key and its alias given with different values.
    """
    valid = valid_keys()
    chosen: dict[str, Any] = {}
    _warn_of_former([_canonical(key) for key in values])
    for key, value in values.items():
        name = _canonical(key)
        name = FORMER_KEYS.get(name, name)
        if name not in valid:
            raise ConfigError(f"unknown key {_short(key)}{_nearest(name[:80], valid)}")
        if name in chosen and chosen[name] != value:
            both = f"{_short(chosen[name])} and {_short(value)}"
            raise ConfigError(f"{key!r} and its other spelling are both set, to {both}")
        chosen[name] = value
    changed: HybridTrainerConfig = _apply(config, {valid[k]: (k, v) for k, v in chosen.items()})
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


def loads(text: str, source: str = "<string>") -> HybridTrainerConfig:
    """Parse TOML text.  A top-level ``preset = "name"`` is applied first.

    Raises:
        ConfigError: not TOML, or anything :func:`with_values` refuses; the message names ``source``.
    """
    try:
        table = parse(text)
        preset = table.pop("preset", None)
        base = HybridTrainerConfig() if preset is None else preset_config(preset)
        return with_values(base, flatten(table))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def load(path: str | Path) -> HybridTrainerConfig:
    """Read a TOML file.

    Raises:
        ConfigError: missing, too large, not UTF-8 or not a valid configuration.
    """
    return loads(read(path), str(path))


def read(path: str | Path) -> str:
    """Text of a TOML file.

    Raises:
        ConfigError: missing, no regular file, too large, or not UTF-8.
    """
    try:
        return read_text(path, MAX_TOML_BYTES)
    except UnusableFileError as error:
        raise ConfigError(str(error)) from None


def differences(one: HybridTrainerConfig, other: HybridTrainerConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> both values, where two configurations differ."""
    found: dict[str, tuple[Any, Any]] = {}
    for key, path in valid_keys().items():
        a, b = (functools.reduce(getattr, path, config) for config in (one, other))
        if a != b:
            found[key] = (a, b)
    return found


def preset_config(name: object) -> HybridTrainerConfig:
    """Configuration of a named preset.

    Raises:
        ConfigError: unknown name; the message lists the known ones.
    """
    if not isinstance(name, str) or name not in PRESETS:
        near = difflib.get_close_matches(str(name)[:80], PRESETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown preset {_short(name)}: must be one of {', '.join(PRESETS)}{hint}")
    return with_values(HybridTrainerConfig(), PRESETS[name])


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_literal(v) for v in value) + "]"
    return repr(value)


def to_toml(config: HybridTrainerConfig) -> str:
    """Complete configuration as TOML text; ``loads(to_toml(c)) == c``."""
    tables: dict[str, list[str]] = {}
    for key, path in valid_keys().items():
        value: Any = config
        for name in path:
            value = getattr(value, name)
        table, _, name = key.rpartition(".")
        tables.setdefault(table, []).append(f"{name} = {_literal(value)}")
    order = sorted(tables, key=lambda t: (t.split(".")[0] != "training", t))
    return "\n\n".join("\n".join([f"[{t}]", *tables[t]]) for t in order) + "\n"
