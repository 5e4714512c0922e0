"""Train any PyTorch model; predict part of the training instead of computing it, where that pays."""

from .config.settings import CheckpointConfig as CheckpointConfig
from .config.settings import DivergenceConfig as DivergenceConfig
from .config.settings import GateConfig as GateConfig
from .config.settings import HybridTrainerConfig as HybridTrainerConfig
from .config.settings import LinearConfig as LinearConfig
from .config.settings import MetricsConfig as MetricsConfig
from .config.settings import PredictorConfig as PredictorConfig
from .config.settings import SecantConfig as SecantConfig
from .config.toml import load as load_config
from .config.toml import preset_config as preset_config
from .config.toml import with_values as with_values
from .former_names import install as _install_former_names
from .predictors import Predictor as Predictor
from .records import BasisSpec as BasisSpec
from .records import CheckpointError as CheckpointError
from .records import ConfigError as ConfigError
from .records import DivergenceError as DivergenceError
from .records import EpochResult as EpochResult
from .records import HybridError as HybridError
from .records import Phase as Phase
from .records import PhasePrediction as PhasePrediction
from .records import StepResult as StepResult
from .records import Verdict as Verdict
from .records import Window as Window
from .trainer import HybridTrainer as HybridTrainer
from .version import __version__ as __version__

_install_former_names()

__all__ = [
    "BasisSpec", "CheckpointConfig", "CheckpointError", "ConfigError", "DivergenceConfig", "DivergenceError",
    "EpochResult", "GateConfig", "HybridError", "HybridTrainer", "HybridTrainerConfig", "LinearConfig",
    "MetricsConfig", "Phase", "PhasePrediction", "Predictor", "PredictorConfig", "SecantConfig", "StepResult",
    "Verdict", "Window", "load_config", "preset_config", "with_values",
]  # fmt: skip
