"""TOML in and out: strict keys, one clear line per mistake.

Tables and names follow the published schema (``[training] [predictor] [predictor.<kind>]
[divergence] [metrics] [checkpoint]``, and ``[gate]``).  Names of the older methodology document are
read as aliases; the canonical ones are written.
"""

from __future__ import annotations

import difflib
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from .config import HybridTrainerConfig
from .presets import PRESETS
from .records import ConfigError

#: Largest file that is read: a config is a page, not a data set.
MAX_TOML_BYTES = 1_000_000

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


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def _canonical(key: str) -> str:
    head, _, rest = key.partition(".")
    if head in TABLE_ALIASES and rest:
        key = f"{TABLE_ALIASES[head]}.{rest}"
    return ALIASES.get(key, key)


def _nearest(key: str, valid: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    if not near:  # right name in the wrong table?
        last = key.rpartition(".")[2]
        near = [k for k in valid if k.rpartition(".")[2] == last][:1]
    if not near:
        by_last = {k.rpartition(".")[2]: k for k in valid}
        near = [by_last[n] for n in difflib.get_close_matches(key.rpartition(".")[2], by_last, n=1)]
    return f"; did you mean {near[0]!r}?" if near else ""


def _coerce(key: str, value: Any, hint: Any) -> Any:
    """Turn a TOML value into the field's type; a bool is never a number."""
    origin = typing.get_origin(hint)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key} = {value!r} must be a list")
        return tuple(_coerce(key, item, typing.get_args(hint)[0]) for item in value)
    if origin in (typing.Union, types.UnionType, typing.Literal):
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and (type(value) is not hint):
        names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
        raise ConfigError(f"{key} = {value!r} must be {names[hint]}")
    return value


def with_values(config: HybridTrainerConfig, values: Mapping[str, Any]) -> HybridTrainerConfig:
    """Replace settings by dotted TOML key.

    Raises:
        ConfigError: unknown key (with the nearest valid one), wrong type, value out of range, or a
            key and its alias given with different values.
    """
    valid = valid_keys()
    chosen: dict[str, Any] = {}
    for key, value in values.items():
        name = _canonical(key)
        if name not in valid:
            raise ConfigError(f"unknown key {key!r}{_nearest(name, valid)}")
        if name in chosen and chosen[name] != value:
            raise ConfigError(f"{key!r} and its other spelling are both set, to {chosen[name]!r} and {value!r}")
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
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid TOML: {error}") from None
    preset = table.pop("preset", None)
    try:
        base = HybridTrainerConfig() if preset is None else preset_config(preset)
        return with_values(base, _flatten(table))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def load(path: str | Path) -> HybridTrainerConfig:
    """Read a TOML file.

    Raises:
        ConfigError: missing, too large, not UTF-8 or not a valid configuration.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_TOML_BYTES:
            raise ConfigError(f"{path}: {size} bytes is too large for a configuration (at most {MAX_TOML_BYTES})")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    return loads(text, str(path))


def preset_config(name: object) -> HybridTrainerConfig:
    """Configuration of a named preset.

    Raises:
        ConfigError: unknown name; the message lists the known ones.
    """
    if not isinstance(name, str) or name not in PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown preset {name!r}: must be one of {', '.join(PRESETS)}{hint}")
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
