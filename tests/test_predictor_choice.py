"""``predictor.type = "auto"``: quasi-Newton or closed form where losses are exact, secant elsewhere, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from cases import assert_same, config, full_batch, make_batches, seed_all, setup
from hybrid_predict_trainer import CheckpointError, ConfigError, HybridTrainerConfig, preset_config
from hybrid_predict_trainer.config.settings import EXACT, NOISY, PORTFOLIO
from hybrid_predict_trainer.config.toml import loads, to_toml, with_values
from hybrid_predict_trainer.cycle.predictor_change import BACK_AFTER
from hybrid_predict_trainer.cycle.predictor_choice import settings_for
from hybrid_predict_trainer.predictors import build

SECANT = {"predictor_type": "secant"}


def test_it_is_the_default_and_survives_a_file() -> None:
    assert HybridTrainerConfig().predictor_type == "auto"
    assert loads(to_toml(HybridTrainerConfig())) == HybridTrainerConfig()
    assert build(HybridTrainerConfig(), 2).name == NOISY
    with pytest.raises(ConfigError, match="did you mean 'auto'"):
        build(HybridTrainerConfig(predictor_type="aoto"), 2)


def test_settings_left_alone_come_along_and_others_stay() -> None:
    full_batch = preset_config("full_batch")
    assert settings_for(HybridTrainerConfig(), PORTFOLIO) == full_batch
    assert settings_for(HybridTrainerConfig(), EXACT) == replace(full_batch, predictor_type=EXACT)
    assert settings_for(HybridTrainerConfig(), NOISY) == HybridTrainerConfig(predictor_type="secant")
    mine = with_values(HybridTrainerConfig(), {"training.correct_steps": 2, "gate.max_backoff": 8})
    found = settings_for(mine, EXACT)
    assert (found.correct_steps, found.gate.max_backoff) == (2, 8)
    gate = replace(found.gate, max_backoff=8)
    assert found == replace(full_batch, predictor_type=EXACT, correct_steps=2, gate=gate)


@pytest.mark.parametrize("model", ["mlp", "batchnorm", "dropout"])
@pytest.mark.parametrize("residual_fn", [None, lambda model, batch: (model(batch[0]) - batch[1])[:, 0]])
def test_a_noisy_run_is_one_with_secant(model: str, residual_fn: Any) -> None:
    batches = make_batches(60)
    automatic, secant = setup(model, "adam", "lambda"), setup(model, "adam", "lambda")
    automatic.trainer(config(), residual_fn=residual_fn).fit(batches)
    seed_all(11)
    secant.trainer(config(**SECANT)).fit(batches)
    assert_same(automatic.everything(), secant.everything())


#: Ways in which the whole data set comes.
WHOLE: dict[str, Any] = {
    "the same tensors": lambda: full_batch(60),
    "a loader": lambda: [
        b for _ in range(60) for b in DataLoader(TensorDataset(*full_batch(1)[0]), batch_size=16, shuffle=False)
    ],
    "copies in a mapping": lambda: [{"x": x.clone(), "y": y.clone()} for x, y in full_batch(60)],
}


def residuals(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
    return (model(x) - y).flatten()


#: Predictor for exact losses, and what a run hands over that has it.
EXACTLY: dict[str, dict[str, Any]] = {
    EXACT: {}, PORTFOLIO: {"residual_fn": residuals},
    f"{PORTFOLIO} of outputs": {"output_fn": lambda model, batch: (
        model(batch[0]), lambda out: torch.nn.functional.mse_loss(out, batch[1])
    )},
}  # fmt: skip


@pytest.mark.parametrize("kind", [EXACT, PORTFOLIO])
@pytest.mark.parametrize("name", WHOLE)
def test_exact_losses_get_quasi_newton_and_closed_form_where_there_are_residuals(
    name: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = setup("mlp", "adam").trainer(config(), **EXACTLY[kind])
    with caplog.at_level("INFO"):
        trainer.fit(WHOLE[name]())
    assert trainer.statistics()["predictor"] == kind
    assert trainer.statistics()["exact_losses"] is True
    assert trainer.statistics()["num_jumps_accepted"] > 0
    assert len([r for r in caplog.records if "predictor.type" in r.getMessage()]) == 1, "said once"
    assert trainer.config.predictor_type == "auto"


@pytest.mark.parametrize("kind", EXACTLY)
@pytest.mark.parametrize("name", ["secant", "linear", "hold", EXACT])
def test_an_explicit_type_is_kept(name: str, kind: str) -> None:
    trainer = setup("mlp", "adam").trainer(config(predictor_type=name), **EXACTLY[kind])
    trainer.fit(full_batch(30))
    assert trainer.statistics()["predictor"] == name


def test_dropout_keeps_it_from_choosing() -> None:
    trainer = setup("dropout", "adam").trainer(config())
    trainer.fit(full_batch(30))
    assert trainer.run.batches.same
    assert not trainer.run.full_batch
    assert trainer.statistics()["predictor"] == NOISY


@pytest.mark.parametrize("kind", [EXACT, PORTFOLIO])
def test_it_goes_back_where_other_batches_come_for_good(kind: str) -> None:
    trainer = setup("mlp", "adam").trainer(config(), **EXACTLY[kind])
    others = make_batches(BACK_AFTER + 30)
    trainer.fit([*full_batch(20), others[0], *full_batch(10)])
    assert trainer.statistics()["predictor"] == kind, "one other batch is no reason"
    trainer.fit(others)
    assert trainer.statistics()["predictor"] == NOISY
    trainer.fit(full_batch(30))
    assert trainer.statistics()["predictor"] == kind


@pytest.mark.parametrize("kind", EXACTLY)
@pytest.mark.parametrize("saved_at", [1, 2, 3, 9, 20, 45])
@pytest.mark.parametrize("then", ["full", "noisy"])
def test_resumed_bit_for_bit(saved_at: int, then: str, kind: str, tmp_path: Path) -> None:
    batches = full_batch(12) + (full_batch(40) if then == "full" else make_batches(40))
    straight = setup("mlp", "adam", "lambda")
    trainer = straight.trainer(config(), **EXACTLY[kind])
    for batch in batches:
        trainer.step(batch)
    first = setup("mlp", "adam", "lambda")
    before = first.trainer(config(), **EXACTLY[kind])
    for batch in batches[:saved_at]:
        before.step(batch)
    path = before.save_checkpoint(tmp_path)
    second = setup("mlp", "adam", "lambda", seed=9)
    after = second.trainer(config(), **EXACTLY[kind])
    after.load_checkpoint(path)
    assert after.statistics()["predictor"] == before.statistics()["predictor"]
    for batch in batches[saved_at:]:
        after.step(batch)
    assert_same(second.everything(), straight.everything())
    assert after.statistics()["predictor"] == trainer.statistics()["predictor"]


def test_a_run_in_closed_form_is_not_resumed_without_its_residuals(tmp_path: Path) -> None:
    first = setup("mlp", "adam").trainer(config(), **EXACTLY[PORTFOLIO])
    first.fit(full_batch(20))
    path = first.save_checkpoint(tmp_path)
    without = setup("mlp", "adam", seed=9)
    trainer, before = without.trainer(config()), without.everything()
    with pytest.raises(CheckpointError, match="pass the same residual_fn or output_fn"):
        trainer.load_checkpoint(path)
    assert_same(without.everything(), before)
    trainer.fit(full_batch(20))
    assert trainer.statistics()["predictor"] == EXACT


def test_a_run_of_quasi_newton_goes_on_with_it_where_residuals_come_later(tmp_path: Path) -> None:
    first = setup("mlp", "adam").trainer(config())
    first.fit(full_batch(20))
    later = setup("mlp", "adam", seed=9).trainer(config(), **EXACTLY[PORTFOLIO])
    later.load_checkpoint(first.save_checkpoint(tmp_path))
    later.fit(full_batch(20), total_steps=60)
    assert later.statistics()["predictor"] == EXACT


def test_the_default_on_a_whole_data_set_is_as_good_as_the_preset() -> None:
    x = torch.linspace(-2, 2, 32)[:, None]
    batch = torch.cat([x, torch.sin(3 * x)], dim=1)

    def ended(settings: HybridTrainerConfig) -> float:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        made = setup("mlp")
        made.model, made.optimizer = model, torch.optim.Adam(model.parameters(), lr=1e-2)
        trainer = made.trainer(settings, loss_fn=lambda m, b: torch.nn.functional.mse_loss(m(b[:, :1]), b[:, 1:]))
        return trainer.fit([batch] * 300, total_steps=150).final_loss

    # the first step, before anybody knows, is not among the pairs: close, not equal
    assert ended(HybridTrainerConfig()) < 10 * ended(preset_config("full_batch"))
    assert ended(HybridTrainerConfig()) < 0.2 * ended(HybridTrainerConfig(predictor_type="secant"))
