"""The experiments of the validation protocol: known answers, controls, and what a wrong folder is told."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from hybrid_predict_trainer import ConfigError
from hybrid_predict_trainer.cli import main
from hybrid_predict_trainer.experiments.validation import (
    ablations,
    accounting,
    collection,
    gradients,
    losses,
    plain,
    program,
)
from hybrid_predict_trainer.experiments.validation.criteria import Criterion, over_seeds
from hybrid_predict_trainer.experiments.validation.plain import Recorded, Scale, Sketch
from hybrid_predict_trainer.forecast import planned_rates
from hybrid_predict_trainer.tell.sinks import jsonable


def quadratic(count: int = 200, width: int = 300) -> np.ndarray:
    """Gradients of gradient descent on a quadratic: nothing is random."""
    curvature = np.linspace(0.001, 0.1, width)
    weights, found = np.ones(width), []
    for _ in range(count):
        found.append(curvature * weights)
        weights = weights - 0.1 * found[-1]
    return np.array(found)


def steps_of_a_random_walk(count: int = 200, width: int = 300, seed: int = 0) -> np.ndarray:
    return np.diff(gradients.random_walk(count + 1, width, seed), axis=0)


def test_a_random_walk_is_noise_and_a_quadratic_predictable() -> None:
    assert {gradients.verdict(steps_of_a_random_walk(seed=seed)) for seed in range(20)} == {"noise"}
    assert gradients.verdict(quadratic()) == "predictable"
    mixed = 0.3 * quadratic() / quadratic().std() + steps_of_a_random_walk()
    assert gradients.verdict(mixed) == "partly predictable"


def test_positions_of_a_random_walk_pass_the_bar_on_components() -> None:
    """6 / pi^2 k^2 of the variance is in component k (Antognini & Sohl-Dickstein, 2018): 94 % in ten."""
    assert gradients.component_share(gradients.random_walk(400, 2000), 10) == pytest.approx(0.942, abs=0.01)
    assert gradients.component_share(gradients.random_walk(400, 2000), 1) == pytest.approx(0.608, abs=0.04)


def test_momentum_alone_passes_the_bar_on_updates() -> None:
    noise = steps_of_a_random_walk(300, 400)
    found = {bar.name: bar for bar in gradients.criteria(noise, noise)}
    bar = found["mean cosine of adjacent updates"]
    assert bar.control == pytest.approx(0.9, abs=0.02)
    assert bar.control_passes
    assert not bar.passed


def test_order_in_time_is_found_where_it_is() -> None:
    assert gradients.order_p(quadratic(), 50) < 0.01
    assert gradients.order_p(quadratic(), 1) < 0.01
    p = [gradients.order_p(steps_of_a_random_walk(60, 100, seed), 10) for seed in range(40)]
    assert np.mean(np.array(p) < 0.05) < 0.2


def test_a_pass_that_the_control_shares_is_no_evidence() -> None:
    bar = {"name": "x", "bar": 0.5, "sense": "above", "control_name": "noise"}
    assert Criterion(**bar, value=0.9, control=0.1).verdict == "PASS"
    assert "no evidence" in Criterion(**bar, value=0.9, control=0.6).verdict
    assert Criterion(**bar, value=0.4, control=0.6).verdict == "FAIL"
    assert Criterion(**bar, value=float("nan"), control=0.6).verdict == "FAIL"
    (row,) = over_seeds([[Criterion(**bar, value=v, control=0.1).to_json()] for v in (0.4, 0.8)])
    assert row["seeds_passed"] == 1
    assert row["value"] == pytest.approx(0.6)
    assert row["interval"][0] < 0.4


def test_a_sketch_keeps_cosines() -> None:
    import torch

    sketch = Sketch(20_000, 4096, 0)
    draw = torch.Generator().manual_seed(0)
    one = torch.randn(20_000, generator=draw)
    other = one + torch.randn(20_000, generator=draw)
    a, b = sketch.of(one), sketch.of(other)
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) == pytest.approx(2**-0.5, abs=0.05)


def run_of(noise: float, seed: int = 0) -> Recorded:
    """A loss that follows a power law."""
    steps = np.arange(1, 601)
    loss = (2 + 3 * steps**-0.5) * np.exp(noise * np.random.default_rng(seed).normal(size=600))
    walk = steps_of_a_random_walk(120, 64, seed)
    return Recorded(loss, planned_rates("constant:warmup=10", 600), walk, walk, 0.01)


def test_a_smooth_loss_is_told_better_by_the_law_than_by_its_average() -> None:
    found = losses.measure(run_of(0.0).losses, run_of(0.0).rates)
    assert found["predictors"]["law"]["mae_of_range"] < 0.1 * found["predictors"]["moving average"]["mae_of_range"]
    assert found["predictors"]["law"]["r2"] > 0.9
    assert losses.decision(found) == "continue"


def test_noise_fails_and_the_ceiling_says_why() -> None:
    found = losses.measure(run_of(0.05).losses, run_of(0.05).rates)
    assert found["predictors"]["law"]["r2"] < 0.5
    assert found["r2_ceiling"] < 0.6
    assert losses.by_fit(0.5) == "stop"
    assert losses.by_fit(0.8) == "refine"


def test_finished_seeds_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    monkeypatch.setitem(program.SCALES, "tiny", Scale(steps=600))
    monkeypatch.setattr(program, "record", lambda scale, seed, tell: trained.append(seed) or run_of(0.01, seed))
    first = program.validate((1, 2), "tiny", 2, tmp_path, lambda line: None)
    assert trained == [0, 1]
    assert list(first["experiments"]) == ["2", "1"]
    (tmp_path / "experiment1-tiny-seed1.json").unlink()
    again = program.validate((1, 2), "tiny", 2, tmp_path, lambda line: None)
    assert trained == [0, 1, 1]
    for number in ("1", "2"):
        assert again["experiments"][number]["criteria"] == first["experiments"][number]["criteria"]
    assert "FAIL" in program.format_text(again)
    assert "| criterion |" in program.markdown(again)


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda d: {**d, "format": 99}, "another version"), (lambda d: {**d, "criteria": 3}, "damaged"),
    (lambda d: {**d, "config": {**d["config"], "steps": 1}}, "other sizes"),
])  # fmt: skip
def test_a_folder_of_another_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], spoil: object, said: str
) -> None:
    monkeypatch.setattr(program, "record", lambda scale, seed, tell: run_of(0.01, seed))
    arguments = ["validate", "--experiment", "2", "--out", str(tmp_path)]
    assert main(arguments) == 0
    path = tmp_path / "experiment2-tiny-seed0.json"
    path.write_text(json.dumps(spoil(json.loads(path.read_text()))))  # type: ignore[operator]
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


#: Ways to damage a stored result within its criteria and results.
DAMAGE = {
    "a figure is gone": lambda d: d["criteria"][0].pop("control"),
    "another kind": lambda d: d["criteria"][0].update(passed="yes"),
    "a list for a number": lambda d: d["criteria"][0].update(value=[]),
    "no name": lambda d: d["criteria"][0].update(name=None),
    "no decision": lambda d: d["results"].update(decision=None),
    "time": lambda d: d.update(cpu_seconds="long"),
}


def refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command ends."""
    capsys.readouterr()
    assert main(command) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


@pytest.mark.parametrize("name", DAMAGE)
def test_a_result_that_is_damaged_within_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr(program, "record", lambda scale, seed, tell: run_of(0.01, seed))
    arguments = ["validate", "--experiment", "2", "--out", str(tmp_path)]
    assert main(arguments) == 0
    path = tmp_path / "experiment2-tiny-seed1.json"
    found = json.loads(path.read_text())
    DAMAGE[name](found)
    path.write_text(json.dumps(found))
    for command in (arguments, ["report", str(tmp_path)]):
        assert "experiment2-tiny-seed1.json: is damaged" in refused(command, capsys)


def test_seeds_with_other_criteria_and_a_page_without_its_figures_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "record", lambda scale, seed, tell: run_of(0.01, seed))
    arguments = ["validate", "--experiment", "2", "--out", str(tmp_path)]
    assert main(arguments) == 0
    path = tmp_path / "experiment2-tiny-seed1.json"
    whole = json.loads(path.read_text())
    for damaged, command in (
        ({**whole, "criteria": whole["criteria"][1:]}, arguments),
        ({**whole, "results": {"decision": "stop"}}, ["report", str(tmp_path)]),
    ):
        path.write_text(json.dumps(damaged))
        assert "holds a result that is damaged" in refused(command, capsys)


@pytest.mark.parametrize(
    "runs", [[None], [{"value": 3}], [{"value": 1, "gap": [], "zero_gap": 0, "share": 0, "jumps": 0}]]
)
def test_damaged_ablations_and_accounts_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], runs: list[object]
) -> None:
    config = jsonable(asdict(program.SCALES["tiny"]))
    path = tmp_path / "ablation-horizon-tiny-seed0.json"
    path.write_text(json.dumps({"format": ablations.FORMAT, "config": config, "runs": runs}))
    assert main(["validate", "--ablation", "horizon", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{path}: is damaged" in error
    assert len(error.splitlines()) == 1
    path = tmp_path / "account-tiny.json"
    account = {"format": accounting.FORMAT, "config": config, "runs": {"plain": runs[0]}, "per_step": {}}
    path.write_text(json.dumps(account))
    with pytest.raises(ConfigError, match=r"account-tiny\.json: is damaged"):
        accounting.kept(tmp_path, "tiny", lambda line: None)


def test_what_could_not_be_collected_is_collected_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full disk is one line, and the result, which says that all is there, is not written."""

    def whole(seed: int) -> Recorded:
        found = run_of(0.01, seed)
        return replace(found, gradient_norms=np.ones(len(found.losses)))

    monkeypatch.setattr(program, "record", lambda scale, seed, tell: whole(seed))
    arguments = ["validate", "--experiment", "2", "--out", str(tmp_path), "--collect"]
    real = collection.save_file

    def full(tensors: object, path: str) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(collection, "save_file", full)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "gradients.safetensors" in error
    assert "No space left" in error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("experiment*"))
    monkeypatch.setattr(collection, "save_file", real)
    assert main(arguments) == 0
    assert "left nothing" not in capsys.readouterr().err
    (tmp_path / "collected" / "tiny-seed1" / "metrics.jsonl").unlink()
    assert main(arguments) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "left nothing" in line]
    assert len(said) == 1
    assert "seed1" in said[0]


def test_one_seed_and_a_torn_file_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--seeds", "1", "--out", str(tmp_path)]) == 2
    assert "at least 2" in capsys.readouterr().err
    (tmp_path / "experiment2-tiny-seed0.json").write_text('{"format": 1, "crit')
    assert main(["validate", "--experiment", "2", "--out", str(tmp_path)]) == 2
    assert "not valid JSON" in capsys.readouterr().err


@pytest.mark.parametrize("asked", [[], ["--experiment", "3"], ["--ablation", "horizon"]])
def test_the_large_scale_needs_an_accelerator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: list[str]
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert main(["validate", "--scale", "100m", "--out", str(tmp_path), *asked]) == 2
    error = capsys.readouterr().err
    assert "needs an accelerator" in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.glob("*.json"))


def test_the_large_scale_is_trained_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert plain.settings_of(plain.SCALES["100m"]).device == "cuda"
    assert plain.settings_of(plain.SCALES["small"]).device == "cpu"


def test_a_page_about_results_of_another_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "record", lambda scale, seed, tell: run_of(0.01, seed))
    assert main(["validate", "--experiment", "2", "--out", str(tmp_path)]) == 0
    for spoil, said in (({"format": 99}, "another version"), ({"results": None}, "damaged")):
        path = tmp_path / "experiment2-tiny-seed0.json"
        whole = path.read_text()
        path.write_text(json.dumps({**json.loads(whole), **spoil}))
        capsys.readouterr()
        assert main(["report", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert len(error.splitlines()) == 1
        path.write_text(whole)
