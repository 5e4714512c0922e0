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
from hybrid_predict_trainer.switchback import (
    BLOCK_STEPS,
    LEVEL,
    MIN_CONTROLS,
    NUM_FREE_BLOCKS,
    Switchback,
)


def trial(
    num_blocks: int, lasting: float, *, passing: float = 0.0, noise: float = 0.002, fraction: float = 0.2, seed: int = 0
) -> Switchback:
    """A run whose log loss falls by 0.01 a block.

    Args:
        num_blocks: Length.
        lasting: What a block with the motion adds to the log loss for good.
        passing: What the motion adds for as long as it is there.
        noise: Of a block's mean.
        fraction: Of controls.
        seed: Of noise and lot.
    """
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    found, level = Switchback(fraction), 0.0
    for _ in range(num_blocks):
        level += -0.01 + lasting * found.moving
        mean = math.exp(level + passing * found.moving + noise * rng.standard_normal())
        found.close_block([mean] * BLOCK_STEPS, generator)
    return found


def test_a_harmful_motion_is_found_out_and_ends() -> None:
    for seed in range(10):
        found = trial(120, 0.01, seed=seed)
        assert found.switched_off, seed
        assert not found.moving, seed


def test_one_that_helps_goes_on() -> None:
    for seed in range(10):
        assert not trial(200, -0.01, seed=seed).switched_off, seed


def test_the_effect_is_what_is_left_and_not_what_passes() -> None:
    """A motion that only calms the loss while it is there has no effect; one that lasts has."""
    effects = [trial(400, -0.004, passing=-0.05, noise=0.001, seed=seed).effect for seed in range(5)]
    assert all(effect == pytest.approx(0.004, abs=0.001) for effect in effects)


def test_without_effect_it_is_seldom_switched_off() -> None:
    """The level is one of a hundred; asked anew at every block of a long run it is several of them."""
    wrong = sum(trial(150, 0.0, seed=seed).switched_off for seed in range(60))
    assert wrong <= 12


def test_the_bound_is_welch_s() -> None:
    found = trial(200, -0.002, seed=3)
    treated, controls = found._changes[True], found._changes[False]
    interval = stats.ttest_ind(treated, controls, equal_var=False).confidence_interval(1 - 2 * LEVEL)
    assert found.excess_bound() == pytest.approx(interval.low, rel=0.02)


@pytest.mark.parametrize(
    ("num_blocks", "fraction"), [(NUM_FREE_BLOCKS - 1, 0.5), (400, 0.0)], ids=["short run", "no controls"]
)
def test_nothing_is_drawn_where_nothing_can_be_learnt(num_blocks: int, fraction: float) -> None:
    found, generator = Switchback(fraction), torch.Generator().manual_seed(0)
    for _ in range(num_blocks):
        found.close_block([1.0], generator)
        assert found.moving
    assert found.effect is None
    assert found.excess_bound() is None


def test_controls_are_never_neighbours_and_as_many_as_asked_for() -> None:
    found, generator = Switchback(0.25), torch.Generator().manual_seed(1)
    moved = []
    for _ in range(2000):
        found.close_block([1.0], generator)
        moved.append(found.moving)
    assert all(a or b for a, b in itertools.pairwise(moved))
    assert moved.count(False) / len(moved) == pytest.approx(0.25 / 1.25, abs=0.03)


@pytest.mark.parametrize(
    ("spoil", "counted"),
    [
        (lambda found: None, 2),
        (lambda found: found.note_jump(), 0),  # all three blocks of either comparison
    ],
)
def test_what_a_jump_has_moved_is_not_compared(spoil: Callable[[Switchback], None], counted: int) -> None:
    found, generator = Switchback(0.0), torch.Generator()
    for i in range(4):
        if i == 1:
            spoil(found)
        found.close_block([2.0 - 0.1 * i], generator)
    assert len(found._changes[True]) == counted


@pytest.mark.parametrize("losses", [[], [float("nan")], [-1.0], [0.0]])
def test_losses_without_a_logarithm_are_left_out(losses: list[float]) -> None:
    found, generator = Switchback(0.0), torch.Generator()
    for block in ([1.0], [1.0], losses, [1.0], [1.0]):
        found.close_block(block, generator)
    assert found._changes[True] == [0.0]
    assert not found.switched_off


def test_state_round_trips_between_two_blocks() -> None:
    a, b = trial(57, -0.01), Switchback(0.2)
    a.count_step()
    b.load_state_dict(a.state_dict())
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    for i in range(30):
        for found, generator in zip((a, b), generators, strict=True):
            found.close_block([1 - 0.01 * i], generator)
    assert_same(a.state_dict(), b.state_dict())


def test_a_run_asks_it_and_one_without_the_motion_has_no_trial() -> None:
    made = setup("mlp", "sgd", "flat")
    trainer = made.trainer(config(lookahead=0.3, smoothing=0.25, explore_outcomes=0, gate__control_fraction=0.5))
    run = trainer.run
    for batch in make_batches(BLOCK_STEPS * (NUM_FREE_BLOCKS + 2 * MIN_CONTROLS + 6)):
        trainer.step(batch)
    assert run.switchback.num_blocks == run.counters.num_real_steps // BLOCK_STEPS
    assert run.switchback._changes[False]
    assert trainer.statistics()["lookahead_switched_off"] is False
    still = setup("mlp", "sgd", "flat").trainer(config(explore_outcomes=0))
    for batch in make_batches(BLOCK_STEPS + 1):
        still.step(batch)
    assert still.run.switchback.num_blocks == 0


def test_a_run_without_the_motion_in_a_block_is_the_run_without_it() -> None:
    """Bit for bit: what is not moving only watches."""
    ends = []
    for changes in ({"lookahead": 0.3, "smoothing": 0.25}, {}):
        made = setup("mlp", "sgd", "flat")
        trainer = made.trainer(config(explore_outcomes=0, gate__overhead_budget=0.0, **changes))
        trainer.run.switchback.moving = False
        for batch in make_batches(BLOCK_STEPS - 1):
            trainer.step(batch)
        ends.append([p.detach().clone() for p in made.model.parameters()])
    assert_same(*ends)
