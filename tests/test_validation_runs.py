"""Experiments 3 to 5 of the validation protocol, at a size of seconds: known answers, controls, resuming, verdicts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hybrid_predict_trainer.cli import main, names
from hybrid_predict_trainer.experiments.downstream import harness, minimal_pairs
from hybrid_predict_trainer.experiments.report import validation
from hybrid_predict_trainer.experiments.validation import (
    ablations,
    acceptance,
    accounting,
    corrections,
    deltas,
    forced,
    hybrid,
    hypotheses,
    program,
)
from hybrid_predict_trainer.experiments.validation.loop import Loop, task_of
from hybrid_predict_trainer.experiments.validation.plain import Scale
from hybrid_predict_trainer.records import ConfigError

SMOKE = Scale(
    steps=60, batch_size=2, context=16, sketch=64, snapshot_every=10, horizons=(10, 20), num_twins=2,
    jump_steps=((25, 5), (50, 10), (80, 20)),
)  # fmt: skip
HALF = replace(SMOKE, steps=40, jump_steps=((50, 10),), forced="hold")
#: Full batches: the data that a run goes on with are always the same.
EXACT = Scale(
    task="regression",
    preset=None,
    batch_size=64,
    context=None,
    steps=80,
    snapshot_every=10,
    horizons=(10,),
    num_twins=2,
)


def silent(line: str) -> None:
    """Nobody reads."""


def test_two_displacements_are_compared() -> None:
    one = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])]
    assert deltas.compare(one, one) == (1.0, 0.0, 1.0)
    cosine, error, layers = deltas.compare([torch.zeros(2), torch.zeros(2)], one)
    assert (cosine, error, layers) == (0.0, 1.0, 0.0)
    cosine, error, layers = deltas.compare([one[0], -one[1]], one)
    assert cosine == pytest.approx((1 - 4) / 5)
    assert error == pytest.approx(4 / math.sqrt(5))
    assert layers == 0.5


def test_full_batches_leave_no_noise_and_are_predictable() -> None:
    found = deltas.measure(EXACT, 0, silent, Loop(EXACT, 0, ("hold", "linear")))
    assert found["ceilings"]["raw"]["10"]["cosine"] == pytest.approx(1.0, abs=1e-6)
    assert found["ceilings"]["averaged"]["10"]["error"] == pytest.approx(0.0, abs=1e-3)
    told = {(r["predictor"], r["weights"]): r for r in found["rows"]}
    assert told["hold", "averaged"]["cosine"] > 0.8


@pytest.fixture(scope="module")
def small_batches() -> dict[str, object]:
    return deltas.measure(SMOKE, 0, silent)


def test_noise_of_small_batches_sets_a_ceiling(small_batches: dict[str, object]) -> None:
    ceilings = small_batches["ceilings"]
    assert 0 < ceilings["raw"]["10"]["cosine"] < 0.99  # type: ignore[index]
    names = {bar.name for bar in deltas.criteria(small_batches)}
    assert "cosine of told and actual displacement, raw weights, 10 steps" in names
    assert "R2 of the loss told by the recurrent state-space model" in names
    assert {p["predictor"] for p in small_batches["points"]} == set(deltas.FORECASTERS)  # type: ignore[attr-defined]
    assert deltas.decision(small_batches) in ("continue", "refine", "stop")


def test_a_twin_goes_on_as_the_run_does_and_otherwise_with_other_data() -> None:
    loop = Loop(SMOKE, 0)
    for _ in range(3):
        loop.step()
    same, other = loop.twin(), loop.twin(data_seed=7)
    for each in (loop, same, other):
        each.step()
        each.step()
    assert all(torch.equal(a, b) for a, b in zip(loop.weights(), same.weights(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(loop.weights(), other.weights(), strict=True))


def test_jumps_of_zero_move_the_schedule_alone() -> None:
    loop = Loop(SMOKE, 0, ("hold",))
    for _ in range(20):
        loop.step()
    before, rate = loop.weights(), loop.optimizer.param_groups[0]["lr"]
    loop.jump(None, 40)
    assert all(torch.equal(a, b) for a, b in zip(before, loop.weights(), strict=True))
    assert loop.optimizer.param_groups[0]["lr"] < rate
    assert (loop.position, loop.num_real, loop.num_claimed) == (60, 20, 40)
    told = loop.predict("hold", 20)
    assert told is not None
    moved = loop.basis.combine(told.coefficients)
    loop.jump(moved, 0)
    assert not all(torch.equal(a, b) for a, b in zip(before, loop.weights(), strict=True))


@pytest.mark.parametrize(("share", "horizon"), [(0.25, 5), (0.5, 10), (0.8, 90)])
def test_the_share_that_was_asked_for_is_predicted(share: float, horizon: int) -> None:
    task = task_of(SMOKE)
    plan = forced.ForcedRun(share=share, horizon=horizon, predictor="hold")
    _, found = forced.forced(replace(SMOKE, steps=120), 0, task, forced.zero_of(plan))
    assert found.real + found.claimed == 120
    assert share - 0.2 < found.to_json()["predicted_share"] <= share


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("validation")
    program.SCALES["tiny"], before = HALF, program.SCALES["tiny"]
    try:
        program.validate((4, 5), "tiny", 2, path, silent, collect=True)
    finally:
        program.SCALES["tiny"] = before
    return path


def test_all_arms_are_run_and_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(program.SCALES, "tiny", HALF)
    monkeypatch.setattr(hybrid, "measure", lambda *_: pytest.fail("a finished seed was run again"))
    found = program.validate((4, 5), "tiny", 2, folder, silent)
    assert list(found["experiments"]) == ["5", "4"]
    log = json.loads((folder / "experiment4-tiny-seed0.json").read_text())
    runs = log["results"]["runs"]
    assert len(runs) == 5
    for percent in (50,):
        assert runs[f"{percent} % equal backward"]["real_steps"] == runs[f"{percent} % predicted"]["real_steps"]
        assert runs[f"{percent} % jump of zero"]["claimed_steps"] == runs[f"{percent} % predicted"]["claimed_steps"]
    assert set(log) >= {"experiment_id", "hypothesis", "date", "seed", "config", "results", "conclusion", "next_steps"}
    assert [row["name"] for row in found["experiments"]["4"]["equivalence"]] == ["50 % predicted"]
    words = program.format_text(found) + program.markdown(found)
    assert "jump of zero" in words
    assert "not tested" in words  # the first hypothesis


def test_what_a_run_leaves_is_collected(folder: Path) -> None:
    kept = folder / "collected" / "tiny-seed0"
    events = [json.loads(line) for line in (kept / "corrections.jsonl").read_text().splitlines()]
    assert events
    assert {"before", "jumped", "corrected", "control", "needed"} <= events[0].keys()
    transitions = [json.loads(line) for line in (kept / "transitions.jsonl").read_text().splitlines()]
    assert len(transitions) == 3 * len(events)


def events_of(jumped: float, corrected: float, control: float) -> dict[str, object]:
    """Ten corrections of a run."""
    rows = [
        {"step": i, "before": 2.0, "jumped": jumped + 0.01 * i, "corrected": corrected + 0.01 * i,
         "control": control + 0.001 * i, "needed": 1 + i % 6}
        for i in range(10)
    ]  # fmt: skip
    return {
        "events": rows, "along_a_plain_run": {"told": 2.0, "corrected": 0.5, "zero": 1.9},
        "final": {"baseline": 2.0, "with": 2.01, "without": 2.1}, "num_events": 10, "diverged": 0,
    }  # fmt: skip


def test_a_fall_that_real_steps_alone_have_is_no_evidence() -> None:
    bars = {bar.name: bar for bar in corrections.criteria(events_of(2.2, 2.0, 1.99))}
    fall = bars["mean fall of the loss in a correction"]
    assert (fall.passed, fall.control_passes) == (True, False)
    again = {bar.name: bar for bar in corrections.criteria(events_of(2.2, 2.0, 1.8))}
    assert "no evidence" in again["mean fall of the loss in a correction"].verdict
    assert bars["error of forecasts taken back by residuals"].value == pytest.approx(0.75)
    assert bars["loss lost against the baseline taken back by residuals"].value == pytest.approx(0.9)
    assert corrections.decision(events_of(2.2, 2.0, 1.99)) == "continue"
    assert corrections.decision(events_of(2.2, 2.2, 2.0)) == "refine"


def test_a_correlation_is_held_against_shuffled_ones() -> None:
    found = events_of(2.2, 2.0, 1.99)
    for i, event in enumerate(found["events"]):  # type: ignore[arg-type, var-annotated]
        event["needed"] = i
    bars = {bar.name: bar for bar in corrections.criteria(found)}
    bar = bars["rank correlation of steps needed and harm of the jump"]
    assert bar.value == pytest.approx(1.0)
    assert 0.3 < bar.bar < 0.9
    assert bar.passed


def judged(value: float, ends: tuple[float, float], control: float = 0.5, sense: str = "below") -> dict[str, object]:
    meets = (lambda v: v < 0.02) if sense == "below" else (lambda v: v > 0.02)
    return {"name": "50 % predicted: final loss above the baseline's", "value": value, "interval": ends, "bar": 0.02,
            "sense": sense, "control": control, "control_name": "jump of zero", "passed": meets(value),
            "control_passes": meets(control), "verdict": ""}  # fmt: skip


@pytest.mark.parametrize(("bar", "verdict"), [
    (judged(0.01, (0.005, 0.015)), "supported"),
    (judged(0.01, (0.005, 0.015), control=0.01), "undecided"),
    (judged(0.05, (0.03, 0.07)), "refuted"),
    (judged(0.01, (-0.05, 0.07)), "undecided"),
    (judged(0.03, (-0.05, 0.07)), "undecided"),
    (judged(math.inf, (0.0, 1.0)), "undecided"),
])  # fmt: skip
def test_a_hypothesis_is_judged_by_what_could_falsify_it(bar: dict[str, object], verdict: str) -> None:
    found = {h["name"]: h for h in hypotheses.verdicts({"4": {"criteria": [bar]}})}
    assert found["H2"]["verdict"] == verdict
    assert found["H1"]["verdict"] == "not tested"


def test_five_percent_is_not_equal_within_two() -> None:
    def runs(ratio: float) -> list[dict[str, object]]:
        return [
            {"runs": {"baseline": {"loss": b}, "50 % predicted": {"loss": b * ratio * (1 + e)}}}
            for b, e in zip((2.0, 2.1, 1.9, 2.05, 1.95), (1e-3, -1e-3, 2e-3, 0.0, -2e-3), strict=True)
        ]

    (row,) = hypotheses.equivalences(runs(1.05))
    assert not row["equal"]
    assert row["holm"] < 0.01
    (row,) = hypotheses.equivalences(runs(1.005))
    assert row["equal"]
    assert "equal within 2 %" in hypotheses.equivalence_lines([row])[0]


def test_likelihood_of_a_long_text_counts_every_byte_once() -> None:
    class Uniform(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(()))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            assert tokens.shape[1] <= 8
            return torch.zeros(*tokens.shape, 256) + self.w

    model = Uniform()
    for length in (2, 8, 9, 10, 30):
        assert minimal_pairs.log_likelihood(model, "a" * length, 8) == pytest.approx(-(length - 1) * math.log(256))
    assert minimal_pairs.accuracy(model, [("abc", "abcd"), ("abcd", "abc")], 8) == 0.5


def test_a_page_shows_it_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(program.SCALES, "tiny", HALF)
    page = validation.page(folder)
    assert "Hypotheses" in page
    assert "jump of zero" in page
    assert "<script" not in page
    assert validation.holds(folder)
    assert not validation.holds(folder / "collected")


def test_what_is_kept_is_judged_with_the_seeds_that_each_experiment_has(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(program.SCALES, "tiny", HALF)
    for path in folder.glob("experiment[45]-tiny-seed*.json"):
        if path.name != "experiment5-tiny-seed1.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    before = sorted(tmp_path.iterdir())
    assert main(["validate", "--kept", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "experiment 4: hybrid training, tiny, 2 seeds" in said
    assert "experiment 5: residual correction, tiny, 1 seeds" in said
    assert [p for p in sorted(tmp_path.iterdir()) if p.suffix == ".json"] == before
    assert main(["validate", "--kept", "--scale", "small", "--out", str(tmp_path)]) == 2
    assert "holds no results of --scale small" in capsys.readouterr().err


def test_acceptance_tables_stand_beside_their_claims(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(program.SCALES, "tiny", HALF)
    account = accounting.kept(folder, "tiny", silent)
    plain, ours = account["runs"]["plain"], account["runs"]["50 % predicted"]
    assert plain["backwards"] > ours["backwards"]
    assert account["per_step"]["backward"] == pytest.approx(2 * account["per_step"]["forward"], rel=0.1)
    assert plain["joules"] is not None or plain["no_energy"]
    assert accounting.kept(folder, "tiny", lambda _: pytest.fail("measured again"))["per_step"] == account["per_step"]
    found = acceptance.tables(program.validate((4, 5), "tiny", 2, folder, silent), account)
    assert len(found) == 5
    rows = {row["what"]: row for rows in found.values() for row in rows}
    assert rows["7B"]["verdict"].startswith("not measured")
    assert rows["loss over the conventional one"]["measured"] is not None
    assert "claimed" in acceptance.format_text(found)
    assert "| what |" in acceptance.markdown(found)


def test_energy_is_read_where_it_can_be(tmp_path: Path) -> None:
    (tmp_path / "intel-rapl:0").mkdir()
    counter = tmp_path / "intel-rapl:0" / "energy_uj"
    counter.write_text("1000000\n")
    meter = accounting.Energy(tmp_path)
    counter.write_text("3500000\n")
    if not torch.cuda.is_available():
        assert meter.joules() == pytest.approx(2.5)
        counter.write_text("5\n")
        assert meter.joules() is None  # it went round
        none = accounting.Energy(tmp_path / "nothing")
        assert none.joules() is None
        assert "RAPL" in none.reason


@pytest.mark.parametrize("name", ["horizon", "confidence"])
def test_one_thing_is_changed_at_a_time(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ablations.SCALES, "tiny", replace(HALF, steps=40))
    monkeypatch.setitem(ablations.VALUES, name, ablations.VALUES[name][:2])
    found = ablations.measure(name, "tiny", 1, tmp_path, silent)
    assert [row["value"] for row in found["rows"]] == list(ablations.VALUES[name])
    monkeypatch.setattr(ablations, "forced", lambda *_: pytest.fail("run again"))
    again = ablations.measure(name, "tiny", 1, tmp_path, silent)
    assert again == found
    assert "jumps of zero" in ablations.format_text(found) + ablations.markdown(found)


def test_the_harness_is_asked_for_or_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "MODULE", "no_such_harness")
    with pytest.raises(ModuleNotFoundError, match=r"hybrid-predict-trainer\[harness\]"):
        harness.evaluate(tmp_path, tmp_path)
    monkeypatch.setattr(harness, "MODULE", "json")
    with pytest.raises(ConfigError, match="save_pretrained"):
        harness.evaluate(tmp_path, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="harness failed"):  # what is run here is no harness
        harness.evaluate(tmp_path, tmp_path)


def test_results_of_the_harness_are_read(tmp_path: Path) -> None:
    assert "cannot reach the hub" in harness.failure("Traceback ...\nrequests.exceptions.ConnectionError: no route")
    assert harness.failure("one\nValueError: two\n\n").endswith("ValueError: two")
    with pytest.raises(ConfigError, match="no results"):
        harness.results_in(tmp_path)
    (tmp_path / "model").mkdir()
    found = {"results": {"arc_easy": {"acc,none": 0.25, "alias": "arc_easy"}}}
    (tmp_path / "model" / "results_1.json").write_text(json.dumps(found))
    assert harness.results_in(tmp_path) == {"arc_easy": {"acc,none": 0.25}}


def test_names_of_ablations_are_those_of_the_command() -> None:
    assert tuple(ablations.VALUES) == names.ABLATIONS


def test_a_file_that_holds_no_pairs_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(b"no gzip")
    with pytest.raises(ConfigError, match="minimal pairs"):
        minimal_pairs.load(path)
