"""`hpt`: exit statuses, one line per mistake, one JSON object, resume bit for bit, signals."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import tqdm.std

from hybrid_predict_trainer.cli import hpt as cli
from hybrid_predict_trainer.cli import progress
from hybrid_predict_trainer.experiments import train as single
from hybrid_predict_trainer.experiments.bench import overhead
from hybrid_predict_trainer.keep.stop_signal import StopSignal
from hybrid_predict_trainer.records import DivergenceError

#: A small language model whose trainer proposes (and is mostly refused) all the time.
GPT = [
    "--task", "gpt", "--preset", "0.3M", "--batch-size", "4", "--context", "16", "--data-bytes", "200000",
    "--set", "predictor.window=2", "--set", "training.full_steps=2", "--set", "training.explore_outcomes=999",
    "--set", "gate.overhead_budget=1.0", "--set", "gate.max_backoff=1", "--set", "metrics.log_interval=1",
]  # fmt: skip
PINN = ["--task", "pinn-poisson", "--batch-size", "16"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Other work runs beside the tests."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert cli.main(["train", *PINN, "--steps", "40", "--out", str(out), "--seed", "2"]) == 0
    return out


def run(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    """Status, standard output, standard error of a command."""
    capsys.readouterr()
    status = cli.main([str(a) for a in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def model_bytes(out: Path) -> tuple[str, bytes]:
    """Name and weights of the latest checkpoint."""
    latest = out / "checkpoints" / (out / "checkpoints" / "latest").read_text().strip()
    return latest.name, (latest / "model_weights.safetensors").read_bytes()


# ---- divergence -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["--plain"], []], ids=["plain", "hybrid"])
@pytest.mark.parametrize("lr", ["10", "1e30"])
def test_a_run_that_diverges_ends_with_status_4(
    flags: list[str], lr: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    argv = ["train", "--task", "regression", "--optimizer", "sgd", "--lr", lr, "--steps", "90", "--json", *flags]
    status, printed, said = run(capsys, *argv, "--out", out)
    assert (status, printed) == (cli.DIVERGED, "")
    assert re.match(r"hpt: error: .*(NaN or infinity has reached|no usable loss)", said.splitlines()[-1])


def test_a_validation_loss_that_is_not_finite_is_a_divergence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(single.Validation, "final", lambda self: float("inf"))
    status, _, said = run(capsys, "train", *PINN, "--steps", "5", "--plain", "--out", tmp_path / "run")
    assert (status, "the validation loss is inf" in said) == (cli.DIVERGED, True)
    assert (tmp_path / "run" / "summary.json").exists()


# ---- bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train"], r"--task is needed: one of gpt, .*pinn-poisson"),
        (["train", "--task", "gtp"], r"unknown task 'gtp'; did you mean 'gpt'\?"),
        (["train", "--task", "gpt", "--preset", "10G"], r"unknown preset .*'10G'; did you mean '10M'\?"),
        (["train", *PINN, "--preset", "big"], r"unknown preset 'big' \(valid: 10k, 50k, 200k\)"),
        (["train", *PINN, "--context", "8"], r"has no use for the setting 'context'"),
        (["train", *PINN, "--set", "training.ful_steps=3"], r"unknown key 'training.ful_steps'; did you mean"),
        (
            ["train", *PINN, "--set", "training.full_steps=0"],
            r"full_steps = 0 is out of range: must be in \[1, ",
        ),
        (["train", *PINN, "--set", "training.full_steps=x"], r"must be a whole number"),
        (["train", *PINN, "--set", "training.full_steps"], r"must be KEY=VALUE"),
        (["train", *PINN, "--steps", "0"], r"argument --steps: 0 is out of range: must be a whole number >= 1"),
        (["train", *PINN, "--steps", "many"], r"argument --steps: 'many' must be a whole number >= 1"),
        (["train", *PINN, "--lr", "-1"], r"argument --lr: -1 is out of range: must be a number > 0"),
        (["train", *PINN, "--lr", "nan"], r"argument --lr: nan is out of range"),
        (["train", *PINN, "--batch-size", "0"], r"argument --batch-size: 0 is out of range"),
        (["train", *PINN, "--config", "missing.toml"], r"missing.toml: cannot be read: No such file"),
        (
            ["train", *PINN, "--config-preset", "smal"],
            r"unknown preset 'smal': .*did you mean 'small'\?",
        ),
        (["train", *PINN, "--predictor", "sekant"], r"unknown predictor 'sekant'; did you mean 'secant'\?"),
        (
            ["train", *PINN, "--optimizer", "lbfgs"],
            r"unknown optimizer 'lbfgs'.* \(valid: adamw, adamw8bit, adam, sgd, muon\)",
        ),
        (["train", *PINN, "--schedule", "step"], r"unknown schedule 'step'"),
        (["train", *PINN, "--device", "warp"], r"unknown device 'warp'"),
        (["train", *PINN, "--device", "cuda:77"], r"device 'cuda:77' is not available"),
        (["train", *PINN, "--dtype", "int8"], r"argument --dtype: invalid choice"),
        (["train", "--task", "gpt", "--data", "nowhere.txt"], r"no file or folder nowhere.txt"),
        (["train", "--task", "gpt", "--data", ""], r"data is an empty name"),
        (["train", "--task", "digits", "--data", " "], r"data is an empty name"),
        (["train", "--task", "gpt", "--context", "999999999"], r"fewer than context \+ 1 = 1000000000; give more text"),
        (["train", "--resume"], r"--resume needs --out"),
        (["train", "--resume", "--out", "nowhere"], r"no run to resume"),
        (["compare", *PINN, "--seeds", "0"], r"argument --seeds: 0 is out of range: must be a whole number >= 1"),
        (["compare", *PINN, "--budgets", "1,-2"], r"argument --budgets: -2 is out of range: must be a number > 0"),
        (["compare", *PINN, "--budgets", "1,,2"], r"argument --budgets: '' must be a number"),
        (["compare"], r"--task is needed: one of gpt"),
        (["inspect", "nowhere"], r"nowhere: no such folder"),
        (["inspect", "."], r"is no checkpoint and holds none"),
        (["report", "nowhere"], r"nowhere: no such directory"),
        (["report", "."], r"nothing to report"),
        (["bench", "overhead", "--preset", "11M"], r"unknown preset .*'11M'"),
        (["bench", "speed"], r"invalid choice: 'speed'"),
        (["bench", "overhead", "--steps", "3"], r"argument --steps: 3 is out of range: must be a whole number >= 30"),
        (["train", "--preset", "small"], r"--task is needed"),
        (["train", *PINN, "--preset", "debug", "--config-preset", "small"], r"name different settings"),
        (["train", *PINN, "--log", "loud"], r"argument --log: invalid choice: 'loud'"),
        (["doctor", "nowhere"], r"nowhere: no records of a run can be read"),
        (["doctor", "."], r"no records of a run can be read"),
        (["doctor"], r"required: RUN"),
        (["watch", "nowhere", "--once"], r"nowhere: no records of a run can be read"),
        (["watch", ".", "--every", "0"], r"argument --every: 0 is out of range: must be a number >= 0.1"),
        (["forecast", "nowhere"], r"nowhere"),
        (["forecast", "nowhere", "--level", "2"], r"argument --level: 2 is out of range"),
        (["forecast", "nowhere", "--prior", "oracle"], r"unknown prior 'oracle'"),
        (["validate", "--scale", "huge"], r"argument --scale: invalid choice: 'huge'"),
        (["validate", "--experiment", "0"], r"argument --experiment: 0 is out of range"),
        (["probe"], r"--task is needed"),
        (["probe", "--task", "x"], r"unknown task 'x'"),
        (["plan"], r"give a size \(--params 1B\) or a task's model"),
        (["plan", "--params", "large"], r"--params large: a size such as 350M"),
        (["plan", "--params", "1B", "--gpu", "16"], r"--gpu 16: a size such as"),
        (["export", "nowhere"], r"nowhere: there is no record"),
        (["sweep", "--task", "gpt"], r"required: --space, --budget"),
        (["forecast", "."], r"holds no metrics.jsonl"),
        (["validate", "--seeds", "0"], r"argument --seeds: 0 is out of range"),
        (["compare", *PINN, "--resume"], r"--resume needs --out"),
        (["bench", "regimes", "--regime", "x"], r"unknown regime 'x'"),
        (["bench", "harm", "--jobs", "0"], r"argument --jobs: 0 is out of range"),
        (["bench", "stack", "--without", "x"], r"unknown factor 'x'"),
        (["bench", "predictors", "--seeds", "0"], r"argument --seeds: 0 is out of range"),
        (["bench", "costs", "--threads", "0"], r"argument --threads: 0 is out of range"),
        (["bench", "report", "nowhere"], r"nowhere: no such directory"),
        (["trian"], r"invalid choice: 'trian' \(choose from .*train.*compare.*inspect.*report.*bench"),
        ([], r"required: COMMAND"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("hpt")
    assert re.search(words, err), err
    assert list(tmp_path.iterdir()) == []  # nothing was begun


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"is empty; pass a file with text in it"),
        (b"\0\1\2" * 100, r"binary"),
        (b"short", r"fewer than context \+ 1"),
    ],
)
def test_bad_text_is_one_line_and_status_2(
    content: bytes, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    status, out, err = run(capsys, "train", "--task", "gpt", "--data", tmp_path / "text.txt", "--out", tmp_path / "run")
    assert (status, out) == (2, "")
    assert re.search(words, err)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        ["probe", "--task", "regression", "--toml"], ["validate", "--markdown"], ["bench", "probe", "--markdown"],
        ["bench", "forecast", "--write-priors"], ["doctor", ".", "--patch"],
    ],
)  # fmt: skip
def test_a_place_that_cannot_be_written_is_told_before_anything_is_computed(
    command: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in cli.COMMANDS.values():
        monkeypatch.setattr(f"hybrid_predict_trainer.cli{module}.run", lambda args: pytest.fail("it was computed"))
    (tmp_path / "file").write_text("x")
    for place, words in ((tmp_path, "is a folder"), (tmp_path / "file" / "a.md", "is no folder")):
        status, _, err = run(capsys, *command, place)
        assert status == 2
        assert words in err
        assert err.count("\n") == 1
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "no right to write" in run(capsys, *command, tmp_path / "new" / "a.md")[2]


@pytest.mark.parametrize(
    ("text", "words"),
    [("[training]\nful_steps = 3", r"c.toml: unknown key 'training.ful_steps'"), ("a =", r"c.toml: not valid TOML")],
)
def test_a_bad_config_file_is_named(text: str, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(text)
    status, _, err = run(capsys, "train", *PINN, "--config", tmp_path / "c.toml", "--out", tmp_path / "run")
    assert status == 2
    assert re.search(words, err)
    assert err.count("\n") == 1


def test_divergence_is_status_4(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*args: object, **kwargs: object) -> None:
        raise DivergenceError("20 steps in a row had no finite loss")

    monkeypatch.setattr(single, "train", diverge)
    status, out, err = run(capsys, "train", *PINN, "--out", tmp_path / "run")
    assert (status, out) == (4, "")
    assert "20 steps in a row" in err


# ---- settings -------------------------------------------------------------------------------------------


def test_flags_win_over_file_over_preset_over_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.toml").write_text('[training]\nfull_steps = 7\nmax_predict_steps = 44\n[predictor]\ntype = "hold"\n')
    flags = ["--config-preset", "large", "--config", tmp_path / "c.toml", "--set", "training.max_predict_steps=33"]
    status, _, _ = run(capsys, "train", *PINN, "--steps", "3", "--out", tmp_path / "run", *flags)
    assert status == 0
    written = (tmp_path / "run" / "config.toml").read_text()
    assert "warmup_steps = 500" in written  # preset
    assert "full_steps = 7" in written  # file over preset
    assert 'type = "hold"' in written  # file over recipe
    assert "max_predict_steps = 33" in written  # flag


def test_a_short_run_leaves_warm_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "train", *PINN, "--steps", "50", "--out", tmp_path / "run")[0] == 0
    assert "warmup_steps = 5\n" in (tmp_path / "run" / "config.toml").read_text()


# ---- train ----------------------------------------------------------------------------------------------


def test_train_writes_its_files_and_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--steps", "30", "--set", "metrics.log_interval=10", "--predictor", "secant"]
    status, out, err = run(capsys, "train", *PINN, *flags, "--out", tmp_path / "run", "--json")
    assert status == 0
    found = json.loads(out)
    assert found["completed"] is True
    assert found["final_val_loss"] > 0
    assert found["statistics"]["cost_units"] >= 30 * 3.1
    assert found["environment"]["torch"] == torch.__version__
    assert err.count("\n") == 3
    assert "10/30" in err
    names = {p.name for p in (tmp_path / "run").iterdir()} - {".lock"}
    assert names == {"run.json", "config.toml", "metrics.jsonl", "summary.json", "recipe.toml", "checkpoints"}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["final_val_loss"] == found["final_val_loss"]


def test_a_used_folder_is_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (trained / "metrics.jsonl").read_bytes()
    status, _, err = run(capsys, "train", *PINN, "--steps", "40", "--out", trained)
    assert status == 2
    assert "holds another run (run.json); add --resume" in err
    assert run(capsys, "compare", *PINN, "--steps", "40", "--out", trained)[0] == 2
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_a_folder_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with single.locked(tmp_path / "run"):
        status, _, err = run(capsys, "train", *PINN, "--steps", "4", "--out", tmp_path / "run")
    assert status == 2
    assert "another process" in err


def test_resuming_a_finished_run_changes_nothing(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = model_bytes(trained)
    status, out, _ = run(capsys, "train", "--resume", "--out", trained, "--json")
    assert status == 0
    assert json.loads(out)["completed"] is True
    assert json.loads(out)["seed"] == 2
    assert model_bytes(trained) == before


@pytest.mark.parametrize(
    "flags", [["--steps", "50"], ["--task", "gpt"], ["--lr", "1e-3"], ["--seed", "7"], ["--plain"]]
)
def test_a_resumed_run_cannot_be_another(flags: list[str], trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "train", "--resume", "--out", trained, *flags)
    assert status == 2
    assert "was started with" in err
    assert flags[0] in err


def test_a_damaged_checkpoint_is_status_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "train", *PINN, "--steps", "5", "--out", tmp_path / "run")[0] == 0
    for folder in (tmp_path / "run" / "checkpoints").glob("checkpoint_*"):
        (folder / "model_weights.safetensors").write_bytes(b"damaged")
    status, out, err = run(capsys, "train", "--resume", "--out", tmp_path / "run")
    assert (status, out) == (3, "")
    assert "no intact checkpoint" in err
    assert "Traceback" not in err
    assert run(capsys, "inspect", tmp_path / "run")[0] == 3


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals) -> None:
    """Send this process a signal while it takes a step."""
    original = progress.Progress.__call__

    def call(self: progress.Progress, result: Any) -> None:
        if result.step == step:
            os.kill(os.getpid(), number)
        original(self, result)

    monkeypatch.setattr(progress.Progress, "__call__", call)


@pytest.mark.parametrize("task", [GPT, [*PINN, "--set", "predictor.window=2", "--set", "training.full_steps=2"]])
def test_an_interrupted_run_resumes_bit_for_bit(
    task: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*task, "--steps", "120", "--json"]
    status, out, _ = run(capsys, "train", *flags, "--out", tmp_path / "straight")
    assert status == 0
    straight = json.loads(out)
    counts = straight["statistics"]
    rows = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    last = max(row["step"] for row in rows if "step" in row)
    jumps = [row["step"] for row in rows if row["event"] == "jump" and row["step"] + 1 < last]  # a run may end with one
    assert jumps
    # the batch of a refused proposal is used again: stop just after one, and after the step that does so
    stops = (3, jumps[0], *(step + 1 for step in jumps[:4]))
    for step in stops:
        interrupt_at(monkeypatch, step, signal.SIGINT if step % 2 else signal.SIGTERM)
        resume = ["--resume"] if step != stops[0] else []
        argv = ["train", *(flags if not resume else ["--json"]), *resume, "--out", str(tmp_path / "broken")]
        status, out, _ = run(capsys, *argv)
        assert status == (130 if step % 2 else 143)
        assert json.loads(out)["completed"] is False
        assert model_bytes(tmp_path / "broken")[0] == f"checkpoint_step_{step}"
        monkeypatch.undo()
        torch.manual_seed(99)  # a new process knows nothing of the old one
    status, out, _ = run(capsys, "train", "--resume", "--out", tmp_path / "broken", "--json")
    assert status == 0
    assert model_bytes(tmp_path / "broken") == model_bytes(tmp_path / "straight")
    resumed = json.loads(out)
    assert resumed["statistics"] == counts
    assert resumed["final_val_loss"] == straight["final_val_loss"]


def test_a_killed_process_leaves_what_it_resumes_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["train", *GPT, "--steps", "150", "--threads", "1", "--out"]
    command = [sys.executable, "-m", "hybrid_predict_trainer.cli", *flags, str(tmp_path / "broken")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    assert process.stderr is not None
    for line in process.stderr:
        if re.match(r"\d\d/150", line):
            process.send_signal(signal.SIGTERM)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "add --resume to continue" in out
    assert run(capsys, "train", "--resume", "--out", tmp_path / "broken")[0] == 0
    assert run(capsys, *flags, tmp_path / "straight")[0] == 0
    assert model_bytes(tmp_path / "broken") == model_bytes(tmp_path / "straight")


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        assert signal.getsignal(signal.SIGINT) != before
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.exit_status == 130
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # the second one ends the process
    assert signal.getsignal(signal.SIGINT) == before


# ---- the other commands -----------------------------------------------------------------------------------


def test_inspect_takes_a_checkpoint_or_the_folder_of_a_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, _ = model_bytes(trained)
    paths = [trained, trained / "checkpoints", trained / "checkpoints" / name]
    found = [json.loads(run(capsys, "inspect", path, "--json")[1]) for path in paths]
    assert found[0] == found[1] == found[2]
    assert found[0]["verified"] is True
    assert found[0]["num_parameters"] > 1000
    assert (found[0]["withdrawn"], found[0]["num_guard_alarms"], found[0]["num_failures"]) == (False, 0, 0)
    status, out, _ = run(capsys, "inspect", trained)
    assert status == 0
    assert "model_weights.safetensors" in out


def test_report_writes_the_page(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "report", trained, "--out", tmp_path / "page.html", "--json")
    assert status == 0
    assert json.loads(out)["report"] == str(tmp_path / "page.html")
    assert "<html" in (tmp_path / "page.html").read_text()


KEYS = {
    "task", "seeds", "arms", "speedup_at_equal_loss", "ci95", "speedup_ci95", "speedup_reason", "speedup_per_seed",
    "speedup_lower_bound", "speedup_wall", "loss_gap_at_equal_cost_pct", "backward_reduction_pct", "environment",
    "settings", "sweep", "verdict",
}  # fmt: skip
ARM_KEYS = {
    "name", "final_val_loss", "final_val_loss_std", "n", "cost_units", "wall_s", "num_forward", "num_backward",
    "num_real_steps", "num_claimed_steps", "num_credited_steps", "num_jumps_proposed", "num_jumps_accepted", "lr",
}  # fmt: skip


def test_compare_prints_one_object_or_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["compare", *PINN, "--steps", "40", "--seeds", "2", "--budgets", "0.5,2", "--out", tmp_path / "out"]
    status, out, err = run(capsys, *flags, "--json")
    assert status == 0
    found = json.loads(out)
    assert found.keys() >= KEYS
    assert found["seeds"] == [0, 1]
    for arm in found["arms"]:
        assert arm.keys() >= ARM_KEYS
        assert all(isinstance(arm[key], int | float) for key in ARM_KEYS - {"name"})
    assert len(err.splitlines()) == 10
    assert str(tmp_path) not in json.dumps(found["environment"])
    assert run(capsys, *flags)[0] == 2
    status, out, _ = run(capsys, *flags, "--overwrite")
    assert status == 0
    head, rule, *rows = out.splitlines()[2:9]
    assert head.startswith("arm ")
    assert set(rule) == {"-", " "}
    assert [row.split()[0] for row in rows] == ["plain", "hybrid", "jump-of-zero", "plain@0.5", "plain@2"]
    assert len({len(line) for line in (head, rule, *rows)}) == 1
    assert "speed-up at equal loss" in out


def test_bench_overhead(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--preset", "0.3M", "--batch-size", "2", "--context", "16", "--steps", "30"]
    status, out, err = run(capsys, "bench", "overhead", *flags, "--json")
    assert status == 0
    found = json.loads(out)
    assert found["num_pairs"] == 30
    assert found["num_windows"] >= 1
    assert 0 < found["ratio_p10"] <= found["full_step_ratio_median"] <= found["ratio_p90"]
    assert found["full_step_ratio_mean"] > 0
    assert found["memory_ratio_training_device"] > found["memory_ratio_training_device_offload"] >= 1
    assert found["host_syncs_per_step"] is None or found["environment"]["device"] != "cpu"
    assert found["tensor_reads_per_step_bare"] >= 1  # loss.item()
    assert found["environment"]["cpu"]
    assert "30/30" in err


def test_reads_are_counted_once_and_only_inside() -> None:
    value, ignored = torch.tensor(2.0), torch.tensor(1.0)
    with overhead.counted_reads({id(ignored)}) as counts:
        assert float(value) + value.item() + ignored.item() == 5.0
        assert bool(value > 1)
        assert torch.stack([value, value]).tolist() == [2.0, 2.0]
    value.item()
    assert sum(counts.values()) == 4
    assert "item" not in vars(torch.Tensor)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "REFRESH_S", 0.0)
    assert cli.main(["train", *PINN, "--predictor", "secant", "--steps", "20", "--out", str(tmp_path / "run")]) == 0
    drawn = stream.getvalue().split("\r\x1b[2K")
    assert re.match(
        r"\[#{12}\.{12}\] 10/20 \w+ +loss \S+  rel\. error \S+  jumps 0/0  \S+ steps/s  \d+ s left", drawn[10]
    )
    assert drawn[-1] == ""
    assert "\n" not in stream.getvalue()


def test_a_notebook_gets_a_bar_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setattr(progress, "REFRESH_S", 0.0)
    monkeypatch.setattr("tqdm.auto.tqdm", tqdm.std.tqdm)  # tqdm's own choice needs a real kernel
    assert cli.main(["train", *PINN, "--predictor", "secant", "--steps", "20", "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert "20/20" in said
    assert "phase=full" in said


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [
        (["train", *PINN, "--steps", "3"], "filelock", "cli"),
        (["compare", *PINN, "--steps", "3"], "matplotlib", "report"),
        (["compare", *PINN, "--steps", "3"], "scipy", "experiments"),
        (["bench", "harm", "--settings", "gru-linear"], "scipy", "experiments"),
        (["bench", "regimes", "--regime", "pinn"], "scipy", "experiments"),
    ],
)
def test_a_missing_library_is_named_before_anything_is_trained(
    command: list[str], module: str, extra: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, module, None)
    status, out, err = run(capsys, *command, "--out", tmp_path / "run")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f'pip install "hybrid-predict-trainer[{extra}]"' in err
    assert not (tmp_path / "run").exists()
