"""The low-pass lookahead against the per-step rule it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cases import config, full_batch, make_batches, setup
from hybrid_predict_trainer.lookahead import DriftLookahead, NoLookahead


def reference(
    steps: list[torch.Tensor], rates: list[float], beta: float, kappa: float, delta: float, gamma: float
) -> list[torch.Tensor]:
    """The rule written out with every step an application: b is an EMA of what the optimizer did per unit of rate."""
    theta, b = torch.zeros_like(steps[0]), torch.zeros_like(steps[0])
    points = []
    for step, rate in zip(steps, rates, strict=True):
        b = gamma * b + (1 - gamma) * step / rate
        theta = theta + (1 - kappa) * step + delta * kappa * rate * b + beta * rate * b
        points.append(theta)
    return points


def walk(
    steps: list[torch.Tensor], lookahead: DriftLookahead, strength: float = 1.0, rates: list[float] | None = None
) -> list[torch.Tensor]:
    p = nn.Parameter(torch.zeros_like(steps[0]))
    points = []
    for step, rate in zip(steps, rates or [1.0] * len(steps), strict=True):
        lookahead.before_step([p])
        with torch.no_grad():
            p += step
        lookahead.after_step([p], rate, pull=1.0, strength=strength)
        points.append(p.detach().clone())
    return points


@pytest.mark.parametrize(
    ("beta", "kappa", "delta"), [(0.3, 0.0, 1.0), (0.0, 0.25, 1.0), (0.3, 0.25, 1.0), (0.0, 0.4, 0.0), (0.3, 0.4, 0.5)]
)
def test_every_step_is_the_rule(beta: float, kappa: float, delta: float) -> None:
    """Rates as in a warm-up and a decay."""
    torch.manual_seed(0)
    rates = [0.01 * min(i + 1, 200 - i) / 100 for i in range(200)]
    steps = [rate * (torch.randn(4, dtype=torch.float64) + 0.3) for rate in rates]
    ours = walk(steps, DriftLookahead(beta, kappa, delta, every=1, gamma=0.99), rates=rates)
    for a, b in zip(ours, reference(steps, rates, beta, kappa, delta, 0.99), strict=True):
        assert torch.allclose(a, b)


def test_the_drift_follows_the_rate() -> None:
    """Steps follow a rate that is halved: the drift in their place is halved at once, not seventy steps later."""
    rates = [1.0] * 600 + [0.5] * 60
    ends = walk([torch.tensor([rate]) for rate in rates], DriftLookahead(0.3, 0.25), rates=rates)
    assert float(ends[-1] - ends[599]) == pytest.approx(1.3 * 0.5 * 60, rel=1e-3)


def test_steps_at_no_rate_are_no_drift() -> None:
    lookahead = DriftLookahead(0.3, 0.25)
    end = walk([torch.ones(1)] * 30, lookahead, rates=[0.0] * 30)[-1]
    assert float(end) == pytest.approx(0.75 * 30)
    assert lookahead._b[0].tolist() == [0.0]


def test_every_third_step_is_nearly_every_step() -> None:
    torch.manual_seed(0)
    steps = [torch.randn(4, dtype=torch.float64) + 0.3 for _ in range(400)]
    plain = torch.stack(steps).cumsum(0)[-1]
    one = walk(steps, DriftLookahead(0.3, every=1))[-1] - plain
    three = walk(steps, DriftLookahead(0.3, every=3))[-1] - plain
    assert float((one - three).norm() / one.norm()) < 0.05


def test_drift_is_amplified_and_oscillation_is_not() -> None:
    steps = [torch.tensor([1.0, (-1.0) ** i], dtype=torch.float64) for i in range(1000)]
    end = walk(steps, DriftLookahead(0.3))[-1]
    assert float(end[0]) > 1.25 * 1000  # 1 + beta of the drift, once it is known
    assert abs(float(end[1])) < 2


@pytest.mark.parametrize(
    ("lookahead", "pull", "strength"),
    [
        (DriftLookahead(0.0), 1.0, 1.0),
        (DriftLookahead(0.3), 1.0, 0.0),  # the rate still rises
        (DriftLookahead(0.3, 0.25), 0.0, 0.0),  # a control block
        (DriftLookahead(0.0, 0.4, 0.0), 0.0, 1.0),  # the rate is far too small
        (NoLookahead(), 1.0, 1.0),
    ],
)
def test_without_a_share_nothing_moves(lookahead: DriftLookahead | NoLookahead, pull: float, strength: float) -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    for i in range(20):
        lookahead.before_step([p])
        with torch.no_grad():
            p += 1
        lookahead.after_step([p], 1.0, pull=pull, strength=strength)
        assert p.tolist() == [2.0 + i, 3.0 + i], i


def test_the_drift_is_watched_in_a_control_block() -> None:
    watching, moving = DriftLookahead(0.0, 0.25), DriftLookahead(0.0, 0.25)
    p, q = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    for lookahead, w, share in ((watching, p, 0.0), (moving, q, 1.0)):
        for _ in range(12):
            lookahead.before_step([w])
            with torch.no_grad():
                w += 1
            lookahead.after_step([w], 1.0, pull=share, strength=share)
    assert p.item() == 12 > q.item()
    assert watching._b[0].tolist() == moving._b[0].tolist()


def test_without_a_use_for_the_drift_there_is_one_copy_and_four_passes() -> None:
    p, lookahead = nn.Parameter(torch.ones(3)), DriftLookahead(0.0, 0.4, 0.0, every=1)
    lookahead.before_step([p])
    assert lookahead.memory_bytes() == 12
    assert lookahead.after_step([p], 1.0, pull=1.0, strength=1.0) == 4
    lookahead.translate([torch.ones(3)], 2.0)
    assert lookahead.state_dict()["theta_0"][0].tolist() == [3.0] * 3


@pytest.mark.parametrize("lookahead", [DriftLookahead(0.3, 0.25, every=1), DriftLookahead(0.0, 0.4, 0.0, every=1)])
def test_a_copy_that_moves_along_keeps_its_distance(lookahead: DriftLookahead) -> None:
    """The step that is measured at the next gradient is the optimizer's, not what the motion made of it."""
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    lookahead.before_step([p])
    for _ in range(5):
        earlier = p.detach().clone()
        with torch.no_grad():
            p += torch.tensor([0.25, -0.5])
        end = p.detach().clone()
        lookahead.after_step([p], 1.0, pull=1.0, strength=1.0, along=[earlier])
        assert not torch.equal(p, end)
        assert torch.allclose(p - earlier, torch.tensor([0.25, -0.5]))


def test_the_first_steps_count_too() -> None:
    """Where a run begins is where its first displacement begins."""
    end = walk([torch.ones(1)] * 3, DriftLookahead(0.0, 0.5, 0.0, every=3))[-1]
    assert end.tolist() == [1.5]


def test_forgetting_holds_nothing_and_begins_anew() -> None:
    lookahead = DriftLookahead(0.3, 0.25)
    walk([torch.ones(2)] * 7, lookahead)
    assert lookahead.memory_bytes() == 16
    lookahead.forget()
    assert lookahead.memory_bytes() == 0
    assert lookahead.state_dict() == DriftLookahead(0.3, 0.25).state_dict()


def test_kappa_without_drift_is_lookahead() -> None:
    """Without the drift a displacement is cut to 1 - kappa of itself: Lookahead's slow weights."""
    torch.manual_seed(0)
    steps = [torch.randn(4, dtype=torch.float64) for _ in range(40)]
    end = walk(steps, DriftLookahead(0.0, 0.5, 0.0, every=5))[-1]
    slow = fast = torch.zeros(4, dtype=torch.float64)
    for number, step in enumerate(steps, start=1):
        fast = fast + step
        if number % 5 == 0:
            slow = fast = slow + 0.5 * (fast - slow)
    assert torch.allclose(end, fast)


def test_kappa_takes_out_the_swing_and_leaves_the_drift() -> None:
    """Swings as slow as the applications, which Lookahead would halve together with the drift."""
    steps = [torch.tensor([1.0, 1.0 if (i // 5) % 2 else -1.0], dtype=torch.float64) for i in range(2000)]
    points = walk(steps, DriftLookahead(0.0, 0.25, every=5))
    last = torch.stack(points[1000:])[4::5]
    drift = (last[-1, 0] - last[0, 0]) / (5 * (len(last) - 1))
    assert float(drift) == pytest.approx(1.0, rel=1e-3)
    swing = float(last[:, 1].max() - last[:, 1].min())
    assert swing == pytest.approx(0.75 * 5.0, rel=0.05)


def test_a_jump_is_no_drift() -> None:
    p = nn.Parameter(torch.zeros(2))
    lookahead = DriftLookahead(0.5, every=1)
    lookahead.before_step([p])
    lookahead.after_step([p], 1.0, pull=1.0, strength=1.0)
    jump = [torch.tensor([10.0, -10.0])]
    with torch.no_grad():
        p += 2 * jump[0]
    lookahead.translate(jump, 2.0)
    lookahead.after_step([p], 1.0, pull=1.0, strength=1.0)
    assert p.tolist() == [20.0, -20.0]


def test_half_precision_weights_keep_a_full_average() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    lookahead = DriftLookahead(0.3, every=1)
    for _ in range(3):
        lookahead.before_step([p])
        lookahead.after_step([p], 1.0, pull=1.0, strength=1.0)
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
