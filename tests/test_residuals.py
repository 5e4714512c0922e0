"""Residuals: hindsight coefficients, ring buffer, retrieval."""

from __future__ import annotations

import pytest
import torch

from cases import assert_same
from hybrid_predict_trainer.propose.residuals import (
    CAPACITIES,
    ResidualStore,
    cosine,
    extract,
    growth,
    hindsight_coefficients,
)
from hybrid_predict_trainer.records import BasisSpec, Hindsight, PhasePrediction, Residual

G, K, F = 2, 3, 8


def seen_through(columns, displacement):
    """Hindsight of a displacement (G, D) through columns (G, K, D)."""
    return Hindsight(
        BB=torch.einsum("gkd,gld->gkl", columns, columns),
        BT=torch.einsum("gkd,gd->gk", columns, displacement),
        TT=displacement.square().sum(dim=1),
    )


def residual(number, num_features=F, horizon=10):
    generator = torch.Generator().manual_seed(number)
    return Residual(
        features=torch.randn(num_features, generator=generator), loss=float(number), horizon=horizon,
        coefficients=torch.full((G, K), float(number), dtype=torch.float64),
    )  # fmt: skip


def filled(count, capacity=5):
    store = ResidualStore(capacity)
    for number in range(count):
        assert store.add(residual(number))
    return store


# ---------------------------------------------------------------- hindsight


@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_hindsight_is_least_squares_in_weight_space(scale):
    columns = scale * torch.randn(G, K, 50, dtype=torch.float64)
    displacement = scale * torch.randn(G, 50, dtype=torch.float64)
    ours = hindsight_coefficients(seen_through(columns, displacement), 1e-9)
    for g in range(G):
        theirs = torch.linalg.lstsq(columns[g].T, displacement[g, :, None]).solution[:, 0]
        torch.testing.assert_close(ours[g], theirs, rtol=1e-5, atol=1e-8)


def test_what_nothing_is_known_about_has_no_residual():
    predicted = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.float64)
    columns = torch.randn(G, K, 50, dtype=torch.float64)
    columns[0, 1] = 0  # a column not seen yet
    columns[1] = 0  # a group that does not move
    true = torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64)
    displacement = torch.stack([true @ columns[0], torch.zeros(50, dtype=torch.float64)])
    found = extract(
        seen_through(columns, displacement),
        PhasePrediction(coefficients=predicted, horizon=7, predicted_loss=2.0), torch.zeros(F), loss=2.5, l2=1e-9,
    )  # fmt: skip
    expected = torch.tensor([[1.0, 0.0, -4.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(found.coefficients, expected, rtol=1e-6, atol=1e-6)
    assert found.loss == 0.5
    assert found.horizon == 7


def test_ridge_shrinks_towards_the_prediction():
    columns, predicted = torch.randn(G, K, 50, dtype=torch.float64), torch.ones(G, K, dtype=torch.float64)
    seen = seen_through(columns, torch.randn(G, 50, dtype=torch.float64))
    distances = [float((hindsight_coefficients(seen, l2, predicted) - predicted).norm()) for l2 in (0.0, 1.0, 1e6)]
    assert distances[0] > 1.5 * distances[1] > 0
    assert distances[2] < 1e-4


def test_growth_spares_the_lag():
    factors = growth(BasisSpec(num_displacements=2, lag=True, optimizer=True), 4.0)
    assert factors.tolist() == [4, 4, 1, 4]
    assert growth(BasisSpec(num_displacements=2), 0.5).tolist() == [0.5, 0.5]


# ---------------------------------------------------------------- ring buffer


@pytest.mark.parametrize("count", [0, 1, 4, 5, 6, 13])
def test_ring_buffer_is_the_last_of_a_list(count):
    store = filled(count)
    assert len(store) == min(count, 5)
    assert sorted(store[i].loss for i in range(len(store))) == [float(n) for n in range(count)][-5:]
    for i in range(len(store)):
        original = residual(int(store[i].loss))
        assert_same(store[i].features, original.features)
        assert_same(store[i].coefficients, original.coefficients)
        assert store[i].horizon == 10
    with pytest.raises(IndexError):
        store[len(store)]


def test_memory_is_bounded_and_counted():
    store = filled(3, capacity=200)
    expected = 200 * (4 * F + 4 * G * K + 8 + 8)
    assert store.memory_bytes() == expected
    for number in range(500):
        store.add(residual(number))
    assert store.memory_bytes() == expected
    assert ResidualStore(500).memory_bytes() == 0
    # the specification's 10 MB holds the largest store of a large basis: 16 groups, 64 columns, 128 features
    large = ResidualStore(CAPACITIES["large"])
    large.add(Residual(features=torch.zeros(128), coefficients=torch.zeros(16, 64), loss=0.0, horizon=1))
    assert large.memory_bytes() < 10e6


def test_what_is_not_finite_is_left_out_and_what_does_not_fit_is_an_error():
    store = filled(2)
    bad = residual(7)
    bad.coefficients[0, 0] = float("nan")
    assert not store.add(bad)
    assert len(store) == 2
    with pytest.raises(ValueError, match="the store holds"):
        store.add(residual(1, num_features=F + 1))
    with pytest.raises(ValueError, match="capacity"):
        ResidualStore(0)


@pytest.mark.parametrize("count", [0, 3, 12])
def test_state_goes_through_a_fresh_store(count):
    store, copy = filled(count), ResidualStore(5)
    copy.load_state_dict(store.state_dict())
    for s in (store, copy):
        s.add(residual(100))
        s.add(residual(101))
    assert_same(copy.state_dict(), store.state_dict())
    query = residual(100).features
    assert [(w, r.loss) for w, r in copy.find_similar(query)] == [(w, r.loss) for w, r in store.find_similar(query)]
    if count > 4:
        with pytest.raises(ValueError, match="do not fit"):
            ResidualStore(2).load_state_dict(store.state_dict())


# ---------------------------------------------------------------- retrieval


def test_cosine_is_that_of_standardised_features():
    stored, query = 100 + torch.randn(30, F), 100 + torch.randn(F)
    mean, std = stored.double().mean(0), stored.double().std(0)
    a, b = (query - mean) / std, (stored - mean) / std
    # the floor of the spread is 0.1 here, below every feature's
    torch.testing.assert_close(cosine(query, stored), torch.cosine_similarity(a[None], b, dim=1), rtol=1e-6, atol=1e-6)
    assert float(torch.cosine_similarity(query[None], stored, dim=1).min()) > 0.99  # raw ones tell nothing apart


def test_cosine_of_few_and_of_equal_entries():
    v = torch.randn(F)
    assert float(cosine(v, v[None])) == pytest.approx(1.0)
    assert float(cosine(-v, v[None])) == pytest.approx(-1.0)
    assert float(cosine(torch.zeros(F), v[None])) == 0
    assert cosine(v, v.expand(4, F)).tolist() == [0, 0, 0, 0]


def test_retrieval_keeps_the_five_best_above_the_threshold():
    generator = torch.Generator().manual_seed(0)
    store, query = ResidualStore(100), torch.ones(F)
    for number in range(60):
        near = number % 6 == 0  # ten of them
        features = (query if near else -query) + 0.3 * torch.randn(F, generator=generator)
        store.add(Residual(features=features, coefficients=torch.zeros(G, K), loss=float(near), horizon=1))
    similarity = cosine(query, torch.stack([store[i].features for i in range(60)]))
    best = similarity[similarity > 0.7].sort(descending=True).values[:5]
    found = store.find_similar(query)
    assert len(found) == 5
    assert [weight for weight, _ in found] == pytest.approx((best / best.sum()).tolist())
    assert all(r.loss == 1 for _, r in found)
    assert len(store.find_similar(query, limit=50)) == int((similarity > 0.7).sum()) < 60
    assert store.find_similar(query, threshold=float(best[1]))[1:] == []
    assert ResidualStore(3).find_similar(query) == []
