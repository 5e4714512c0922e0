"""``hpt train`` with closed-form moves: tasks that hand out residuals or outputs, and those that do not."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from hybrid_predict_trainer.cli import hpt as cli
from hybrid_predict_trainer.tasks import TASKS, TaskSettings, make_task
from hybrid_predict_trainer.tasks.base import HasSolution
from hybrid_predict_trainer.tasks.labelled import ReadsLabelled


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def train(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    status = cli.main(["train", *map(str, argv)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("name", ["gauss_newton", "ntk", "portfolio"])
def test_an_equation_is_trained_in_closed_form_and_its_error_is_shown(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    status, said, told = train(
        capsys, "--task", "oscillator", "--batch-size", "24", "--predictor", name, "--steps", "45", "--out", out,
        "--set", "metrics.log_interval=1",
    )  # fmt: skip
    assert status == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["statistics"]["num_jumps_accepted"] > 0
    assert f"relative L2 error {summary['solution_error']:.2e}" in said
    assert "rel. error " in told
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    errors = [r["solution_error"] for r in records if r["event"] == "validation"]
    assert len(errors) >= 3
    assert errors[-1] == summary["solution_error"]


def test_a_resumed_run_is_the_whole_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--task", "regression", "--batch-size", "30", "--predictor", "gauss_newton", "--steps", "60",
            "--set", "checkpoint.save_interval=3"]  # fmt: skip
    assert train(capsys, *argv, "--out", tmp_path / "whole")[0] == 0
    assert train(capsys, *argv, "--out", tmp_path / "cut")[0] == 0
    kept = sorted((tmp_path / "cut" / "checkpoints").glob("checkpoint_step_*"), key=lambda p: int(p.name.split("_")[2]))
    assert 0 < int(kept[-2].name.split("_")[2]) < 60
    shutil.rmtree(kept[-1])
    (tmp_path / "cut" / "summary.json").unlink()
    assert train(capsys, "--resume", "--out", tmp_path / "cut")[0] == 0
    results = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "cut")]
    assert results[0]["final_val_loss"] == results[1]["final_val_loss"]
    assert results[0]["solution_error"] == results[1]["solution_error"]


class Labelled(ReadsLabelled):
    settings = TaskSettings()


def test_classifiers_hand_out_their_outputs() -> None:
    torch.manual_seed(0)
    task, model = Labelled(), torch.nn.Linear(4, 3)
    batch = torch.randn(32, 4), torch.arange(32) % 3
    logits, loss = task.output_fn(model, batch)
    assert logits.shape == (32, 3)
    assert loss(logits).item() == task.loss_fn(model, batch).item()
    assert loss(torch.zeros(32, 3)).item() == pytest.approx(math.log(3))


@pytest.mark.parametrize("argv", [["--predictor", "gauss_newton"], ["--predictor", "ntk", "--record"]])
def test_what_cannot_be_is_one_line(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over a lazy dog " * 400)
    task = ["pinn-poisson"] if "--record" in argv else ["gpt", "--preset", "0.3M", "--context", "8", "--data", text]
    status, said, told = train(capsys, "--task", *task, *argv, "--steps", "5", "--out", tmp_path / "run")
    assert (status, said, told.count("\n")) == (2, "", 1)
    assert ("nothing to record" if "--record" in argv else "needs residuals, and task gpt has none") in told
    assert not (tmp_path / "run").exists()


def test_every_task_with_a_solution_tells_its_error() -> None:
    for name in TASKS:
        if name in ("gpt", "gpt-modern", "finetune", "bert", "digits", "digits-mlp", "cifar"):
            continue
        task = make_task(name, TaskSettings(batch_size=20))
        assert isinstance(task, HasSolution)
        assert 0 < task.solution_error(task.build_model(0)) < 100
