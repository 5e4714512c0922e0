"""TOML in and out: strict keys, one clear line per mistake.

Tables and names follow the published schema (``[training] [predictor] [predictor.<kind>]
[divergence] [metrics] [checkpoint]``, and ``[gate] [lookahead]``).  Names of the older methodology document
and of earlier versions (:mod:`.former`, with one line of warning) are read as aliases; the canonical ones are written.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..records import ConfigError
from ..safe_files import UnusableFileError, read_text
from .keys import keys_of
from .keys import with_values as with_values
from .settings import HybridTrainerConfig

#: Largest file that is read: a config is a page, not a data set.
MAX_TOML_BYTES = 100_000
#: Longest key that is read, in parts.  Ours have three; reading a key takes time like the square of its parts.
MAX_KEY_PARTS = 8
_KEY_PART = r"""(?:[\w-]+|"[^"\n]*"|'[^'\n]*')"""
_LONG_KEY = re.compile(rf"(?<![\w-]){_KEY_PART}(?:[ \t]*\.[ \t]*{_KEY_PART}){{{MAX_KEY_PARTS}}}")


def valid_keys() -> dict[str, tuple[str, ...]]:
    """Every dotted TOML key -> path of attribute names in :class:`HybridTrainerConfig`."""
    return keys_of(HybridTrainerConfig)


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


def loads(text: str, source: str = "<string>") -> HybridTrainerConfig:
    """Parse TOML text.  A top-level ``preset = "name"`` is applied first; a table ``[about]`` is for people.

    Raises:
        ConfigError: not TOML, or anything :func:`with_values` refuses; the message names ``source``.
    """
    try:
        table = parse(text)
        table.pop("about", None)
        preset = table.pop("preset", None)
        base = HybridTrainerConfig() if preset is None else preset_config(preset)
        return with_values(base, flatten(table))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def load(path: str | Path) -> HybridTrainerConfig:
    """Read a TOML file.

    Args:
        path: Of the file.

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
    """:meth:`.HybridTrainerConfig.preset` of ``name``.

    Raises:
        ConfigError: there is no such preset.
    """
    return HybridTrainerConfig.preset(name)


def literal(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
    if isinstance(value, tuple | list):
        return "[" + ", ".join(literal(v) for v in value) + "]"
    return repr(value)


def to_toml(config: HybridTrainerConfig) -> str:
    """Complete configuration as TOML text; ``loads(to_toml(c)) == c``."""
    tables: dict[str, list[str]] = {}
    for key, path in valid_keys().items():
        value: Any = config
        for name in path:
            value = getattr(value, name)
        table, _, name = key.rpartition(".")
        tables.setdefault(table, []).append(f"{name} = {literal(value)}")
    order = sorted(tables, key=lambda t: (t.split(".")[0] != "training", t))
    return "\n\n".join("\n".join([f"[{t}]", *tables[t]]) for t in order) + "\n"
