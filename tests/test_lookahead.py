"""The low-pass lookahead against the per-step rule it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cases import config, full_batch, make_batches, setup
from hybrid_predict_trainer.lookahead import EmaLookahead, NoLookahead


def reference(steps: list[torch.Tensor], beta: float, gamma: float) -> list[torch.Tensor]:
    """EMA-Nesterov as published: m is an EMA of the steps, theta moves by beta m after each."""
    theta, m = torch.zeros_like(steps[0]), torch.zeros_like(steps[0])
    points = []
    for step in steps:
        old = theta
        theta = theta + step
        m = gamma * m + (1 - gamma) * (theta - old)
        theta = theta + beta * m
        m = m + (1 - gamma) * beta * m  # the published m sees the whole way from point to point
        points.append(theta)
    return points


def walk(steps: list[torch.Tensor], lookahead: EmaLookahead, strength: float = 1.0) -> list[torch.Tensor]:
    p = nn.Parameter(torch.zeros_like(steps[0]))
    lookahead._x = [torch.zeros_like(steps[0])]
    points = []
    for step in steps:
        with torch.no_grad():
            p += step
        lookahead.after_step([p], strength)
        points.append(p.detach().clone())
    return points


def test_every_step_is_the_published_rule_to_first_order() -> None:
    """m = (1 - gamma)(theta - x) by Abel summation; what differs is of order (1 - gamma)."""
    torch.manual_seed(0)
    steps = [torch.randn(4, dtype=torch.float64) + 0.3 for _ in range(200)]
    ours, theirs = walk(steps, EmaLookahead(0.3, every=1, gamma=0.99)), reference(steps, 0.3, 0.99)
    plain = torch.stack(steps).cumsum(0)[-1]
    extra, wanted = ours[-1] - plain, theirs[-1] - plain
    assert float((extra - wanted).norm() / wanted.norm()) < 0.05


def test_every_fifth_step_is_nearly_every_step() -> None:
    torch.manual_seed(0)
    steps = [torch.randn(4, dtype=torch.float64) + 0.3 for _ in range(400)]
    plain = torch.stack(steps).cumsum(0)[-1]
    one = walk(steps, EmaLookahead(0.3, every=1))[-1] - plain
    five = walk(steps, EmaLookahead(0.3, every=5))[-1] - plain
    assert float((one - five).norm() / one.norm()) < 0.05


def test_drift_is_amplified_and_oscillation_is_not() -> None:
    steps = [torch.tensor([1.0, (-1.0) ** i], dtype=torch.float64) for i in range(1000)]
    end = walk(steps, EmaLookahead(0.3))[-1]
    assert float(end[0]) > 1.25 * 1000  # 1 / (1 - beta) of the drift in the long run
    assert abs(float(end[1])) < 2


@pytest.mark.parametrize("lookahead", [EmaLookahead(0.0), EmaLookahead(0.3), NoLookahead()])
def test_without_strength_nothing_moves(lookahead: EmaLookahead | NoLookahead) -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    for i in range(20):
        strength = 1.0 if isinstance(lookahead, NoLookahead) or lookahead.beta == 0 else 0.0
        lookahead.after_step([p], strength)
        assert p.tolist() == [1.0, 2.0], i


def test_a_jump_is_no_drift() -> None:
    p = nn.Parameter(torch.zeros(2))
    lookahead = EmaLookahead(0.5, every=1)
    lookahead.after_step([p], 1.0)
    jump = [torch.tensor([10.0, -10.0])]
    with torch.no_grad():
        p += 2 * jump[0]
    lookahead.translate(jump, 2.0)
    lookahead.after_step([p], 1.0)
    assert p.tolist() == [20.0, -20.0]


def test_half_precision_weights_keep_a_full_average() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    lookahead = EmaLookahead(0.3, every=1)
    for _ in range(3):
        lookahead.after_step([p], 1.0)
    assert lookahead._x[0].dtype is torch.float32
    assert lookahead.memory_bytes() == 12


@pytest.mark.parametrize(("data", "used"), [(make_batches, True), (full_batch, False)])
def test_only_where_losses_are_noisy(data, used: bool) -> None:
    """With exact losses the gate finds longer jumps at once, and its tests assume that nothing else moves."""
    made = setup("mlp", "sgd", "flat")
    trainer = made.trainer(config(lookahead=0.3, explore_outcomes=0))
    for batch in data(20):
        trainer.step(batch)
    assert bool(trainer.run.lookahead.memory_bytes()) is used
