"""Bandits: the formulas, known problems, regret, speed."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import rng
from hybrid_predict_trainer.propose import horizon as bandit
from hybrid_predict_trainer.propose.horizon import UCB1, Choice, LinUCB

NO_CONTEXT = np.ones(1)


def play(player, problem, num_rounds, seed=0):
    """Regret of every round on ``problem(generator) -> (context, mean reward of every arm)``."""
    generator = np.random.default_rng(seed)
    regrets = []
    for _ in range(num_rounds):
        x, means = problem(generator)
        choice = player.choose(x)
        player.observe(choice, float(means[choice.arm] + 0.1 * generator.standard_normal()))
        regrets.append(means.max() - means[choice.arm])
    return np.array(regrets)


MEANS = np.array([0.0, -0.2, 0.1, 0.5, 0.3, -0.5])


def fixed(generator):
    return NO_CONTEXT, MEANS


def contextual(generator):
    """Which of six arms is best depends on the context."""
    theta = np.random.default_rng(99).standard_normal((6, 3))
    x = np.array([*generator.uniform(-1, 1, 2), 1.0])
    return x, theta @ x / 2


# ---------------------------------------------------------------- formulas


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_linucb_is_the_explicit_ridge_of_every_arm(discount):
    generator = np.random.default_rng(0)
    player = LinUCB(3, 4, l2=0.7, discount=discount, alpha=1.3)
    seen = []
    for _ in range(50):
        x, arm, r = generator.standard_normal(4), int(generator.integers(3)), float(generator.standard_normal())
        player.observe(Choice(arm=arm, context=x, score=0.0), r)
        seen.append((arm, x, r))
    query = generator.standard_normal(4)
    bounds = []
    for arm in range(3):
        rows = [(discount ** (len(seen) - 1 - i), x, r) for i, (a, x, r) in enumerate(seen) if a == arm]
        weight, X, y = (np.array(v) for v in zip(*rows, strict=True))
        V = X.T @ (weight[:, None] * X) + 0.7 * np.eye(4)
        theta = np.linalg.solve(V, X.T @ (weight * y))
        np.testing.assert_allclose(player.theta[arm], theta, rtol=1e-9)
        bounds.append(query @ theta + 1.3 * math.sqrt(query @ np.linalg.solve(V, query)))
    choice = player.choose(query)
    assert choice.arm == int(np.argmax(bounds))
    assert choice.score == pytest.approx(max(bounds))


def test_ucb1_is_the_published_bound():
    scores = bandit.ucb1_scores(np.array([4.0, 16.0]), np.array([2.0, 4.0]), 1.0)
    assert scores == pytest.approx([0.5 + math.sqrt(2 * math.log(20) / 4), 0.25 + math.sqrt(2 * math.log(20) / 16)])
    assert bandit.ucb1_scores(np.array([0.0, 1.0]), np.zeros(2), 1.0)[0] == math.inf


# ---------------------------------------------------------------- known problems


@pytest.mark.parametrize("make", [lambda: LinUCB(6, 1, alpha=0.5), lambda: UCB1(6)], ids=["linucb", "ucb1"])
def test_best_arm_of_a_known_problem_is_found(make):
    for seed in range(3):
        regrets = play(make(), fixed, 4000, seed)
        assert (regrets[-500:] == 0).mean() > 0.85
        assert regrets[2000:].sum() < 0.7 * regrets[:2000].sum()  # sublinear: the later half costs less


def test_ucb1_keeps_within_its_regret_bound():
    gaps = MEANS.max() - MEANS
    n = 3000
    bound = 8 * sum(math.log(n) / g for g in gaps if g > 0) + (1 + math.pi**2 / 3) * gaps.sum()
    assert play(UCB1(6), fixed, n).sum() < bound


def test_linucb_uses_the_context_and_ucb1_does_not():
    n = 3000
    with_context, without = (play(p, contextual, n) for p in (LinUCB(6, 3, alpha=0.5), UCB1(6)))
    assert with_context[n // 2 :].sum() < 0.35 * with_context[: n // 2].sum()
    assert with_context.sum() < 0.1 * without.sum()
    assert (with_context[-500:] < 0.05).mean() > 0.95


@pytest.mark.parametrize(
    "make",
    [lambda d: LinUCB(2, 1, alpha=0.3, discount=d), lambda d: UCB1(2, scale=0.2, discount=d)],
    ids=["linucb", "ucb1"],
)
def test_discounting_follows_a_change(make):
    def regret_after_the_change(player):
        play(player, lambda g: (NO_CONTEXT, np.array([1.0, 0.0])), 2000)
        return play(player, lambda g: (NO_CONTEXT, np.array([0.2, 0.9])), 300, seed=1).sum()

    forgetful, stubborn = regret_after_the_change(make(0.98)), regret_after_the_change(make(1.0))
    assert forgetful < 0.5 * stubborn


def test_no_jump_is_learnt_where_no_jump_pays():
    costly = np.array([0.0, -0.05, -0.05, -0.1, -0.2, -0.3])
    player = LinUCB(6, 1, alpha=0.2)
    play(player, lambda g: (NO_CONTEXT, costly), 1500)
    assert player.choose(NO_CONTEXT).arm == 0


# ---------------------------------------------------------------- arms, rewards, contexts


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 500), st.integers(1, 200), st.integers(0, 400))
def test_horizons_begin_with_none_rise_and_stay_within(window, minimum, maximum):
    arms = bandit.horizons(window, minimum, maximum)
    assert arms[0] == 0
    assert list(arms) == sorted(set(arms))
    assert all(min(minimum, maximum) <= y <= maximum for y in arms[1:])
    assert len(arms) == 1 if maximum == 0 else len(arms) >= 2


def test_horizons_of_a_usual_window():
    assert bandit.horizons(20, 1, 1000) == (0, 5, 10, 20, 40, 80)
    assert bandit.horizons(20, 8, 30) == (0, 8, 10, 20, 30)


def test_reward_is_net_steps_over_the_cost_of_the_cycle():
    assert bandit.reward(0, 0) == 0
    assert bandit.reward(5, 2, 10) == pytest.approx(3 / 12)
    assert bandit.reward(0, 2, 10) == pytest.approx(-2 / 12)
    # what gains more net steps in a window wins, though its own price is paid back fewer times over
    assert bandit.reward(10, 4, 20) > bandit.reward(2, 0.5, 20)
    assert bandit.reward(1, 0, 0) == 0


def test_context_is_bounded_whatever_the_window():
    for loss, slope in ((2.0, -0.01), (0.0, 0.0), (1e-12, -1e9), (math.nan, math.nan)):
        window = SimpleNamespace(loss=loss, loss_slope=slope, num_steps=20, lr_ahead=0.1, lr_integral=0.0, step=10**6)
        x = bandit.context_features(window, confidence=0.3, persistence=1.0, spread=math.inf)
        assert x.shape == (bandit.NUM_CONTEXT_FEATURES,)
        assert (np.abs(x) <= 1).all()
    fast, slow = (
        SimpleNamespace(loss=1.0, loss_slope=slope, num_steps=20, lr_ahead=0.1, lr_integral=0.2, step=5)
        for slope in (-0.01, 0.0)
    )
    there = {"confidence": 0.5, "persistence": 0.5, "spread": 0.1}
    difference = bandit.context_features(fast, **there) - bandit.context_features(slow, **there)
    assert np.count_nonzero(difference) == 1


# ---------------------------------------------------------------- state, randomness


@pytest.mark.parametrize(
    "make", [lambda: LinUCB(6, 3, discount=0.99), lambda: UCB1(6, discount=0.99)], ids=["linucb", "ucb1"]
)
def test_state_goes_through_a_fresh_object(make):
    player = make()
    play(player, contextual, 40)
    copy = make()
    copy.load_state_dict(player.state_dict())
    np.testing.assert_array_equal(play(player, contextual, 60, seed=5), play(copy, contextual, 60, seed=5))
    for a, b in zip(player.state_dict().values(), copy.state_dict().values(), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_choices_survive_a_checkpoint():
    choice = LinUCB(3, 2).choose(np.array([0.25, -1.0]))
    again = Choice.from_state_dict(choice.state_dict())
    assert again.arm == choice.arm
    np.testing.assert_array_equal(again.context, choice.context)


def test_ties_are_broken_by_a_generator_of_its_own():
    before = rng()
    arms = {LinUCB(6, 2, seed=seed).choose(np.ones(2)).arm for seed in range(40)}
    assert arms == set(range(6))
    assert LinUCB(6, 2, seed=3).choose(np.ones(2)).arm == LinUCB(6, 2, seed=3).choose(np.ones(2)).arm
    after = rng()
    assert torch.equal(before["torch"], after["torch"])
    assert before["numpy"] == after["numpy"]


def test_a_reward_that_is_not_a_number_is_left_out():
    for player in (LinUCB(2, 1), UCB1(2)):
        choice = player.choose(NO_CONTEXT)
        untouched = player.state_dict()
        player.observe(choice, math.nan)
        for a, b in zip(untouched.values(), player.state_dict().values(), strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
