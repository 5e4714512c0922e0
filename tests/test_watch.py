"""`hpt watch`: what it shows of a run, finished or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hybrid_predict_trainer.cli import main
from hybrid_predict_trainer.cli.watch import view


def records(folder: Path) -> Path:
    steps = [
        {"event": "step", "phase": "full", "loss": 10.0 * 0.8**i, "gradient_norm": 1.0, "lr": 0.01, "confidence": 0.5,
         "reason": "the window is not full yet"} for i in range(40)
    ]  # fmt: skip
    steps += [{"event": "jump", "accepted": True}, {"event": "jump", "accepted": False}]
    steps += [{"event": "validation", "num_real_steps": 40, "val_loss": 0.25}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps) + '{"event": "st')
    return folder


def test_a_run_in_progress_is_shown_with_its_torn_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(records(tmp_path)), "--once"]) == 0
    text = capsys.readouterr().out
    for words in (
        "40, 40 real",
        "the window is not full yet",
        "validation 0.25",
        "1 of 2 accepted",
        "nothing is wrong",
    ):
        assert words in text
    found = view(tmp_path)
    assert found["curve"][0] == "█"
    assert found["curve"][-1] == "▁"


def test_it_ends_with_the_run(tmp_path: Path) -> None:
    records(tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    assert main(["watch", str(tmp_path)]) == 0


def test_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(records(tmp_path)), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["jumps_accepted"] == 1
