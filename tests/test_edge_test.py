"""Where on its line a step ended: known answers, for the statistic and for the decision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hybrid_predict_trainer.move.edge_test import MAX_COSINES, SURE, VISIBLE, Edge, locate, step_cosines
from hybrid_predict_trainer.numerics.sequential import Moments
from hybrid_predict_trainer.weights.parameters import Groups

# ---------------------------------------------------------------- the statistic


def groups_of(*index: int) -> Groups:
    """Parameters in groups, whatever they are called."""
    num = max(index) + 1
    return Groups(tuple(f"p{i}" for i in range(len(index))), index, tuple(f"g{g}" for g in range(num)), (1,) * num)


ONE = groups_of(0)


def quadratic_cosine(rate: float, curvature: float = 1.0) -> float:
    """h of one gradient-descent step on curvature/2 |w|^2: the sign of rate * curvature - 1."""
    before = torch.tensor([3.0, 4.0])
    after = before - rate * curvature * before
    return float(step_cosines([curvature * after], [before], [after], ONE)[0])


@pytest.mark.parametrize(("rate", "wanted"), [(0.1, -1.0), (0.9, -1.0), (1.1, 1.0), (1.9, 1.0)])
def test_cosine_tells_on_which_side_of_the_bottom_a_step_ended(rate: float, wanted: float) -> None:
    assert quadratic_cosine(rate) == pytest.approx(wanted)


def test_cosine_is_zero_at_the_bottom_and_where_nothing_moved() -> None:
    assert quadratic_cosine(1.0) == 0.0
    w = torch.ones(3)
    assert step_cosines([w], [w], [w], ONE).tolist() == [0.0, 0.0]
    assert step_cosines([None], [w], [w + 1], ONE).tolist() == [0.0, 0.0]


def test_cosines_are_over_all_parameters_and_over_every_group() -> None:
    g = [torch.tensor([1.0, 0.0]), torch.tensor([2.0]), torch.tensor([[3.0]])]
    u = [torch.tensor([-1.0, 0.0]), torch.tensor([1.0]), torch.tensor([[4.0]])]
    zero = [torch.zeros_like(t) for t in u]
    groups = groups_of(0, 1, 0)
    wanted = [13 / math.sqrt(14 * 18), 11 / math.sqrt(10 * 17), 1.0]
    assert step_cosines(g, zero, u, groups).tolist() == pytest.approx(wanted)
    without = step_cosines([g[0], None, None], zero, u, groups).tolist()
    assert without == pytest.approx([-1.0, -1.0, 0.0])


def test_sparse_gradients_are_left_out() -> None:
    g = [torch.tensor([1.0]), torch.tensor([[5.0]]).to_sparse()]
    zero, u = [torch.zeros(1), torch.zeros(1, 1)], [torch.tensor([-1.0]), torch.tensor([[1.0]])]
    assert step_cosines(g, zero, u, groups_of(0, 1)).tolist() == [-1.0, -1.0, 0.0]


# ---------------------------------------------------------------- the decision

ALPHA = 0.05


def sample(mean: float, spread: float, n: int) -> Moments:
    """n values with exactly that mean and spread."""
    values = np.random.default_rng(n).standard_normal(n)
    values = (values - values.mean()) / values.std(ddof=1)
    moments = Moments()
    moments.push((mean + spread * values).tolist())
    return moments


@pytest.mark.parametrize(
    ("mean", "spread", "n", "wanted"),
    [
        (-0.4, 0.1, 20, Edge.SHORT),  # a rate far too small, large batches
        (-0.04, 0.01, 20, Edge.SHORT),  # it is the ratio that counts, not the size
        (-0.13, 0.1, 20, Edge.SHORT_IN_NOISE),  # the mean is seen, a single step's sign is not
        (0.3, 0.1, 20, Edge.BEYOND),
        (0.13, 0.1, 20, Edge.BEYOND),
        (-0.02, 0.1, 20, Edge.UNKNOWN),
        (0.0, 0.1, 20, Edge.UNKNOWN),
        (-0.02, 0.1, MAX_COSINES - 1, Edge.UNKNOWN),
        (-0.02, 0.1, MAX_COSINES, Edge.NEAR),
        (0.02, 0.1, MAX_COSINES, Edge.NEAR),
        (-0.4, 0.1, 2, Edge.UNKNOWN),
    ],
)
def test_known_places(mean: float, spread: float, n: int, wanted: Edge) -> None:
    assert locate(sample(mean, spread, n), ALPHA) is wanted


def test_nothing_is_known_of_nothing() -> None:
    assert locate(Moments(), ALPHA) is Edge.UNKNOWN
    assert locate(Moments(), ALPHA, patient=True) is Edge.UNKNOWN


def test_the_fewer_cosines_the_clearer_each_has_to_be() -> None:
    """Those that decide early are those that happened to agree."""
    ratio = VISIBLE * (1 + SURE / 12)
    assert locate(sample(-1.1 * ratio, 1.0, 12), ALPHA) is Edge.SHORT
    assert locate(sample(-0.95 * ratio, 1.0, 12), ALPHA) is Edge.SHORT_IN_NOISE
    assert locate(sample(-0.95 * ratio, 1.0, 40), ALPHA) is Edge.SHORT
    assert locate(sample(-0.95 * VISIBLE, 1.0, 4000), ALPHA) is Edge.SHORT_IN_NOISE


def test_patience_waits_for_a_decision_however_long_it_takes() -> None:
    for n in (MAX_COSINES, 100, 1000):
        assert locate(sample(-0.05, 1.0, n), ALPHA) is Edge.NEAR
        assert locate(sample(-0.05, 1.0, n), ALPHA, patient=True) is Edge.UNKNOWN
    assert locate(sample(-0.05, 1.0, 20_000), ALPHA, patient=True) is Edge.SHORT_IN_NOISE
    assert locate(sample(0.05, 1.0, 20_000), ALPHA, patient=True) is Edge.BEYOND


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("patient", [False, True])
def test_a_cosine_that_is_no_number_is_no_reason_for_a_raise(bad: float, patient: bool) -> None:
    moments = sample(-0.4, 0.1, 30)
    moments.push([bad])
    assert locate(moments, ALPHA, patient=patient) is Edge.NEAR


@pytest.mark.parametrize("noise", [0.01, 1.0])
def test_at_the_edge_hardly_anything_is_called_short(noise: float) -> None:
    """Looked at after every cosine up to the last: the level holds for all looks together."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(200):
        moments = Moments()
        for value in (noise * rng.standard_normal(MAX_COSINES)).tolist():
            moments.push([value])
            edge = locate(moments, ALPHA)
            if edge is not Edge.UNKNOWN:
                wrong += edge is not Edge.NEAR
                break
    assert wrong <= 200 * ALPHA
