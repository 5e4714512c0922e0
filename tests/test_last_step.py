"""Full-batch runs with an optimizer whose own steps throw the weights away: the run ends where jumps have led."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig
from hybrid_predict_trainer.config.toml import with_values
from hybrid_predict_trainer.records import Phase, Reason

CALM = 60  # steps


class Throwing(torch.optim.Adam):
    """Adam until step 60; from there on it moves every weight by a half, as Rprop's steps grow to do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=1e-2)
        self.num_steps = 0

    def step(self, closure: Any = None) -> Any:
        self.num_steps += 1
        if self.num_steps <= CALM:
            return super().step(closure)
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.add_(0.5)
        return None


def _batch() -> tuple[Tensor, Tensor]:
    x = torch.linspace(-2, 2, 32)[:, None]
    return x, torch.sin(2 * x)


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.mse_loss(model(batch[0]), batch[1])


def _trainer(seed: int = 0, **settings: Any) -> tuple[HybridTrainer, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    config = with_values(HybridTrainerConfig(seed=seed), settings)
    return HybridTrainer(model, Throwing(model.parameters()), config, loss_fn=_loss), model


@pytest.mark.parametrize("seed", range(4))
def test_a_run_does_not_end_on_a_step_that_threw_the_weights_away(seed: int) -> None:
    """Whatever the draw of what is skipped as a control; a step of this optimizer leads to a loss above 1."""
    trainer, model = _trainer(seed)
    phases: list[Phase] = []
    trainer.fit(
        itertools.repeat(_batch()), total_steps=130, progress_callback=lambda result: phases.append(result.phase)
    )
    assert Phase.PREDICT in phases[-3:]
    assert float(_loss(model, _batch()).detach()) < 0.01


def test_what_is_skipped_as_a_control_is_no_way_back() -> None:
    """With every second jump skipped there are controls while steps are calm, and none of a step that threw."""
    trainer, _ = _trainer(0, **{"gate.holdout_fraction": 0.5})
    skipped: list[int] = []
    for _ in range(160):
        result = trainer.step(_batch())
        if result.reason == Reason.CONTROL_SKIP.value:
            skipped.append(trainer.run.meter.num_real_steps)
    assert skipped
    assert trainer.run.meter.num_real_steps > CALM + 10
    assert max(skipped) <= CALM


def test_without_jumps_a_run_ends_where_it_always_did() -> None:
    trainer, _ = _trainer(0, **{"training.max_predict_steps": 0})
    trainer.fit(itertools.repeat(_batch()), total_steps=50)
    assert trainer.current_step == 50
