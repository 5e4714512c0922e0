"""Today's GPT at equal wall-clock, at tiny size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hybrid_predict_trainer.experiments.arms.options import InputError, Options
from hybrid_predict_trainer.experiments.bench import equal_time
from hybrid_predict_trainer.experiments.run_arm import Arm, Experiment

TINY = Options(task="gpt-modern", batch_size=16, context=8, data_bytes=20_000, threads=1)


def test_every_arm_gets_the_steps_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    takes = {"plain": 0.5, "four-rates": 0.5, "hybrid": 1.0}

    def pilot(setup: Experiment, arm: Arm, seed: int, steps: int) -> float:
        assert (seed, steps) == (7, 3)
        return takes[arm.name]

    monkeypatch.setattr(equal_time, "pilot", pilot)
    said: list[str] = []
    found = equal_time.measure(TINY, seconds=1.0, seed=7, lrs={"plain": 1e-2}, pilot_steps=3, note=said.append)
    assert {a["arm"]: a["steps"] for a in found["arms"]} == {"plain": 2, "four-rates": 2, "hybrid": 1}
    assert {a["arm"]: a["lr"] for a in found["arms"]} == {"plain": 1e-2, "four-rates": 3e-3, "hybrid": 3e-3}
    assert all(a["final_val_loss"] < 5.6 for a in found["arms"])  # log 256 is 5.545
    assert len(said) == 6
    assert len(equal_time.format_text(found).splitlines()) == 4


def test_a_pilot_is_timed() -> None:
    setup = equal_time.build_experiment(TINY)
    assert 0 < equal_time.pilot(setup, Arm(name="plain", kind="plain", lr=1e-3), 0, 1) < 10


def test_the_script_refuses_what_does_not_fit_in_one_line() -> None:
    with pytest.raises(InputError, match="preset"):
        equal_time.measure(Options(task="gpt-modern", preset="125M"), seconds=1)
    script = Path(__file__).resolve().parent.parent / "benchmarks" / "parts.py"
    done = subprocess.run(
        [sys.executable, str(script), "equal-time", "--preset", "125M"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
