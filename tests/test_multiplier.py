"""The learned multiplier's books: what it takes to raise, how a raise is settled, and when it goes back for good.

Readings are made up here: a check is one call of each, in the order in which the scale makes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cases import assert_same
from hybrid_predict_trainer import HybridTrainer
from hybrid_predict_trainer.move.edge_test import MAX_COSINES
from hybrid_predict_trainer.move.multiplier import (
    CREEP,
    CREEP_LEVEL,
    EXPLOSION,
    FIRST_CHECKS,
    GROWTH,
    MAX_LOOKS,
    MAX_TAKEN_BACK,
    MOST_UNSETTLED,
    NUM_ARRIVED,
    NUM_ENDS,
    NUM_UNSTEADY,
    PATIENCE,
    PEAK_SHARE,
    ROOM,
    SIGMAS,
    UNTOLD,
    UNTOLD_BY_SGD,
    Advice,
    Multiplier,
    Reading,
    chooses_its_rate,
    orthogonalizes,
)
from hybrid_predict_trainer.numerics.sequential import Moments
from hybrid_predict_trainer.weights.parameters import pretrained

HIGH = 100.0
#: Losses of the first steps, and of later ones.
FIRST, LATER = [2.0, 2.1, 1.9, 2.05, 1.95], [1.0, 1.1, 0.9, 1.05, 0.95]


def reading(loss: float = 1.0, **changes: object) -> Reading:
    made = Reading(lr=1.0, loss=loss, noise=0.1, newest=[loss + v - 1.0 for v in LATER])
    return replace(made, **changes)  # type: ignore[arg-type]


def begun(
    maximum: float = HIGH, *, exact: bool = False, checks: int = FIRST_CHECKS, pretrained: bool = False
) -> Multiplier:
    """One that has seen the loss fall and the rate stand."""
    m = Multiplier(maximum, pretrained=pretrained)
    for i in range(NUM_ENDS):
        m.watch(reading(newest=FIRST[: i + 1], exact=exact))
    for _ in range(checks):
        m.settle(reading(2.0))
        m.follow(1.0)
    assert m.has_fallen(reading(exact=exact))
    return m


def moments(values: Sequence[float]) -> Moments:
    found = Moments()
    found.push(values)
    return found


#: Steps that are clearly too short, that are so on the mean only, and that overshoot.
SHORT = moments([-0.4 + 0.02 * (-1) ** i for i in range(20)])
IN_NOISE = moments([-0.1 + 0.1 * (-1) ** i for i in range(100)])
ZERO = moments([0.1 * (-1) ** i for i in range(MAX_COSINES)])
#: h of single steps: those that count for nothing, and a look at steps that end at the edge, beyond it, before it.
UNSTEADY = [0.9] * NUM_UNSTEADY
AT_EDGE, BEYOND, BEFORE = ([mean + 0.05 * (-1) ** i for i in range(NUM_ARRIVED)] for mean in (-0.002, 0.01, -0.2))


def check(m: Multiplier, cosines: Moments, now: Reading) -> Advice:
    """One check, as the scale makes it."""
    advice = m.settle(now)
    if advice is not Advice.TAKEN_BACK and m.follow(now.lr):
        raised, _ = m.decide(cosines, now)
        return advice if raised is Advice.NOTHING else raised
    return advice


def raised(factor: float = GROWTH, **changes: object) -> Multiplier:
    """With an open raise."""
    m = begun(**changes)  # type: ignore[arg-type]
    while m.value < factor:
        m.decide(SHORT, reading())
    assert m.value == factor
    return m


# ---------------------------------------------------------------- what it takes to raise


def test_clear_evidence_doubles_and_keeps_the_start_once() -> None:
    m = begun()
    assert m.decide(SHORT, reading()) == (Advice.RAISED, True)
    assert m.decide(SHORT, reading()) == (Advice.NOTHING, True)  # one state for both
    assert (m.value, m.num_raises, m.touched) == (GROWTH**2, 2, False)
    assert m.account is not None
    assert (m.account.value, m.account.checks_left) == (1.0, PATIENCE)


def test_what_shows_on_the_mean_only_ends_the_slow_start() -> None:
    m = begun()
    assert m.decide(IN_NOISE, reading()) == (Advice.NOTHING, True)
    assert (m.value, m.touched, m.cap) == (1.0, True, ROOM)


def test_of_a_network_that_was_trained_before_the_mean_is_enough() -> None:
    m = begun(pretrained=True)
    assert m.decide(IN_NOISE, reading()) == (Advice.RAISED, True)
    assert m.decide(SHORT, reading()) == (Advice.NOTHING, True)
    assert (m.value, m.touched) == (GROWTH**2, False)
    assert m.decide(ZERO, reading()) == (Advice.NOTHING, True)
    assert (m.value, m.touched) == (GROWTH**2, True)


def _network(gains: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 1))
    if gains == "none":
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 1))
    elif gains != "as drawn":
        with torch.no_grad():
            model[1].weight.add_(torch.linspace(0, 0.1, 6))
    if gains == "frozen":
        model[1].requires_grad_(False)
    return model.to(torch.bfloat16) if gains == "half precision" else model


@pytest.mark.parametrize(
    ("gains", "known"),
    [("as drawn", False), ("none", False), ("trained", True), ("frozen", True), ("half precision", True)],
)
def test_what_is_known_to_be_trained(gains: str, known: bool) -> None:
    assert pretrained(_network(gains)) is known


def test_past_the_edge_it_creeps_to_a_bound() -> None:
    m = raised()
    m.decide(ZERO, reading())
    assert m.touched
    values = []
    for _ in range(6):
        m.account = None
        m.decide(IN_NOISE, reading())
        values.append(m.value)
    assert values[:2] == pytest.approx([GROWTH * CREEP, GROWTH * CREEP**2])
    assert values[-1] == ROOM * GROWTH
    m.follow(1.0)
    assert m.learning  # until the last raise is seen to have come to the edge
    m.arrive(UNSTEADY + AT_EDGE)
    m.follow(1.0)
    assert not m.learning


def test_the_bound_given_holds_in_the_slow_start() -> None:
    m = begun(3.0)
    for _ in range(5):
        m.account = None
        m.decide(SHORT, reading())
    assert m.value == 3.0
    m.arrive(UNSTEADY + AT_EDGE)
    m.follow(1.0)
    assert not m.learning


# ---------------------------------------------------------------- whether a raise has gone past the edge


def touched(value: float = GROWTH**3, **changes: object) -> Multiplier:
    """At the end of a slow start, waiting to see where its steps end."""
    m = begun()
    while m.value < value:
        m.account = None
        m.decide(SHORT, reading())
    m.decide(ZERO, reading(**changes))
    assert m.touched
    return m


def test_steps_that_end_beyond_the_edge_halve_it_until_they_do_not() -> None:
    m = touched()
    m.arrive(UNSTEADY + BEYOND)
    assert (m.value, m.cap, m.arrived) == (GROWTH**2, ROOM * GROWTH**2, False)
    m.arrive(UNSTEADY + AT_EDGE)
    assert (m.value, m.arrived) == (GROWTH**2, True)
    m.arrive(UNSTEADY + BEYOND)  # later h is positive at any rate
    assert m.value == GROWTH**2


def test_what_h_cannot_tell_from_one_is_not_halved() -> None:
    m = touched(GROWTH)
    assert (m.value, m.arrived) == (UNTOLD, True)
    m.account = None
    m.decide(IN_NOISE, reading())
    assert (m.value, m.arrived) == (GROWTH * CREEP, False)
    m.arrive(UNSTEADY + BEYOND)
    assert (m.value, m.arrived) == (UNTOLD, True)


def test_steps_that_grow_with_the_gradient_may_go_back_to_one() -> None:
    m = touched(GROWTH)
    m.halve_down_to(UNTOLD_BY_SGD)
    m.account = None
    m.decide(IN_NOISE, reading())
    m.arrive(UNSTEADY + BEYOND)
    assert (m.value, m.arrived) == (GROWTH * CREEP / GROWTH, False)
    m.arrive(UNSTEADY + BEYOND)
    assert (m.value, m.arrived) == (1.0, True)


@pytest.mark.parametrize(("optimizer", "least"), [(torch.optim.SGD, UNTOLD_BY_SGD), (torch.optim.Adam, UNTOLD)])
def test_which_steps_grow_is_told_by_the_optimizer(optimizer: Any, least: float) -> None:
    model = nn.Linear(4, 2)
    held = optimizer(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(held, 100)
    trainer = HybridTrainer(
        model, held, loss_fn=lambda model, batch: model(batch).square().mean(), lr_scheduler=schedule
    )
    assert trainer.run.optimizer_step.scale.multiplier._least_halved == least


def test_the_first_steps_after_a_change_do_not_say_where_it_has_led_to() -> None:
    m = touched()
    for value in UNSTEADY + AT_EDGE[:-1]:  # one at a time, too
        m.arrive([value])
    assert not m.arrived
    m.arrive(AT_EDGE[-1:])
    assert (m.value, m.arrived) == (GROWTH**3, True)


def test_while_steps_are_still_too_short_it_waits() -> None:
    m = touched()
    m.arrive(UNSTEADY + BEFORE + BEFORE)
    m.arrive(BEFORE)
    assert (m.value, m.arrived) == (GROWTH**3, False)
    m.arrive(BEYOND)
    assert m.value == GROWTH**2


def test_it_does_not_wait_for_ever() -> None:
    m = touched()
    m.arrive(UNSTEADY)
    for _ in range(MAX_LOOKS):
        assert not m.arrived
        m.arrive(BEFORE)
    assert (m.value, m.arrived) == (GROWTH**3, True)


def test_a_later_raise_has_to_arrive_as_well() -> None:
    m = touched()
    m.arrive(UNSTEADY + AT_EDGE)
    m.account = None
    m.decide(IN_NOISE, reading())
    assert (m.value, m.arrived) == (GROWTH**3 * CREEP, False)


def test_it_waits_where_the_schedule_falls_and_not_where_it_rises() -> None:
    m = touched()
    assert not m.follow(0.5)  # no raise
    assert m.learning
    m.follow(0.6)
    assert not m.learning


def test_exact_losses_have_judged_a_raise() -> None:
    assert touched(exact=True).arrived
    assert not touched().arrived


def test_without_a_raise_there_is_nothing_to_arrive() -> None:
    m = begun()
    m.decide(ZERO, reading())
    assert (m.touched, m.arrived) == (True, True)


@pytest.mark.parametrize("end", [Multiplier.take_back, Multiplier.level])
def test_what_went_back_does_not_wait(end: Callable[[Multiplier], object]) -> None:
    m = touched()
    end(m)
    assert m.arrived


def test_a_takeback_after_a_halving_does_not_raise() -> None:
    m = touched()
    m.arrive(UNSTEADY + AT_EDGE)
    m.account = None
    m.decide(IN_NOISE, reading())
    assert m.account is not None
    m.arrive(UNSTEADY + BEYOND)
    halved = m.value
    assert halved < GROWTH**3
    m.take_back()
    assert m.value == halved


def test_beyond_fourfold_the_loss_is_asked_in_between() -> None:
    m = raised(MOST_UNSETTLED)
    assert m.decide(SHORT, reading()) == (Advice.NOTHING, True)  # of older steps, later
    assert m.value == MOST_UNSETTLED
    for _ in range(PATIENCE):
        m.settle(reading())
    assert m.decide(SHORT, reading()) == (Advice.RAISED, True)
    assert m.value == MOST_UNSETTLED * GROWTH


def test_exact_losses_are_asked_at_every_step() -> None:
    m = raised(MOST_UNSETTLED)
    m.decide(SHORT, reading(exact=True))
    assert m.value == MOST_UNSETTLED * GROWTH


@pytest.mark.parametrize("noise", [1e-3, 0.03, 0.3])
@pytest.mark.parametrize("seed", range(2))
def test_noise_about_zero_raises_nothing_however_long_it_is_looked_at(noise: float, seed: int) -> None:
    """10,000 checks of one cosine each.  All tests after the edge share one level: seldom even one creep."""
    m, rng, now = begun(), np.random.default_rng(seed), reading()
    cosines = Moments()
    for value in (noise * rng.standard_normal(10_000)).tolist():
        cosines.push([value])
        m.follow(1.0)
        _, decided = m.decide(cosines, now)
        if decided:
            cosines = Moments()
    assert m.touched
    assert m.num_raises == 0
    assert m.value <= ROOM


def test_over_many_runs_of_noise_the_share_with_a_creep_is_below_the_level() -> None:
    """200 runs of 400 checks: without sharing the level, or with t tests, several times as many."""
    wrong, rng = 0, np.random.default_rng(3)
    for row in rng.standard_normal((200, 400)):
        m, cosines, now = begun(), Moments(), reading()
        m._touch()
        for value in row.tolist():
            cosines.push([value])
            if m.decide(cosines, now)[1]:
                cosines = Moments()
        wrong += m.num_raises > 0
        assert m.value <= ROOM
    assert wrong <= 200 * CREEP_LEVEL


def test_no_raise_in_the_first_checks() -> None:
    m = begun(checks=0)
    advice = [check(m, SHORT, reading()) for _ in range(FIRST_CHECKS)]
    assert advice == [Advice.NOTHING] * (FIRST_CHECKS - 1) + [Advice.RAISED]


@pytest.mark.parametrize("num_steps", [50, 1_000, 20_000, 1_000_000])
def test_no_raise_while_the_schedule_rises(num_steps: int) -> None:
    """In a warm-up of a million steps the rate rises by a millionth of itself from check to check at the end."""
    m = begun(checks=0)
    for step in np.linspace(0, num_steps - 6, 200).astype(int).tolist():
        m.follow((step + 1) / num_steps)
        assert not m.follow((step + 6) / num_steps), f"step {step} of {num_steps}"
        assert not m.learning
    m.follow(1.0)
    assert m.follow(1.0)


def test_rounding_is_no_rise() -> None:
    m = begun()
    for i in range(20):
        assert m.follow(1.0 + 1e-15 * (i % 3))


@pytest.mark.parametrize("num_steps", [200, 10_000, 1_000_000])
def test_a_falling_schedule_is_not_worked_against_once_the_edge_was_touched(num_steps: int) -> None:
    """A share of the peak: the same part of a cosine of any length."""
    m, untouched = begun(), begun()
    m._touch()
    allowed = []
    for step in np.linspace(0, num_steps, 400).astype(int).tolist():
        rate = 0.5 * (1 + math.cos(math.pi * step / num_steps))
        allowed.append(m.follow(rate))
        assert untouched.follow(rate)
        assert allowed[-1] == (rate >= PEAK_SHARE)
    assert sum(allowed) == pytest.approx(400 * math.acos(2 * PEAK_SHARE - 1) / math.pi, abs=2)


def test_no_raise_before_the_loss_has_fallen_once_and_the_evidence_stands_until_then() -> None:
    m = Multiplier(HIGH)
    for i in range(NUM_ENDS):
        m.watch(reading(newest=FIRST[: i + 1]))
    for _ in range(FIRST_CHECKS):
        m.follow(1.0)
    flat = reading(2.0, newest=[2.0, 2.1, 1.9, 2.04, 1.94])  # lower, and not beyond chance
    for cosines in (SHORT, IN_NOISE):
        m.touched = cosines is IN_NOISE
        for _ in range(5):
            assert m.decide(cosines, flat) == (Advice.NOTHING, False)
    assert m._num_tests == 0  # of one test that goes on the level is spent once
    m.touched = False
    assert m.decide(SHORT, reading(1.0)) == (Advice.RAISED, True)
    assert m.has_fallen(flat)  # once is enough


@pytest.mark.parametrize(
    ("first", "now", "exact", "fallen"),
    [
        (FIRST, LATER, False, True),
        (FIRST[:4], LATER, False, False),  # too few
        (FIRST, LATER[:4], False, False),
        (FIRST, [1.99, 2.09, 1.89, 2.04, 1.94], False, False),
        (FIRST, [1.99, 2.09, 1.89, 2.04, 1.94], True, True),  # exact losses: any fall is one
        ([2.0] * 5, [2.0] * 5, True, False),
        ([2.0] * 5, [math.nan] * 5, True, False),
        ([-1.0] * 5, [-2.0] * 5, True, True),
        ([1e200, -1e200, 1e200, 1.0, 1.0], [1.0] * 5, False, False),
    ],
)
def test_what_counts_as_fallen(first: list[float], now: list[float], exact: bool, fallen: bool) -> None:
    m = Multiplier(HIGH)
    for i in range(len(first)):
        m.watch(reading(newest=first[: i + 1], exact=exact))
    assert m.has_fallen(reading(newest=now, exact=exact)) is fallen


@pytest.mark.parametrize("touched", [False, True])
def test_no_raise_while_it_is_not_allowed(touched: bool) -> None:
    m = begun()
    if touched:
        m._touch()
    for _ in range(10):
        assert m.decide(SHORT, reading(allowed=False)) == (Advice.NOTHING, True)
    assert (m.value, m.num_raises, m.account) == (1.0, 0, None)


# ---------------------------------------------------------------- how a raise is settled


def test_a_raise_stays_where_the_loss_is_no_worse() -> None:
    m = raised()
    advice = [m.settle(reading(0.99)) for _ in range(PATIENCE)]
    assert advice == [Advice.NOTHING] * (PATIENCE - 1) + [Advice.SETTLED]
    assert (m.value, m.account, m.num_taken_back) == (GROWTH, None, 0)
    assert m.settle(reading(5.0)) is Advice.NOTHING  # settled is settled


@pytest.mark.parametrize("loss", [1.0 + 1.1 * SIGMAS * 0.1, math.nan, math.inf])
def test_a_raise_after_which_the_loss_stands_higher_goes_back_with_its_cap(loss: float) -> None:
    m = raised(GROWTH**2)
    for _ in range(PATIENCE - 1):
        assert m.settle(reading(loss)) is Advice.NOTHING
    assert m.settle(reading(loss)) is Advice.TAKEN_BACK
    assert (m.value, m.cap, m.num_taken_back, m.account, m.learning) == (1.0, 1.0, 1, None, False)
    for _ in range(10):
        assert check(m, SHORT, reading()) is Advice.NOTHING
    assert m.value == 1.0


def test_noise_is_no_reason_to_take_a_raise_back() -> None:
    m = raised()
    for _ in range(PATIENCE):
        m.settle(reading(1.0 + 0.9 * SIGMAS * 0.1))
    assert (m.value, m.num_taken_back) == (GROWTH, 0)


def test_a_slow_ruin_is_seen_against_the_best() -> None:
    """Every raise starts from a loss a little higher than the last: against its own start none looks worse."""
    m, loss = raised(), 1.0
    for _ in range(PATIENCE):
        m.settle(reading(loss))
    for _ in range(4):
        loss += 0.15
        m.decide(SHORT, reading(loss))
        advice = [m.settle(reading(loss)) for _ in range(PATIENCE)][-1]
        if advice is Advice.TAKEN_BACK:
            break
    assert advice is Advice.TAKEN_BACK
    assert loss < 1.0 + 2 * 0.15 + 1e-9


def test_it_goes_back_to_the_start_of_the_open_raise_and_the_second_time_to_one() -> None:
    m = raised()
    for _ in range(PATIENCE):
        m.settle(reading())
    m.decide(SHORT, reading())
    assert m.value == GROWTH**2
    assert m.take_back() is Advice.TAKEN_BACK
    assert (m.value, m.cap) == (GROWTH, GROWTH)
    assert MAX_TAKEN_BACK == 2
    assert m.take_back() is Advice.TAKEN_BACK
    assert (m.value, m.cap) == (1.0, 1.0)


def test_at_the_last_takeback_allowed_the_start_of_the_open_raise_is_no_refuge() -> None:
    m = raised()
    m.account = None
    m.decide(SHORT, reading())
    m.num_taken_back = MAX_TAKEN_BACK - 1
    m.take_back()
    assert (m.value, m.cap) == (1.0, 1.0)


def test_for_good_the_first_time() -> None:
    m = raised()
    m.take_back(for_good=True)
    assert (m.value, m.cap, m.account) == (1.0, 1.0, None)
    m.follow(1.0)
    assert not m.learning


def test_without_an_open_raise_it_goes_back_to_one() -> None:
    m = raised(GROWTH**2)
    m.account = None
    m.take_back()
    assert (m.value, m.cap) == (1.0, 1.0)


def test_a_new_raise_is_told_of_even_at_the_check_that_settles_the_last() -> None:
    """Whoever hears RAISED keeps the state of its start: were it lost, a take-back would find none, or an old one."""
    m = raised()
    advice = [check(m, SHORT, reading()) for _ in range(PATIENCE)]
    assert advice[-1] is Advice.RAISED
    assert m.account is not None
    assert m.account.checks_left == PATIENCE
    assert m.account.value == m.value / GROWTH


# ---------------------------------------------------------------- exact losses


def seen(m: Multiplier, *losses: float) -> Advice:
    return m.watch(reading(newest=losses, exact=True))


def test_exact_a_raise_ends_at_once_above_the_largest_loss_before_it() -> None:
    m = begun(exact=True)
    m.decide(SHORT, reading(newest=[1.3, 1.2, 1.1, 1.2, 1.0], exact=True))
    assert m.account is not None
    assert m.account.ceiling == 1.3
    assert seen(m, 1.0, 1.25) is Advice.NOTHING
    assert seen(m, 1.25, 1.31) is Advice.TAKEN_BACK
    assert (m.value, m.num_taken_back) == (1.0, 1)


def test_exact_a_settled_raise_ends_by_an_explosion() -> None:
    for last, wanted in ((0.99, Advice.NOTHING), (1.01, Advice.TAKEN_BACK)):
        m = raised(exact=True)
        m.account = None
        assert seen(m, 0.9, 1.0, EXPLOSION * last) is wanted
        assert m.value == (GROWTH if wanted is Advice.NOTHING else 1.0)


def test_exact_negative_losses_explode_upwards_too() -> None:
    """Log densities: four times a negative loss is lower than it."""
    for newest, wanted in (
        ((-1.0, -1.0), Advice.NOTHING),
        ((-1.0, 1.9), Advice.NOTHING),
        ((-1.0, 2.1), Advice.TAKEN_BACK),
    ):
        m = raised(exact=True)
        m.account = None
        assert seen(m, *newest) is wanted


@pytest.mark.parametrize("settled", [False, True])
def test_exact_no_number_is_an_explosion(settled: bool) -> None:
    m = raised(exact=True)
    if settled:
        m.account = None
    assert seen(m, 1.0, math.nan) is Advice.TAKEN_BACK


def test_nothing_is_watched_where_losses_are_noisy_or_nothing_was_raised() -> None:
    assert raised().watch(reading(newest=[1.0, 1e9])) is Advice.NOTHING
    assert seen(begun(exact=True), 1.0, 1e9) is Advice.NOTHING
    assert seen(raised(exact=True), 1e9) is Advice.NOTHING  # nothing to compare with yet


# ---------------------------------------------------------------- the rest


def test_level_is_one_without_blame() -> None:
    m = raised(GROWTH**2)
    m.level()
    assert (m.value, m.cap, m.account, m.num_taken_back, m.learning) == (1.0, 1.0, None, 0, False)
    for _ in range(10):
        assert check(m, SHORT, reading()) is Advice.NOTHING
    assert m.value == 1.0


def script(i: int) -> tuple[Moments, Reading]:
    """A run that is raised, settled, raised again, touches the edge, creeps, and gets worse."""
    loss = 1.0 if i < 21 else 3.0
    cosines = SHORT if i in (4, 9, 10) else ZERO if i == 12 else IN_NOISE if i > 18 else moments([0.0])
    return cosines, reading(loss)


@pytest.mark.parametrize("at", range(0, 32, 2))
def test_its_state_round_trips_at_any_check(at: int) -> None:
    a = begun(checks=0)
    for i in range(at):
        check(a, *script(i))
    b = Multiplier(7.0)
    b.load_state_dict(a.state_dict())
    assert_same(b.state_dict(), a.state_dict())
    for i in range(at, 32):
        assert check(a, *script(i)) is check(b, *script(i))
        assert_same(b.state_dict(), a.state_dict())
    assert a.num_taken_back > 0, "the script has to reach everything"
    assert a.num_raises > 3


def test_state_round_trips_while_a_raise_waits_to_arrive() -> None:
    a, b = touched(), Multiplier(7.0)
    a.arrive(UNSTEADY[:3])
    for values in (UNSTEADY[3:] + BEYOND[:5], BEYOND[5:], UNSTEADY + AT_EDGE):
        b.load_state_dict(a.state_dict())
        assert_same(b.state_dict(), a.state_dict())
        a.arrive(values)
        b.arrive(values)
        assert_same(b.state_dict(), a.state_dict())
    assert (a.value, a.arrived) == (GROWTH**2, True)


def test_state_round_trips_while_the_first_losses_are_taken() -> None:
    a, b = Multiplier(HIGH), Multiplier(HIGH)
    a.watch(reading(newest=FIRST[:1]))
    b.load_state_dict(a.state_dict())
    for m in (a, b):
        for i in range(1, NUM_ENDS):
            m.watch(reading(newest=FIRST[: i + 1]))
        assert m.has_fallen(reading())


def test_orthogonal_steps_are_known_by_the_name_of_their_optimizer() -> None:
    class Muon(torch.optim.SGD):
        pass

    class Derived(Muon):
        pass

    class Holder(torch.optim.SGD):
        def __init__(self, parameters: list[nn.Parameter]) -> None:
            super().__init__(parameters, lr=0.1)
            self.inner = Muon(parameters, lr=0.1)

    p = [nn.Parameter(torch.ones(2, 2))]
    assert orthogonalizes(Muon(p, lr=0.1))
    assert orthogonalizes(Derived(p, lr=0.1))
    assert orthogonalizes(Holder(p))
    assert not orthogonalizes(torch.optim.SGD(p, lr=0.1))
    assert not orthogonalizes(torch.optim.AdamW(p, lr=0.1))


@pytest.mark.parametrize("says", [{"adjust_lr_fn": None}, {"ns_steps": 5}, {"use_muon": True}, {"use_muon": False}])
def test_orthogonal_steps_are_known_by_their_groups(says: dict[str, object]) -> None:
    p = [nn.Parameter(torch.ones(2, 2))]
    assert orthogonalizes(torch.optim.SGD([{"params": p, **says}], lr=0.1)) == (says != {"use_muon": False})


def test_optimizers_that_choose_their_rate_are_known_by_name_or_estimate() -> None:
    class Prodigy(torch.optim.SGD):
        pass

    class Holder(torch.optim.SGD):
        def __init__(self, parameters: list[nn.Parameter]) -> None:
            super().__init__(parameters, lr=0.1)
            self.inner = Prodigy(parameters, lr=0.1)

    p = [nn.Parameter(torch.ones(2, 2))]
    assert chooses_its_rate(Prodigy(p, lr=1.0))
    assert chooses_its_rate(Holder(p))
    assert chooses_its_rate(torch.optim.SGD([{"params": p, "d": 1e-6}], lr=1.0))
    assert not chooses_its_rate(torch.optim.SGD(p, lr=0.1))
    assert not chooses_its_rate(torch.optim.AdamW(p, lr=0.1))
