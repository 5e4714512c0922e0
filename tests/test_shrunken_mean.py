"""Shrunken means, moves of products and importance-weighted gains: known answers."""

from __future__ import annotations

import math

import pytest
import torch

from hybrid_predict_trainer.numerics.shrunken_mean import (
    factors_of,
    importance_weighted_gain,
    shrunken_mean,
    shrunken_step,
)


def test_without_scatter_it_is_the_mean_and_of_pure_noise_nothing() -> None:
    same = torch.tensor([[1.0, -2.0, 3.0]] * 4)
    assert torch.equal(shrunken_mean(same), same[0])
    assert not shrunken_mean(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -0.9]])).any()
    assert not shrunken_mean(torch.zeros(3, 2)).any()


def test_the_factor_is_known() -> None:
    """Mean 2, two chunks at 1 and 3: variance 2, of the mean 1, share of noise a quarter."""
    assert shrunken_mean(torch.tensor([[1.0], [3.0]])).item() == pytest.approx(2 * 0.75)


def test_it_is_nearer_to_the_drift_than_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    drift = 0.3 * torch.randn(400, generator=generator)
    errors = []
    for _ in range(20):
        chunks = drift + torch.randn(8, 400, generator=generator)
        errors.append([(each - drift).square().sum().item() for each in (shrunken_mean(chunks), chunks.mean(dim=0))])
    shrunk, plain = (sum(e) / len(errors) for e in zip(*errors, strict=True))
    # signal 0.09, noise 1/8 per entry: the best factor leaves 0.09 * 0.125 / 0.215
    assert shrunk / 400 == pytest.approx(0.09 * 0.125 / 0.215, rel=0.15)
    assert plain / 400 == pytest.approx(0.125, rel=0.1)


def test_a_step_goes_on_for_at_most_a_quarter_of_at_least_forty_steps() -> None:
    chunks = [torch.full((2,), 5.0)] * 8
    assert torch.equal(shrunken_step(chunks, chunk_steps=5, horizon=10), torch.full((2,), 10.0))
    for steps, horizon, said in ((4, 8, "too short"), (5, 11, "a quarter"), (5, 0, "a quarter")):
        with pytest.raises(ValueError, match=said) as caught:
            shrunken_step(chunks, chunk_steps=steps, horizon=horizon)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="two chunks"):
        shrunken_mean(torch.zeros(1, 3))


def test_a_move_of_a_product_of_full_rank_is_met_and_beyond_the_rank_it_is_the_nearest() -> None:
    generator = torch.Generator().manual_seed(1)
    b, a = (torch.randn(*shape, generator=generator) for shape in ((6, 2), (2, 5)))
    inside = b @ torch.randn(2, 5, generator=generator)
    new_b, new_a = factors_of(inside, b, a)
    assert (new_b.shape, new_a.shape) == (b.shape, a.shape)
    torch.testing.assert_close(new_b @ new_a, b @ a + inside, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(new_b.norm(dim=0), new_a.norm(dim=1), rtol=1e-4, atol=1e-4)
    anything = torch.randn(6, 5, generator=generator)
    new_b, new_a = factors_of(anything, b, a)
    rest = torch.linalg.svdvals((b @ a + anything).double())[2:].square().sum().sqrt()
    assert (new_b @ new_a - b @ a - anything).norm().item() == pytest.approx(rest.item(), rel=1e-4)


def test_gains_are_those_of_the_new_policy_without_new_samples() -> None:
    """A coin: heads pays 1. From p = 0.5 to 0.6 the expected reward rises by 0.1."""
    generator = torch.Generator().manual_seed(2)
    heads = torch.rand(40_000, generator=generator) < 0.5
    ratios = torch.where(heads, math.log(0.6 / 0.5), math.log(0.4 / 0.5))
    gain = importance_weighted_gain(heads.float(), ratios, 8)
    assert gain.mean().item() == pytest.approx(0.1, abs=0.002)
    assert not importance_weighted_gain(heads.float(), torch.zeros(40_000), 8).any()
    assert not importance_weighted_gain(torch.ones(8), ratios[:8], 8).any(), "a group that agrees says nothing"
    for size, group in ((8, 1), (9, 8)):
        with pytest.raises(ValueError, match="divide N"):
            importance_weighted_gain(torch.ones(size), torch.zeros(size), group)
