"""Settings under the names they had until version 0.2, until the next minor version: each with one line of warning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

from ..notices import users_line
from ..records import ConfigError

#: Former TOML key -> today's.
FORMER_KEYS = {
    "training.max_learned_scale": "training.max_lr_multiplier",
    "training.min_learned_scale": "training.min_group_factor",
    "training.lookahead": "lookahead.extrapolation",
    "training.smoothing": "lookahead.damping",
    "training.drift": "lookahead.drift",
    "training.lookahead_scope": "lookahead.scope",
    "gate.control_fraction": "gate.holdout_fraction",
}


C = TypeVar("C")


def _warn(cls: type, former: str, path: str) -> None:
    warnings.warn(
        f"{cls.__name__}: {former} is now {path}; the former name goes with the next minor version",
        DeprecationWarning,
        stacklevel=users_line(),
    )


def with_former_names(names: Mapping[str, str]) -> Callable[[type[C]], type[C]]:
    """Let a dataclass of settings be made, replaced and read under former names.

    Args:
        names: Former name -> today's: a field (``"a"``), or a field of a table (``"table.a"``).  The former name may be
            the table's own (``"table"`` -> ``"table.a"``): then it is made, but not read, with a number.
    """

    def decorate(cls: type[C]) -> type[C]:
        make: Callable[..., None] = cls.__init__
        all_fields = {f.name for f in fields(cls)}  # type: ignore[arg-type]

        @functools.wraps(make)
        def make_from(self: C, **values: Any) -> None:
            make(self, **_translated(cls, names, all_fields, values))

        cls.__init__ = make_from  # type: ignore[method-assign, assignment]
        for former in names.keys() - all_fields:
            setattr(cls, former, _reader(cls, former, names[former]))
        return cls

    return decorate


def _translated(cls: type, names: Mapping[str, str], all_fields: set[str], values: dict[str, Any]) -> dict[str, Any]:
    """Values by today's names.

    Raises:
        ConfigError: a former name and today's are both given, with different values; or a number for a table of which
            the other settings would be lost.
    """
    given = {k: values.pop(k) for k in names if k in values and (k not in all_fields or _is_number(values[k]))}
    # dataclasses.replace names every field; there, what is replaced has the word
    replacing = all_fields <= values.keys()
    for former, value in given.items():
        path = names[former]
        table, _, name = path.rpartition(".")
        if former == table and all_fields - {table} <= values.keys():
            table_of = f"{table}=replace(config.{table}, {name}={value!r})"
            raise ConfigError(f"{former} = {value!r}: {former} is a table now, say replace(config, {table_of})")
        _warn(cls, former, path)
        if not table:
            if not replacing and values.get(name, value) != value:
                raise ConfigError(
                    f"{former} and its other spelling {name} are both set, to {value!r} and {values[name]!r}"
                )
            values[name] = value
        else:
            base = values[table] if table in values else _default(cls, table)
            values[table] = replace(base, **{name: value})
    return values


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _default(cls: type, name: str) -> Any:
    [field] = [f for f in fields(cls) if f.name == name]
    make: Any = field.default_factory
    return make()


def _reader(cls: type, former: str, path: str) -> property:
    def read(self: Any) -> Any:
        _warn(cls, former, path)
        return functools.reduce(getattr, path.split("."), self)

    return property(read, doc=f"Former name of ``{path}``.")
