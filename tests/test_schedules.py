"""Schedules for users: their shapes, their ends, and how they go along with steps that a jump is credited with."""

from __future__ import annotations

import doctest
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cases import full_batch, loss_fn, setup
from hybrid_predict_trainer import ConfigError, HybridTrainer, HybridTrainerConfig, schedules, with_values
from hybrid_predict_trainer.config.presets import PRESETS

STEPS = 120


def optimizer(lr: float = 1e-4) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=lr)


def factor(scheduler: Any) -> Callable[[int], float]:
    return scheduler.lr_lambdas[0]  # type: ignore[no-any-return]


def quiet_cyclic(o: torch.optim.Optimizer, **settings: Any) -> Any:
    with pytest.warns(UserWarning, match="not recommended with prediction"):
        return schedules.cyclic(o, **settings)


MADE: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "wsd": lambda o: schedules.wsd(o, warmup_steps=10, stable_steps=60, decay_steps=50),
    "wsd-sqrt": lambda o: schedules.wsd(o, warmup_steps=0, stable_steps=80, decay_steps=40, shape="sqrt"),
    "linear": lambda o: schedules.linear(o, STEPS),
    "cosine": lambda o: schedules.cosine(o, STEPS, warmup_steps=5, final=0.1),
    "cyclic": lambda o: quiet_cyclic(o, cycle_steps=40),
}


def test_the_examples_of_the_docstring_hold() -> None:
    assert doctest.testmod(schedules).failed == 0
    assert doctest.testmod(schedules).attempted > 3


def test_warm_up_stable_decay_is_the_founding_documents_and_clamped() -> None:
    """Linear from 1e-6 to 1e-4 in 500, 10,000 at 1e-4, half a cosine to 1e-6 in 5,000; and no rise after it."""
    made = schedules.wsd(
        optimizer(), warmup_steps=500, stable_steps=10_000, decay_steps=5_000, initial=0.01, final=0.01
    )
    rates = [1e-4 * factor(made)(step) for step in (0, 250, 500, 10_499, 10_500, 11_500, 15_500, 18_000, 10**7)]
    fifth = 1e-6 + 0.99e-4 * (1 + math.cos(math.pi / 5)) / 2
    assert rates == pytest.approx([1e-6, 50.5e-6, 1e-4, 1e-4, 1e-4, fifth, 1e-6, 1e-6, 1e-6])


@pytest.mark.parametrize("name", ["wsd", "wsd-sqrt", "linear", "cosine"])
def test_rates_rise_to_the_peak_fall_to_the_end_and_stay_there(name: str) -> None:
    made = factor(MADE[name](optimizer()))
    course = [made(step) for step in range(2 * STEPS)]
    top = course.index(max(course))
    assert max(course) == 1.0
    assert course[:top] == sorted(course[:top])
    assert course[top:] == sorted(course[top:], reverse=True)
    assert set(course[STEPS:]) == {0.1 if name == "cosine" else 0.0}
    assert min(course[: STEPS - 1]) > 0  # every step of the run moves


@pytest.mark.parametrize(
    ("mode", "second"), [("triangular", 1.0), ("triangular2", 0.55), ("exp_range", 0.1 + 0.9 * 0.5)]
)
def test_cyclic_goes_up_and_down(mode: Any, second: float) -> None:
    made = factor(quiet_cyclic(optimizer(), cycle_steps=10, mode=mode, gamma=0.5 ** (1 / 15)))
    assert made(0) == made(10) == made(20) == pytest.approx(0.1)
    assert made(15) == pytest.approx(second)
    first = 0.1 + 0.9 * 0.5 ** (5 / 15) if mode == "exp_range" else 1.0
    assert made(5) == pytest.approx(first)


@pytest.mark.parametrize("name", MADE)
def test_they_are_resumed_by_position_and_may_be_longer_then(name: str) -> None:
    one, other = MADE[name](optimizer()), MADE[name](optimizer())
    for _ in range(50):
        one.optimizer.step()
        one.step()
    other.load_state_dict(one.state_dict())
    other.optimizer.load_state_dict(one.optimizer.state_dict())
    assert other.last_epoch == 50
    for _ in range(40):
        for made in (one, other):
            made.optimizer.step()
            made.step()
        assert one.get_last_lr() == other.get_last_lr()


@pytest.mark.parametrize("clock", ["cost", "credited", "claimed"])
@pytest.mark.parametrize("name", MADE)
def test_a_jump_advances_the_schedule_by_the_runs_clock(name: str, clock: str) -> None:
    """Real steps and the credit of jumps together: the schedule stands where the clock does and ends where it does."""
    built = setup("mlp", "adam", "constant")
    scheduler = MADE[name](built.optimizer)
    config = with_values(
        HybridTrainerConfig(), {**PRESETS["full_batch"], "training.warmup_steps": 10, "training.clock": clock}
    )
    trainer = HybridTrainer(built.model, built.optimizer, config, loss_fn=loss_fn, lr_scheduler=scheduler)
    peaks, course = [group["initial_lr"] for group in built.optimizer.param_groups], factor(scheduler)

    before = [0]

    def agree(result: Any) -> None:
        """What a step costs beside itself is on the clock after it, and in the schedule at the next one."""
        assert before[-1] <= scheduler.last_epoch <= trainer.run.position
        assert scheduler.get_last_lr() == pytest.approx([peak * course(scheduler.last_epoch) for peak in peaks])
        before.append(trainer.run.position)

    trainer.fit(full_batch(2 * STEPS), total_steps=STEPS, progress_callback=agree)
    counts = trainer.statistics()
    assert counts["num_jumps_accepted"] > 0
    assert trainer.run.position >= STEPS
    assert scheduler.last_epoch > counts["num_real_steps"]  # jumps take the place of steps that nobody made


@pytest.mark.parametrize(
    ("name", "total", "learns"),
    [("wsd", STEPS, True), ("linear", STEPS, True), ("cosine", STEPS, True), ("cyclic", 121, True),
     ("cyclic", 100, False), ("wsd", 60, False)],
)  # fmt: skip
def test_rates_are_raised_only_where_the_run_ends_low(name: str, total: int, learns: bool) -> None:
    """A cycle that ends at its top, or a run that ends before the decay, has nothing that settles the noise."""
    built = setup("mlp", "adam", "constant")
    trainer = HybridTrainer(
        built.model, built.optimizer, HybridTrainerConfig(), loss_fn=loss_fn, lr_scheduler=MADE[name](built.optimizer)
    )
    trainer.run.schedule.plan(total)
    assert trainer.run.schedule.anneals is learns


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda o: schedules.wsd(o, warmup_steps=-1, stable_steps=1, decay_steps=1), "warmup_steps = -1"),
        (lambda o: schedules.wsd(o, warmup_steps=1, stable_steps=1, decay_steps=1.5), "decay_steps = 1.5 is not"),
        (lambda o: schedules.wsd(o, warmup_steps=1, stable_steps=1, decay_steps=1, final=2), r"final = 2 .* \[0, 1\]"),
        (lambda o: schedules.wsd(o, warmup_steps=1, stable_steps=1, decay_steps=1, shape="step"), "cosine, linear"),
        (lambda o: schedules.linear(o, 0), "total_steps = 0"),
        (lambda o: schedules.cosine(o, 5, warmup_steps=6), "at most total_steps = 5"),
        (lambda o: schedules.cyclic(o, cycle_steps=1), "cycle_steps = 1"),
        (lambda o: schedules.cyclic(o, mode="saw"), "triangular2"),
    ],
)  # fmt: skip
def test_bad_lengths_and_names_are_one_clear_line(make: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make(optimizer())
    assert "\n" not in str(caught.value)
