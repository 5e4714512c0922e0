"""The divergence monitor on runs that are known to be healthy: how often it cries wolf, with bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hybrid_predict_trainer.experiments.bench import false_alarms as healthy
from hybrid_predict_trainer.experiments.bench.false_alarms import (
    NOISES,
    Recording,
    alarms,
    false_positive_table,
    rates,
    synthetic,
)
from hybrid_predict_trainer.observe import divergence
from hybrid_predict_trainer.observe.history import History, Reading
from hybrid_predict_trainer.records import Level

#: Largest share of checked steps at warning or above; where a row is not named: GENERAL.
GENERAL = 0.01
BOUNDS = {
    ("skewed, noisy", "prediction_error, single loss"): 0.02,
    # a line above what the run's jumps are worth is crossed often
    ("90% of jumps kept", "confidence, 0.85 / 0.7"): 0.05,
    ("80% of jumps kept", "confidence, 0.85 / 0.7"): 0.4,
    ("40% of jumps kept", "confidence, 0.85 / 0.7"): 1.0,
}
#: Critical alarms restore or skip: they must all but never come.
CRITICAL = 0.002


@pytest.fixture(scope="module")
def table():
    return false_positive_table(seeds=(0, 1, 2), real=False)


def test_every_signal_is_measured_on_every_run(table):
    signals = {"loss_deviation", "gradient_explosion", "gradient_vanishing", "oscillation", "prediction_error"}
    for kind in NOISES:
        for name in (kind, f"{kind}, noisy"):
            assert signals <= {row["signal"] for row in table if row["run"] == name}
    assert all(row["num_checked"] >= 1000 for row in table)
    text = healthy.as_text(table)
    assert len(text.splitlines()) == len(table) + 2


def test_warnings_on_healthy_runs_are_rare(table):
    for row in table:
        rate = row["warning"] + row["critical"]
        assert rate <= BOUNDS.get((row["run"], row["signal"]), GENERAL), row
        if row["signal"] != "prediction_error, single loss":
            assert row["critical"] <= CRITICAL, row


def test_a_smoothed_loss_is_judged_more_fairly_than_a_single_one(table):
    rate = {(row["run"], row["signal"]): row["warning"] for row in table}
    for kind in ("white", "heavy-tailed", "skewed"):
        noisy = f"{kind}, noisy"
        assert rate[noisy, "prediction_error"] <= rate[noisy, "prediction_error, single loss"] + 0.003


@pytest.mark.parametrize("run", healthy.REAL_RUNS, ids=lambda run: run[0])
def test_real_runs_raise_no_warning(run):
    recording = healthy.record(*run)
    checked = list(alarms(recording, num_warmup=min(100, run[2] // 3)))
    assert len(checked) >= 4 * 100
    assert recording.losses[-1] < 0.5 * recording.losses[0]  # it did learn
    for row in rates(recording.name, checked):
        assert row["warning"] + row["critical"] <= GENERAL, row


# ---------------------------------------------------------------- the same signals do see what is wrong


def spoiled(change, at=500, kind="white"):
    run = synthetic(kind, seed=1, num_steps=700)
    losses, norms = np.array(run.losses), np.array(run.norms)
    change(losses, norms, at)
    return Recording(name="spoiled", losses=tuple(losses.tolist()), norms=tuple(norms.tolist()))


def seen_after(run, signal, at=500, level=Level.WARNING):
    """Steps from the change to the first alarm; None if there is none within 50."""
    steps = [s - at for s, alarm in alarms(run) if alarm.signal == signal and alarm.level >= level and s >= at]
    return steps[0] if steps and steps[0] < 50 else None


def test_a_loss_that_leaps_is_seen_within_two_steps():
    def leap(losses, norms, at):
        losses[at:] *= 1.4

    assert seen_after(spoiled(leap), "loss_deviation") in (0, 1)


def test_a_loss_that_swings_is_seen():
    def swing(losses, norms, at):
        losses[at:] *= 1 + 0.5 * np.sin(2 * math.pi * np.arange(len(losses) - at) / 5.5)

    assert seen_after(spoiled(swing), "oscillation") is not None


@pytest.mark.parametrize(("factor", "level"), [(25.0, Level.WARNING), (400.0, Level.CRITICAL)])
def test_an_exploding_gradient_is_seen_at_once(factor, level):
    def explode(losses, norms, at):
        norms[at:] *= factor

    assert seen_after(spoiled(explode), "gradient_explosion", level=level) == 0


def test_a_vanishing_gradient_is_seen_after_its_ten_steps():
    def vanish(losses, norms, at):
        norms[at:] *= 1e-3

    assert seen_after(spoiled(vanish), "gradient_vanishing") == 10


def test_noise_has_unit_variance_and_its_own_shape():
    generator = np.random.default_rng(0)
    draws = {name: noise(generator, 100_000) for name, noise in NOISES.items()}
    for name, values in draws.items():
        assert values.mean() == pytest.approx(0, abs=0.02), name
        assert values.std() == pytest.approx(1, abs=0.05), name
    tail = {name: float((values > 4).mean()) for name, values in draws.items()}
    assert tail["white"] < 1e-4 < tail["heavy-tailed"] < tail["skewed"]
    lag = {name: float(np.corrcoef(values[1:], values[:-1])[0, 1]) for name, values in draws.items()}
    assert lag["autocorrelated"] == pytest.approx(0.7, abs=0.02)
    assert abs(lag["white"]) < 0.02


def test_alarms_are_those_of_the_monitor():
    """The table would be worth nothing if it measured other calls than a run makes."""
    from hybrid_predict_trainer import HybridTrainerConfig
    from hybrid_predict_trainer.observe.divergence import Monitor

    run = synthetic("skewed", seed=3, num_steps=600, noisy=True)
    history, monitor, worst = History(), Monitor(HybridTrainerConfig().divergence, healthy.SIGMA), {}
    for step, (loss, norm) in enumerate(zip(run.losses, run.norms, strict=True)):
        reading, warming_up = Reading(step, loss, norm), step < healthy.NUM_WARMUP
        worst[step] = monitor.check(reading, history, warming_up=warming_up).level
        history.push(reading, warming_up=warming_up)
    found = dict.fromkeys(range(600), Level.NORMAL)
    for step, alarm in alarms(run):
        found[step] = max(found[step], alarm.level)
    assert found == worst
    assert max(worst.values()) >= Level.CAUTION
    assert divergence.worst([]).quiet
