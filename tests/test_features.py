"""The 32 loss-curve features: shape, known values, invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_predict_trainer.observe.loss_features import NUM_LOSS_FEATURES, log_scale, loss_features

LOSSES = st.lists(st.floats(-1e6, 1e6), max_size=300)
#: Where the named features stand.
MEAN, TREND, SPREAD, CORRELATION, SIGNS, HALVES = (
    slice(0, 6),
    slice(6, 12),
    slice(12, 18),
    slice(18, 21),
    slice(21, 24),
    slice(24, 26),
)
BEST, WORST, FILL, NOW, POWER, DRAWDOWN = 26, 27, 28, 29, 30, 31
SPANS = (8, 16, 32, 64, 128, 256)


@given(LOSSES, st.integers(0, 10**6))
@settings(max_examples=80, deadline=None)
def test_shape_and_finiteness(losses: list[float], step: int) -> None:
    features = loss_features(losses, step)
    assert features.shape == (NUM_LOSS_FEATURES,) == (32,)
    assert features.dtype == torch.float32
    assert torch.isfinite(features).all()


def test_deterministic_and_pure() -> None:
    losses = list(np.random.default_rng(0).random(100) + 1)
    before, state = list(losses), torch.get_rng_state()
    assert torch.equal(loss_features(losses, 100), loss_features(tuple(losses), 100))
    assert losses == before
    assert torch.equal(torch.get_rng_state(), state)


def test_empty_history() -> None:
    assert not loss_features([], 0).any()


def test_constant_loss() -> None:
    features = loss_features([math.e] * 256, 256)
    assert features[NOW] == pytest.approx(1.0)
    assert features[FILL] == 1.0
    others = [i for i in range(32) if i not in (NOW, FILL)]
    assert features[others].abs().max() < 1e-6


def test_exponential_fall() -> None:
    """Log-loss is a line of slope -0.01: trends and means are known."""
    losses = [math.exp(-0.01 * t) for t in range(256)]
    features = loss_features(losses, 256)
    assert torch.allclose(features[TREND], torch.tensor([-0.01 * (s - 1) for s in SPANS]), atol=1e-5)
    assert torch.allclose(features[MEAN], torch.tensor([0.01 * (s - 8) / 2 for s in SPANS]), atol=1e-5)
    assert features[SPREAD].abs().max() < 1e-6
    assert features[HALVES].abs().max() < 1e-5
    assert features[WORST] == pytest.approx(0.01 * (63 - 3.5), abs=1e-5)
    assert features[BEST] == pytest.approx(-0.035, abs=1e-5)


@pytest.mark.parametrize("exponent", [-0.5, -1.0])
def test_power_law_exponent(exponent: float) -> None:
    losses = [t**exponent for t in range(1, 501)]
    assert loss_features(losses, 500)[POWER] == pytest.approx(exponent, abs=1e-4)


def test_alternation_and_noise() -> None:
    alternating = loss_features([1.0 + 0.1 * (-1) ** t for t in range(256)], 256)
    assert (alternating[SIGNS] > 0.9).all()
    assert (alternating[CORRELATION] < -0.8).all()
    noise = loss_features(list(np.exp(np.random.default_rng(1).normal(0, 0.3, 256))), 256)
    assert noise[SIGNS][-1] == pytest.approx(0.5, abs=0.1)
    assert noise[SPREAD][-1] == pytest.approx(0.3, abs=0.05)
    assert abs(noise[CORRELATION][-1]) < 0.2


def test_drawdown() -> None:
    assert loss_features([1.0] * 100 + [math.e] * 8, 108)[DRAWDOWN] == pytest.approx(1.0)


@given(st.lists(st.floats(0.01, 100), min_size=20, max_size=100), st.floats(0.01, 100))
@settings(max_examples=40, deadline=None)
def test_scale_free_but_for_the_level(losses: list[float], factor: float) -> None:
    a, b = loss_features(losses, 500), loss_features([factor * v for v in losses], 500)
    keep = [i for i in range(32) if i not in (NOW, *range(18, 24))]
    assert torch.allclose(a[keep], b[keep], atol=1e-3)
    assert float(b[NOW] - a[NOW]) == pytest.approx(math.log(factor), abs=1e-4)


def test_only_the_last_256_count() -> None:
    recent = list(np.random.default_rng(0).random(256) + 1)
    assert torch.equal(loss_features([9.0] * 50 + recent, 306), loss_features(recent, 306))


def test_log_scale() -> None:
    assert np.allclose(log_scale(np.array([1.0, math.e])), [0, 1])
    assert np.allclose(log_scale(np.array([0.0, -(math.e - 1), math.e - 1])), [0, -1, 1])
    assert log_scale(np.array([])).size == 0
