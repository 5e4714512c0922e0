"""What a newcomer types first: losses of (output, target), presets by name, the trainer at a prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hybrid_predict_trainer import ConfigError, HybridTrainer, HybridTrainerConfig, attach, preset_config


@pytest.mark.parametrize(
    ("loss", "out", "targets"),
    [
        (nn.MSELoss(), 1, "real"), (nn.L1Loss(), 1, "real"), (nn.HuberLoss(), 1, "real"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), 3, "class"), (nn.NLLLoss(), 3, "class"),
        (nn.functional.cross_entropy, 3, "class"), (nn.functional.mse_loss, 1, "real"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("way", ["trainer", "engine"])
def test_a_loss_of_output_and_target_is_taken(loss: Any, out: int, targets: str, way: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, out), nn.LogSoftmax(1) if out > 1 else nn.Identity())
    batch = (torch.randn(6, 4), torch.randint(0, out, (6,)) if targets == "class" else torch.randn(6, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    wanted = float(loss(model(batch[0]), batch[1]).detach())
    if way == "trainer":
        assert HybridTrainer(model, optimizer, loss_fn=loss).step(batch).loss == wanted
        return
    engine = attach(model, optimizer, loss_fn=loss)
    value = loss(model(batch[0]), batch[1])
    value.backward()
    engine.note(value, batch)
    optimizer.step()
    assert engine.run.subject.loss_fn(model, batch).shape == ()


def test_a_batch_that_is_no_pair_is_named() -> None:
    model = nn.Linear(4, 1)
    trainer = HybridTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=nn.MSELoss())
    with pytest.raises(TypeError, match="no pair"):
        trainer.step({"x": torch.randn(2, 4)})


def test_a_module_of_model_and_batch_is_left_alone() -> None:
    class Own(nn.Module):
        def forward(self, model: nn.Module, batch: Any) -> torch.Tensor:
            return model(batch).square().mean()

    model = nn.Linear(4, 1)
    trainer = HybridTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=Own())
    assert trainer.step(torch.randn(2, 4)).loss > 0


def test_the_trainer_says_what_it_is() -> None:
    model = nn.Linear(4, 1)
    trainer = HybridTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=nn.MSELoss())
    assert repr(trainer) == "HybridTrainer(Linear with 5 trained weights, SGD, predictor secant, warmup, step 0)"
    off = HybridTrainer(model, trainer.run.subject.optimizer, HybridTrainerConfig(enabled=False))
    assert "switched off" in repr(off)


def test_presets_have_a_form_in_python() -> None:
    assert HybridTrainerConfig.preset("full_batch") == preset_config("full_batch")
    assert HybridTrainerConfig.preset("full_batch").predictor_type == "portfolio"
    with pytest.raises(ConfigError, match="did you mean 'full_batch'"):
        HybridTrainerConfig.preset("fullbatch")
    with pytest.raises(ConfigError, match="unknown preset"):
        HybridTrainerConfig.preset(3)


def test_a_loss_function_of_ones_own_is_left_alone() -> None:
    def own(model: nn.Module, target: torch.Tensor) -> torch.Tensor:  # the batch is all target
        return model(target).square().mean()

    model = nn.Linear(4, 1)
    assert (
        HybridTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=own).step(torch.randn(2, 4)).loss > 0
    )
