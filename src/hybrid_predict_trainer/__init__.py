"""Train any PyTorch model; predict part of the training instead of computing it, where that pays.

Names are imported when they are first asked for, so that ``hpt --help`` does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING

from .former_names import install as _install_former_names
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .config.settings import CheckpointConfig as CheckpointConfig
    from .config.settings import DivergenceConfig as DivergenceConfig
    from .config.settings import GateConfig as GateConfig
    from .config.settings import HybridTrainerConfig as HybridTrainerConfig
    from .config.settings import LinearConfig as LinearConfig
    from .config.settings import LookaheadConfig as LookaheadConfig
    from .config.settings import MetricsConfig as MetricsConfig
    from .config.settings import PredictorConfig as PredictorConfig
    from .config.settings import SecantConfig as SecantConfig
    from .config.toml import load as load_config
    from .config.toml import preset_config as preset_config
    from .config.toml import with_values as with_values
    from .cycle.engine import Engine as Engine
    from .cycle.engine import attach as attach
    from .experiments.probe.run import probe as probe
    from .move.average import AverageFollower as AverageFollower
    from .move.head_ladder import find_recipe as find_recipe
    from .move.modifier import StepModifier as StepModifier
    from .move.recipe import Recipe as Recipe
    from .predictors import Predictor as Predictor
    from .records import BasisSpec as BasisSpec
    from .records import CheckpointError as CheckpointError
    from .records import ConfigError as ConfigError
    from .records import DamagedCheckpointError as DamagedCheckpointError
    from .records import DivergenceError as DivergenceError
    from .records import EpochResult as EpochResult
    from .records import HybridError as HybridError
    from .records import Phase as Phase
    from .records import PhasePrediction as PhasePrediction
    from .records import StepResult as StepResult
    from .records import Verdict as Verdict
    from .records import Window as Window
    from .recovery import CheckpointFailed as CheckpointFailed
    from .recovery import IntegrationError as IntegrationError
    from .recovery import NumericalInstability as NumericalInstability
    from .recovery import PredictionDivergence as PredictionDivergence
    from .recovery import PredictorTrainingFailed as PredictorTrainingFailed
    from .recovery import Recovery as Recovery
    from .trainer import HybridTrainer as HybridTrainer

_install_former_names()

#: Public name -> its module, and its name there where that is another one; a type checker reads the imports above.
_HOMES = {
    "BasisSpec": "records", "CheckpointConfig": "config.settings", "CheckpointError": "records",
    "ConfigError": "records", "DivergenceConfig": "config.settings", "DivergenceError": "records",
    "EpochResult": "records", "GateConfig": "config.settings", "HybridError": "records", "HybridTrainer": "trainer",
    "HybridTrainerConfig": "config.settings", "LinearConfig": "config.settings",
    "LookaheadConfig": "config.settings", "MetricsConfig": "config.settings",
    "Phase": "records", "PhasePrediction": "records", "Predictor": "predictors",
    "PredictorConfig": "config.settings", "SecantConfig": "config.settings", "StepResult": "records",
    "StepModifier": "move.modifier", "Recipe": "move.recipe", "find_recipe": "move.head_ladder",
    "Verdict": "records", "Window": "records", "Engine": "cycle.engine",
    "attach": "cycle.engine", "load_config": "config.toml:load", "preset_config": "config.toml",
    "probe": "experiments.probe.run",
    "with_values": "config.toml", "AverageFollower": "move.average", "DamagedCheckpointError": "records",
    "CheckpointFailed": "recovery", "IntegrationError": "recovery", "NumericalInstability": "recovery",
    "PredictionDivergence": "recovery", "PredictorTrainingFailed": "recovery", "Recovery": "recovery",
}  # fmt: skip

#: Packages and modules that ``import hybrid_predict_trainer`` alone makes reachable as attributes.
_INNER = frozenset({
    "config", "cost", "cycle", "distributed", "judge", "keep", "move", "notices", "numerics", "observe", "predictors",
    "propose", "records", "safe_files", "tell", "trainer", "weights",
})  # fmt: skip

__all__ = [
    "AverageFollower", "BasisSpec", "CheckpointConfig", "CheckpointError", "CheckpointFailed", "ConfigError",
    "DamagedCheckpointError", "DivergenceConfig", "DivergenceError", "Engine", "EpochResult", "GateConfig",
    "HybridError", "HybridTrainer", "HybridTrainerConfig", "IntegrationError", "LinearConfig", "LookaheadConfig",
    "MetricsConfig", "NumericalInstability", "Phase", "PhasePrediction", "PredictionDivergence", "Predictor",
    "PredictorConfig", "PredictorTrainingFailed", "Recipe", "Recovery", "SecantConfig",
    "StepModifier", "StepResult", "Verdict", "Window", "attach", "find_recipe", "load_config", "preset_config", "probe",
    "with_values",
]  # fmt: skip

if not TYPE_CHECKING:  # seen by a type checker, it would let every misspelt name pass

    def __getattr__(name: str) -> object:
        """Import a public name, or a package of the library, when it is first asked for (PEP 562)."""
        if name in _HOMES:
            home, _, original = _HOMES[name].partition(":")
            value = getattr(importlib.import_module(f"{__name__}.{home}"), original or name)
            globals()[name] = value
            return value
        if name in _INNER:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
