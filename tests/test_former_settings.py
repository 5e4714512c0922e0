"""Settings under their former names: in TOML, as arguments, as attributes; each with one line of warning."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from functools import reduce
from typing import Any

import pytest

from cases import setup
from hybrid_predict_trainer import ConfigError, GateConfig, HybridTrainerConfig, LookaheadConfig
from hybrid_predict_trainer.config.former import FORMER_KEYS
from hybrid_predict_trainer.config.toml import loads, preset_config, to_toml, valid_keys, with_values

#: Former key -> a legal value that is not the default.
VALUES: dict[str, Any] = {
    "training.max_learned_scale": 7.0,
    "training.min_learned_scale": 0.5,
    "training.lookahead": 0.7,
    "training.smoothing": 0.125,
    "training.drift": 0.0,
    "training.lookahead_scope": "all",
    "gate.control_fraction": 0.25,
}
#: Of them, those that Python knew as arguments of the root.
ROOT = [key for key in VALUES if key.startswith("training.")]


def value_of(config: HybridTrainerConfig, key: str) -> Any:
    return reduce(getattr, valid_keys()[FORMER_KEYS[key]], config)


def expected(key: str) -> HybridTrainerConfig:
    return with_values(HybridTrainerConfig(), {FORMER_KEYS[key]: VALUES[key]})


def said(key: str) -> str:
    former, today = key.rpartition(".")[2], FORMER_KEYS[key].removeprefix("training.").removeprefix("gate.")
    return f": {former} is now {today};"


def test_every_former_key_is_tried() -> None:
    assert VALUES.keys() == FORMER_KEYS.keys()
    assert set(FORMER_KEYS.values()) <= valid_keys().keys()
    for key, value in VALUES.items():
        assert value_of(HybridTrainerConfig(), key) != value


@pytest.mark.parametrize("key", VALUES)
def test_toml(key: str) -> None:
    value = f"{VALUES[key]!r}".replace("'", '"')
    table, _, name = key.rpartition(".")
    with pytest.warns(UserWarning, match=f"^{key} is now {FORMER_KEYS[key]}; former keys go") as caught:
        config = loads(f"[{table}]\n{name} = {value}\n")
    assert len(caught) == 1
    assert config == expected(key) != HybridTrainerConfig()
    assert key not in valid_keys()
    assert loads(to_toml(config)) == config, "written under today's names: no warning"
    with pytest.warns(UserWarning, match="is now"), pytest.raises(ConfigError, match=FORMER_KEYS[key]):
        with_values(HybridTrainerConfig(), {key: -1.0})


def test_tables_of_the_older_document_are_known_under_former_names_too() -> None:
    with pytest.warns(UserWarning, match="training.smoothing is now lookahead.damping"):
        config = with_values(HybridTrainerConfig(), {"hybrid_trainer_config.smoothing": 0.125})
    assert config == expected("training.smoothing")


def test_a_file_with_all_former_keys_is_told_in_one_line() -> None:
    with pytest.warns(UserWarning, match="former keys go") as caught:
        config = with_values(HybridTrainerConfig(), VALUES)
    [line] = [str(w.message) for w in caught]
    assert all(f"{key} is now {today}" in line for key, today in FORMER_KEYS.items())
    assert config == with_values(HybridTrainerConfig(), {FORMER_KEYS[k]: v for k, v in VALUES.items()})


@pytest.mark.parametrize("key", VALUES)
def test_a_former_key_and_todays_must_agree(key: str) -> None:
    both = {key: VALUES[key], FORMER_KEYS[key]: VALUES[key]}
    with pytest.warns(UserWarning, match="is now"):
        assert with_values(HybridTrainerConfig(), both) == expected(key)
    default = value_of(HybridTrainerConfig(), key)
    with pytest.warns(UserWarning, match="is now"), pytest.raises(ConfigError, match="are both set"):
        with_values(HybridTrainerConfig(), {**both, FORMER_KEYS[key]: default})


@pytest.mark.parametrize("key", ROOT)
def test_arguments(key: str) -> None:
    name = key.rpartition(".")[2]
    with pytest.warns(DeprecationWarning, match=said(key)) as caught:
        config = HybridTrainerConfig(**{name: VALUES[key]})
    assert len(caught) == 1
    assert caught[0].filename == __file__, "it points at the caller"
    assert config == expected(key)


@pytest.mark.parametrize("key", [key for key in ROOT if key != "training.lookahead"])
def test_replace_and_attributes(key: str) -> None:
    name = key.rpartition(".")[2]
    base = HybridTrainerConfig(warmup_steps=3, lookahead=LookaheadConfig(extrapolation=0.5, holdout_fraction=0.2))
    with pytest.warns(DeprecationWarning, match=said(key)):
        config = replace(base, **{name: VALUES[key]})
    assert config == with_values(base, {FORMER_KEYS[key]: VALUES[key]})
    with pytest.warns(DeprecationWarning, match=said(key)) as caught:
        assert getattr(config, name) == VALUES[key]
    assert caught[0].filename == __file__, "it points at the reader"


def test_the_gate() -> None:
    key = "gate.control_fraction"
    with pytest.warns(DeprecationWarning, match=said(key)):
        gate = GateConfig(control_fraction=0.25)
    assert gate == GateConfig(holdout_fraction=0.25)
    with pytest.warns(DeprecationWarning, match=said(key)):
        assert replace(GateConfig(max_chunks=4), control_fraction=0.0) == GateConfig(max_chunks=4, holdout_fraction=0.0)
    with pytest.warns(DeprecationWarning, match=said(key)):
        assert gate.control_fraction == 0.25
    with pytest.raises(ConfigError, match="are both set"), pytest.warns(DeprecationWarning, match=said(key)):
        GateConfig(control_fraction=0.2, holdout_fraction=0.3)


def test_several_arguments_of_one_table() -> None:
    with pytest.warns(DeprecationWarning, match="is now lookahead") as caught:
        config = HybridTrainerConfig(smoothing=0.5, lookahead=0.0, drift=0.0)
    assert len(caught) == 3
    assert config.lookahead == LookaheadConfig(extrapolation=0.0, damping=0.5, drift=0.0)


def test_a_number_does_not_replace_a_table() -> None:
    with pytest.raises(
        ConfigError, match=r"replace\(config, lookahead=replace\(config.lookahead, extrapolation=0.0\)\)"
    ):
        replace(HybridTrainerConfig(), lookahead=0.0)


def test_unknown_arguments_are_still_refused() -> None:
    with pytest.raises(TypeError, match="max_learnt_scale"):
        HybridTrainerConfig(max_learnt_scale=2.0)


def test_configurations_are_still_values() -> None:
    config = HybridTrainerConfig(lookahead=LookaheadConfig(damping=0.5))
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert hash(config) == hash(copy.deepcopy(config))
    assert "damping=0.5" in repr(config)
    with pytest.raises(AttributeError):
        config.max_lr_multiplier = 2.0


@pytest.mark.parametrize(
    ("gate", "blocks", "wanted"), [(0.1, "gate", 0.1), (0.0, "gate", 0.0), (0.0, 0.3, 0.3), (0.2, 0, 0.0)]
)
def test_two_experiments_have_two_settings(gate: float, blocks: Any, wanted: float) -> None:
    values = {"gate.holdout_fraction": gate, "lookahead.holdout_fraction": blocks, "lookahead.scope": "all"}
    config = with_values(HybridTrainerConfig(), values)
    assert config.block_holdout == wanted
    assert loads(to_toml(config)).block_holdout == wanted
    run = setup("mlp", "adam", "flat").trainer(config).run
    assert run.optimizer_step.switchback.holdout_fraction == wanted
    assert run.optimizer_step.scale.trial.holdout_fraction == wanted


@pytest.mark.parametrize("wrong", ["gates", 0.6, -0.1, True])
def test_the_range_of_the_holdout(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"lookahead\.holdout_fraction"):
        LookaheadConfig(holdout_fraction=wrong)


@pytest.mark.parametrize("name", ["epochs", "epochs_adam", "finetune", "muon", "full_batch"])
def test_presets_use_todays_names(name: str) -> None:
    assert preset_config(name) != HybridTrainerConfig()  # warnings are errors
