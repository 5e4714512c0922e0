"""`hpt bench regimes` and `hpt bench report` from end to end on a tiny regime: resuming, adding, bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hybrid_predict_trainer.cli import hpt as cli
from hybrid_predict_trainer.experiments.regimes import cells as regime_cells
from hybrid_predict_trainer.experiments.regimes import readme_rows
from hybrid_predict_trainer.experiments.regimes import report as regime_report
from hybrid_predict_trainer.experiments.regimes import runs as regime_runs
from hybrid_predict_trainer.experiments.run_arm import Arm, run_arm
from hybrid_predict_trainer.experiments.statistics import METHOD

TINY = [
    "bench",
    "regimes",
    "--regime",
    "self-test",
    "--quick",
    "--sweep-seeds",
    "1",
    "--steps",
    "12",
    "--jobs",
    "1",
    "--lr-grid",
    "0.01,0.02",
]
SETTINGS = ["--set", "predictor.window=2", "--set", "training.full_steps=2", "--set", "gate.overhead_budget_exact=1.0"]


def run(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    """Status, standard output, standard error of a command."""
    capsys.readouterr()
    status = cli.main([str(a) for a in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HPT_DATA_DIR", raising=False)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the arms that are really trained from now on, warm-up and probes left out."""
    made: list[str] = []

    def counting(setup: Any, arm: Arm, seed: int, *args: Any, **kwargs: Any) -> Any:
        if setup.steps > regime_runs.NUM_DISCARDED_STEPS:
            made.append(arm.name)
        return run_arm(setup, arm, seed, *args, **kwargs)

    monkeypatch.setattr(regime_runs, "run_arm", counting)
    return made


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished benchmark."""
    out = tmp_path_factory.mktemp("regimes")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HPT_DATA_DIR", raising=False)
        assert cli.main([*TINY, *SETTINGS, "--arms", "hybrid,jump-of-zero,ema", "--out", str(out)]) == 0
    return out


def test_the_object_says_what_was_asked_for(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, *TINY, *SETTINGS, "--arms", "hybrid,jump-of-zero,ema", "--out", results, "--json")
    found = json.loads(out)
    assert status == 0
    assert (found["schema"], found["regime"], found["quick"], found["complete"]) == (
        "regimes-1",
        "self-test",
        True,
        True,
    )
    assert found == json.loads((results / "self-test.json").read_text())
    assert "commit" in found
    assert found["environment"]["torch"]
    assert found["settings"]["steps"] == 12
    assert str(results) not in out, "results are compared between machines"
    assert [c["case"] for c in found["cases"]] == ["tuned", "slow"]
    assert len(found["skipped"]) == 1
    assert re.match(r"missing: skipped: .*HPT_DATA_DIR, which is not set", found["skipped"][0])
    assert found["skipped"][0] in err
    keys = {
        "case", "arm", "S", "S_wall", "mean", "std", "ci95", "n", "kind", "final_loss", "gap_pct", "backward_reduction",
        "prediction_share", "lr", "jumps", "paired_p", "verdict",
    }  # fmt: skip
    assert all(keys <= set(r) for r in found["arms"])
    tuned = {r["arm"]: r for r in found["arms"] if r["case"] == "tuned"}
    assert list(tuned) == ["plain", "hybrid", "jump-of-zero", "ema", "plain@0.5", "plain@2"]
    assert {r["n"] for r in tuned.values()} == {2}
    assert tuned["hybrid"]["jumps"]["proposed"] > 0
    assert 0 < tuned["hybrid"]["prediction_share"]["cost"] < 1
    assert 0 < tuned["hybrid"]["prediction_share"]["time"] < 1
    assert tuned["jump-of-zero"]["lr"] == tuned["hybrid"]["lr"]
    assert tuned["ema"]["weights_only"]
    assert tuned["plain"]["paired_p"] is None
    slow = {r["arm"]: r for r in found["arms"] if r["case"] == "slow"}
    assert {slow[a]["lr"] for a in ("plain", "hybrid", "ema", "plain@2")} == {found["cases"][1]["lr"]}
    assert found["cases"][1]["lr"] == pytest.approx(0.1 * found["cases"][1]["lr_tuned"])
    assert slow["tuned@1"]["lr"] == tuned["plain"]["lr"]
    assert slow["tuned@1"]["final_loss"] == tuned["plain"]["final_loss"]
    assert all(r["cost_vs_tuned"] > 0 for r in slow.values())


def test_a_second_time_nothing_is_trained_and_an_added_arm_alone(
    results: Path, capsys: pytest.CaptureFixture[str], counted: list[str]
) -> None:
    before = json.loads((results / "self-test.json").read_text())
    command = [*TINY, *SETTINGS, "--case", "tuned", "--out", results, "--json", "--arms"]
    assert run(capsys, *command, "hybrid,jump-of-zero,ema")[0] == 0
    assert counted == []
    status, out, _ = run(capsys, *command, "hybrid,jump-of-zero,ema,lookahead")
    assert status == 0
    assert set(counted) == {"lookahead"}
    assert len(counted) == 2 + 2, "two rates, two seeds"
    rows = {r["arm"]: r for r in json.loads(out)["arms"]}
    assert all(rows[r["arm"]] == r for r in before["arms"] if r["case"] == "tuned")


def test_an_interrupted_benchmark_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*TINY, "--case", "tuned", "--arms", "hybrid", "--budgets", "1", "--seeds", "1", "--out", tmp_path]
    train, calls = regime_runs.train, 0

    def interrupted(setup: Any, arm: Arm, seed: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return train(setup, arm, seed)

    with monkeypatch.context() as patch:
        patch.setattr(regime_runs, "train", interrupted)
        assert run(capsys, *command)[0] == 130
    assert len(counted) == 3
    assert run(capsys, *command)[0] == 0
    assert len(counted) == 3 + 1 + 2, "the last trial of the sweep and the two judged runs"
    counted.clear()
    assert run(capsys, *command, "--fresh")[0] == 0
    assert len(counted) == 6


def test_workers_find_what_this_process_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*TINY, "--case", "tuned", "--arms", "ema", "--budgets", "1", "--seeds", "1", "--json"]
    command[command.index("--jobs") + 1] = "2"
    _, parallel, _ = run(capsys, *command, "--out", tmp_path / "a")
    _, alone, _ = run(capsys, *command, "--jobs", "1", "--out", tmp_path / "b")
    first, second = (json.loads(out)["cases"][0]["sweep"] for out in (parallel, alone))
    for sweep in (first, second):
        for trials in sweep["trials"].values():
            trials.sort(key=lambda t: t["lr"])
    assert first == second
    assert len(first["trials"]["ema"]) == 2


def test_a_peer_that_cannot_run_here_is_left_out_and_one_that_fails_has_diverged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_or_fail(setup: Any, arm: Arm, *args: Any, **kwargs: Any) -> Any:
        if arm.name == "snoo":
            raise ModuleNotFoundError("'outer' is not installed")
        if arm.name == "ema" and setup.steps > regime_runs.NUM_DISCARDED_STEPS and arm.lr == 0.02:
            raise RuntimeError("the matrix is singular")
        return run_arm(setup, arm, *args, **kwargs)

    monkeypatch.setattr(regime_runs, "run_arm", run_or_fail)
    command = [
        *TINY,
        "--case",
        "tuned",
        "--arms",
        "snoo,ema",
        "--budgets",
        "1",
        "--seeds",
        "1",
        "--out",
        tmp_path,
        "--json",
    ]
    status, out, _ = run(capsys, *command)
    found = json.loads(out)
    assert status == 0
    assert found["cases"][0]["notes"] == ["tuned: snoo left out: 'outer' is not installed"]
    assert [r["arm"] for r in found["arms"]] == ["plain", "ema"]
    assert found["arms"][1]["lr"] == 0.01, "the rate at which it failed is not chosen"
    assert {t["final_val_loss"] is None for t in found["cases"][0]["sweep"]["trials"]["ema"]} == {True, False}


def test_a_person_gets_a_table_and_a_verdict_per_arm(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, *TINY, *SETTINGS, "--arms", "hybrid", "--out", results, "--case", "tuned")
    assert status == 0
    assert re.search(r"^arm +S by cost +S by wall-clock", out, re.MULTILINE)
    assert re.search(r"^hybrid: .*S ", out, re.MULTILINE)


# ---- the report ----------------------------------------------------------------------------------


def test_the_report_is_one_page_and_tables(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, *TINY, *SETTINGS, "--arms", "hybrid,jump-of-zero,ema", "--out", results)
    tables, page = tmp_path / "tables.md", tmp_path / "deep" / "page.html"
    status, out, _ = run(capsys, "bench", "report", results, "--out", page, "--markdown", tables)
    assert (status, out.strip()) == (0, str(tables))
    text = tables.read_text()
    overview = text.splitlines()
    assert overview[0] == "| S by cost, self-test | tuned | slow |"
    widths = {line.count("|") for line in overview[:5]}
    assert widths == {4}
    for arm in ("hybrid", "jump-of-zero", "ema", "plain@0.5", "tuned@2"):
        assert f"| {arm} |" in text
    assert "incomplete" not in text
    assert "quick" in text
    html = page.read_text()
    assert html.startswith("<!doctype html>")
    assert html.count("<svg") >= 8, "two plots of two widths for each case"
    assert "plain budgets" in html
    assert "http" not in re.sub(r'http-equiv="[^"]*"', "", html)
    assert "<script" not in html
    status, out, _ = run(capsys, "bench", "report", results, "--json")
    assert json.loads(out)["markdown"] == text
    assert (results / "regimes.html").exists()


def test_the_overview_is_a_table_per_regime() -> None:
    rows = [{"case": "c", "arm": "hybrid", "kind_of_arm": "hybrid", "S": 2.0, "kind": "exact"}]
    first, second = ({"regime": name, "cases": [{"case": "c"}], "arms": rows} for name in ("pinn", "lm"))
    lines = regime_report.overview([first, second, first])
    assert lines == [
        "| S by cost, pinn | c | c |", "| --- | --- | --- |", "| hybrid | 2 | 2 |", "",
        "| S by cost, lm | c |", "| --- | --- |", "| hybrid | 2 |",
    ]  # fmt: skip


def planted_row(arm: str, **changes: Any) -> dict[str, Any]:
    kind = "plain" if arm.startswith("plain") else "hybrid"
    return {"case": "c", "arm": arm, "kind_of_arm": kind, "budget": 1.0, "cost_units": 10.0, "verdict": "v", **changes}


def test_cells_say_bounds_intervals_and_what_is_not_known() -> None:
    row = planted_row("hybrid", S=3.0312, kind="at least", ci95=[2.551, None], S_wall=None, interval=METHOD)
    assert regime_report.s_cell(row) == "≥ 3.03 [2.55, ∞)"
    assert readme_rows.bold(regime_report.s_cell(row)) == "≥ **3.03** [2.55, ∞)"
    assert regime_report.s_cell({**row, "kind": "exact", "ci95": [2.551, 3.99]}) == "3.03 [2.55, 3.99]"
    assert regime_report.s_cell({**row, "kind": "at most", "ci95": [None, 3.99]}) == "≤ 3.03 (0, 3.99]"
    assert regime_report.s_cell(row, "S_wall") == regime_report.DASH
    assert regime_report.s_cell({"S": 0.5, "kind": "exact", "ci95": None}) == "0.5"
    assert regime_report.percent_cell(-12.34) == f"{regime_cells.MINUS}12 %"
    assert regime_report.percent_cell(1e-13) == "0 %"
    assert regime_report.loss_cell({"final_loss": {"mean": None}, "errors": ["x"]}) == "diverged"
    assert (
        regime_report.share_cell({"prediction_share": {"cost": 0.012, "time": None}}) == f"1.2 / {regime_report.DASH} %"
    )


@pytest.mark.parametrize(
    ("per_seed", "cell"),
    [
        ([(1.2, "exact"), (1.3, "exact"), (1.25, "exact")], "1.25 [1.13, 1.38]"),
        ([(16.0, "at least")] * 3, "1.25"),
        ([], "1.25"),
        ([(None, "unknown"), (1.2, "exact")], "1.25"),
        ("nonsense", "1.25"),
    ],
)
def test_percentile_intervals_of_older_results_are_not_shown(per_seed: Any, cell: str) -> None:
    seeds = [{"value": v, "kind": k} for v, k in per_seed] if isinstance(per_seed, list) else per_seed
    old = planted_row("hybrid", S=1.25, kind="exact", ci95=[1.2, 1.3], per_seed=seeds, S_wall=1.1, S_wall_ci95=[1, 2])
    assert regime_report.s_cell(old) == cell
    assert regime_report.s_cell(old, "S_wall") == "1.1"
    assert regime_report.verdicts([old]) == []
    assert "too narrow intervals" in regime_report.conditions({"arms": [old]})
    assert "too narrow intervals" not in regime_report.conditions({"arms": [{**old, "interval": METHOD}]})


def test_rows_for_the_readme() -> None:
    wall = {"S_wall": 1.2, "S_wall_kind": "exact", "S_wall_ci95": [1.0, 1.5]}
    about = {"S": 1.29, "kind": "exact", "ci95": [1.2, 1.4], "n": 3, "interval": METHOD, **wall}
    rows = [
        planted_row("plain", final_loss={"mean": 2.175, "std": 0.011}),
        planted_row("hybrid", final_loss={"mean": 2.056, "std": 0.0086}, **about),
        planted_row("snoo", S=1.02, kind="exact", weights_only=True),
        planted_row("long-warmup", S=0.99, kind="at most"),
    ]
    case = {"case": "c", "steps": 300, "task": {"task": "gpt"}}
    *_, row = readme_rows.lines([{"regime": "lm", "cases": [case, {"case": "no hybrid"}], "arms": rows}])
    assert row == (
        "| gpt, c, 300 steps | `lm --case c` | 3 | 2.175 ± 0.011 | 2.056 ± 0.0086 | **1.29** [1.2, 1.4] | snoo 1.02 "
        "| ≤ 0.99 / \N{EN DASH} |"
    )
    *_, row = readme_rows.short_lines([{"regime": "lm", "cases": [case, {"case": "no hybrid"}], "arms": rows}])
    assert row == "| gpt, c, 300 steps | 2.175 ± 0.011 | 2.056 ± 0.0086 | **1.29** [1.2, 1.4] | 1.2 [1, 1.5] | 3 |  |"


def test_hostile_names_are_escaped_and_tables_keep_their_columns(tmp_path: Path) -> None:
    row = planted_row("<b>|x", S=1.2, kind="exact", ci95=[1.1, 1.3], curve=[[1, 2.0], [2, 1.0]])
    result = {
        "schema": "regimes-1", "regime": "<i>", "seeds": [0], "arms": [planted_row("plain"), row],
        "cases": [{"case": "c", "notes": ["<script>"]}],
    }  # fmt: skip
    (tmp_path / "x.json").write_text(json.dumps(result))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "y.json").write_text(json.dumps(result))
    (tmp_path / "broken.json").write_text("{")
    assert len(regime_report.load_results(tmp_path)) == 1
    regime_report.write(tmp_path)
    html = (tmp_path / "regimes.html").read_text()
    assert "<script>" not in html
    assert "<b>|" not in html
    lines = [line for line in regime_report.markdown([result]).splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines[:3]} == {3}
    assert "incomplete" in html


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["regimes"], r"required: --regime"),
        (["regimes", "--regime", "pin"], r"unknown regime 'pin'; did you mean 'pinn'\? \(valid: pinn, epochs, "),
        (["regimes", "--regime", "lm", "--case", "novel"], r"unknown case of regime 'lm' 'novel'"),
        (
            ["regimes", "--regime", "self-test", "--case", "missing"],
            r"no case of regime 'self-test' can be run: .*HPT_DATA_DIR",
        ),
        (["regimes", "--regime", "self-test", "--arms", "nadam"], r"unknown arm 'nadam'"),
        (["regimes", "--regime", "self-test", "--predictors", "sekant"], r"unknown predictor 'sekant'"),
        (["regimes", "--regime", "self-test", "--set", "x"], r"must be KEY=VALUE"),
        (["regimes", "--regime", "self-test", "--budgets", "0"], r"--budgets: 0 is out of range"),
        (["regimes", "--regime", "self-test", "--lr-grid", "1,a"], r"--lr-grid: 'a' must be a number > 0"),
        (["regimes", "--regime", "self-test", "--seeds", "0"], r"--seeds: 0 is out of range"),
        (
            ["regimes", "--regime", "self-test", "--seed", "999", "--seeds", "2"],
            r"seeds 999 to 1000: must be below 1000",
        ),
        (["regimes", "--regime", "self-test", "--jobs", "-1"], r"--jobs"),
        (["regimes", "--regime", "self-test", "--device", "warp"], r"unknown device 'warp'"),
        (["report", "nowhere"], r"nowhere: no such directory"),
        (["report", "."], r"nothing to report"),
        (["report"], r"required: DIR"),
        ([], r"required: BENCHMARK"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "bench", *argv)
    assert status == 2
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("hpt")
    assert re.search(words, last), err
    assert "Traceback" not in err


def test_two_benchmarks_do_not_write_to_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with regime_runs.locked(tmp_path):
        status, _, err = run(capsys, *TINY, "--out", tmp_path)
    assert status == 2
    assert "another process is writing to it" in err


# ---- the other benchmarks ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv", [["--json", "memory", "--predictor", "hold"], ["memory", "--predictor", "hold", "--json"]]
)
def test_json_may_stand_on_either_side_of_the_name(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "bench", *argv)
    assert status == 0
    assert json.loads(out)


def test_every_benchmark_is_in_the_readme_of_the_folder() -> None:
    text = (Path(__file__).parents[1] / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for name in ("overhead", "predictors", "memory", "costs", "stack", "regimes", "report"):
        assert f"hpt bench {name}" in text
