"""The table behind the learned scale's constants."""

from __future__ import annotations

import pytest

from hybrid_predict_trainer.experiments.step_cosines import cosines, parts, text


def test_parts_are_means_of_equal_pieces() -> None:
    values = [(0.1 * i, float(i)) for i in range(8)]
    first, second = parts(2.0, values, num_parts=2)
    assert (first.first, first.last, second.first, second.last) == (1, 5, 5, 9)
    assert (first.cosine, second.cosine) == pytest.approx((0.15, 0.55))
    assert (first.loss, second.loss) == (1.5, 5.5)
    assert first.noise == pytest.approx(0.1290994)
    assert "+0.150" in text([first])


def test_a_rate_far_too_small_shows_in_the_sign() -> None:
    """Full-batch gradients: a tiny step ends where the loss still falls, nearly opposite to the gradient."""
    small = cosines("regression", None, 30, 1e-4)
    assert len(small) == 29
    assert all(h < -0.3 for h, _ in small[5:])
