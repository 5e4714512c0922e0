"""What a prediction is unsure of: members that disagree, and noise that stays."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from dynamics import mean, turning
from hybrid_predict_trainer.config.settings import MlpConfig, RssmConfig
from hybrid_predict_trainer.predictors import Mlp, Rssm
from hybrid_predict_trainer.predictors._answers import miss_loss, split_uncertainty


def ensemble(num_samples: int, disagreement: float, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Totals (M, 1, 1) of 200 members, and which each is from."""
    generator = torch.Generator().manual_seed(0)
    centres = disagreement * torch.randn(200, 1, generator=generator, dtype=torch.float64)
    totals = centres + spread * torch.randn(200, num_samples, generator=generator, dtype=torch.float64)
    return totals.reshape(-1, 1, 1), torch.arange(200).repeat_interleave(num_samples)


@pytest.mark.parametrize("num_samples", [2, 4, 32])
@pytest.mark.parametrize("disagreement", [0.0, 0.1, 1.0])
def test_parts_are_those_the_ensemble_was_made_with(num_samples: int, disagreement: float) -> None:
    """However few samples: their noise is not taken for disagreement."""
    totals, members = ensemble(num_samples, disagreement, 0.5)
    area, noise = torch.tensor([4.0]).double(), torch.tensor([0.3]).double()
    epistemic, aleatoric = split_uncertainty(totals, members, noise, area)
    assert epistemic == pytest.approx(4 * disagreement**2, rel=0.25, abs=0.12)
    assert aleatoric == pytest.approx(4 * (0.5**2 + 0.3), rel=0.15)


def test_one_sample_each_is_all_disagreement() -> None:
    totals, members = ensemble(1, 1.0, 0.0)
    one = torch.ones(1).double()
    epistemic, aleatoric = split_uncertainty(totals, members, 0 * one, one)
    assert epistemic == pytest.approx(float(totals.var(correction=0)))
    assert aleatoric == 0


def test_the_loss_of_a_miss_is_least_at_its_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    missed = 0.02 * torch.randn(4000, 2, 3, generator=generator).square()
    beyond = torch.full((4000, 2), 0.01)
    weights = torch.ones(4000, 2, 3)
    weights[..., 2] = 0  # not known
    base = torch.tensor(0.5)
    wanted = (missed[..., :2].sum(dim=2) + beyond).mean()
    at = torch.linspace(-6.0, 0.0, 601)
    losses = [float(miss_loss(x.expand(4000, 2), missed, beyond, weights, base)) for x in at]
    found = 0.5 * float(at[losses.index(min(losses))].exp())
    assert found == pytest.approx(float(wanted), rel=0.02)


def test_a_surprise_has_a_bounded_gradient() -> None:
    log_ratio = torch.zeros(1, 1, requires_grad=True)
    one = torch.ones(1, 1)
    miss_loss(log_ratio, 1e6 * one[..., None], 0 * one, one[..., None], one).backward()
    assert log_ratio.grad is not None
    assert float(log_ratio.grad) == pytest.approx(1 - math.exp(3))


SIZES = {"deterministic_dim": 16, "stochastic_dim": 4, "num_categoricals": 4, "hidden_dim": 16, "sequence_length": 4}
MAKE: dict[str, Callable[[], Mlp | Rssm]] = {
    "mlp": lambda: Mlp(MlpConfig(hidden=(32,), updates_per_window=0, learning_rate=3e-3), 2),
    "rssm": lambda: Rssm(RssmConfig(**SIZES, updates_per_window=0, learning_rate=3e-3, num_samples=8), 2),
}


def uncertainty(name: str, num_windows: int, noise: float) -> tuple[float, float]:
    """(disagreement on the next correction, aleatoric part) on unseen windows, after equally long training."""
    predictor = MAKE[name]()
    for step in turning(predictor.spec, num_windows, noise=noise, turns=False):
        predictor.observe(step.window)
    for _ in range(100):
        for update in [predictor._update] if isinstance(predictor, Mlp) else [m.update for m in predictor.members]:
            update()
    apart, remaining = [], []
    zero, one = torch.zeros(2).double(), torch.ones(2).double()
    for step in turning(predictor.spec, 20, noise=noise, turns=False, seed=5):
        predictor.observe(step.window)
        if step.window.index >= 10:
            answers = predictor._answers
            assert answers is not None
            apart.append(split_uncertainty(answers.corrections[:, 0], answers.members, zero, one)[0])
            remaining.append(predictor.predict(step.window.num_steps).aleatoric)
    return mean(apart), mean(remaining)


@pytest.mark.parametrize(("name", "noise"), [("mlp", 0.1), ("mlp", 0.3), ("rssm", 0.3)])
def test_more_data_lowers_the_epistemic_part_and_not_the_aleatoric(name: str, noise: float) -> None:
    """The next displacement is the last one and noise of a known share: that share remains."""
    few, many = uncertainty(name, 12, noise), uncertainty(name, 150, noise)
    assert 0 < many[0] < 0.7 * few[0]
    known = math.sqrt(noise**2 / (1 + noise**2))
    assert few[1] == pytest.approx(known, rel=0.25)
    assert many[1] == pytest.approx(known, rel=0.25)
