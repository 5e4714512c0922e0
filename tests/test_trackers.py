"""Trackers get what the records say, and never stop a run."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest

from cases import Fake, assert_same, config, make_batches, setup
from frameworks import framework
from hybrid_predict_trainer.adapters.trackers import TensorBoard, Trackio, WandB, numbers

COUNT = 20


def test_numbers_of_a_record() -> None:
    found = numbers({"schema": 1, "event": "step", "step": 3, "phase": "full", "loss": 0.5, "skipped": True,
                     "gradient_norm": math.nan, "reason": "the window is not full yet", "none": None})  # fmt: skip
    assert found == {"hpt/step/phase": 1.0, "hpt/step/loss": 0.5, "hpt/step/skipped": 1.0}
    assert numbers({"event": "divergence", "severity": "critical"}) == {"hpt/divergence/severity": 3.0}


def run_with(sink: Any) -> tuple[list[float], Any]:
    built = setup("mlp", "adam", "lambda")
    trainer = built.trainer(config(), sinks=[sink], predictor=Fake())
    losses = [trainer.step(batch).loss for batch in make_batches(COUNT)]
    trainer.metrics.sink.close()
    return losses, built.everything()["parameters"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_holds_what_was_recorded(tmp_path: Path) -> None:
    framework("tensorboard")
    losses, _ = run_with(TensorBoard(tmp_path))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = events.Scalars("hpt/step/loss")
    assert [e.value for e in found] == pytest.approx(losses)
    assert [e.step for e in found] == list(range(1, COUNT + 1))
    assert {e.value for e in events.Scalars("hpt/step/phase")} >= {0.0, 1.0}
    names = events.Tags()["scalars"]
    assert {"hpt/step/confidence", "hpt/step/cost_units", "hpt/jump/loss_before", "hpt/jump/accepted"} <= set(names)


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(tmp_path: Path) -> None:
    framework("wandb", in_ci=False)
    run_with(WandB(project="test", mode="offline", dir=str(tmp_path)))
    (file,) = tmp_path.rglob("*.wandb")
    until = time.monotonic() + 30  # another process writes it, after the run has finished here
    while b"hpt/step/loss" not in file.read_bytes() and time.monotonic() < until:
        time.sleep(0.1)
    assert b"hpt/step/loss" in file.read_bytes()


def test_a_tracker_that_fails_stops_nothing() -> None:
    class Broken:
        asked = 0

        def write(self, record: Any) -> None:
            self.asked += 1
            raise ConnectionError("no route to the tracker")

    broken, quiet = Broken(), setup("mlp", "adam", "lambda")
    with pytest.warns(UserWarning, match="no route to the tracker"):
        losses, weights = run_with(broken)
    plain = quiet.trainer(config(), predictor=Fake())
    assert [plain.step(batch).loss for batch in make_batches(COUNT)] == losses
    assert_same(weights, quiet.everything()["parameters"])
    assert broken.asked == 3


@pytest.mark.filterwarnings("ignore")
def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    framework("trackio", in_ci=False)
    run_with(Trackio("test"))
    assert any(b"hpt/step/loss" in f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())
