"""The multilayer predictor learns what its base cannot, and behaves."""

from __future__ import annotations

import math

import pytest
import torch

from dynamics import (
    assert_degenerate_windows_are_harmless,
    assert_global_random_state_untouched,
    assert_resumes_bitwise,
    errors,
    mean,
    run,
    turning,
)
from hybrid_predict_trainer import HybridTrainerConfig
from hybrid_predict_trainer.config.settings import MlpConfig
from hybrid_predict_trainer.config.toml import with_values
from hybrid_predict_trainer.predictors import build
from hybrid_predict_trainer.predictors._frame import Frame, known_targets, step_weights
from hybrid_predict_trainer.predictors._learned import changed_loss, log_change
from hybrid_predict_trainer.predictors.mlp import Mlp
from hybrid_predict_trainer.records import BasisSpec, ConfigError


def make() -> Mlp:
    return Mlp(MlpConfig(), 2)


def test_learns_what_the_base_cannot() -> None:
    learnt = errors(make(), 140)
    untrained = errors(Mlp(MlpConfig(updates_per_window=0), 2), 140)
    assert mean(untrained[-40:]) > 0.95, "the base alone is no better than no jump"
    assert mean(learnt[-40:]) < 0.4
    assert mean(learnt[-40:]) < 0.5 * mean(learnt[20:60])
    assert mean(untrained[2:]) < 1.1, "hardly worse than no jump, from the start"


def test_without_its_coefficient_head_it_is_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = make()
    errors(predictor, 140)
    torch.nn.init.zeros_(predictor.network.coefficients.weight)
    torch.nn.init.zeros_(predictor.network.coefficients.bias)
    monkeypatch.setattr(predictor, "_update", lambda: None)
    found = []
    for step in turning(predictor.spec, 8, seed=1):
        predictor.observe(step.window)
        e = predictor.experience
        base = e.frame.coefficients(e.base[0] * e.rates[0])
        found.append(float((predictor.predict(10).coefficients - base).abs().max()))
    assert max(found) < 1e-12


def test_learns_the_loss() -> None:
    learnt, untrained = run(make(), 140)[1], run(Mlp(MlpConfig(updates_per_window=0), 2), 140)[1]
    assert mean(learnt[-40:]) < 0.6 * mean(untrained[-40:])


def test_resumes_bitwise() -> None:
    assert_resumes_bitwise(make)


def test_global_random_state_is_untouched() -> None:
    assert_global_random_state_untouched(make)


def test_degenerate_windows() -> None:
    assert_degenerate_windows_are_harmless(make)


def test_every_weight_is_trained() -> None:
    predictor = make()
    before = {name: p.clone() for name, p in predictor.network.named_parameters()}
    errors(predictor, 12)
    for name, p in predictor.network.named_parameters():
        assert not torch.equal(before[name], p), name


def test_dropout_is_the_epistemic_part() -> None:
    predictor = make()
    errors(predictor, 80)
    assert predictor.predict(10).epistemic > 0
    assert Mlp(MlpConfig(dropout=0.0), 2).config.dropout == 0
    without = Mlp(MlpConfig(dropout=0.0), 2)
    errors(without, 40)
    assert without.predict(10).epistemic < 1e-6


def test_memory_budget() -> None:
    config = with_values(HybridTrainerConfig(), {"predictor.type": "mlp", "predictor.memory_budget_mb": 0.5})
    with pytest.raises(ConfigError, match=r"mlp needs [\d.]+ MB"):
        build(config, 2)
    assert build(HybridTrainerConfig(predictor_type="mlp"), 11).memory_bytes() < 20 * 2**20


# ---------------------------------------------------------------- the pieces it shares with rssm


def test_frame_agrees_with_explicit_gram_schmidt() -> None:
    columns = torch.randn(2, 4, 30, dtype=torch.float64)
    target = torch.randn(2, 30, dtype=torch.float64)
    frame = Frame.of(columns @ columns.mT)
    basis, _ = torch.linalg.qr(columns.mT)  # (2, 30, 4), signs free
    inside = (basis @ (basis.mT @ target[:, :, None]))[:, :, 0]
    u = frame.project((columns @ target[:, :, None])[:, :, 0])
    back = (frame.coefficients(u)[:, :, None] * columns).sum(dim=1)
    torch.testing.assert_close(back, inside, rtol=1e-4, atol=1e-4)
    c = torch.randn(2, 4, dtype=torch.float64)
    torch.testing.assert_close(frame.coefficients(frame.express(c)), c)
    first = frame.coefficients(torch.eye(4, dtype=torch.float64)[0].expand(2, 4))
    assert float(first[:, 1:].abs().max()) == 0, "the first direction is the newest displacement"


def test_parallel_columns_stay_bounded() -> None:
    d = torch.randn(1, 1, 30, dtype=torch.float64)
    columns = d + 1e-9 * torch.randn(1, 5, 30, dtype=torch.float64)
    frame = Frame.of(columns @ columns.mT)
    u = torch.ones(1, 5, dtype=torch.float64)
    jump = (frame.coefficients(u)[:, :, None] * columns).sum(dim=1)
    assert float(jump.norm()) < 3 * float(d.norm())


def test_step_weights_sum_to_the_horizon() -> None:
    for m in (0.25, 1.0, 1.5, 3.0, 4.0, 7.5):
        assert float(step_weights(m).sum()) == pytest.approx(m)


def test_known_targets_are_what_the_ring_still_holds() -> None:
    known = known_targets(BasisSpec(num_displacements=6, lag=True))
    assert known.tolist() == [[True] * 7, [True] * 4 + [False] * 3, [True] * 3 + [False] * 4, [True] * 2 + [False] * 5]


@pytest.mark.parametrize(("before", "after"), [(2.0, 0.5), (-2.0, -1.0), (1e-3, 3e-3), (-1.0, -1.5)])
def test_log_change_and_back(before: float, after: float) -> None:
    change = log_change(before, after)
    assert changed_loss(before, change) == pytest.approx(after, rel=0.5)
    if before > 0:
        assert changed_loss(before, change) == pytest.approx(after)
    assert math.isnan(log_change(math.nan, 1.0))
