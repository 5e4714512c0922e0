"""What a search varies: a TOML file of parameters, read into Optuna's distributions.

    lr = { low = 1e-4, high = 1e-1, log = true }     # a range; whole numbers give a range of whole numbers
    schedule = ["linear", "wsd"]                     # choices
    predictor.window = { low = 4, high = 16, step = 4 }

A parameter is an option of ``hpt train`` (:data:`OPTIONS`) or a setting by its dotted key (docs/options.md).
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...config.settings import HybridTrainerConfig
from ...config.toml import parse, read, valid_keys
from ...records import ConfigError
from ..arms.options import Options
from ..report.text import short_value
from ..run_folder import of_type

#: Options of ``hpt train`` that may vary, and the type of their values.
OPTIONS: Mapping[str, type] = {
    "lr": float, "weight_decay": float, "steps": int, "batch_size": int, "context": int, "seed": int, "preset": str,
    "optimizer": str, "schedule": str, "predictor": str, "config_preset": str, "dtype": str,
}  # fmt: skip
#: Keys of a range.
RANGE = {"low", "high", "log", "step"}
#: Those that change rate and schedule only.
RATE_NAMES = ("lr", "schedule")


def read_space(path: Path) -> dict[str, Any]:
    """Name -> Optuna distribution, in the file's order.

    Raises:
        ConfigError: the file is no TOML, holds no parameter, an unknown one, or values that it cannot have.
    """
    found: dict[str, Any] = {}
    try:
        for name, said in _entries(parse(read(path)), ""):
            found[name] = _distribution(name, said)
    except ConfigError as error:
        told = str(error)
        raise ConfigError(told if str(path) in told else f"{path}: {told}") from None
    if not found:
        raise ConfigError(f"{path}: the space is empty: say for example lr = {{ low = 1e-4, high = 1e-1, log = true }}")
    return found


def _entries(table: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    """Dotted name and what is said of it: a range, or a list of choices."""
    found: list[tuple[str, Any]] = []
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and not (value.keys() & RANGE):
            if not value:
                raise ConfigError(f"{name}: is empty; say a range {{ low = ..., high = ... }} or a list of choices")
            found += _entries(value, f"{name}.")
        else:
            found.append((name, value))
    return found


def _kind_of(name: str) -> type:
    """The type of a parameter's values.

    Raises:
        ConfigError: there is no such parameter.
    """
    if name in OPTIONS:
        return OPTIONS[name]
    keys = valid_keys()
    if name not in keys:
        near = difflib.get_close_matches(name, [*OPTIONS, *keys], n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"unknown parameter {name!r}{hint} (valid: {', '.join(OPTIONS)}, and settings such as predictor.window)"
        )
    value: Any = HybridTrainerConfig()
    for attribute in keys[name]:
        value = getattr(value, attribute)
    return type(value)


def _distribution(name: str, said: object) -> Any:
    kind = _kind_of(name)
    if isinstance(said, list):
        return _choices(name, kind, said)
    if not isinstance(said, Mapping):
        raise ConfigError(
            f"{name} = {short_value(said)} is neither a range {{ low = ..., high = ... }} nor a list of choices; what "
            "does not vary belongs on the command line"
        )
    return _range(name, kind, said)


def _choices(name: str, kind: type, said: Sequence[Any]) -> Any:
    from optuna.distributions import CategoricalDistribution

    if not said:
        raise ConfigError(f"{name}: has no choices")
    values = []
    for value in said:
        if name in OPTIONS:
            values.append(_valued(name, value, kind))
        elif not isinstance(value, bool | int | float | str):
            raise ConfigError(f"{name}: {short_value(value)} must be a number, a text, true or false")
        else:
            values.append(value)
    if len({repr(v) for v in values}) < len(values):
        raise ConfigError(f"{name}: a choice is there twice")
    return CategoricalDistribution(tuple(values))


def _range(name: str, kind: type, said: Mapping[str, Any]) -> Any:
    from optuna.distributions import FloatDistribution, IntDistribution

    unknown = [key for key in said if key not in RANGE]
    if unknown:
        raise ConfigError(f"{name}: unknown key {short_value(unknown[0])} (valid: {', '.join(sorted(RANGE))})")
    for key in ("low", "high"):
        if key not in said:
            raise ConfigError(f"{name}: a range needs low and high; {key} is missing")
    if kind not in (int, float):
        raise ConfigError(f"{name}: has no range; say a list of choices, such as {name} = [...]")
    for key in ("low", "high", "step"):
        value = said.get(key, 1)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ConfigError(f"{name}: {key} = {short_value(value)} must be a number")
        if kind is int and type(value) is not int:
            raise ConfigError(f"{name}: {key} = {short_value(value)} must be a whole number")
    log = said.get("log", False)
    if type(log) is not bool:
        raise ConfigError(f"{name}: log = {short_value(log)} must be true or false")
    low, high = (_valued(name, kind(said[key]), kind) for key in ("low", "high"))
    if not low < high:
        raise ConfigError(f"{name}: low = {short_value(low)} must be below high = {short_value(high)}")
    if log and low <= 0:
        raise ConfigError(f"{name}: low = {short_value(low)} must be above 0 where log = true")
    if log and "step" in said:
        raise ConfigError(f"{name}: takes either log or step")
    step = said.get("step")
    if step is not None and not 0 < step <= high - low:
        raise ConfigError(f"{name}: step = {short_value(step)} must be above 0 and at most high - low")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an end that no step meets is moved down, as the documents say
        if kind is int:
            return IntDistribution(low, high, log=log, step=step or 1)
        return FloatDistribution(low, high, log=log, step=step)


def _valued(name: str, value: object, kind: type) -> Any:
    """The value, if a flag of that name would take it."""
    if name not in OPTIONS:
        return value
    try:
        return of_type(name, float(value) if kind is float and type(value) is int else value, kind)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


def extremes(space: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Name and value of the ends of every range, and of every choice."""
    found = []
    for name, distribution in space.items():
        values = getattr(distribution, "choices", None) or (distribution.low, distribution.high)
        found += [(name, value) for value in values]
    return found


def with_params(options: Options, params: Mapping[str, Any]) -> Options:
    """A trial's options: those of the search with its values over them; ``seed`` is no option."""
    own = {name: value for name, value in params.items() if name in OPTIONS and name != "seed"}
    settings = tuple(f"{name}={_toml(value)}" for name, value in params.items() if name not in OPTIONS)
    return replace(options, **own, set=(*options.set, *settings))


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
