"""The learned scale: its statistic, its rule, and what it does to a run at a rate that is too small."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cases import assert_same, config, full_batch, make_batches, setup
from hybrid_predict_trainer import HybridTrainer
from hybrid_predict_trainer.early_cuts import EARLY_STEPS
from hybrid_predict_trainer.lookahead import DriftLookahead
from hybrid_predict_trainer.step_scale import (
    CHECK_STEPS,
    CREEP,
    GROWTH,
    MAX_COSINES,
    MEASURED_AT_EDGE,
    PATIENCE,
    LearnedScale,
    UnitScale,
    step_cosines,
)
from hybrid_predict_trainer.weights import Groups


def groups_of(*index: int) -> Groups:
    """Parameters in groups, whatever they are called."""
    num = max(index) + 1
    return Groups(tuple(f"p{i}" for i in range(len(index))), index, tuple(f"g{g}" for g in range(num)), (1,) * num)


ONE = groups_of(0)


def learned(maximum: float = 100.0) -> LearnedScale:
    """A scale over one group, without cuts."""
    return LearnedScale(ONE, maximum)


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


def feed(
    scale: LearnedScale, cosine: float, rate: float, loss: float = 1.0, checks: int = 1, noise: float = 0.1
) -> None:
    """Checks at which the measured cosines alternate by 0.05 about ``cosine``."""
    scale.forget()
    weights = [nn.Parameter(torch.tensor([1.0, 0.0]))]
    for i in range(checks * scale.check_steps):
        now = cosine + (0.05 if i % 2 else -0.05)
        weights[0].grad = torch.tensor([now, math.sqrt(1 - now**2)])
        scale.measure(weights)
        scale.before_step(weights)
        with torch.no_grad():
            weights[0] += torch.tensor([1.0, 0.0])
        scale.check(rate, loss, noise)


def test_grows_while_the_loss_still_falls_at_the_end_of_a_step() -> None:
    scale = learned()
    feed(scale, -0.2, 1.0, checks=2)  # the first two checks only learn that the rate does not rise
    assert scale.value == 1.0
    feed(scale, -0.2, 1.0, checks=3)
    assert scale.value == pytest.approx(GROWTH**3)
    assert not scale.touched


@pytest.mark.parametrize("cosine", [0.05, 0.01, 0.0, -0.005])
def test_stays_at_one_at_a_tuned_rate(cosine: float) -> None:
    scale = learned()
    feed(scale, cosine, 1.0, checks=20)
    assert scale.value == 1.0
    assert scale.touched


def test_nothing_is_learned_while_the_schedule_rises() -> None:
    scale = learned()
    for i in range(10):
        feed(scale, -0.5, 0.1 * (i + 1))
    assert scale.value == 1.0


def test_a_falling_schedule_is_not_worked_against_once_the_edge_was_touched() -> None:
    untouched, touched = learned(), learned()
    feed(untouched, -0.2, 1.0, checks=3)
    feed(touched, -0.2, 1.0, checks=3)
    feed(touched, 0.1, 1.0)
    before = touched.value
    for i in range(8):
        for scale in (untouched, touched):
            feed(scale, -0.2, 0.9 - 0.1 * i)
    assert touched.value == before
    assert untouched.value > before


def test_a_raise_after_which_the_loss_stands_higher_is_taken_back_for_good() -> None:
    scale = learned()
    feed(scale, -0.2, 1.0, loss=1.0, checks=4)
    raised = scale.value
    assert raised > 1
    feed(scale, -0.2, 1.0, loss=1.5, checks=PATIENCE)
    assert scale.value == 1.0
    assert scale.num_taken_back == 1
    feed(scale, -0.2, 1.0, loss=1.0, checks=5)
    assert scale.value == 1.0


def test_noise_is_no_reason_to_take_a_raise_back() -> None:
    scale = learned()
    feed(scale, -0.2, 1.0, loss=1.0, checks=4)
    feed(scale, -0.2, 1.0, loss=1.1, checks=PATIENCE, noise=0.1)
    assert scale.num_taken_back == 0


def test_beyond_the_edge_it_creeps_and_before_it_doubles() -> None:
    """At a rate that was below the edge the edge moves, slowly; before it was seen there is far to go."""
    scale = learned()
    feed(scale, -0.2, 1.0, checks=4)
    before = scale.value
    assert before == pytest.approx(GROWTH**2)
    feed(scale, 0.2, 1.0)
    assert scale.touched
    while scale.value == before:
        feed(scale, -0.2, 1.0)
    assert scale.value == pytest.approx(before * CREEP)


def test_a_raise_in_the_slow_start_lets_groups_be_cut_again() -> None:
    scale = LearnedScale(Groups(("w",), (0,), ("mlp_up", "head"), (2, 0)), 100.0, 0.05)
    for _ in range(EARLY_STEPS):
        scale.cuts.count_step()
    assert not scale.cuts.watching
    feed(scale, -0.2, 1.0, checks=3)
    assert scale.value > 1
    assert scale.cuts.watching


def test_bound_holds_and_measuring_ends_there() -> None:
    scale = learned(2.0)
    feed(scale, -0.5, 1.0, checks=10)
    assert scale.value == 2.0
    assert scale.before_step([torch.ones(2)]) == 0
    assert scale.memory_bytes() == 0


def test_halving_is_for_good() -> None:
    scale = learned()
    feed(scale, -0.5, 1.0, checks=6)
    value = scale.value
    scale.halve()
    assert scale.value == max(1.0, value / 2)
    feed(scale, -0.5, 1.0, checks=6)
    assert scale.value == max(1.0, value / 2)


def test_applied_scales_every_group_and_puts_the_rates_back_even_on_error() -> None:
    optimizer = torch.optim.SGD(
        [{"params": [nn.Parameter(torch.ones(1))], "lr": 0.1}, {"params": [nn.Parameter(torch.ones(1))], "lr": 0.2}]
    )
    scale = learned()
    scale.value = 3.0
    seen: list[float] = []

    def step() -> None:
        with scale.applied(optimizer):
            seen.extend(g["lr"] for g in optimizer.param_groups)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        step()
    assert seen == pytest.approx([0.3, 0.6])
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.2]


def test_sparse_measuring_after_the_edge() -> None:
    """Before the edge every step is measured, after it one per check."""
    scale, p = learned(), [nn.Parameter(torch.ones(2))]
    feed(scale, -0.2, 1.0, checks=3)
    assert sum(bool(scale.before_step(p)) for _ in range(CHECK_STEPS)) == CHECK_STEPS
    scale.forget()
    feed(scale, 0.2, 1.0, checks=2)
    assert scale.touched
    kept = 0
    for _ in range(2 * CHECK_STEPS):
        kept += bool(scale.before_step(p))
        scale.check(1.0, 1.0, 0.1)
    assert kept == 2 * MEASURED_AT_EDGE


@pytest.mark.parametrize(("cosine", "checks"), [(-0.3, 1), (-0.03, 4)])
def test_the_nearer_the_edge_the_more_cosines_decide(cosine: float, checks: int) -> None:
    """A sequential test: two standard errors of what was collected."""
    scale = learned()
    feed(scale, cosine, 1.0, checks=2)
    for _ in range(checks - 1):
        feed(scale, cosine, 1.0)
        assert scale.value == 1.0
    feed(scale, cosine, 1.0)
    assert scale.value == pytest.approx(GROWTH)


def test_an_undecided_mean_is_called_zero_after_enough_cosines() -> None:
    scale = learned()
    feed(scale, 0.0, 1.0, checks=3)
    assert not scale.touched
    feed(scale, 0.0, 1.0, checks=MAX_COSINES // (CHECK_STEPS - 1))
    assert scale.touched


def test_state_round_trips_in_the_middle_of_a_check() -> None:
    a, b = learned(), learned()
    feed(a, -0.2, 1.0, checks=4)
    p = [nn.Parameter(torch.ones(2))]
    a.before_step(p)
    b.load_state_dict(a.state_dict())
    assert_same(b.state_dict(), a.state_dict())
    for scale in (a, b):
        feed(scale, -0.2, 1.0, loss=9.0, checks=PATIENCE)
    assert a.value == b.value == 1.0


def test_null_object_does_nothing() -> None:
    scale, p = UnitScale(), [nn.Parameter(torch.ones(2))]
    assert scale.value == 1.0
    assert scale.measure(p) == scale.before_step(p) == scale.memory_bytes() == 0
    optimizer = torch.optim.SGD(p, lr=0.1)
    with scale.applied(optimizer):
        assert optimizer.param_groups[0]["lr"] == 0.1


def trained(rate_factor: float, **changes: object) -> tuple[float, HybridTrainer]:
    """Mean loss of the last steps of a run at ``rate_factor`` times a good rate, never jumping."""
    made = setup("mlp", "sgd", "flat")
    for group in made.optimizer.param_groups:
        group["lr"] *= rate_factor
    trainer = made.trainer(config(explore_outcomes=0, gate__overhead_budget=0.0, **changes))
    losses = [trainer.step(batch).loss for batch in make_batches(200, 32)]
    return sum(losses[-20:]) / 20, trainer


def test_a_rate_far_too_small_is_made_up_for() -> None:
    small, _ = trained(0.01, max_learned_scale=1.0)
    scaled, trainer = trained(0.01, max_learned_scale=100.0)
    good, _ = trained(1.0, max_learned_scale=1.0)
    assert trainer.statistics()["learned_scale"] > 4
    assert scaled - good < 0.5 * (small - good)


def test_a_jump_is_not_taken_for_a_step() -> None:
    """The step before a jump must not be measured across it."""
    made = setup("mlp", "adamw", "flat")
    trainer = made.trainer(config(max_learned_scale=100.0, predictor_type="secant"))
    scale = trainer.run.scale
    assert isinstance(scale, LearnedScale)
    seen = 0
    for batch in full_batch(60):
        if trainer.step(batch).was_predicted:
            seen += 1
            assert not scale._before
    assert seen


@pytest.mark.parametrize(("scheduler", "learned"), [("constant", False), ("flat", True)])
def test_without_a_schedule_nothing_would_take_the_noise_out_again(scheduler: str, learned: bool) -> None:
    """A larger rate settles higher; a run that never lowers it is left alone."""
    trainer = setup("mlp", "sgd", scheduler).trainer(config(max_learned_scale=100.0, lookahead=0.3))
    assert isinstance(trainer.run.scale, LearnedScale) is learned
    assert isinstance(trainer.run.lookahead, DriftLookahead) is learned


def test_growing_is_between_the_first_raise_and_the_edge() -> None:
    scale = learned()
    assert not scale.growing
    scale.value = 4.0
    assert scale.growing
    scale.touched = True
    assert not scale.growing
    assert not UnitScale().growing
