"""Forecasts learnt from runs that have ended: of curves that no law describes, and how wide their intervals are."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from hybrid_predict_trainer import ConfigError
from hybrid_predict_trainer.cli import main
from hybrid_predict_trainer.experiments.forecasts import scores
from hybrid_predict_trainer.experiments.forecasts.published import Run
from hybrid_predict_trainer.forecast import Curve, forecast, planned_rates
from hybrid_predict_trainer.sweeps.curves import LOOKS
from hybrid_predict_trainer.sweeps.finished import Finished, forecast_among, looks_from, widening

TOTAL = 2000
SCHEDULES = ("cosine:warmup=100", "linear:warmup=100", "constant:warmup=100", "wsd:warmup=100,decay=0.2")


def curve(schedule: str, size: float, seed: int, scatter: float = 0.001) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A run that falls in two stages, as no power law does, and gains from low rates: steps, losses, rates."""
    rates = planned_rates(schedule, TOTAL)
    steps = np.arange(20.0, TOTAL + 1, 20.0)
    progress = np.cumsum(rates)[steps.astype(int) - 1]
    rate = rates[steps.astype(int) - 1]
    falls = 1.2 / (1 + np.exp((np.log(progress) - 5.0) / 0.4)) + 0.8 / (1 + np.exp((np.log(progress) - 6.6) / 0.3))
    losses = (1.6 + size) + (1 + 0.3 * size) * falls - 0.1 * (1 - rate**0.75)
    return steps, losses * np.exp(scatter * np.random.default_rng(seed).normal(size=len(steps))), rates


def ended(size: float, seed: int, model: str, schedules: tuple[str, ...] = SCHEDULES, **kw: float) -> list[Finished]:
    runs = [curve(schedule, size, seed + k, **kw) for k, schedule in enumerate(schedules)]
    return [Finished(steps=s, losses=v, rates=r, model=model) for s, v, r in runs]


def begun(schedule: str, size: float, seed: int, share: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    steps, losses, rates = curve(schedule, size, seed)
    known = steps <= share * TOTAL
    return steps[known], losses[known], rates, float(losses[-1])


KNOWN = [*ended(0.0, 1, "small"), *ended(0.3, 10, "large")]


def test_what_no_law_describes_is_learnt_from_others() -> None:
    errors = []
    for share in (0.25, 0.5):
        for schedule in SCHEDULES:
            *seen, truth = begun(schedule, 0.15, 99, share)
            told, by_law = forecast_among(*seen, KNOWN, model="middle"), forecast(*seen)
            assert told.final_loss == pytest.approx(truth, rel=0.02)
            assert told.low < truth < told.high
            assert told.points[-1] == (TOTAL, told.final_loss, told.low, told.high)
            others = (by_law.final_loss, told.last_value, told.power_law, told.log_line)
            errors.append([abs(float(x or math.inf) / truth - 1) for x in (told.final_loss, *others)])
    ours, *theirs = np.median(errors, axis=0)
    assert ours < 0.5 * min(theirs)


def test_intervals_are_as_wide_as_the_finished_runs_ask_for() -> None:
    """Ends that scatter, of which nothing is seen before, widen the interval."""
    rng = np.random.default_rng(0)
    *seen, _ = begun(SCHEDULES[0], 0.15, 99, 0.5)
    widths = []
    for scatter in (0.0, 0.05):
        shaken = []
        for run in KNOWN:
            losses = np.array(run.losses)
            losses[-20:] *= np.exp(scatter * rng.normal())
            shaken.append(Finished(steps=run.steps, losses=losses, rates=run.rates))
        told = forecast_among(*seen, shaken, level=0.8)
        widths.append(math.log(told.high / told.low))
    assert widths[1] > 2 * widths[0]
    assert widths[1] > 0.05


def test_an_interval_holds_its_share_of_ends() -> None:
    """Over models of random sizes; of eight finished runs the quantile is their largest, so that it holds more."""
    held = []
    for seed in range(24):
        size = float(np.random.default_rng(seed).uniform(0, 0.3))
        *seen, truth = begun(SCHEDULES[seed % 4], size, 1000 + seed, 0.5)
        told = forecast_among(*seen, KNOWN, model="another")
        held.append(told.low < truth < told.high)
    assert np.mean(held) >= 0.85


def grown(size: float, schedule: str, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A run whose later half falls the further the larger its model is; its first half says nothing of that."""
    steps, losses, rates = curve(schedule, 0.0, seed)
    return steps, losses * (1 - 0.08 * math.log(size) * np.clip(2 * steps / TOTAL - 1, 0, 1)), rates


def test_what_changes_with_the_size_is_carried_on() -> None:
    whole = [(size, *grown(size, schedule, int(size))) for size in (1.0, 2.0) for schedule in SCHEDULES]
    sized = [Finished(steps=s, losses=v, rates=r, size=size) for size, s, v, r in whole]
    named = [Finished(steps=s, losses=v, rates=r, model=f"{size}") for size, s, v, r in whole]
    errors = []
    for schedule in SCHEDULES:
        steps, losses, rates = grown(4.0, schedule, 99)
        seen = (steps[:25], losses[:25], rates)
        told = (forecast_among(*seen, sized, size=4.0), forecast_among(*seen, named, model="4.0"))
        errors.append([abs(x.final_loss / losses[-1] - 1) for x in told])
    ours, blind = np.mean(errors, axis=0)
    assert ours < 0.85 * blind
    with pytest.raises(ConfigError, match="or none of them"):
        forecast_among(*seen, sized)
    with pytest.raises(ConfigError, match="above 0"):
        forecast_among(*seen, sized, size=-1.0)


def test_few_runs_never_narrow_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid_predict_trainer.sweeps import finished

    trials = [finished._whole(k, run, looks_from(0.5)) for k, run in enumerate(KNOWN)]
    monkeypatch.setattr(finished, "_size", lambda *_: 0.1)
    assert widening(trials, 0.9) == 1.0
    assert widening(trials, 0.8) == pytest.approx(0.1)


def test_looks_hold_the_share_that_is_known() -> None:
    for share in (0.03, 0.25, 0.5, 0.99):
        looks = looks_from(share)
        assert looks[1] == pytest.approx(share)
        assert looks[-1] == 1.0
        assert list(looks) == sorted(looks)
    assert LOOKS[-1] == 1.0


CUT = Finished(steps=[1, 2], losses=[3.0, 2.0], rates=[1.0] * 9)
BAD = {
    "too few": (lambda s, v: (s, v), KNOWN[:2], "at least 3"),
    "not ended": (lambda s, v: (s, v), [*KNOWN, CUT], "run 9 ends"),
    "no rows": (lambda s, v: (s[:0], v[:0]), KNOWN, "no losses"),
    "not finite": (lambda s, v: (s, np.where(s == s[4], np.nan, v)), KNOWN, "not finite"),
    "too early": (lambda s, v: (s[:2], v[:2]), KNOWN, "say too little"),
    "over": (lambda s, v: (s + TOTAL - s[-1], v), KNOWN, "nothing left"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_learnt_from_is_said(name: str) -> None:
    spoil, known, said = BAD[name]
    steps, losses, rates, _ = begun(SCHEDULES[0], 0.1, 5, 0.5)
    with pytest.raises(ConfigError, match=said) as caught:
        forecast_among(*spoil(steps, losses), rates, known)
    assert "\n" not in str(caught.value)


def written(path: Path, steps: np.ndarray, losses: np.ndarray, rates: np.ndarray | None = None) -> str:
    rows = [f"{s:g},{v!r}" + ("" if rates is None else f",{float(rates[int(s) - 1])!r}")
            for s, v in zip(steps.tolist(), losses.tolist(), strict=True)]  # fmt: skip
    path.write_text("\n".join(["step,loss" + ("" if rates is None else ",lr"), *rows]) + "\n")
    return str(path)


def test_the_command_learns_from_finished_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    like = []
    for k, run in enumerate(KNOWN):
        path = written(tmp_path / f"{k}.csv", np.array(run.steps), np.array(run.losses), np.array(run.rates))
        like += ["--like", path]
    steps, losses, _, truth = begun(SCHEDULES[0], 0.15, 99, 0.25)
    asked = [
        "forecast",
        written(tmp_path / "now.csv", steps, losses),
        "--schedule",
        SCHEDULES[0],
        "--steps",
        str(TOTAL),
    ]
    assert main([*asked, *like, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["final_loss"] == pytest.approx(truth, rel=0.02)
    assert found["prior"] == [["8 finished runs", 1.0]]
    assert main([*asked, *like, "--prior", "language-models"]) == 2
    assert "leave out one" in capsys.readouterr().err
    assert main([*asked, *like[:4]]) == 2
    assert "at least 3" in capsys.readouterr().err


def test_finished_logs_without_rates_take_the_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    like = []
    for k in range(4):
        like += ["--like", written(tmp_path / f"{k}.csv", *curve(SCHEDULES[0], 0.1 * k, k)[:2])]
    steps, losses, rates, truth = begun(SCHEDULES[0], 0.15, 99, 0.5)
    own = written(tmp_path / "now.csv", steps, losses, rates)
    assert main(["forecast", own, *like, "--schedule", SCHEDULES[0], "--steps", str(TOTAL)]) == 0
    assert "4 finished runs" in capsys.readouterr().out
    found = forecast_among(steps, losses, rates, ended(0.0, 0, "", SCHEDULES[:1] * 4))
    assert found.final_loss == pytest.approx(truth, rel=0.05)


def test_scores_learn_from_other_families_only() -> None:
    runs = [
        Run(f"{size}-{k}", f"f{size}", f"f{size}", Curve.of(s, v), r)
        for size in (0.0, 0.15, 0.3)
        for k, (s, v, r) in enumerate(curve(schedule, size, 7, 0.003) for schedule in SCHEDULES)
    ]
    found = scores.among_others(runs, shares=(0.5,))
    assert len(found) == 12
    (row,) = scores.summary(found)
    assert row["median"] < 0.01
    assert row["median"] < min(row["last_value"], row["power_law"], row["log_line"])
    assert scores.noise_floor(runs) == pytest.approx(0.003 * 0.6745, rel=0.3)
    with pytest.raises(ConfigError, match="at least 3"):
        scores.among_others(runs, without=lambda run, other: not other.name.endswith("0"))
