"""History against the naive numpy versions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_predict_trainer.numerics.running import Baseline, RunningMoments, slope
from hybrid_predict_trainer.observe.history import LOSS_CAPACITY, NORM_CAPACITY, History, Reading, Readout
from reference import ema_moments, trimmed_mean

NUMBERS = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60)


@given(NUMBERS, st.sampled_from([0.5, 0.9, 0.95]))
@settings(max_examples=60, deadline=None)
def test_running_moments(values: list[float], decay: float) -> None:
    moments = RunningMoments(decay=decay)
    for value in values:
        moments.push(value)
    mean, std = ema_moments(values, decay)
    scale = max(map(abs, values)) + 1e-9
    assert moments.mean == pytest.approx(mean, abs=1e-9 * scale)
    assert moments.std == pytest.approx(std, abs=2e-6 * scale)


def test_moments_of_nothing_and_of_a_constant() -> None:
    moments = RunningMoments(decay=0.9)
    assert math.isnan(moments.mean)
    assert math.isnan(moments.std)
    for _ in range(5):
        moments.push(3.0)
        assert (moments.mean, moments.std) == (pytest.approx(3.0), pytest.approx(0.0, abs=1e-6))


@given(NUMBERS)
@settings(max_examples=60, deadline=None)
def test_baseline(values: list[float]) -> None:
    baseline = Baseline()
    for value in values:
        baseline.push(value)
    assert baseline.mean == pytest.approx(np.mean(values), abs=1e-8)
    assert baseline.std == pytest.approx(np.std(values, ddof=1) if len(values) > 1 else 0.0, rel=1e-6, abs=1e-6)
    assert (baseline.low, baseline.high, baseline.count) == (min(values), max(values), len(values))


def coordinates(points: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([x for x, _ in points], dtype=float), np.array([y for _, y in points], dtype=float)


@given(st.lists(st.tuples(st.floats(-100, 100), st.floats(-100, 100)), min_size=2, max_size=30))
@settings(max_examples=60, deadline=None)
def test_slope_is_least_squares(points: list[tuple[float, float]]) -> None:
    x, y = np.array(points).T
    if np.ptp(x) < 1e-3:
        return
    assert slope(*coordinates(points)) == pytest.approx(np.polyfit(x, y, 1)[0], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("points", [[], [(1, 2)], [(1, 2), (1, 3)], [(1, math.nan), (2, math.nan)]])
def test_no_slope(points: list[tuple[float, float]]) -> None:
    assert slope(*coordinates(points)) == 0.0


# ---------------------------------------------------------------- buffers


def test_buffers_are_bounded_and_ordered() -> None:
    history = History()
    losses = [float(i) for i in range(1000)]
    for i, loss in enumerate(losses):
        history.push(Reading(i, loss, loss / 2), warming_up=i < 100)
    assert list(history.losses) == losses[-LOSS_CAPACITY:]
    assert list(history.norms) == [v / 2 for v in losses[-NORM_CAPACITY:]]
    assert history.loss_baseline.count == history.norm_baseline.count == 100
    assert history.norm_baseline.mean == pytest.approx(np.mean(losses[:100]) / 2)


def test_missing_norms() -> None:
    history = History()
    history.push(Reading(0, 1.0, None), warming_up=True)
    assert (list(history.losses), list(history.norms), history.norm_baseline.count) == ([1.0], [], 0)


@pytest.mark.parametrize(("losses", "stable"), [([], False), ([1.0], False), ([3.0, 2.0], True), ([1.0, 1.0], True)])
def test_loss_ema_stable(losses: list[float], stable: bool) -> None:
    history = History()
    for i, loss in enumerate(losses):
        history.push(Reading(i, loss, 1.0), warming_up=True)
    assert history.loss_ema_stable is stable


def test_exploding_loss_is_not_stable() -> None:
    history = History()
    for i in range(50):
        history.push(Reading(i, 1.0 if i < 5 else 2.0**i, 1.0), warming_up=i < 5)
    assert not history.loss_ema_stable


# ---------------------------------------------------------------- windows and their slope


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=40), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_window_mean_is_trimmed(losses: list[float], window: int) -> None:
    history = History()
    for i, loss in enumerate(losses):
        history.push(Reading(i, loss, 1.0), warming_up=False)
    assert history.close_window(len(losses), window) == pytest.approx(trimmed_mean(losses[-window:]))


def test_a_spike_does_not_hide_progress() -> None:
    history = History()
    for i, loss in enumerate([1.0] * 9 + [1e6]):
        history.push(Reading(i, loss, 1.0), warming_up=False)
    assert history.close_window(10, 10) == 1.0


def run_windows(curve: list[float], steps: int = 10) -> History:
    history = History()
    for i, loss in enumerate(curve):
        for _ in range(steps):
            history.push(Reading(i, loss, 1.0), warming_up=False)
        history.close_window(steps * (i + 1), steps)
    return history


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.05])
def test_slope_of_an_exponential_fall(rate: float) -> None:
    curve = [5 * math.exp(-rate * 10 * i) for i in range(30)]
    recent = math.exp(np.mean(np.log(curve[-4:])))
    assert run_windows(curve).loss_slope() == pytest.approx(-rate * recent, rel=1e-6)


def test_slope_of_a_line_through_zero() -> None:
    assert run_windows([1.0 - 0.2 * i for i in range(20)]).loss_slope() == pytest.approx(-0.02)


@pytest.mark.parametrize("curve", [[], [1.0], [1.0, 0.5], [2.0] * 10])
def test_no_slope_yet_or_none_at_all(curve: list[float]) -> None:
    assert run_windows(curve).loss_slope() == pytest.approx(0.0, abs=1e-12)


def test_slope_after_a_resume() -> None:
    """Logarithms are kept beside the losses, and are no part of a checkpoint."""
    history, again = History(), History()
    for step, loss in enumerate([3.0, 2.0, 0.0, 1.5, 1.0, 0.7, 0.6, 0.5], start=1):
        history.push(Reading(step, loss, None), warming_up=False)
        history.close_window(step, 1)
    assert history.loss_slope() < 0
    again.load_state_dict(history.state_dict())
    assert again.loss_slope() == history.loss_slope()
    for other in (history, again):
        other.push(Reading(9, 0.4, None), warming_up=False)
        other.close_window(9, 1)
    assert again.loss_slope() == history.loss_slope()


def test_steep_beginning_is_forgotten() -> None:
    flat = [1.0] * 30
    assert abs(run_windows([100 / (i + 1) for i in range(25)] + flat).loss_slope()) < 1e-3


# ---------------------------------------------------------------- reading from the device


def test_cpu_readings_come_at_once() -> None:
    readout = Readout(interval=10)
    readout.push(1, torch.tensor(2.0, dtype=torch.float64), torch.tensor(3.0))
    assert readout.due
    assert readout.read() == [Reading(1, 2.0, 3.0)]
    assert readout.read() == []
    assert readout.read(force=True) == []


def test_late_readings_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Readout, "due", property(lambda self: len(self._pending) >= self.interval))
    readout = Readout(interval=3)
    for step in range(3):
        assert readout.read() == []
        readout.push(step, torch.tensor(1.5 + step), None if step == 1 else torch.tensor(0.5))
    assert readout.read() == [Reading(0, 1.5, 0.5), Reading(1, 2.5, None), Reading(2, 3.5, 0.5)]
    readout.push(3, torch.tensor(math.nan), None)
    [forced] = readout.read(force=True)
    assert not forced.finite


@pytest.mark.parametrize(
    ("loss", "norm", "finite"),
    [(1.0, 1.0, True), (1.0, None, True), (math.nan, 1.0, False), (1.0, math.inf, False), (-math.inf, None, False)],
)
def test_finite(loss: float, norm: float | None, finite: bool) -> None:
    assert Reading(0, loss, norm).finite is finite
