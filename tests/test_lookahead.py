"""The low-pass lookahead against the per-step rule it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cases import config, full_batch, make_batches, setup
from hybrid_predict_trainer.lookahead import DriftLookahead, NoLookahead


def reference(steps: list[torch.Tensor], beta: float, kappa: float, gamma: float) -> list[torch.Tensor]:
    """The rule written out with every step an application: b is an EMA of what the optimizer did."""
    theta, b = torch.zeros_like(steps[0]), torch.zeros_like(steps[0])
    points = []
    for step in steps:
        b = gamma * b + (1 - gamma) * step
        theta = theta + (1 - kappa) * step + kappa * b + beta * b
        points.append(theta)
    return points


def walk(steps: list[torch.Tensor], lookahead: DriftLookahead, strength: float = 1.0) -> list[torch.Tensor]:
    p = nn.Parameter(torch.zeros_like(steps[0]))
    lookahead._theta_0, lookahead._b = [torch.zeros_like(steps[0])], [torch.zeros_like(steps[0])]
    points = []
    for step in steps:
        with torch.no_grad():
            p += step
        lookahead.after_step([p], strength)
        points.append(p.detach().clone())
    return points


@pytest.mark.parametrize(("beta", "kappa"), [(0.3, 0.0), (0.0, 0.25), (0.3, 0.25)])
def test_every_step_is_the_rule(beta: float, kappa: float) -> None:
    torch.manual_seed(0)
    steps = [torch.randn(4, dtype=torch.float64) + 0.3 for _ in range(200)]
    ours = walk(steps, DriftLookahead(beta, kappa, every=1, gamma=0.99))
    for a, b in zip(ours, reference(steps, beta, kappa, 0.99), strict=True):
        assert torch.allclose(a, b)


def test_every_fifth_step_is_nearly_every_step() -> None:
    torch.manual_seed(0)
    steps = [torch.randn(4, dtype=torch.float64) + 0.3 for _ in range(400)]
    plain = torch.stack(steps).cumsum(0)[-1]
    one = walk(steps, DriftLookahead(0.3, every=1))[-1] - plain
    five = walk(steps, DriftLookahead(0.3, every=5))[-1] - plain
    assert float((one - five).norm() / one.norm()) < 0.05


def test_drift_is_amplified_and_oscillation_is_not() -> None:
    steps = [torch.tensor([1.0, (-1.0) ** i], dtype=torch.float64) for i in range(1000)]
    end = walk(steps, DriftLookahead(0.3))[-1]
    assert float(end[0]) > 1.25 * 1000  # 1 + beta of the drift, once it is known
    assert abs(float(end[1])) < 2


@pytest.mark.parametrize("lookahead", [DriftLookahead(0.0), DriftLookahead(0.3, 0.25), NoLookahead()])
def test_without_strength_nothing_moves(lookahead: DriftLookahead | NoLookahead) -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    for i in range(20):
        strength = 1.0 if isinstance(lookahead, NoLookahead) or lookahead.beta == 0 else 0.0
        lookahead.after_step([p], strength)
        assert p.tolist() == [1.0, 2.0], i


def test_kappa_without_drift_is_lookahead() -> None:
    """Where b stays zero (gamma = 1) a displacement is cut to 1 - kappa of itself: Lookahead's slow weights."""
    torch.manual_seed(0)
    steps = [torch.randn(4, dtype=torch.float64) for _ in range(40)]
    end = walk(steps, DriftLookahead(0.0, 0.5, every=5, gamma=1.0))[-1]
    slow = fast = torch.zeros(4, dtype=torch.float64)
    for number, step in enumerate(steps, start=1):
        fast = fast + step
        if number % 5 == 0:
            slow = fast = slow + 0.5 * (fast - slow)
    assert torch.allclose(end, fast)


def test_kappa_takes_out_the_swing_and_leaves_the_drift() -> None:
    """Swings as slow as the applications, which Lookahead would halve together with the drift."""
    steps = [torch.tensor([1.0, 1.0 if (i // 5) % 2 else -1.0], dtype=torch.float64) for i in range(2000)]
    points = walk(steps, DriftLookahead(0.0, 0.25))
    last = torch.stack(points[1000:])[4::5]
    drift = (last[-1, 0] - last[0, 0]) / (5 * (len(last) - 1))
    assert float(drift) == pytest.approx(1.0, rel=1e-3)
    swing = float(last[:, 1].max() - last[:, 1].min())
    assert swing == pytest.approx(0.75 * 5.0, rel=0.05)


def test_a_jump_is_no_drift() -> None:
    p = nn.Parameter(torch.zeros(2))
    lookahead = DriftLookahead(0.5, every=1)
    lookahead.after_step([p], 1.0)
    jump = [torch.tensor([10.0, -10.0])]
    with torch.no_grad():
        p += 2 * jump[0]
    lookahead.translate(jump, 2.0)
    lookahead.after_step([p], 1.0)
    assert p.tolist() == [20.0, -20.0]


def test_half_precision_weights_keep_a_full_average() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    lookahead = DriftLookahead(0.3, every=1)
    for _ in range(3):
        lookahead.after_step([p], 1.0)
    assert lookahead._b[0].dtype is torch.float32
    assert lookahead.memory_bytes() == 24


@pytest.mark.parametrize(("data", "used"), [(make_batches, True), (full_batch, False)])
def test_only_where_losses_are_noisy(data, used: bool) -> None:
    """With exact losses the gate finds longer jumps at once, and its tests assume that nothing else moves."""
    made = setup("mlp", "sgd", "flat")
    trainer = made.trainer(config(lookahead=0.3, explore_outcomes=0))
    for batch in data(20):
        trainer.step(batch)
    assert bool(trainer.run.lookahead.memory_bytes()) is used
