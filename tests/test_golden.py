"""The golden traces can be trusted: runs repeat, show what they are there for, and a changed figure is found."""

from __future__ import annotations

import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hybrid_predict_trainer as hpt
from golden import trace as trace_module
from golden.__main__ import main, told
from golden.builds import PACKAGE, PRESENT, build
from golden.drive import Run, play, unmet
from golden.runs import RUNS
from golden.trace import Trace, added, digest, first_difference, flat, how_far


def played(run: Run, folder: Path) -> Trace:
    folder.mkdir(exist_ok=True)
    return play(run, hpt, folder)


@pytest.mark.parametrize("name", ["quasi-newton-full", "multiplier", "rollback", "resumed-across"])
def test_runs_repeat_and_show_what_they_are_there_for(name: str, tmp_path: Path) -> None:
    first, second = played(RUNS[name], tmp_path), played(RUNS[name], tmp_path)
    assert unmet(RUNS[name], first) is None
    assert first_difference(first, second) is None
    assert first.steps
    assert first.records
    assert not added(first, second)


@pytest.mark.parametrize("name", ["bandit", "blocks", "lookahead"])
def test_without_what_a_run_is_there_for_it_is_another(name: str, tmp_path: Path) -> None:
    run = RUNS[name]
    other = replace(run, settings={**run.settings, **run.without})
    found = first_difference(played(run, tmp_path / "with"), played(other, tmp_path / "without"))
    assert found is not None
    assert found.startswith("step ")


def test_one_changed_setting_is_found_at_its_step(tmp_path: Path) -> None:
    """The step of the first jump, not the end of the run."""
    run = RUNS["heuristic-full"]
    old = played(run, tmp_path / "old")
    new = played(replace(run, settings={**run.settings, "gate.max_relative_length": 1e-6}), tmp_path / "new")
    jump = next(i for i, row in enumerate(old.steps) if row["was_predicted"])
    assert str(first_difference(old, new)).startswith(f"step {jump + 1}: ")


def small() -> Trace:
    steps = [{"loss": 1.0, "reason": "warm-up is not over"}, {"loss": float("nan"), "reason": "a"}]
    return Trace(steps=steps, records=[{"event": "step", "step": 1, "lr": 0.1}], end={"statistics.num_steps": 2})


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda t: t.steps[1].update(loss=2.0), "step 2: loss is nan in the earlier build and 2.0 in this one"),
        (lambda t: t.steps[0].update(loss=1), "step 1: loss is 1.0 in the earlier build and 1 in this one"),
        (lambda t: t.steps[0].pop("reason"), "step 1: reason is gone"),
        (lambda t: t.steps.pop(), "2 steps in the earlier build and 1 in this one"),
        (lambda t: t.records[0].update(lr=-0.0), "line 1 of the JSONL file (step, step 1): lr is 0.1"),
        (lambda t: t.records.append({}), "1 lines in the JSONL file of the earlier build and 2 in this one's"),
        (lambda t: t.end.update({"statistics.num_steps": 3}), "at the end: statistics.num_steps is 2"),
        (lambda t: setattr(t, "error", "raised E"), "after step 2: ended; now raised E"),
    ],
)
def test_every_part_of_a_trace_is_compared(change, wanted: str) -> None:
    old, new = small(), deepcopy(small())
    assert first_difference(old, new) is None
    change(new)
    assert str(first_difference(old, new)).startswith(wanted)


def test_what_is_new_is_told_and_is_no_difference() -> None:
    old, new = small(), deepcopy(small())
    new.end["statistics.num_doves"] = 3
    assert first_difference(old, new) is None
    assert added(old, new) == {"statistics.num_doves"}
    same, line = told("heuristic-full", old, new)
    assert not same  # and no jump was accepted
    assert "VACUOUS  num_jumps_accepted is None, not at least 2" in line


def test_names_and_words_that_were_changed_are_those_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trace_module.RENAMED, "lr_multiplier", "learned_scale")
    monkeypatch.setitem(trace_module.REWORDED, "too far", "the jump leaves the trust radius")
    now = flat({"a": {"lr_multiplier": 2.0, "wall_s": 1.0}, "reason": "too far"})
    assert now == {"a.learned_scale": 2.0, "reason": "the jump leaves the trust radius"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int64, torch.bool])
def test_a_digest_sees_one_bit_the_shape_and_the_dtype(dtype: torch.dtype) -> None:
    one = torch.tensor([1, 0, 1, 1]).to(dtype)
    other = one.clone()
    other[1] = 1
    found = [digest(t) for t in (one, other, one.view(2, 2), one.to(torch.complex128), torch.zeros((), dtype=dtype))]
    assert len(set(found)) == len(found)
    assert digest(one.clone()) == found[0]
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))


def test_a_build_is_loaded_from_its_folder_and_leaves_no_trace(tmp_path: Path) -> None:
    before = {name: module for name, module in sys.modules.items() if name.startswith(PACKAGE)}
    path = list(sys.path)
    package = tmp_path / "src" / PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from . import part\nVALUE = part.VALUE\n", encoding="utf-8")
    (package / "part.py").write_text("VALUE = 5\n", encoding="utf-8")
    with build(tmp_path) as other:
        assert other.VALUE == 5
        assert other is not hpt
    with build(PRESENT) as present:
        assert present is not hpt
        assert present.HybridTrainer is not hpt.HybridTrainer
    assert {name: module for name, module in sys.modules.items() if name.startswith(PACKAGE)} == before
    assert sys.path == path
    with pytest.raises(SystemExit, match="is no checkout"), build(tmp_path / "src"):
        pass


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(RUNS)
    assert main(["--against", str(PRESENT), "--only", "off"]) == 0
    assert "1 of 1 runs are the same to the last bit" in capsys.readouterr().out
    for wrong in (["--only", "of"], []):
        with pytest.raises(SystemExit):
            main(wrong)
    assert "--against PATH is missing" in capsys.readouterr().err


def test_every_predictor_and_every_way_is_covered() -> None:
    wanted = ("hold", "heuristic", "secant", "quasi_newton", "linear", "dmd", "mlp", "rssm", "auto")
    assert set(wanted) <= {run.settings.get("predictor.type") for run in RUNS.values()}
    for run in RUNS.values():
        assert run.least or run.shows is not Run.__dataclass_fields__["shows"].default or run.without, run.about


def test_runs_that_differ_by_rounding_are_told_from_other_runs() -> None:
    rows = [{"phase": "full", "loss": 1.0, "reason": "r"}, {"phase": "predict", "loss": 0.5, "reason": "r"}]
    old, rounded, other = (Trace(steps=deepcopy(rows)) for _ in range(3))
    rounded.steps[1]["loss"] = 0.5 * (1 + 1e-9)
    other.steps[1]["phase"] = "full"
    assert how_far(old, rounded) == "the same decisions in 2 steps, losses within 1.0e-09"
    assert how_far(old, other) == "another decision at step 2, losses within 0.0e+00 until then"
