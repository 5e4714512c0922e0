"""How often the divergence monitor cries wolf: every signal on runs that are known to be healthy.

Synthetic runs are a decaying curve under noise of four kinds; real ones are short runs of the
embedded tasks at their own recipe.  Nothing diverges in any of them, so every alarm is a false one.
A rate is alarms per checked step; warm-up is not checked, as in a run.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...config.settings import DivergenceConfig
from ...observe import divergence
from ...observe.history import History, Reading
from ...propose.confidence import TrackRecord
from ...records import Alarm, Level
from ...tasks import TaskSettings, build_optimizer, build_scheduler, make_task, with_steps
from ...weights import algebra as weights
from ..report.text import aligned

Array = NDArray[np.float64]

#: Steps of warm-up and of probation, and the sigma of the loss deviation: the defaults of a run.
NUM_WARMUP = 100
NUM_PROBATION = 5
SIGMA = 3.0
#: Losses whose spread says what a single one is worth.
NUM_BEFORE = 40

#: Entry and exit of the confidence signal: the specification's, and the same ratio below a default run's entry.
CONFIDENCE_LINES = ((0.85, 0.70), (0.15, 0.15 * 0.70 / 0.85))

#: Real runs: (task, preset, steps), each below half a minute on one core.
REAL_RUNS = (("gpt", "0.3M", 150), ("digits", None, 300), ("regression", None, 500))


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """Losses and gradient norms of one healthy run."""

    name: str
    losses: tuple[float, ...]
    norms: tuple[float, ...]
    expected: tuple[float, ...] | None = None  # the curve without noise, where it is known


# ---- runs ---------------------------------------------------------------------------------------


def white(generator: np.random.Generator, n: int) -> Array:
    """Independent normal noise (n,) of unit variance."""
    return generator.standard_normal(n)


def heavy_tailed(generator: np.random.Generator, n: int) -> Array:
    """Student's t with 4 degrees of freedom, scaled to unit variance."""
    return generator.standard_t(4, n) / math.sqrt(2.0)


def skewed(generator: np.random.Generator, n: int) -> Array:
    """Centred log-normal (shape 0.6), scaled to unit variance: losses have their long tail above."""
    shape = 0.6
    mean = math.exp(shape**2 / 2)
    draws = generator.lognormal(0.0, shape, n)
    return np.asarray((draws - mean) / (mean * math.sqrt(math.expm1(shape**2))))


def autocorrelated(generator: np.random.Generator, n: int) -> Array:
    """First-order autoregression (n,) with coefficient 0.7 and unit variance."""
    shocks = math.sqrt(1 - 0.7**2) * generator.standard_normal(n)
    values, last = np.empty(n), float(generator.standard_normal())
    for i in range(n):
        last = 0.7 * last + shocks[i]
        values[i] = last
    return values


NOISES: Mapping[str, Callable[[np.random.Generator, int], Array]] = {
    "white": white,
    "heavy-tailed": heavy_tailed,
    "skewed": skewed,
    "autocorrelated": autocorrelated,
}


def synthetic(kind: str, *, seed: int, num_steps: int = 2000, noisy: bool = False) -> Recording:
    """A power law from 4 to about 1.5 under multiplicative noise; norms fall with the root of the loss.

    Args:
        kind: Of the noise, a key of ``NOISES``.
        seed: Of the noise.
        num_steps: Length.
        noisy: The loss has a standard deviation of 30 % and the norm's logarithm one of 0.5, as late on a
            small batch; else 5 % and 0.2.
    """
    generator = np.random.default_rng((seed, sorted(NOISES).index(kind)))
    of_loss, of_norm = (0.3, 0.5) if noisy else (0.05, 0.2)
    curve = 1.0 + 3.0 * (1 + np.arange(num_steps) / 50) ** -0.5
    losses = curve * np.maximum(1 + of_loss * NOISES[kind](generator, num_steps), 0.01)
    norms = np.sqrt(curve) * np.exp(of_norm * NOISES[kind](generator, num_steps))
    name = f"{kind}, noisy" if noisy else kind
    return Recording(
        name=name, losses=tuple(losses.tolist()), norms=tuple(norms.tolist()), expected=tuple(curve.tolist())
    )


def record(task_name: str, preset: str | None, num_steps: int, *, seed: int = 0) -> Recording:
    """Train a task plainly at its recipe and keep what the monitor would have read."""
    task = make_task(task_name, TaskSettings(preset=preset))
    recipe = with_steps(task.defaults, num_steps)
    model = task.build_model(seed)
    optimizer = build_optimizer(model, recipe)
    schedule = build_scheduler(optimizer, recipe.schedule, num_steps, recipe.warmup_steps, recipe.decay_frac)
    batches, losses, norms = task.batches(seed), [], []
    parameters = list(model.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for _ in range(num_steps):
            optimizer.zero_grad()
            loss = task.loss_fn(model, next(batches))
            loss.backward()
            norms.append(float(weights.global_norm(weights.gradients(parameters))))
            if recipe.grad_clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, recipe.grad_clip)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
    name = task_name if preset is None else f"{task_name} {preset}"
    return Recording(name=name, losses=tuple(losses), norms=tuple(norms))


# ---- signals ------------------------------------------------------------------------------------


def alarms(
    run: Recording, config: DivergenceConfig | None = None, num_warmup: int = NUM_WARMUP
) -> Iterator[tuple[int, Alarm]]:
    """(step, alarm) of every per-step signal on its own, quiet ones too, as the monitor calls them."""
    c = config or DivergenceConfig()
    history = History()
    for step, (loss, norm) in enumerate(zip(run.losses, run.norms, strict=True)):
        if step >= num_warmup:
            baseline = history.norm_baseline.mean
            yield (
                step,
                named(
                    divergence.loss_deviation(
                        loss, history.loss_ema.mean, history.loss_ema.std, SIGMA, history.losses[-1]
                    ),
                    "loss_deviation",
                ),
            )
            explosion = divergence.gradient_explosion(norm, baseline, c.gradient_norm_multiplier, c.critical_multiplier)
            yield step, named(explosion, "gradient_explosion")
            vanishing = divergence.gradient_vanishing(
                history.norms, baseline, c.vanishing_gradient_threshold, loss, history.loss_baseline.mean
            )
            yield step, named(vanishing, "gradient_vanishing")
            yield step, named(divergence.oscillation(history.losses, c.max_sign_changes), "oscillation")
        history.push(Reading(step, loss, norm), warming_up=step < num_warmup)


def named(alarm: Alarm, signal: str) -> Alarm:
    """The alarm with its signal's name, which a quiet one does not carry."""
    return replace(alarm, signal=signal)


def prediction_errors(
    run: Recording, *, smoothed: bool, config: DivergenceConfig | None = None
) -> Iterator[tuple[int, Alarm]]:
    """A perfect forecast of the curve against the loss that came: what noise alone does to this signal.

    Args:
        run: With a known curve.
        smoothed: Judge the mean of a probation's losses, as the design asks; else every single loss.
        config: Thresholds.
    """
    assert run.expected is not None, "needs the curve without noise"
    c = config or DivergenceConfig()
    n = NUM_PROBATION if smoothed else 1
    signal = "prediction_error" if smoothed else "prediction_error, single loss"
    for step in range(NUM_WARMUP, len(run.losses) - n, n):
        actual, predicted = np.mean(run.losses[step : step + n]), np.mean(run.expected[step : step + n])
        alarm = divergence.prediction_error(
            float(actual), float(predicted),
            c.prediction_error_caution, c.prediction_error_threshold, c.prediction_error_critical,
            noise=float(np.std(run.losses[step - NUM_BEFORE : step])) / math.sqrt(n),
        )  # fmt: skip
        yield step, named(alarm, signal)


def confidences(
    share_kept: float, *, seed: int, enter: float, leave: float, num_jumps: int = 1000
) -> Iterator[tuple[int, Alarm]]:
    """The confidence signal on a run whose jumps are kept with a constant probability.

    An honest confidence is near that probability and scatters; whatever lies above it is crossed often.
    """
    generator, track = np.random.default_rng(seed), TrackRecord()
    for jump in range(num_jumps):
        if jump >= 20:
            alarm = divergence.low_confidence(track.confidence, enter, leave)
            yield jump, named(alarm, f"confidence, {enter:.3g} / {leave:.3g}")
        track.record(bool(generator.random() < share_kept))


# ---- table --------------------------------------------------------------------------------------


def rates(run: str, checked: Sequence[tuple[int, Alarm]]) -> list[dict[str, Any]]:
    """One row per signal: the share of steps at caution, warning and critical."""
    totals = Counter(alarm.signal for _, alarm in checked)
    found = Counter((alarm.signal, alarm.level) for _, alarm in checked)
    return [
        {
            "run": run, "signal": signal, "num_checked": total,
            **{level.name.lower(): found[signal, level] / total for level in Level if level is not Level.NORMAL},
        }
        for signal, total in totals.items()
    ]  # fmt: skip


def false_positive_table(*, seeds: Sequence[int] = (0, 1, 2, 3, 4), real: bool = True) -> list[dict[str, Any]]:
    """Rows ``{"run", "signal", "num_checked", "caution", "warning", "critical"}``, rates per checked step.

    Args:
        seeds: Of the synthetic runs, pooled.
        real: Train the real runs too (about a minute).
    """
    rows = []
    for kind, noisy in itertools.product(NOISES, (False, True)):
        checked: list[tuple[int, Alarm]] = []
        for seed in seeds:
            run = synthetic(kind, seed=seed, noisy=noisy)
            checked += [*alarms(run), *prediction_errors(run, smoothed=True), *prediction_errors(run, smoothed=False)]
        rows += rates(run.name, checked)
    for share, (enter, leave) in itertools.product((0.95, 0.9, 0.8, 0.4), CONFIDENCE_LINES):
        jumps = [pair for seed in seeds for pair in confidences(share, seed=seed, enter=enter, leave=leave)]
        rows += rates(f"{share:.0%} of jumps kept", jumps)
    if real:
        for task, preset, num_steps in REAL_RUNS:
            recording = record(task, preset, num_steps)
            rows += rates(recording.name, list(alarms(recording, num_warmup=min(NUM_WARMUP, num_steps // 3))))
    return rows


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for a terminal, rates in percent."""
    head = ("run", "signal", "checked", "caution %", "warning %", "critical %")
    cells = [
        (
            row["run"], row["signal"], str(row["num_checked"]),
            *(f"{100 * row[level]:.2f}" for level in ("caution", "warning", "critical")),
        )
        for row in rows
    ]  # fmt: skip
    return "\n".join(aligned(head, cells))
