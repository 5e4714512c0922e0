"""``hpt bench overhead --model tiny`` and ``hpt bench profile``: what a step costs beside the plain loop's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from hybrid_predict_trainer.experiments.bench import profile, step_price
from hybrid_predict_trainer.experiments.bench.builds import PACKAGE, Build
from hybrid_predict_trainer.experiments.bench.workloads import WORKLOADS, workload

ROOT = Path(__file__).resolve().parents[1]


def silent(line: str) -> None:
    """Nobody waits."""


def test_sizes_are_as_stated() -> None:
    for name, size in (("tiny", 2209), ("mlp", 8970)):
        assert sum(p.numel() for p in WORKLOADS[name].model(0).parameters()) == size
        assert f"{size:,}" in WORKLOADS[name].about


def test_a_workload_is_the_same_every_time() -> None:
    work = workload("mlp")
    for a, b, _ in zip(work.batches(), work.batches(), range(3), strict=False):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(work.model(0).parameters(), work.model(0).parameters(), strict=True))


def test_no_such_model() -> None:
    with pytest.raises(ValueError, match=r"unknown small model 'tyni'; did you mean 'tiny'\?"):
        step_price.measure("tyni", note=silent)


def test_no_such_checkout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no checkout of an earlier build"):
        step_price.measure("tiny", against=tmp_path, note=silent)


def test_another_build_beside_this_one() -> None:
    present = sys.modules[PACKAGE]
    other = Build(ROOT)
    with other.used() as package:
        assert package is sys.modules[PACKAGE] is other.package
        assert package is not present
        assert package.HybridTrainer is not present.HybridTrainer
    assert sys.modules[PACKAGE] is present
    with other.used() as again:
        assert again is package


def test_turns_with_this_build_as_the_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_price, "BLOCK", 20)
    result = step_price.measure("tiny", num_steps=40, rounds=1, against=ROOT, note=silent)
    plain, ours, earlier = result["rows"]
    assert plain["num_real_steps"] == 40
    assert plain["extra_us"] == 0
    assert ours["num_jumps_proposed"] > 3
    assert ours["num_real_steps"] + ours["num_jumps_proposed"] == 40
    for count in ("num_real_steps", "num_jumps_proposed"):
        assert ours[count] == earlier[count]
    assert "extra CPU time per real step, over the earlier build's" in step_price.format_text(result)


def test_a_profile_knows_whose_time_it_is() -> None:
    result = profile.measure("tiny", num_steps=6, skip=22)
    rows = {row["station"]: row for row in result["rows"]}
    assert sum(row["share_pct"] for row in rows.values()) == pytest.approx(100)
    for station in ("observe", "judge", "propose", "predictors", profile.FORWARD, profile.BACKWARD, profile.OPTIMIZER):
        assert rows[station]["calls_per_step"] > 0, station
    assert 22 < result["num_real_steps"] < 28
    # four linear layers and three activations, a loss and what it is read by: in every forward the same operations
    assert rows[profile.FORWARD]["torch_ops_per_step"] >= 8
    assert rows[profile.BACKWARD]["new_tensors_per_step"] > 3
    assert "observe" in profile.format_text(result)


def test_operations_are_counted_where_they_are_made() -> None:
    counts = profile._Counted(profile._Stations(workload("tiny")))
    x = torch.ones(3)
    with counts:
        y = x + 1
        y.add_(1)
        y.view(3, 1)
    assert counts.num_ops["elsewhere"] == 3
    assert counts.num_tensors["elsewhere"] == 1  # neither what is written in place nor a view is memory of its own
