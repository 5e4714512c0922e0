"""Divergence signals: a table of known cases, and silence on healthy noisy runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from cases import Fake, config, full_batch, loss_fn, make_batches, setup
from hybrid_predict_trainer import DivergenceConfig, HybridTrainerConfig
from hybrid_predict_trainer.observe import divergence as d
from hybrid_predict_trainer.observe.history import History, Reading
from hybrid_predict_trainer.records import Action, Alarm, Level, Phase

N, CAUTION, WARNING, CRITICAL = Level.NORMAL, Level.CAUTION, Level.WARNING, Level.CRITICAL
nan, inf = math.nan, math.inf

CASES: dict[str, tuple[Callable[..., Alarm], tuple, Level, Action]] = {
    "loss usual": (d.loss_deviation, (1.1, 1.0, 0.1, 3.0), N, Action.CONTINUE),
    "loss below": (d.loss_deviation, (-9.0, 1.0, 0.1, 3.0), N, Action.CONTINUE),
    "loss 2 sigma": (d.loss_deviation, (1.21, 1.0, 0.1, 3.0), CAUTION, Action.CONTINUE),
    "loss 3 sigma": (d.loss_deviation, (1.31, 1.0, 0.1, 3.0), WARNING, Action.FORCE_FULL),
    "loss 3 sigma, once": (d.loss_deviation, (1.5, 1.0, 0.1, 3.0, 1.1), CAUTION, Action.CONTINUE),
    "loss 2 sigma, twice": (d.loss_deviation, (1.21, 1.0, 0.1, 3.0, 1.3), WARNING, Action.FORCE_FULL),
    "loss usual after 3 sigma": (d.loss_deviation, (1.1, 1.0, 0.1, 3.0, 1.4), N, Action.CONTINUE),
    "loss 6 sigma, once": (d.loss_deviation, (1.61, 1.0, 0.1, 3.0, 0.9), WARNING, Action.FORCE_FULL),
    "loss nan": (d.loss_deviation, (nan, 1.0, 0.1, 3.0), CRITICAL, Action.SKIP_STEP),
    "loss inf": (d.loss_deviation, (inf, 1.0, 0.1, 3.0), CRITICAL, Action.SKIP_STEP),
    "loss -inf": (d.loss_deviation, (-inf, 1.0, 0.1, 3.0), CRITICAL, Action.SKIP_STEP),
    "loss nothing known": (d.loss_deviation, (5.0, nan, nan, 3.0), N, Action.CONTINUE),
    "loss constant": (d.loss_deviation, (1.0 + 1e-9, 1.0, 0.0, 3.0), N, Action.CONTINUE),
    "gradient usual": (d.gradient_explosion, (2.9, 1.0, 10.0, 100.0), N, Action.CONTINUE),
    "gradient 3x": (d.gradient_explosion, (3.1, 1.0, 10.0, 100.0), CAUTION, Action.CONTINUE),
    "gradient 10x": (d.gradient_explosion, (10.1, 1.0, 10.0, 100.0), WARNING, Action.FORCE_FULL),
    "gradient 100x": (d.gradient_explosion, (101.0, 1.0, 10.0, 100.0), CRITICAL, Action.ROLLBACK),
    "gradient nan": (d.gradient_explosion, (nan, 1.0, 10.0, 100.0), CRITICAL, Action.SKIP_STEP),
    "gradient inf": (d.gradient_explosion, (inf, 0.0, 10.0, 100.0), CRITICAL, Action.SKIP_STEP),
    "gradient no baseline": (d.gradient_explosion, (1e9, 0.0, 10.0, 100.0), N, Action.CONTINUE),
    "vanished": (d.gradient_vanishing, ([0.009] * 10, 1.0, 0.01, 1.0, 1.0), WARNING, Action.FORCE_FULL),
    "vanished but once": (d.gradient_vanishing, ([0.009] * 9 + [0.02], 1.0, 0.01, 1.0, 1.0), N, Action.CONTINUE),
    "vanished for nine": (d.gradient_vanishing, ([0.009] * 9, 1.0, 0.01, 1.0, 1.0), N, Action.CONTINUE),
    "vanished at the minimum": (d.gradient_vanishing, ([0.001] * 10, 1.0, 0.01, 0.01, 1.0), N, Action.CONTINUE),
    "vanished, no baseline": (d.gradient_vanishing, ([0.0] * 10, 0.0, 0.01, 1.0, 1.0), N, Action.CONTINUE),
    "prediction right": (d.prediction_error, (1.0, 1.0, 0.1, 0.2, 1.0), N, Action.CONTINUE),
    "prediction 11 %": (d.prediction_error, (1.11, 1.0, 0.1, 0.2, 1.0), CAUTION, Action.CONTINUE),
    "prediction 21 %": (d.prediction_error, (1.21, 1.0, 0.1, 0.2, 1.0), WARNING, Action.CORRECT),
    "prediction twice": (d.prediction_error, (2.01, 1.0, 0.1, 0.2, 1.0), CRITICAL, Action.ROLLBACK),
    "prediction 30 %, noise 5 %": (d.prediction_error, (1.3, 1.0, 0.1, 0.2, 1.0, 0.05), CAUTION, Action.CONTINUE),
    "prediction 36 %, noise 5 %": (d.prediction_error, (1.36, 1.0, 0.1, 0.2, 1.0, 0.05), WARNING, Action.CORRECT),
    "prediction, noise unknown": (d.prediction_error, (1.21, 1.0, 0.1, 0.2, 1.0, nan), WARNING, Action.CORRECT),
    "prediction too dark": (d.prediction_error, (0.5, 1.0, 0.1, 0.2, 1.0), CAUTION, Action.CONTINUE),
    "prediction of nothing": (d.prediction_error, (0.0, 0.0, 0.1, 0.2, 1.0), N, Action.CONTINUE),
    "prediction unknown": (d.prediction_error, (1.0, nan, 0.1, 0.2, 1.0), N, Action.CONTINUE),
    "confident": (d.low_confidence, (0.9, 0.85, 0.7), N, Action.CONTINUE),
    "less confident": (d.low_confidence, (0.8, 0.85, 0.7), CAUTION, Action.CONTINUE),
    "not confident": (d.low_confidence, (0.6, 0.85, 0.7), WARNING, Action.FORCE_FULL),
}


@pytest.mark.parametrize("name", CASES)
def test_signals(name: str) -> None:
    function, arguments, level, action = CASES[name]
    alarm = function(*arguments)
    assert (alarm.level, alarm.action) == (level, action)
    assert alarm.quiet is (level is N)
    if level > N:
        assert alarm.signal


def test_perfect_prediction_is_not_an_alarm() -> None:
    """The loss and its prediction are compared, not the error and the loss."""
    for loss in (1e-12, 0.5, 3.0, 1e6, -2.0):
        assert d.prediction_error(loss, loss, 0.1, 0.2, 1.0).quiet


def test_worst_wins_and_first_among_equals() -> None:
    a, b, c = Alarm(level=CAUTION, signal="a"), Alarm(level=WARNING, signal="b"), Alarm(level=WARNING, signal="c")
    assert d.worst([a, b, c]).signal == "b"
    assert d.worst([]).quiet


# ---------------------------------------------------------------- oscillation


def test_sign_changes_known_answers() -> None:
    line = [5.0 - 0.1 * i for i in range(14)]
    assert d.sign_changes(line)[1] == pytest.approx(0.0, abs=1e-12)
    wave = [math.sin(2 * math.pi * i / 5 * 0.9) for i in range(14)]
    smoothed = np.convolve(wave, np.full(5, 0.2), mode="valid")
    residual = smoothed - np.polyval(np.polyfit(np.arange(10), smoothed, 1), np.arange(10))
    changes = int((np.sign(residual[1:]) != np.sign(residual[:-1])).sum())
    assert d.sign_changes(wave) == (changes, pytest.approx(float(np.sqrt(np.mean(residual**2)))))
    assert d.sign_changes(wave[:13]) == (0, 0.0)


def decaying(generator: np.random.Generator, steps: int, noise: float) -> np.ndarray:
    return 3 * np.exp(-np.arange(steps) / (steps / 3)) + 1 + noise * generator.normal(size=steps)


def test_a_growing_swing_is_seen() -> None:
    """Calm for long, then a swing of period 4 as of a learning rate that has become too large."""
    calm = decaying(np.random.default_rng(0), 200, 0.01)
    swing = [float(calm[-1] + 0.5 * (1.3**i) * math.sin(math.pi * i / 1.5)) for i in range(20)]
    alarms = [d.oscillation([*calm, *swing[: i + 1]], 3) for i in range(20)]
    assert any(a.level is WARNING and a.action is Action.CORRECT for a in alarms)


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1, 0.5])
def test_white_noise_does_not_oscillate(noise: float) -> None:
    generator = np.random.default_rng(1)
    losses = list(decaying(generator, 1000, noise))
    alarms = sum(not d.oscillation(losses[max(0, i - 256) : i], 3).quiet for i in range(20, 1000))
    assert alarms / 980 < 0.01


# ---------------------------------------------------------------- the monitor


def watch(losses: np.ndarray, norms: np.ndarray, warmup: int = 100, sigma: float = 3.0) -> list[Alarm]:
    monitor, history, alarms = d.Monitor(DivergenceConfig(), sigma), History(), []
    for i, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        reading = Reading(i, float(loss), float(norm))
        alarm = monitor.check(reading, history, warming_up=i < warmup)
        if alarm.level < CRITICAL and reading.finite:
            history.push(reading, warming_up=i < warmup)
        alarms.append(alarm)
    return alarms


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_healthy_noisy_runs_are_quiet(noise: float, seed: int) -> None:
    """White noise around a decaying curve: fewer than 1 % of steps warn, none is critical."""
    generator = np.random.default_rng(seed)
    losses, norms = decaying(generator, 2000, noise), np.exp(0.3 * generator.normal(size=2000))
    alarms = watch(losses, norms)[100:]
    assert max((a.level for a in alarms), default=N) < CRITICAL
    assert sum(a.level >= WARNING for a in alarms) / len(alarms) < 0.01


def test_warm_up_is_silent_but_for_what_is_not_finite() -> None:
    losses = np.array([1.0, 50.0, 1.0, nan, 1.0])
    levels = [a.level for a in watch(losses, np.ones(5))]
    assert levels == [N, N, N, CRITICAL, N]


def test_judged_against_the_steps_before() -> None:
    """A spike must not raise the mean that it is compared with."""
    losses = np.concatenate([1 + 0.01 * np.random.default_rng(0).normal(size=200), [1.2]])
    assert watch(losses, np.ones(201))[-1].level is WARNING


def test_giving_up() -> None:
    config_ = DivergenceConfig(max_consecutive_nonfinite=3)
    monitor, history = d.Monitor(config_, 3.0), History()
    actions = [monitor.check(Reading(i, nan, 1.0), history, warming_up=False).action for i in range(4)]
    assert actions == [Action.SKIP_STEP] * 3 + [Action.ABORT]
    monitor = d.Monitor(config_, 3.0)
    for i in range(20):
        loss = nan if i % 4 else 1.0  # three bad ones, then a good one
        assert monitor.check(Reading(i, loss, 1.0), history, warming_up=False).action is not Action.ABORT


# ---------------------------------------------------------------- in a run


def test_explosion_is_skipped_and_forces_full_steps() -> None:
    made = setup("mlp", "sgd")
    trainer = made.trainer(config(), predictor=Fake(1.0))
    batches = make_batches(40)
    for batch in batches[:8]:
        trainer.step(batch)
    before = made.everything()["parameters"]
    x, y = batches[8]
    result = trainer.step((x, y + 1e4))
    while result.phase is Phase.PREDICT:
        result = trainer.step((x, y + 1e4))
    assert result.skipped
    assert (result.alarm.level, result.alarm.signal) in {(CRITICAL, "gradient_explosion"), (CRITICAL, "loss_deviation")}
    assert all((made.everything()["parameters"][n] == p).all() for n, p in before.items())
    after = [trainer.step(b).phase for b in batches[9:12]]
    assert after == [Phase.FULL] * 3


def end_of(optimizer: str, factor: float, *, enabled: bool) -> tuple[float, int]:
    """Mean loss at the end of a run whose loss is scaled from its sixtieth step on, and steps that were skipped."""
    made, batches, number, skipped = setup("mlp", optimizer), make_batches(160), 0, 0

    def scaled(model: nn.Module, batch: Any) -> Tensor:
        return (factor if number >= 60 else 1.0) * loss_fn(model, batch)

    trainer = made.trainer(HybridTrainerConfig(enabled=enabled, warmup_steps=30), loss_fn=scaled)
    for batch in batches:
        skipped += trainer.step(batch).skipped
        number += 1
    return sum(loss_fn(made.model, b).item() for b in batches) / len(batches), skipped


@pytest.mark.parametrize("factor", [1.0, 60.0, 150.0, 200.0, 1e3, 1e6])
@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_a_loss_that_is_scaled_anew_trains_on_as_it_would_alone(optimizer: str, factor: float) -> None:
    """A sum in the place of a mean, another weight of a loss: gradients are larger for good, and Adam does not mind."""
    plain, _ = end_of(optimizer, factor, enabled=False)
    ours, skipped = end_of(optimizer, factor, enabled=True)
    assert skipped <= d.LASTING + 2
    assert ours < 1.05 * plain


def test_two_outliers_in_a_row_are_skipped_and_nothing_is_usual_of_them() -> None:
    trainer = setup("mlp", "sgd").trainer(config(), predictor=Fake(0.0))
    for batch in make_batches(8):
        trainer.step(batch)
    usual = trainer.run.losses.history.norm_baseline.mean
    for x, y in make_batches(2):
        assert trainer.step((x, y + 1e4)).skipped
    assert not trainer.step(make_batches(1)[0]).skipped
    assert trainer.run.losses.history.norm_baseline.mean == usual
    assert not trainer.run.monitor.lasts


def test_quiet_run_has_no_events() -> None:
    trainer = setup("mlp", "adam").trainer(config(), predictor=Fake())
    for batch in full_batch(80):
        trainer.step(batch)
    assert trainer.summary()["divergence_events"] == []
    assert trainer.statistics()["num_divergence_events"] == 0


@pytest.mark.parametrize(("exact", "norm", "level"), [
    (False, 1e3, Level.CRITICAL), (True, 1e3, Level.WARNING), (True, math.inf, Level.CRITICAL),
])  # fmt: skip
def test_where_every_batch_is_the_same_no_finite_step_is_skipped(exact: bool, norm: float, level: Level) -> None:
    """Skipped for its gradient once, it would be skipped for ever."""
    monitor, history = d.Monitor(DivergenceConfig(), 3.0), History()
    for i in range(20):
        history.push(Reading(i, 1.0, 1.0), warming_up=True)
    assert monitor.check(Reading(20, 1.0, norm), history, warming_up=False, exact=exact).level is level
