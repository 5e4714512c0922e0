"""The trial of the lookahead: known effects, blocks that do not count, and what it costs to know."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from cases import assert_same, config, make_batches, setup
from hybrid_predict_trainer.judge.switchback import (
    BLOCK_STEPS,
    LEVEL,
    MAX_COMPARISONS,
    MIN_COMPARISONS,
    NUM_FREE_BLOCKS,
    NUM_LOSSES,
    Switchback,
)
from hybrid_predict_trainer.numerics.sequential import difference_interval


def steep(step: float) -> float:
    """Log loss of a run that falls fastest at first, as runs do."""
    return math.log(2 + 8 * (1 + step / (30 * BLOCK_STEPS)) ** -0.7)


def even(step: float) -> float:
    """One that falls by a hundredth in every block."""
    return -0.01 * step / BLOCK_STEPS


def closed(found: Switchback, losses: list[float], generator: torch.Generator) -> None:
    """A full block in which the motion had something to do."""
    for _ in range(BLOCK_STEPS):
        found.on_motion()
        found.count_step()
    found.close_block(losses[-NUM_LOSSES:], generator)


def trial(
    num_blocks: int, lasting: float, *, passing: float = 0.0, delay: float = 3.0, noise: float = 0.01,
    fraction: float = 0.2, seed: int = 0, curve: Callable[[float], float] = steep,
) -> Switchback:  # fmt: skip
    """A run, step by step.

    Args:
        num_blocks: Length.
        lasting: What a block with the motion adds to the log loss for good.
        passing: What the motion adds for as long as it is there.
        delay: Steps in which that comes and goes.
        noise: Of a single log loss.
        fraction: Of controls.
        seed: Of noise and lot.
        curve: Log loss without any of this.
    """
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    found, level, present, step = Switchback(fraction), 0.0, 1.0, 0
    for _ in range(num_blocks):
        losses = []
        for _ in range(BLOCK_STEPS):
            step += 1
            level += lasting * found.moving / BLOCK_STEPS
            present += (found.moving - present) / delay
            losses.append(math.exp(curve(step) + level + passing * present + noise * rng.standard_normal()))
        closed(found, losses, generator)
    return found


@pytest.mark.parametrize("curve", [even, steep])
def test_a_harmful_motion_is_found_out_and_ends(curve: Callable[[float], float]) -> None:
    for seed in range(10):
        found = trial(200, 0.01, seed=seed, curve=curve)
        assert found.switched_off, seed
        assert not found.moving, seed


@pytest.mark.parametrize("curve", [even, steep])
def test_one_that_helps_goes_on(curve: Callable[[float], float]) -> None:
    for seed in range(10):
        assert not trial(200, -0.01, seed=seed, curve=curve).switched_off, seed


@pytest.mark.parametrize("passing", [-0.05, 0.05])
def test_the_effect_is_what_is_left_and_not_what_passes(passing: float) -> None:
    """A motion that calms or raises the loss while it is there has no effect by that."""
    effects = [trial(400, -0.004, passing=passing, seed=seed, curve=even).effect for seed in range(5)]
    assert all(effect == pytest.approx(0.004, abs=0.0015) for effect in effects)


def test_a_passing_rise_alone_is_seldom_taken_for_harm() -> None:
    wrong = sum(trial(150, 0.0, passing=0.02, seed=seed).switched_off for seed in range(20))
    assert wrong <= 3


def test_without_effect_it_is_seldom_switched_off() -> None:
    """The level is one of two hundred; asked anew at every block of a long run it is several of them."""
    wrong = sum(trial(150, 0.0, fraction=0.1, seed=seed).switched_off for seed in range(40))
    assert wrong <= 3


def test_early_blocks_are_not_compared_with_later_ones() -> None:
    """Before there can be controls nothing is recorded: a loss falls fastest at first."""
    found, generator = Switchback(0.0), torch.Generator()
    for i in range(NUM_FREE_BLOCKS + 1):
        closed(found, [math.exp(-i)], generator)
    assert not any(found._changes.values())
    closed(found, [math.exp(-NUM_FREE_BLOCKS - 1)], generator)
    assert list(found._changes[True]) == pytest.approx([-2.0])


def test_its_bounds_are_those_of_an_interval_that_is_always_valid() -> None:
    """About the same middle as Student's, and wider, as it has to be: it is looked at after every block."""
    found = trial(300, -0.0005, seed=3)
    treated, controls = found._changes[True], found._changes[False]
    student = stats.ttest_ind(treated, controls).confidence_interval(1 - LEVEL)
    low, high = found.excess()
    interval = difference_interval(treated, controls, LEVEL)
    assert (low, high) == (interval.low, interval.high)
    assert (low + high) / 2 == pytest.approx((student.low + student.high) / 2)
    assert 1.2 < (high - low) / (student.high - student.low) < 2


@pytest.mark.parametrize(
    ("num_blocks", "fraction"), [(NUM_FREE_BLOCKS - 1, 0.5), (400, 0.0)], ids=["short run", "no controls"]
)
def test_nothing_is_drawn_where_nothing_can_be_learnt(num_blocks: int, fraction: float) -> None:
    found, generator = Switchback(fraction), torch.Generator().manual_seed(0)
    for _ in range(num_blocks):
        closed(found, [1.0], generator)
        assert found.moving
    assert found.effect is None
    assert found.excess() == (-math.inf, math.inf)


def test_controls_are_never_neighbours_and_as_many_as_asked_for() -> None:
    found, generator = Switchback(0.25), torch.Generator().manual_seed(1)
    moved = []
    for _ in range(2000):
        closed(found, [1.0], generator)
        moved.append(found.moving)
    assert all(a or b for a, b in itertools.pairwise(moved))
    assert moved.count(False) / len(moved) == pytest.approx(0.25 / 1.25, abs=0.03)


def started() -> tuple[Switchback, torch.Generator]:
    """A trial whose next comparison would count."""
    found, generator = Switchback(0.0), torch.Generator()
    for _ in range(NUM_FREE_BLOCKS + 1):
        closed(found, [1.0], generator)
    return found, generator


@pytest.mark.parametrize(("jump", "counted"), [(False, 5), (True, 2)])
def test_what_a_jump_has_moved_is_not_compared(jump: bool, counted: int) -> None:
    """It spoils the comparisons that its block ends, is the middle of, and begins: three, and no more."""
    found, generator = started()
    if jump:
        found.on_jump()
    for i in range(5):
        closed(found, [2.0 - 0.1 * i], generator)
    assert len(found._changes[True]) == counted


def test_nor_does_a_control_that_had_nothing_to_leave_out() -> None:
    for tried, counted in ((True, 1), (False, 0)):
        found, generator = started()
        found.moving = False
        if tried:
            found.on_motion()
        found.close_block([1.0], generator)
        closed(found, [1.0], generator)
        assert len(found._changes[False]) == counted


def test_a_block_in_which_nothing_was_tried_says_nothing() -> None:
    found, generator = started()
    for moved in (True, False, True, True, True):
        for _ in range(BLOCK_STEPS):
            found.count_step()
        if moved:
            found.on_motion()
        found.close_block([1.0], generator)
    assert len(found._changes[True]) == 2


@pytest.mark.parametrize("losses", [[], [float("nan")], [-1.0], [0.0]])
def test_losses_without_a_logarithm_are_left_out(losses: list[float]) -> None:
    found, generator = started()
    for block in ([1.0], losses, [1.0], [1.0]):
        closed(found, block, generator)
    assert list(found._changes[True]) == [0.0, 0.0]  # the one before, and the one that has it in its middle
    assert not found.switched_off


@pytest.mark.parametrize("treated", range(MIN_COMPARISONS))
def test_a_verdict_needs_comparisons_of_both_kinds(treated: int) -> None:
    found = Switchback(0.5)
    found._changes = {True: [0.5] * treated, False: [0.0] * 50}
    assert found.effect is None
    assert found.excess() == (-math.inf, math.inf)
    found._changes[True] = [0.5] * MIN_COMPARISONS
    assert found.effect == -0.5


def test_state_round_trips_between_two_blocks() -> None:
    a, b = trial(57, -0.01), Switchback(0.2)
    a.count_step()
    a.on_motion()
    b.load_state_dict(a.state_dict())
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    for i in range(30):
        for found, generator in zip((a, b), generators, strict=True):
            closed(found, [1 - 0.01 * i], generator)
    assert_same(a.state_dict(), b.state_dict())


def test_a_run_asks_it_and_one_without_the_motion_has_no_trial() -> None:
    made = setup("mlp", "sgd", "flat")
    trainer = made.trainer(
        config(
            lookahead__extrapolation=0.3,
            lookahead__scope="all",
            lookahead__damping=0.25,
            explore_outcomes=0,
            gate__holdout_fraction=0.5,
        )
    )
    run = trainer.run
    for batch in make_batches(BLOCK_STEPS * (NUM_FREE_BLOCKS + 14)):
        trainer.step(batch)
    assert run.optimizer_step.switchback.num_blocks == run.meter.num_real_steps // BLOCK_STEPS
    assert run.optimizer_step.switchback._changes[False]
    assert trainer.statistics()["lookahead_switched_off"] is False
    still = setup("mlp", "sgd", "flat").trainer(config(explore_outcomes=0))
    for batch in make_batches(BLOCK_STEPS + 1):
        still.step(batch)
    assert still.run.optimizer_step.switchback.num_blocks == 0


def test_only_the_losses_of_a_block_s_latter_half_are_its_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[float]] = []
    monkeypatch.setattr(Switchback, "close_block", lambda self, losses, generator: given.append(losses))
    trainer = setup("mlp", "sgd", "flat").trainer(
        config(lookahead__extrapolation=0.3, lookahead__scope="all", explore_outcomes=0, gate__overhead_budget=0.0)
    )
    seen = [trainer.step(batch).loss for batch in make_batches(BLOCK_STEPS)]
    assert given == [seen[-NUM_LOSSES:]]


def test_once_switched_off_nothing_is_held() -> None:
    trainer = setup("mlp", "sgd", "flat").trainer(
        config(lookahead__extrapolation=0.3, lookahead__scope="all", explore_outcomes=0)
    )
    first, *rest = make_batches(10)
    trainer.step(first)
    assert trainer.run.optimizer_step.lookahead.memory_bytes() > 0
    trainer.run.optimizer_step.switchback.switched_off = True
    for batch in rest:
        trainer.step(batch)
        assert trainer.run.optimizer_step.lookahead.memory_bytes() == 0


def test_a_run_without_the_motion_in_a_block_is_the_run_without_it() -> None:
    """Bit for bit: what is not moving only watches."""
    ends = []
    for changes in ({"lookahead__extrapolation": 0.3, "lookahead__damping": 0.25, "lookahead__scope": "all"}, {}):
        made = setup("mlp", "sgd", "lambda")
        trainer = made.trainer(config(explore_outcomes=0, gate__overhead_budget=0.0, **changes))
        trainer.run.optimizer_step.switchback.moving = False
        for batch in make_batches(BLOCK_STEPS - 1):
            trainer.step(batch)
        ends.append([p.detach().clone() for p in made.model.parameters()])
    assert_same(*ends)


def test_a_long_run_remembers_its_newest_comparisons_only() -> None:
    found, generator = Switchback(0.0), torch.Generator()
    for i in range(NUM_FREE_BLOCKS + MAX_COMPARISONS + 50):
        closed(found, [math.exp(-(i**2) / 1e4)], generator)
    assert len(found._changes[True]) == MAX_COMPARISONS
    kept = found.state_dict()["with"]
    assert kept == sorted(kept, reverse=True), "the oldest are dropped, the order stays"
    again = Switchback(0.0)
    again.load_state_dict(found.state_dict())
    closed(found, [1.0], generator)
    closed(again, [1.0], generator)
    assert again.state_dict() == found.state_dict()
    assert len(again._changes[True]) == MAX_COMPARISONS
