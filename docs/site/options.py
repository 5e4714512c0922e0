"""docs/options.md from the settings' own classes: every option with default, unit and range; `make options`."""

from __future__ import annotations

import re
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hybrid_predict_trainer import ConfigError, HybridTrainerConfig
from hybrid_predict_trainer.config.presets import PRESETS
from hybrid_predict_trainer.config.settings import SOURCES
from hybrid_predict_trainer.config.toml import literal, valid_keys, with_values
from hybrid_predict_trainer.predictors import PREDICTORS

PAGE = Path(__file__).parents[1] / "options.md"
HEAD = """# Options

Written by `make options` from the settings' own classes: the range is found by asking them, the unit follows from
the name.  What each one means is in [configuration.md](configuration.md); "presets" names those that set it, and
`hpt train --preset NAME` prints their sources.

| key | default | type | unit | range | presets |
|---|---|---|---|---|---|
"""
UNITS = (
    (r"(steps|warmup|_interval)$", "steps"),
    (r"_mb$", "MB"),
    (r"windows?$", "windows or steps"),
    (r"(fraction|budget|_exact|threshold|significance)$", "share or bound"),
    (r"(_dim|size|rank)$", "numbers"),
    (r"learning_rate$", "rate"),
)
#: Values that no setting takes, so that it says what it does take.
PROBES = (-1e18, 1e18, "no such name")


def range_of(key: str, hint: Any) -> str:
    """Legal values, from the setting's own refusal."""
    if key == "predictor.type":
        return ", ".join(("auto", *PREDICTORS, *SOURCES))
    if get_args(hint) and all(isinstance(v, str) for v in get_args(hint)):
        return ", ".join(get_args(hint))
    for value in PROBES:
        probe: Any = int(value) if hint is int and not isinstance(value, str) else value
        try:
            with_values(HybridTrainerConfig(), {key: [probe] if "tuple" in str(hint) else probe})
        except ConfigError as error:
            found = re.search(r"must be (.*)$", str(error))
            if found and ("out of range" in str(error) or "is unknown" in str(error)):
                return found[1].replace("|", "or")
    return "true, false" if hint is bool else "any text" if hint is str else "see the text"


def page() -> str:
    """The whole document."""
    rows = []
    for key, path in valid_keys().items():
        owner: Any = HybridTrainerConfig
        value: Any = HybridTrainerConfig()
        hint: Any = None
        for name in path:
            hint = get_type_hints(owner)[name]
            value = getattr(value, name)
            owner = hint if is_dataclass(hint) else owner
        named = next((unit for pattern, unit in UNITS if re.search(pattern, key)), "-")
        unit = "-" if isinstance(value, bool | str) else named
        users = ", ".join(name for name in PRESETS if key in PRESETS[name]) or "-"
        kind = type(value).__name__
        rows.append(f"| `{key}` | `{literal(value)}` | {kind} | {unit} | {range_of(key, hint)} | {users} |")
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
