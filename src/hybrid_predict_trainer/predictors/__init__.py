"""Interchangeable predictors; ``build`` is the only place that knows their names.

Other packages add theirs under the entry-point group ``hybrid_predict_trainer.predictors``: a callable
with the arguments of the ones below.  Only the name of an installed entry point is ever looked up,
so that a configuration file cannot make the program import what it likes.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib.metadata import entry_points

from ..config.settings import HybridTrainerConfig
from ..records import ConfigError
from .base import Predictor as Predictor
from .dmd import Dmd as Dmd
from .heuristic import Heuristic as Heuristic
from .hold import Hold as Hold
from .linear import Linear as Linear
from .mlp import Mlp as Mlp
from .pacing import Paced as Paced
from .quasi_newton import QuasiNewton as QuasiNewton
from .quasi_newton import with_history_that_fits
from .rssm import Rssm as Rssm
from .secant import Secant as Secant

#: Where installed packages announce predictors of their own.
ENTRY_POINTS = "hybrid_predict_trainer.predictors"

#: name -> constructor from the configuration and the number of parameter groups G.
PREDICTORS: dict[str, Callable[[HybridTrainerConfig, int], Predictor]] = {
    "hold": lambda config, num_groups: Hold(),
    "heuristic": lambda config, num_groups: Heuristic(),
    "linear": lambda config, num_groups: Linear(config.predictor.linear, num_groups),
    "secant": lambda config, num_groups: Secant(config.predictor.secant),
    "quasi_newton": lambda config, num_groups: QuasiNewton(config.predictor.quasi_newton),
    "dmd": lambda config, num_groups: Dmd(config.predictor.dmd),
    "mlp": lambda config, num_groups: Mlp(
        config.predictor.mlp, num_groups, config.seed, config.predictor.update_budget
    ),
    "rssm": lambda config, num_groups: Rssm(
        config.predictor.rssm, num_groups, config.seed, config.predictor.update_budget
    ),
}


def build(config: HybridTrainerConfig, num_groups: int, num_weights: int = 0) -> Predictor:
    """Predictor named by ``config.predictor_type``.

    Args:
        config: Settings.
        num_groups: G.
        num_weights: Of the model, where a predictor's memory depends on it; 0: unknown.

    Raises:
        ConfigError: unknown name, or more memory than ``predictor_memory_mb``.
    """
    name = "secant" if config.predictor_type == "auto" else config.predictor_type
    constructor = PREDICTORS[name] if name in PREDICTORS else _installed(name)
    predictor = constructor(with_history_that_fits(config, num_weights), num_groups)
    needed = predictor.memory_bytes() / 2**20
    if needed > config.predictor_memory_mb:
        raise ConfigError(
            f"predictor.memory_budget_mb = {config.predictor_memory_mb:g} is too small: {name} needs {needed:.1f} MB"
        )
    return predictor


def _installed(name: str) -> Callable[[HybridTrainerConfig, int], Predictor]:
    """Constructor announced by an installed package under exactly this name."""
    found = entry_points(group=ENTRY_POINTS)
    if name in found.names:
        constructor: Callable[[HybridTrainerConfig, int], Predictor] = found[name].load()
        return constructor
    names = sorted({"auto", *PREDICTORS, *found.names})
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"predictor.type = {name!r} is unknown: must be one of {', '.join(names)}{hint}")
