"""The table of costs: every part is there, on the objects of a real run, with its target."""

from __future__ import annotations

import pytest

from hybrid_predict_trainer.experiments.bench import costs


def test_every_part_is_timed_and_has_its_target() -> None:
    told: list[str] = []
    table = costs.measure("0.3M", ("hold", "linear"), num_repeats=2, batch_size=1, context=16, note=told.append)
    assert all(set(row) == {"part", "median_ms", "p90_ms", "share_of_window", "target_ms"} for row in table)
    targets = {row["part"]: row["target_ms"] for row in table}
    for name in ("hold", "linear"):
        assert targets[f"predict {name}"] == 5.0
        for part in ("update", "combine", "window close"):
            assert targets[f"{part} {name}"] is None
    assert {"copy the weights", "move the weights", "encode: state"} <= targets.keys()
    assert targets["encode: loss features"] == 1.0
    assert targets["bandit decision"] == 0.1
    by_part = {row["part"]: row for row in table}
    assert by_part["window, usual length"]["share_of_window"] == pytest.approx(1)
    assert by_part["full step"]["share_of_window"] == pytest.approx(0.1)
    assert all(0 < row["median_ms"] <= row["p90_ms"] for row in table)
    assert told[-1] == "timing linear"


def test_figures_of_one_part() -> None:
    row = costs.row(
        "update rssm", [3.0, 1.0, 2.0, 5.0, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0], window_ms=1000.0, target_ms=10.0
    )
    assert row == {
        "part": "update rssm", "median_ms": 5.5, "p90_ms": 10.0, "share_of_window": 0.0055, "target_ms": 10.0,
    }  # fmt: skip
    late = costs.row("bandit decision", [0.3], window_ms=1000.0, target_ms=0.1)
    shown = costs.format_text([row, late, costs.row("full step", [1.0], 10.0)])
    assert [
        " ".join(line.split()[-2:]) if line.split()[-1] in ("met", "MISSED") else line.split()[-1]
        for line in shown.splitlines()[2:5]
    ] == ["10 met", "0.1 MISSED", "-"]
