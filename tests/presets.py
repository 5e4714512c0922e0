"""Writes the shipped presets and configs/default.toml with the settings and defaults of today: `make presets`."""

from __future__ import annotations

from pathlib import Path

from hybrid_predict_trainer import HybridTrainerConfig
from hybrid_predict_trainer.config.preset_text import rewritten
from hybrid_predict_trainer.config.presets import FOLDER, names
from hybrid_predict_trainer.config.toml import to_toml

DEFAULT = Path(__file__).parents[1] / "configs" / "default.toml"

if __name__ == "__main__":
    for name in names():
        (FOLDER / f"{name}.toml").write_text(rewritten(name), encoding="utf-8")
    text = "# Every setting with its default. Meanings: docs/configuration.md.\n" + to_toml(HybridTrainerConfig())
    DEFAULT.write_text(text, encoding="utf-8")
