"""The guard over a run, on streams of losses: when it raises an alarm, asks for a copy, and what a comparison says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise

import numpy as np
import pytest

from hybrid_predict_trainer.judge.guard import (
    ANCHOR_SHARE,
    ANCHOR_STEPS,
    BLOCK_STEPS,
    MAX_PAIRS,
    PATIENCE_BLOCKS,
    WINDOW_BLOCKS,
    Guard,
    Request,
)

Noise = Callable[[np.random.Generator, int], np.ndarray]
NOISE: dict[str, Noise] = {
    "normal": lambda g, n: g.normal(size=n),
    "heavy tails": lambda g, n: g.standard_t(3, size=n) / math.sqrt(3),
    "one-sided": lambda g, n: g.exponential(size=n) - 1,
    "two values": lambda g, n: g.choice([-1.0, 1.0], size=n),
}


def watched(losses: Iterable[float], *, exact: bool = False, moving: bool = True) -> tuple[Guard, dict[int, Request]]:
    """A guard after a stream of losses, and what it asked for at which step."""
    guard, asked = Guard(), {}
    for step, loss in enumerate(losses, start=1):
        request = guard.watch(float(loss), step, exact=exact, moving=moving)
        if request is not Request.NOTHING:
            asked[step] = request
    return guard, asked


def alarms(asked: dict[int, Request]) -> list[int]:
    return [step for step, request in asked.items() if request is Request.COMPARE]


# ---------------------------------------------------------------- alarms


@pytest.mark.parametrize("noise", NOISE)
def test_stationary_noise_is_no_harm(noise: str) -> None:
    """Of 96 such streams of 20,000 steps none was accused; these are some of them."""
    for seed in range(2):
        losses = 1 + 0.4 * NOISE[noise](np.random.default_rng(seed), 20_000)
        assert alarms(watched(losses)[1]) == [], seed


@pytest.mark.parametrize("noise", NOISE)
def test_a_falling_loss_is_no_harm(noise: str) -> None:
    losses = 0.3 + 2 / np.sqrt(1 + np.arange(6000) / 50) + 0.17 * NOISE[noise](np.random.default_rng(1), 6000)
    assert alarms(watched(losses)[1]) == []


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_steps", [600, 3000, 10_000])
def test_slow_ruin_is_seen(num_steps: int, seed: int) -> None:
    """A loss that creeps from 0.4 to 0.65 within noise of 0.17, however slowly; not before it has begun to rise."""
    noise = 0.17 * np.random.default_rng(seed).normal(size=2000 + num_steps)
    level = np.concatenate([np.full(1000, 0.4), np.linspace(0.4, 0.65, num_steps), np.full(1000, 0.65)])
    found = alarms(watched(level + noise)[1])
    assert len(found) == 1
    assert 1000 < found[0] < 1000 + num_steps + WINDOW_BLOCKS * BLOCK_STEPS


def test_an_alarm_takes_its_patience() -> None:
    """A burst shorter than the patience is forgiven; one that lasts is not."""
    length = BLOCK_STEPS * (PATIENCE_BLOCKS - 1)
    burst = np.concatenate([np.full(640, 1.0), np.full(length, 3.0), np.full(640, 1.0)])
    assert alarms(watched(burst + 0.01 * np.random.default_rng(0).normal(size=burst.size))[1])  # the window holds on
    short = np.concatenate([np.full(640, 1.0), np.full(4, 1.5), np.full(640, 1.0)])
    assert alarms(watched(short + 0.1 * np.random.default_rng(0).normal(size=short.size))[1]) == []


@pytest.mark.parametrize(("factor", "expected"), [(2.0, 0), (2.9, 0), (8.0, 1), (100.0, 1)])
def test_exact_losses_are_compared_by_their_logarithms(factor: float, expected: int) -> None:
    """Three times the best; swings of an optimizer at its edge are less."""
    losses = np.concatenate([np.geomspace(1, 1e-6, 2000), np.full(400, factor * 1e-6)])
    assert len(alarms(watched(losses, exact=True)[1])) == expected


@pytest.mark.parametrize("level", [-3.0, 0.0])
def test_exact_losses_that_have_no_logarithm(level: float) -> None:
    assert alarms(watched([level] * 500, exact=True)[1]) == []


@pytest.mark.parametrize("level", [1e200, -1e200, 1e308])
def test_losses_whose_squares_are_no_numbers_end_nothing(level: float) -> None:
    """They swing between huge values: nothing can be told, and no state of theirs is worth keeping."""
    _, asked = watched([level, -level] * 200)
    assert asked == {}


def test_who_moves_nothing_is_not_accused() -> None:
    guard, asked = watched(np.linspace(1, 9, 2000), moving=False)
    assert asked == {}
    assert guard.num_alarms == 0
    guard = Guard()
    asked = {}
    for step, loss in enumerate(np.concatenate([np.full(640, 1.0), np.full(640, 5.0)]), start=1):
        asked[step] = guard.watch(float(loss), step, exact=False, moving=step <= 640)
    assert Request.ANCHOR in asked.values()
    assert alarms(asked) == []  # by then nothing moved


def test_without_an_anchor_there_is_no_alarm() -> None:
    """Motions that began when the loss had risen already have nothing to go back to."""
    guard = Guard()
    for step, loss in enumerate(np.linspace(1, 9, 2000), start=1):
        assert guard.watch(float(loss), step, exact=False, moving=step > 1000) is Request.NOTHING


# ---------------------------------------------------------------- anchors


def test_anchors_are_taken_at_its_best_and_ever_more_rarely() -> None:
    losses = 3 / np.sqrt(1 + np.arange(20_000) / 50) + 0.05 * np.random.default_rng(0).normal(size=20_000)
    guard, asked = watched(losses)
    steps = list(asked)
    assert set(asked.values()) == {Request.ANCHOR}
    assert steps[0] == BLOCK_STEPS
    gaps = [(b - a) / max(ANCHOR_STEPS, ANCHOR_SHARE * b) for a, b in pairwise(steps)]
    assert min(gaps) >= 1
    assert 30 < len(steps) < 120
    assert guard.anchor_step == steps[-1]


def test_no_anchor_while_the_loss_stands_above_its_best() -> None:
    level = np.concatenate([np.full(320, 1.0), np.full(96, 1.6)])
    asked = watched(level + 0.02 * np.random.default_rng(0).normal(size=level.size))[1]
    assert max(step for step, request in asked.items() if request is Request.ANCHOR) <= 320


# ---------------------------------------------------------------- comparison


def alarmed() -> Guard:
    """A guard that has raised its alarm."""
    level = np.concatenate([np.full(640, 1.0), np.full(640, 2.0)])
    losses = level + 0.05 * np.random.default_rng(0).normal(size=level.size)
    guard = Guard()
    for step, loss in enumerate(losses, start=1):
        if guard.watch(float(loss), step, exact=False, moving=True) is Request.COMPARE:
            return guard
    raise AssertionError("no alarm")


NOISES = np.random.default_rng(3).normal(size=MAX_PAIRS)
PAIRS: dict[str, tuple[list[tuple[float, float]], Request]] = {
    "worse": ([(2 + e, 1 + 1.1 * e) for e in NOISES], Request.RESTORE),
    "better": ([(1 + e, 2 + 1.1 * e) for e in NOISES], Request.WITHDRAW),
    "no difference": ([(1 + e, 1 - e) for e in NOISES], Request.WITHDRAW),
    "equal": ([(1.0, 1.0)] * MAX_PAIRS, Request.WITHDRAW),
    "present not finite": ([(math.nan, 1.0)], Request.RESTORE),
    "present infinite": ([(math.inf, 1.0)], Request.RESTORE),
    "anchor not finite": ([(1.0, math.nan)], Request.WITHDRAW),
    "anchor infinite": ([(1.0, math.inf)], Request.WITHDRAW),
    "neither finite": ([(math.nan, math.nan)], Request.WITHDRAW),
    "both infinite": ([(math.inf, math.inf)], Request.WITHDRAW),
}


@pytest.mark.parametrize("name", PAIRS)
def test_verdicts(name: str) -> None:
    pairs, verdict = PAIRS[name]
    guard, answers = alarmed(), []
    assert guard.comparing
    for present, anchor in pairs:
        answers.append(guard.compare(present, anchor))
        if answers[-1] is not Request.NOTHING:
            break
    assert answers[-1] is verdict
    assert set(answers[:-1]) <= {Request.NOTHING}
    assert (guard.withdrawn, guard.comparing) == (True, False)
    assert (guard.num_alarms, guard.num_restored) == (1, int(verdict is Request.RESTORE))
    if name in ("no difference", "equal"):
        assert len(answers) == MAX_PAIRS
    if name in ("worse", "better"):
        assert 2 < len(answers) < MAX_PAIRS


def raised_exactly(guard: Guard, first: int) -> None:
    """Exact losses at 1, then a hundred times that, until the alarm."""
    for step in range(first, first + 640):
        guard.watch(1.0, step, exact=True, moving=True)
    for step in range(first + 640, first + 1280):
        if guard.watch(100.0, step, exact=True, moving=True) is Request.COMPARE:
            return
    raise AssertionError("no alarm")


def accused(guard: Guard) -> Request:
    """The verdict on weights that are clearly worse, on losses that go on changing."""
    for number in range(MAX_PAIRS):
        answer = guard.compare(100.0 + number, 1.0)
        if answer is not Request.NOTHING:
            return answer
    raise AssertionError("no verdict")


def test_exact_losses_get_a_second_try_and_no_third() -> None:
    """No jump can have done the harm where losses are exact: smaller steps first, the end after that."""
    guard = Guard()
    raised_exactly(guard, 1)
    assert accused(guard) is Request.RETRY
    assert (guard.withdrawn, guard.comparing, guard.num_retries, guard.num_restored) == (False, False, 1, 1)
    assert guard.watch(100.0, 2000, exact=True, moving=True) is Request.NOTHING  # what was before is forgotten
    raised_exactly(guard, 2001)
    assert accused(guard) is Request.RESTORE
    assert (guard.withdrawn, guard.num_alarms, guard.num_retries, guard.num_restored) == (True, 2, 1, 2)


def test_nothing_is_asked_after_the_end_or_while_comparing() -> None:
    guard = alarmed()
    assert {guard.watch(9.0, i, exact=False, moving=True) for i in range(200)} == {Request.NOTHING}
    guard.withdraw()
    assert {guard.watch(9.0, i, exact=False, moving=True) for i in range(200)} == {Request.NOTHING}


def test_a_void_anchor_ends_the_comparison_and_the_next_one_is_taken_at_a_best() -> None:
    guard = alarmed()
    guard.forget_anchor()
    assert (guard.comparing, guard.withdrawn, guard.anchor_step) == (False, False, -1)
    assert {guard.watch(2.0, 2000 + i, exact=False, moving=True) for i in range(200)} == {Request.NOTHING}
    asked = [guard.watch(0.5, 3000 + i, exact=False, moving=True) for i in range(200)]
    assert Request.ANCHOR in asked


# ---------------------------------------------------------------- a dead run


def test_a_dead_run_is_rescued_once_and_only_with_an_anchor() -> None:
    assert not Guard().rescue()
    guard, _ = watched([1.0] * 100)
    assert guard.rescue()
    assert (guard.withdrawn, guard.num_alarms, guard.num_restored) == (True, 1, 1)
    assert not guard.rescue()
    assert guard.num_restored == 1


def test_a_dead_run_is_rescued_in_the_middle_of_a_comparison() -> None:
    guard = alarmed()
    guard.compare(1.0, 1.0)
    assert guard.rescue()
    assert not guard.comparing


# ---------------------------------------------------------------- state


def test_the_state_goes_through_at_every_point() -> None:
    """A copy that is made anew from the state at every step says the same as the original."""
    level = np.concatenate([np.full(500, 1.0), np.full(700, 1.4)])
    losses = level + 0.05 * np.random.default_rng(0).normal(size=level.size)
    original, copy = Guard(), Guard()
    seen = set()
    for step, loss in enumerate(losses, start=1):
        renewed = Guard()
        renewed.load_state_dict(copy.state_dict())
        copy = renewed
        if original.comparing:
            pair = (float(loss), float(loss) - 0.01 * (step % 3))
            answers = [g.compare(*pair) for g in (original, copy)]
        else:
            answers = [g.watch(float(loss), step, exact=False, moving=True) for g in (original, copy)]
        assert answers[0] is answers[1], step
        assert copy.state_dict() == original.state_dict()
        seen.add(answers[0])
    assert {Request.ANCHOR, Request.COMPARE, Request.NOTHING} < seen
    assert original.withdrawn


def test_the_state_is_a_copy() -> None:
    guard, _ = watched([1.0, 2.0, 3.0])
    state = guard.state_dict()
    guard.watch(4.0, 4, exact=False, moving=True)
    assert state["losses"] == [1.0, 2.0, 3.0]
