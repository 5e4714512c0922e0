"""The table behind the learned scale's constants."""

from __future__ import annotations

import pytest

from hybrid_predict_trainer.experiments.bench.step_cosines import Trace, cosines, format_text, group_text, parts


def test_parts_are_means_of_equal_pieces() -> None:
    values = [(0.1 * i, float(i)) for i in range(8)]
    first, second = parts(2.0, values, num_parts=2)
    assert (first.first, first.last, second.first, second.last) == (1, 5, 5, 9)
    assert (first.cosine, second.cosine) == pytest.approx((0.15, 0.55))
    assert (first.loss, second.loss) == (1.5, 5.5)
    assert first.noise == pytest.approx(0.1290994)
    assert "+0.150" in format_text([first])


def test_a_rate_far_too_small_shows_in_the_sign() -> None:
    """Full-batch gradients: a tiny step ends where the loss still falls, nearly opposite to the gradient."""
    small = cosines("regression", None, 30, 1e-4).of_all
    assert len(small) == 29
    assert all(h < -0.3 for h, _ in small[5:])


def test_groups_are_averaged_over_the_first_steps() -> None:
    trace = Trace(roles=("a", "b"), of_all=[], of_group=[[0.1, -0.5]] * 5 + [[0.3, -0.1]] * 15)
    lines = group_text({3.0: trace}).splitlines()
    assert lines[2].split() == ["3", "a", "+0.10", "+0.30"]
    assert lines[3].split() == ["3", "b", "-0.50", "-0.10"]


def test_a_run_has_a_cosine_per_group_and_step() -> None:
    trace = cosines("regression", None, 6, 1.0)
    assert (
        [len(values) for values in trace.of_group] == [len(trace.roles)] * 5 == [len(trace.roles)] * len(trace.of_all)
    )
