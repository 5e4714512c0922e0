"""Presets: complete files with the source of every number, and what the command line says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_predict_trainer import ConfigError, HybridTrainerConfig, load_config
from hybrid_predict_trainer.cli import main
from hybrid_predict_trainer.config import presets
from hybrid_predict_trainer.config.preset_text import format_preset, rewritten
from hybrid_predict_trainer.config.toml import differences, flatten, valid_keys
from hybrid_predict_trainer.experiments.arms.options import Options, build_experiment

#: What the founding documents say: preset -> warm-up, full steps, longest prediction, sigma.
FOUNDING = {
    "small": (100, 20, 60, 3.0), "medium": (200, 30, 80, 2.5), "large": (500, 50, 100, 2.0),
    "specialist": (100, 15, 120, 3.0), "generalist": (500, 50, 80, 3.0),
    "100M": (100, 20, 50, 3.0), "1B": (200, 20, 30, 3.0), "7B": (500, 20, 15, 3.0),
}  # fmt: skip


@pytest.mark.parametrize("name", presets.names())
def test_a_file_is_complete_and_every_number_that_is_no_default_has_a_source(name: str) -> None:
    flat = {k: v for k, v in flatten(presets.preset_table(name)).items() if not k.startswith("about.")}
    assert set(flat) == set(valid_keys()), "run 'make presets'"
    assert (presets.FOLDER / f"{name}.toml").read_text(encoding="utf-8") == rewritten(name), "run 'make presets'"
    chosen = HybridTrainerConfig.preset(name)
    assert load_config(presets.FOLDER / f"{name}.toml") == chosen
    assert set(differences(HybridTrainerConfig(), chosen)) <= set(presets.about(name)["sources"])
    assert all(presets.about(name)["sources"].values())


@pytest.mark.parametrize("name", FOUNDING)
def test_the_numbers_are_the_founding_documents(name: str) -> None:
    c = HybridTrainerConfig.preset(name)
    assert (c.warmup_steps, c.full_steps, c.max_predict_steps, c.divergence_threshold) == FOUNDING[name]


@pytest.mark.parametrize(
    ("num_weights", "full_batch", "expected"),
    [(10, True, "full_batch"), (99_999_999, False, None), (100_000_000, False, "small"), (499_999_999, False, "small"),
     (500_000_000, False, "medium"), (3_000_000_000, False, "large"), (10**12, True, "full_batch")],
)  # fmt: skip
def test_auto_goes_by_weights_that_train_and_by_full_batch(num_weights: int, full_batch: bool, expected: Any) -> None:
    name, why = presets.choose(num_weights, full_batch=full_batch)
    assert name == expected
    assert ("whole data set" in why) if full_batch else (f"{num_weights:,} weights train" in why)


def test_auto_in_python_counts_what_trains() -> None:
    with torch.device("meta"):
        model = torch.nn.Linear(40_000, 20_000)
    assert HybridTrainerConfig.preset("auto", model) == HybridTrainerConfig.preset("medium")
    model.weight.requires_grad_(False)
    assert HybridTrainerConfig.preset("auto", model) == HybridTrainerConfig()
    assert HybridTrainerConfig.preset("auto", model, full_batch=True) == HybridTrainerConfig.preset("full_batch")
    with pytest.raises(ConfigError, match="needs the model"):
        HybridTrainerConfig.preset("auto")


def test_what_is_told_names_every_number_with_its_source_and_what_is_not_taken() -> None:
    text = format_preset("medium")
    assert "training.warmup_steps = 200             # methodology document" in text
    assert "not taken: confidence_threshold 0.87" in text
    assert f"the other {len(valid_keys()) - 8} settings are the defaults" in text


@pytest.mark.parametrize(
    ("task", "preset", "says", "same_as"),
    [("pinn-poisson", "auto", "preset auto: full_batch: every batch", "full_batch"),
     ("digits-mlp", "auto", "auto: the settings stay as they are: 26,122 weights train, fewer than", None),
     ("regression", "1B", "preset 1B: about 1 billion", "1B")],
)  # fmt: skip
def test_a_run_says_what_it_took_and_why(
    task: str, preset: str, says: str, same_as: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = build_experiment(Options(task=task, config_preset=preset, steps=4000, threads=1))
    assert says in capsys.readouterr().err
    if same_as is not None:
        asked = presets.PRESETS[same_as]
        assert all(_value(setup.config, key) == value for key, value in asked.items())


def _value(config: Any, key: str) -> Any:
    for name in valid_keys()[key]:
        config = getattr(config, name)
    return config


def test_debug_brings_its_own_task_and_is_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["train", "--preset", "debug", "--out", str(out), "--threads", "1"]) == 0
    said = capsys.readouterr()
    assert "preset debug: every phase" in said.err
    assert "pinn-poisson, hybrid, seed 0: validation loss" in said.out
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 60
    assert summary["statistics"]["num_jumps_proposed"] > 0
    assert main(["train", "--preset", "debug", "--resume", "--out", str(out)]) == 0
    assert main(["train", "--preset", "small", "--resume", "--out", str(out)]) == 2
    assert "training.warmup_steps = 5, not 100" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--preset", "debug", "--config-preset", "small"], "name different settings"),
     (["--preset", "smal", "--task", "gpt"], "unknown preset of task 'gpt'"),
     (["--config-preset", "smal", "--task", "pinn-poisson"], "did you mean 'small'"),
     (["--preset", "small"], "--task is needed")],
)  # fmt: skip
def test_names_that_do_not_fit_are_one_line(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *argv, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert message in said[0]
