"""The learned scale: how steps are measured and scaled, and what it does to a run; its rules are in test_multiplier."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cases import assert_same, config, full_batch, make_batches, setup
from hybrid_predict_trainer import HybridTrainer
from hybrid_predict_trainer.judge.switchback import BLOCK_STEPS, NUM_FREE_BLOCKS
from hybrid_predict_trainer.move.edge_test import MAX_COSINES
from hybrid_predict_trainer.move.group_warmup import EARLY_STEPS
from hybrid_predict_trainer.move.lookahead import DriftLookahead
from hybrid_predict_trainer.move.lr_multiplier import CHECK_STEPS, MEASURED_AT_EDGE, LrMultiplier
from hybrid_predict_trainer.move.multiplier import (
    FIRST_CHECKS,
    GROWTH,
    MAX_LOOKS,
    NUM_ARRIVED,
    NUM_UNSTEADY,
    PATIENCE,
    ROOM,
    Advice,
    Reading,
)
from hybrid_predict_trainer.move.unit_multiplier import UnitMultiplier
from hybrid_predict_trainer.numerics.sequential import Moments
from hybrid_predict_trainer.weights.parameters import Groups

ONE = Groups(("p0",), (0,), ("g0",), (1,))


def learned(maximum: float = 100.0) -> LrMultiplier:
    """A scale over one group, without cuts, that has seen the loss fall."""
    scale = LrMultiplier(ONE, maximum)
    scale.multiplier._first, scale.multiplier._fallen = [2.0] * 5, True
    return scale


def reading(rate: float = 1.0, loss: float = 1.0, noise: float = 0.1) -> Reading:
    return Reading(lr=rate, loss=loss, noise=noise, newest=[loss] * 12)


def feed(
    scale: LrMultiplier, cosine: float, rate: float = 1.0, loss: float = 1.0, checks: int = 1, noise: float = 0.1
) -> list[Advice]:
    """Checks at which the measured cosines alternate by 0.05 about ``cosine``."""
    scale.forget()
    weights, advice = [nn.Parameter(torch.tensor([1.0, 0.0]))], []
    for i in range(checks * scale.check_steps):
        now = cosine + (0.05 if i % 2 else -0.05)
        weights[0].grad = torch.tensor([now, math.sqrt(1 - now**2)])
        scale.measure(weights)
        scale.before_step(weights)
        with torch.no_grad():
            weights[0] += torch.tensor([1.0, 0.0])
        scale.after_step(weights)
        advice.append(scale.check(reading(rate, loss, noise)))
    return advice


def test_grows_while_the_loss_still_falls_at_the_end_of_a_step() -> None:
    scale = learned()
    feed(scale, -0.4, checks=FIRST_CHECKS)  # nothing is measured before the first of them is over
    assert scale.value == 1.0
    feed(scale, -0.4, checks=8)
    assert scale.value >= GROWTH**2
    assert not scale.touched


@pytest.mark.parametrize("cosine", [0.05, 0.01, 0.0, -0.005, -0.02])
def test_stays_at_one_at_a_tuned_rate(cosine: float) -> None:
    scale = learned()
    feed(scale, cosine, checks=12)
    assert scale.value == 1.0
    assert scale.touched


def test_an_undecided_mean_is_called_zero_after_enough_cosines() -> None:
    scale = learned()
    feed(scale, 0.0, checks=FIRST_CHECKS)
    feed(scale, 0.0, checks=MAX_COSINES // CHECK_STEPS - 1)
    assert not scale.touched
    feed(scale, 0.0, checks=3)
    assert scale.touched


def test_the_nearer_the_edge_the_more_cosines_decide() -> None:
    """A sequential test: it takes as long as it takes."""
    needed = []
    for cosine in (-0.5, -0.15):
        scale = learned()
        while scale.value == 1.0 and not scale.touched:
            feed(scale, cosine)
            needed.append((cosine, scale.value))
    assert [cosine for cosine, _ in needed].count(-0.15) > [cosine for cosine, _ in needed].count(-0.5)
    assert needed[-1] == (-0.15, GROWTH)


def test_of_a_long_run_moments_are_kept_and_not_the_cosines() -> None:
    """A patient test lasts as long as the run: neither memory nor the time of a check grows with it."""
    scale = learned()
    feed(scale, 0.0, checks=12)
    assert scale.touched
    feed(scale, 0.0, checks=200)
    state = scale.state_dict()
    assert state["moments"][0] >= 150
    assert len(state["cosines"]) <= CHECK_STEPS


def test_a_raise_in_the_slow_start_lets_groups_be_cut_again() -> None:
    scale = LrMultiplier(Groups(("w",), (0,), ("mlp_up", "head"), (2, 0)), 100.0, 0.05)
    scale.multiplier._first, scale.multiplier._fallen = [2.0] * 5, True
    for _ in range(EARLY_STEPS):
        scale.cuts.count_step()
    assert not scale.cuts.watching
    while scale.value == 1.0:
        feed(scale, -0.4)
    assert scale.cuts.watching


def test_bound_holds_and_measuring_ends_there() -> None:
    scale = learned(4.0)
    feed(scale, -0.5, checks=24)
    assert scale.value == 4.0
    assert scale.before_step([torch.ones(2)]) > 0  # it may have gone past the edge
    feed(scale, -0.5, checks=(NUM_UNSTEADY + MAX_LOOKS * NUM_ARRIVED) // CHECK_STEPS)
    assert scale.value == 4.0
    assert scale.before_step([torch.ones(2)]) == 0
    assert scale.memory_bytes() == 0


def grown() -> LrMultiplier:
    """With an open raise, fresh."""
    scale = learned()
    while scale.multiplier.account is None:
        feed(scale, -0.4)
    return scale


def test_a_check_says_what_follows() -> None:
    advice = feed(grown(), 0.5, checks=PATIENCE)
    assert advice == [Advice.NOTHING] * (PATIENCE * CHECK_STEPS - 1) + [Advice.SETTLED]


def test_a_take_back_begins_a_new_test() -> None:
    scale = grown()
    advice = feed(scale, -0.4, loss=1.5, checks=PATIENCE)
    assert advice[-1] is Advice.TAKEN_BACK
    assert (scale.value, scale.taken_back) == (1.0, 1)
    assert scale._moments == Moments()
    assert not scale._cosines
    feed(scale, -0.4, checks=10)
    assert scale.value == 1.0


def test_a_new_raise_comes_out_where_the_last_one_is_settled() -> None:
    scale = grown()
    advice = feed(scale, -0.4, checks=3 * PATIENCE)
    assert Advice.RAISED in advice
    account = scale.multiplier.account
    assert account is None or account.value > 1.0


@pytest.mark.parametrize("raised", [False, True])
def test_withdrawn_for_good_nothing_is_measured_any_more(raised: bool) -> None:
    """Before the first raise as well: the run goes on as the plain loop, at its cost."""
    scale = grown() if raised else learned()
    feed(scale, -0.4, checks=2)
    assert scale.withdraw(for_good=True) is (Advice.TAKEN_BACK if raised else Advice.NOTHING)
    assert (scale.value, scale.may_grow) == (1.0, False)
    feed(scale, -0.4, checks=10)
    assert scale.value == 1.0
    assert scale.before_step([torch.ones(2)]) == 0


def test_resting_is_the_schedule_s_own_rate_for_a_while() -> None:
    scale = grown()
    scale.rest(True)
    assert (scale.value, scale.learned) == (1.0, GROWTH)
    assert scale.before_step([torch.ones(2)]) == 0
    scale.rest(False)
    assert scale.value == GROWTH


def test_exact_losses_end_a_raise_between_two_checks() -> None:
    scale = grown()
    bad = Reading(lr=1.0, loss=1.0, noise=0.0, newest=[1.0, 1.1], exact=True)
    assert scale.check(bad) is Advice.TAKEN_BACK
    assert scale.value == 1.0


# ---------------------------------------------------------------- its trial: blocks with m against blocks without


def blocks(scale: LrMultiplier, num: int, harm: float, noise: float = 0.01) -> Advice:
    """Losses that fall; a block with m adds ``harm`` to their logarithm for good."""
    generator, level, newest = torch.Generator().manual_seed(0), 0.0, []
    for _ in range(num * BLOCK_STEPS):
        level += harm * (scale.value > 1) / BLOCK_STEPS - 0.01 / BLOCK_STEPS
        newest = [*newest, math.exp(level + noise * float(torch.randn((), generator=generator)))][-12:]
        advice = scale.check(Reading(lr=1.0, loss=1.0, noise=1e9, newest=newest))
        if advice is Advice.TAKEN_BACK:
            return advice
    return Advice.NOTHING


def tried(value: float) -> LrMultiplier:
    scale = LrMultiplier(ONE, 100.0, holdout_fraction=0.3, generator=torch.Generator().manual_seed(1))
    scale.multiplier.value = value
    return scale


def test_where_blocks_with_it_are_worse_it_is_withdrawn_for_good() -> None:
    scale = tried(4.0)
    assert blocks(scale, 150, 0.02) is Advice.TAKEN_BACK
    assert scale.trial.num_blocks > NUM_FREE_BLOCKS
    assert (scale.value, scale.learned, scale.may_grow) == (1.0, 1.0, False)


def test_where_they_are_better_it_stays_and_the_controls_end() -> None:
    scale = tried(4.0)
    assert blocks(scale, 150, -0.02) is Advice.NOTHING
    assert scale.trial.proved
    assert scale.value == 4.0
    blocks(scale, 20, -0.02)
    assert scale.value == 4.0


def test_without_a_raise_there_is_no_trial() -> None:
    scale = tried(1.0)
    blocks(scale, 20, 0.0)
    assert scale.trial.num_blocks == 0


def test_a_raise_begins_the_comparison_anew() -> None:
    scale = tried(2.0)
    scale.multiplier._first, scale.multiplier._fallen = [2.0] * 5, True
    scale.trial.proved = True
    scale.trial._changes[True].append(0.1)
    while scale.learned == 2.0:
        feed(scale, -0.4)
    assert not scale.trial.proved
    assert not scale.trial._changes[True]


# ---------------------------------------------------------------- around a step


def test_applied_scales_every_group_and_puts_the_rates_back_even_on_error() -> None:
    optimizer = torch.optim.SGD(
        [{"params": [nn.Parameter(torch.ones(1))], "lr": 0.1}, {"params": [nn.Parameter(torch.ones(1))], "lr": 0.2}]
    )
    scale = learned()
    scale.multiplier.value = 3.0
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
    feed(scale, -0.2, checks=FIRST_CHECKS)
    assert sum(bool(scale.before_step(p)) for _ in range(CHECK_STEPS)) == CHECK_STEPS
    scale.forget()
    feed(scale, 0.2, checks=5)
    assert scale.touched
    kept = 0
    for _ in range(2 * CHECK_STEPS):
        kept += bool(scale.before_step(p))
        scale.check(reading())
    assert kept == 2 * MEASURED_AT_EDGE


@pytest.mark.parametrize("num_checks", [0, 3, 6, 9, 12])
def test_state_round_trips_in_the_middle_of_a_check(num_checks: int) -> None:
    a, b = learned(), LrMultiplier(ONE, 3.0)
    feed(a, -0.4, checks=num_checks)
    p = [nn.Parameter(torch.ones(2))]
    a.before_step(p)
    a.check(reading())
    b.load_state_dict(a.state_dict())
    assert_same(b.state_dict(), a.state_dict())
    for cosine, loss in ((-0.4, 1.0), (0.2, 1.0), (-0.2, 9.0)):
        assert feed(a, cosine, loss=loss, checks=PATIENCE) == feed(b, cosine, loss=loss, checks=PATIENCE)
        assert_same(b.state_dict(), a.state_dict())


def test_null_object_does_nothing() -> None:
    scale, p = UnitMultiplier(), [nn.Parameter(torch.ones(2))]
    assert scale.value == 1.0
    assert scale.measure(p) == scale.before_step(p) == scale.memory_bytes() == 0
    optimizer = torch.optim.SGD(p, lr=0.1)
    with scale.applied(optimizer):
        assert optimizer.param_groups[0]["lr"] == 0.1


def trained(rate_factor: float, **changes: object) -> tuple[float, HybridTrainer]:
    """Mean loss of the last steps of a run at ``rate_factor`` times a good rate, never jumping."""
    made = setup("mlp", "sgd")
    for group in made.optimizer.param_groups:
        group["lr"] *= rate_factor
    made.scheduler = torch.optim.lr_scheduler.LambdaLR(made.optimizer, lambda t: 1.0 if t < 200 else 0.1)
    trainer = made.trainer(config(explore_outcomes=0, gate__overhead_budget=0.0, **changes))
    losses = [trainer.step(batch).loss for batch in make_batches(200, 32)]
    return sum(losses[-20:]) / 20, trainer


def test_a_rate_far_too_small_is_made_up_for() -> None:
    small, _ = trained(0.01, max_lr_multiplier=1.0)
    scaled, trainer = trained(0.01, max_lr_multiplier=100.0)
    good, _ = trained(1.0, max_lr_multiplier=1.0)
    assert trainer.statistics()["learned_scale"] > 4
    assert scaled - good < 0.5 * (small - good)


def test_a_jump_is_not_taken_for_a_step() -> None:
    """The step before a jump must not be measured across it."""
    made = setup("mlp", "adamw", "flat")
    trainer = made.trainer(config(max_lr_multiplier=100.0, predictor_type="secant"))
    scale = trainer.run.optimizer_step.scale
    assert isinstance(scale, LrMultiplier)
    seen = 0
    for batch in full_batch(60):
        if trainer.step(batch).was_predicted:
            seen += 1
            assert not scale._before
    assert seen


@pytest.mark.parametrize(("scheduler", "learned"), [("constant", False), ("flat", True)])
def test_without_a_schedule_nothing_would_take_the_noise_out_again(scheduler: str, learned: bool) -> None:
    """A larger rate settles higher; a run that never lowers it is left alone."""
    trainer = setup("mlp", "sgd", scheduler).trainer(
        config(max_lr_multiplier=100.0, lookahead__extrapolation=0.3, lookahead__scope="all")
    )
    assert isinstance(trainer.run.optimizer_step.scale, LrMultiplier) is learned
    assert isinstance(trainer.run.optimizer_step.lookahead, DriftLookahead) is learned


def test_growing_is_between_the_first_raise_and_the_edge() -> None:
    scale = learned()
    assert not scale.growing
    scale.multiplier.value = 4.0
    assert scale.growing
    scale.multiplier.touched = True
    assert not scale.growing
    assert not UnitMultiplier().growing


def test_the_room_past_the_edge_is_bounded() -> None:
    scale = learned()
    feed(scale, 0.0, checks=12)
    assert scale.touched
    feed(scale, -0.1, checks=100)
    assert 1.0 < scale.learned <= ROOM
