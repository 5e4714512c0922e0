"""Interchangeable predictors; ``build`` is the only place that knows their names."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from ..config import HybridTrainerConfig
from ..records import ConfigError
from .base import Predictor as Predictor
from .heuristic import Heuristic as Heuristic
from .hold import Hold as Hold
from .linear import Linear as Linear
from .secant import Secant as Secant

#: name -> constructor from the configuration and the number of parameter groups G.
PREDICTORS: dict[str, Callable[[HybridTrainerConfig, int], Predictor]] = {
    "hold": lambda config, num_groups: Hold(),
    "heuristic": lambda config, num_groups: Heuristic(),
    "linear": lambda config, num_groups: Linear(config.predictor.linear, num_groups),
    "secant": lambda config, num_groups: Secant(config.predictor.secant),
}


def build(config: HybridTrainerConfig, num_groups: int) -> Predictor:
    """Predictor named by ``config.predictor_type``.

    Raises:
        ConfigError: unknown name, or more memory than ``predictor_memory_mb``.
    """
    name = config.predictor_type
    if name not in PREDICTORS:
        near = difflib.get_close_matches(name, PREDICTORS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"predictor.type = {name!r} is unknown: must be one of {', '.join(sorted(PREDICTORS))}{hint}")
    predictor = PREDICTORS[name](config, num_groups)
    needed = predictor.memory_bytes() / 2**20
    if needed > config.predictor_memory_mb:
        raise ConfigError(
            f"predictor.memory_budget_mb = {config.predictor_memory_mb:g} is too small: {name} needs {needed:.1f} MB"
        )
    return predictor
