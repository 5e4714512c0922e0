"""The low-pass lookahead against the per-step rule it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cases import assert_same, config, difference, full_batch, make_batches, setup
from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig, LookaheadConfig
from hybrid_predict_trainer.judge.switchback import Switchback
from hybrid_predict_trainer.move.lookahead import DriftLookahead, NoLookahead, went_on


def reference(
    steps: list[torch.Tensor], rates: list[float], beta: float, kappa: float, delta: float, gamma: float
) -> list[torch.Tensor]:
    """The rule written out with every step an application: b is an EMA of what the optimizer did per unit of rate."""
    theta, b = torch.zeros_like(steps[0]), torch.zeros_like(steps[0])
    made = foretold = 0.0
    points = []
    for step, rate in zip(steps, rates, strict=True):
        made = 0.9 * made + rate * float(step @ b)
        foretold = 0.9 * foretold + rate**2 * float(b @ b)
        a = min(max(made / foretold, 0.0), 1.0) if foretold > 0 else 1.0
        b = gamma * b + (1 - gamma) * step / rate
        theta = theta + (1 - kappa) * step + a * (delta * kappa + beta) * rate * b
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


def test_without_a_rate_nothing_is_taken_out() -> None:
    """The first group is frozen, or has no rate: the drift cannot be told, so nothing could be put back."""
    lookahead = DriftLookahead(0.3, 0.25)
    end = walk([torch.ones(1)] * 30, lookahead, rates=[0.0] * 30)[-1]
    assert end.item() == 30.0
    assert lookahead._b[0].tolist() == [0.0]


def test_every_third_step_is_nearly_every_step() -> None:
    torch.manual_seed(0)
    steps = [0.1 * torch.randn(4, dtype=torch.float64) + 0.3 for _ in range(400)]
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
    assert_same(lookahead.state_dict(), DriftLookahead(0.3, 0.25).state_dict())


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
    assert float(drift) == pytest.approx(1.0, rel=0.015)  # a is 1, less what the swing takes off
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
    trainer = made.trainer(config(lookahead__scope="all", lookahead__extrapolation=0.3, explore_outcomes=0))
    for batch in data(20):
        trainer.step(batch)
    assert bool(trainer.run.optimizer_step.lookahead.memory_bytes()) is used


class Spy(DriftLookahead):
    """Records what a run asks for."""

    def __init__(self, *args: float) -> None:
        super().__init__(*args)
        self.begun: list[list[torch.Tensor]] = []
        self.asked: list[dict[str, object]] = []
        self.translated = 0

    def before_step(self, parameters):
        self.begun.append([p.detach().clone() for p in parameters])
        return super().before_step(parameters)

    def after_step(self, parameters, rate, *, pull, strength, along=(), movable=()):
        self.asked.append({"rate": rate, "pull": pull, "strength": strength, "along": len(along)})
        return super().after_step(parameters, rate, pull=pull, strength=strength, along=along, movable=movable)

    def translate(self, deltas, scale):
        self.translated += 1
        super().translate(deltas, scale)


RATES = [0.25, 0.5, 1.0, 1.0, 0.5, 0.25]


def spied(num_steps: int, *, value: float = 1.0, touched: bool = True, **changes: object):
    """A run under a schedule that rises and falls, its lookahead watched."""
    made = setup("mlp", "sgd")
    base = made.optimizer.param_groups[0]["lr"]
    made.scheduler = torch.optim.lr_scheduler.LambdaLR(made.optimizer, lambda t: RATES[min(t, len(RATES) - 1)])
    trainer = made.trainer(
        config(
            lookahead__scope="all",
            lookahead__extrapolation=0.3,
            lookahead__damping=0.25,
            max_lr_multiplier=50.0,
            explore_outcomes=0,
            **changes,
        )
    )
    spy = trainer.run.optimizer_step.lookahead = Spy(0.3, 0.25)
    trainer.run.optimizer_step.scale.multiplier.value, trainer.run.optimizer_step.scale.multiplier.touched = (
        value,
        touched,
    )
    start = [p.detach().clone() for p in trainer.run.subject.parameters]
    for batch in make_batches(num_steps):
        trainer.step(batch)
    return spy, start, base, trainer


def test_a_run_begins_its_motion_before_its_first_step() -> None:
    spy, start, _, _ = spied(2)
    assert all(torch.equal(a, b) for a, b in zip(spy.begun[0], start, strict=True))


def test_a_run_tells_the_rate_its_scale_included_and_the_strength_of_the_schedule() -> None:
    spy, _, base, _ = spied(6, value=3.0)
    assert [a["rate"] for a in spy.asked] == pytest.approx([3 * base * r for r in RATES])
    assert [a["strength"] for a in spy.asked] == [0.0, 0.0, 0.0, 1.0, 0.5, 0.25]
    assert {a["pull"] for a in spy.asked} == {1.0}


@pytest.mark.parametrize(
    ("value", "touched", "drift", "pull"),
    [
        (1.0, False, 1.0, 1.0),
        (4.0, False, 1.0, 0.0),  # growing
        (4.0, True, 1.0, 1.0),
        (4.0, True, 0.0, 0.0),  # without the drift it would shorten what was lengthened
        (1.0, True, 0.0, 1.0),
        (50.0, False, 1.0, 1.0),  # at its bound it does not grow
    ],
)
def test_steps_that_are_being_lengthened_are_not_pulled_back(
    value: float, touched: bool, drift: float, pull: float
) -> None:
    spy, *_ = spied(4, value=value, touched=touched, lookahead__drift=drift)
    assert {a["pull"] for a in spy.asked} == {pull}


def test_the_copy_that_a_step_is_measured_from_goes_along() -> None:
    spy, _, _, trainer = spied(30, value=1.0, touched=False)
    assert max(a["along"] for a in spy.asked) == len(trainer.run.subject.parameters)


def test_an_accepted_jump_moves_the_lookahead_and_spoils_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled: list[int] = []
    monkeypatch.setattr(Switchback, "on_jump", lambda self: spoiled.append(1))
    made = setup("mlp", "sgd", "flat")
    trainer = made.trainer(
        config(
            lookahead__scope="all",
            lookahead__extrapolation=0.3,
            gate__exact="never",
            gate__significance=0.5,
            gate__holdout_fraction=0.0,
        )
    )
    spy = trainer.run.optimizer_step.lookahead = Spy(0.3)
    for batch in full_batch(300):
        trainer.step(batch)
    accepted = trainer.statistics()["num_jumps_accepted"]
    assert accepted > 0
    assert spy.translated == accepted
    assert len(spoiled) >= accepted


def test_two_equal_batches_do_not_end_it() -> None:
    made = setup("mlp", "sgd", "flat")
    trainer = made.trainer(config(lookahead__scope="all", lookahead__extrapolation=0.3, explore_outcomes=0))
    batches = make_batches(12)
    for batch in [*batches[:6], batches[5], *batches[6:]]:
        trainer.step(batch)
    assert trainer.run.optimizer_step.lookahead.num_steps == 13


# ---------------------------------------------------------------- the share of the drift that went on


@pytest.mark.parametrize(
    ("made", "foretold", "share"),
    [(1.0, 1.0, 1.0), (0.5, 2.0, 0.25), (3.0, 1.0, 1.0), (-1.0, 1.0, 0.0), (0.0, 0.0, 1.0), (float("nan"), 1.0, 0.0),
     (float("inf"), float("inf"), 0.0)],
)  # fmt: skip
def test_the_share_is_between_none_and_all(made: float, foretold: float, share: float) -> None:
    assert float(went_on(torch.tensor([made, foretold]))) == share


TURNS = {"straight on": (1.0, 0.0), "by a right angle": (0.0, 1.0), "back": (-1.0, 0.0), "half as far": (0.5, 0.0)}
SHARES = {"straight on": 1.0, "by a right angle": 0.0, "back": 0.0, "half as far": 0.5}


@pytest.mark.parametrize("turn", TURNS)
def test_what_is_left_of_the_drift_after_a_turn(turn: str) -> None:
    """Some ten applications later the share is that of the new course along the old one; the drift turns slower."""
    lookahead = DriftLookahead(0.3, every=1, gamma=0.995)
    walk([torch.tensor([1.0, 0.0])] * 900 + [torch.tensor(TURNS[turn])] * 30, lookahead)
    assert float(went_on(lookahead._sums)) == pytest.approx(SHARES[turn], abs=0.2)


def valley(beta: float, turns: float) -> float:
    """Mean loss of noisy gradient descent behind a minimum that goes round; ``turns``: radians per step."""
    g = torch.Generator().manual_seed(0)
    p, lookahead, losses = nn.Parameter(torch.tensor([1.0, 0.0])), DriftLookahead(beta), []
    for t in range(1500):
        angle = torch.tensor(turns * t)
        gradient = p.detach() - torch.stack([angle.cos(), angle.sin()])
        losses.append(0.5 * float(gradient @ gradient))
        lookahead.before_step([p])
        with torch.no_grad():
            p -= 0.1 * (gradient + 0.05 * torch.randn(2, generator=g))
        lookahead.after_step([p], 0.1, pull=1.0, strength=1.0)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("turns", [0.05, 0.1, 0.2])
def test_where_the_drift_leads_astray_little_of_it_is_followed(turns: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The minimum has gone elsewhere by the time that the drift is known."""
    without, with_it = valley(0.0, turns), valley(0.5, turns)
    assert with_it < 1.02 * without
    monkeypatch.setattr("hybrid_predict_trainer.move.lookahead.went_on", lambda sums: torch.ones(()))
    regardless = valley(0.5, turns)
    assert regardless > with_it


# ---------------------------------------------------------------- which networks


def _blocks() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 1))


NETWORKS = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)),
    "cnn": lambda: nn.Sequential(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 1)),
    "rnn": lambda: nn.ModuleDict({"rnn": nn.LSTM(6, 8, batch_first=True), "head": nn.Linear(8, 1)}),
    "transformer": _blocks,
}


@pytest.mark.parametrize("scope", ["blocks", "all"])
@pytest.mark.parametrize("network", NETWORKS)
def test_networks_by_scope(network: str, scope: str) -> None:
    model = NETWORKS[network]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    settings = HybridTrainerConfig(lookahead=LookaheadConfig(scope=scope))
    run = HybridTrainer(model, optimizer, settings, lambda m, b: b, schedule).run
    assert isinstance(run.optimizer_step.lookahead, DriftLookahead) is (scope == "all" or network == "transformer")


@pytest.mark.parametrize(("scheduler", "moves"), [("flat", False), ("lambda", True)])
def test_under_a_constant_schedule_nothing_moves(scheduler: str, moves: bool) -> None:
    """What settles higher is settled by a decay."""
    ends = []
    for beta in (0.0, 0.5):
        made = setup("mlp", "sgd", scheduler)
        trainer = made.trainer(
            config(
                lookahead__scope="all",
                lookahead__extrapolation=beta,
                lookahead__damping=beta / 2,
                gate__overhead_budget=0.0,
            )
        )
        trainer.step_n(make_batches(20), 20)
        ends.append([p.detach() for p in made.model.parameters()])
    assert (difference(*ends) is not None) is moves
