"""The folder of a run: resume compares, early kills lead on, links and hostile files are refused in one line."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_predict_trainer import safe_files
from hybrid_predict_trainer.cli import hpt as cli
from hybrid_predict_trainer.cli import progress
from hybrid_predict_trainer.experiments import run_folder
from hybrid_predict_trainer.experiments.arms.options import InputError
from hybrid_predict_trainer.experiments.compare import run as compare
from hybrid_predict_trainer.keep import checkpoint, housekeeping
from hybrid_predict_trainer.keep.stop_signal import StopSignal

TINY = ["--task", "pinn-poisson", "--batch-size", "16"]
TEXT = "the quick brown fox jumps over a lazy dog " * 400
GPT = ["--task", "gpt", "--preset", "0.3M", "--batch-size", "2", "--context", "8"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def run(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main([str(a) for a in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("hpt: error", "hpt "))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with data of its own, made once."""
    root = tmp_path_factory.mktemp("trained")
    (root / "c.txt").write_text(TEXT)
    argv = ["train", *GPT, "--data", str(root / "c.txt"), "--steps", "6", "--seed", "3", "--out", str(root / "run")]
    assert cli.main([*argv, "--set", "training.full_steps=20", "--set", "checkpoint.save_interval=2"]) == 0
    return root


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run beside its text; run.json points to the copy."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    told["data_path"] = told["options"]["data"] = str(tmp_path / "c.txt")
    (tmp_path / "run" / "run.json").write_text(json.dumps(told))
    return tmp_path


# ---- resume compares ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seed", "0"], "--seed 3, not 0"),
        (["--seed", "4"], "--seed 3, not 4"),
        (["--steps", "7"], "--steps 6, not 7"),
        (["--steps", "5"], "--steps 6, not 5"),
        (["--lr", "0.5"], "without --lr, not 0.5"),
        (["--batch-size", "4"], "--batch-size 2, not 4"),
        (["--context", "9"], "--context 8, not 9"),
        (["--optimizer", "sgd"], "without --optimizer, not sgd"),
        (["--schedule", "linear"], "without --schedule, not linear"),
        (["--task", "regression"], "--task gpt, not regression"),
        (["--threads", "1"], "without --threads, not 1"),
        (["--dtype", "float64"], "without --dtype, not float64"),
        (["--data", "elsewhere.txt"], "not elsewhere.txt"),
        (["--data-bytes", "100"], "without --data-bytes, not 100"),
        (["--plain"], "without --plain"),
        (["--record"], "without --record"),
        (["--fused"], "without --fused"),
        (["--predictor", "hold"], "predictor.type = secant, not hold"),
        (["--set", "training.full_steps=30"], "training.full_steps = 20, not 30"),
        (["--config-preset", "large"], ", not "),
        (["--set", "gate.max_backoff=77"], "gate.max_backoff = "),
    ],
    ids=str,
)
def test_a_differing_option_is_one_line(
    flags: list[str], words: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "train", "--resume", "--out", trained / "run", *flags)
    assert (status, out) == (2, ""), err
    (line,) = errors(err)
    assert words in line


def test_options_said_again_agree(
    copied: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copied)
    (copied / "same.toml").write_text("[checkpoint]\nsave_interval = 2\n")
    flags = [
        "--seed",
        "3",
        "--steps",
        "6",
        "--set",
        "training.full_steps=20",
        "--data",
        "c.txt",
        "--config",
        "same.toml",
    ]
    status, _, err = run(capsys, "train", "--resume", "--out", "run", *GPT, *flags)
    assert status == 0, err
    (copied / "same.toml").write_text("[gate]\nmax_backoff = 7\n")
    status, _, err = run(capsys, "train", "--resume", "--out", "run", "--config", "same.toml")
    assert (status, "gate.max_backoff = " in err, ", not 7" in err) == (2, True, True)


def test_the_data_is_found_from_another_working_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.txt").write_text(TEXT)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "train", *GPT, "--data", "c.txt", "--steps", "2", "--out", "run")[0] == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    status, _, err = run(capsys, "train", "--resume", "--out", tmp_path / "run")
    assert status == 0, err


def test_another_corpus_is_noticed(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "c.txt").write_text(TEXT.upper())
    status, _, err = run(capsys, "train", "--resume", "--out", copied / "run")
    assert status == 2
    assert "the data or the task has changed since the run was started: data.sha256 was " in err
    (copied / "c.txt").unlink()
    assert run(capsys, "train", "--resume", "--out", copied / "run")[0] == 2


@pytest.mark.parametrize("whole", [True, False], ids=["replaced", "edited"])
def test_an_edited_config_is_noticed(whole: bool, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied / "run" / "config.toml"
    path.write_text("" if whole else path.read_text().replace("full_steps = 20", "full_steps = 21"))
    status, _, err = run(capsys, "train", "--resume", "--out", copied / "run")
    assert status == 2
    words = "config.toml: was changed: " if whole else "training.full_steps is 21, the checkpoint was written with 20"
    assert words in err


def test_a_run_of_an_older_version_can_be_resumed(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied / "run" / "run.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in told.items() if k not in ("task", "data_path")}))
    assert run(capsys, "train", "--resume", "--out", copied / "run")[0] == 0


# ---- early kills ------------------------------------------------------------------------------------------


def killed_early(copied: Path, *, config: bool = True) -> Path:
    """The folder as a kill before the first checkpoint leaves it."""
    out = copied / "run"
    for path in out.iterdir():
        if path.name not in ("run.json", *(["config.toml"] if config else [])):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (out / "checkpoints" / ".tmp-checkpoint_step_0-1-000000000000000000000000").mkdir(parents=True)
    (out / "metrics.jsonl").touch()
    return out


@pytest.mark.parametrize("config", [True, False])
def test_an_early_kill_is_resumed_from_step_0(config: bool, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    straight = json.loads((copied / "run" / "summary.json").read_text())
    out = killed_early(copied, config=config)
    status, told, err = run(capsys, "train", "--resume", "--out", out, "--json")
    assert status == 0, err
    assert "has no checkpoint yet: starting from step 0" in err
    assert json.loads(told)["final_val_loss"] == straight["final_val_loss"]
    assert (out / "config.toml").exists()


def test_a_plain_start_after_an_early_kill_works(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = killed_early(copied)
    status, _, err = run(capsys, "train", *TINY, "--steps", "3", "--out", out)
    assert status == 0, err
    assert json.loads((out / "run.json").read_text())["options"]["task"] == "pinn-poisson"


def test_a_differing_option_is_noticed_without_a_checkpoint_too(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = killed_early(copied)
    assert run(capsys, "train", "--resume", "--out", out, "--set", "training.full_steps=9")[0] == 2


def test_a_trained_run_without_checkpoints_is_not_begun_anew(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copied / "run" / "checkpoints")
    before = (copied / "run" / "metrics.jsonl").read_bytes()
    status, _, err = run(capsys, "train", "--resume", "--out", copied / "run")
    assert (status, "was trained, but holds no checkpoint any more" in err) == (2, True)
    status, _, err = run(capsys, "train", *TINY, "--out", copied / "run")
    assert (status, "holds another run" in err) == (2, True)
    assert (copied / "run" / "metrics.jsonl").read_bytes() == before


def test_a_disk_that_is_full_at_the_start_is_no_dead_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["train", *TINY, "--steps", "4", "--out", tmp_path / "run"]
    refuse_saves(monkeypatch, lambda step: True)
    assert run(capsys, *argv)[0] == 3
    monkeypatch.undo()
    status, _, err = run(capsys, "train", "--resume", "--out", tmp_path / "run")
    assert (status, "starting from step 0" in err) == (0, True)


# ---- saves that fail -----------------------------------------------------------------------------------------


def refuse_saves(monkeypatch: pytest.MonkeyPatch, when: Callable[[int], bool]) -> list[int]:
    """A disk that is full while ``when`` says so; the steps that were asked for."""
    asked: list[int] = []
    original = checkpoint._write

    def write(path: Path, content: bytes) -> None:
        named = re.search(r"checkpoint_step_(\d+)", f"{path.parent.name} {path.name}")
        assert named is not None
        step = int(named[1])
        asked.extend([step] if step not in asked[-1:] else [])
        if when(step):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        original(path, content)

    monkeypatch.setattr(checkpoint, "_write", write)
    return asked


EVERY = ["--set", "checkpoint.save_interval=2"]


def test_a_save_that_fails_warns_once_is_tried_again_and_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = refuse_saves(monkeypatch, lambda step: step in (4, 6, 8, 12))
    status, _, err = run(capsys, "train", *TINY, *EVERY, "--steps", "15", "--plain", "--out", tmp_path / "run")
    assert status == 0, err
    warned = [line for line in err.splitlines() if "training goes on" in line]
    assert len(warned) == 2
    assert "the newest is of step 2" in warned[0]
    assert "the newest is of step 10" in warned[1]
    assert asked == [0, 2, 4, 6, 8, 10, 12, 14, 15]
    assert housekeeping.latest(tmp_path / "run" / "checkpoints").name == "checkpoint_step_15"


def test_only_a_failure_at_the_end_is_status_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_saves(monkeypatch, lambda step: step > 3)
    status, out, err = run(capsys, "train", *TINY, *EVERY, "--steps", "8", "--out", tmp_path / "run")
    assert (status, out) == (3, "")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["completed"] is True
    assert len(errors(err)) == 1
    monkeypatch.undo()
    assert run(capsys, "train", "--resume", "--out", tmp_path / "run")[0] == 0


def test_a_disk_that_is_really_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The limit on file sizes refuses writes as a full disk does."""
    argv = ["train", *TINY, *EVERY, "--steps", "4", "--out", tmp_path / "run"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4500, before[1]))  # more than the settings, less than a checkpoint
    try:
        status, _, err = run(capsys, *argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (status, len(errors(err))) == (3, 1), err
    assert run(capsys, "train", "--resume", "--out", tmp_path / "run")[0] == 0


def test_a_disk_that_is_full_before_anything_is_trained_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        status, _, err = run(capsys, "train", *TINY, "--out", tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (status, len(errors(err))) == (2, 1), err
    assert str(tmp_path / "run") in err


# ---- signals ---------------------------------------------------------------------------------------------


def test_a_hang_up_leaves_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = progress.Progress.__call__

    def call(self: progress.Progress, result: Any) -> None:
        if result.step == 5:
            os.kill(os.getpid(), signal.SIGHUP)
        original(self, result)

    monkeypatch.setattr(progress.Progress, "__call__", call)
    status, _, _ = run(capsys, "train", *TINY, "--steps", "30", "--out", tmp_path / "run")
    assert status == 129
    assert housekeeping.latest(tmp_path / "run" / "checkpoints").name == "checkpoint_step_5"
    monkeypatch.undo()
    assert run(capsys, "train", "--resume", "--out", tmp_path / "run")[0] == 0


def test_a_hang_up_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number == 0
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


class Closed(io.StringIO):
    """A terminal that has gone."""

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")


def test_a_terminal_that_has_gone_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Closed())
    monkeypatch.setattr(sys, "stdout", Closed())
    argv = ["train", *TINY, "--steps", "5", "--set", "metrics.log_interval=1", "--out", str(tmp_path / "run")]
    status = cli.main(argv)
    monkeypatch.undo()
    assert status == 0
    assert (tmp_path / "run" / "summary.json").exists()


# ---- links -----------------------------------------------------------------------------------------------

LINKED = (
    ".lock", "metrics.jsonl", "summary.json", "run.json", "config.toml", "report.html", "checkpoints", "recording",
)  # fmt: skip


@pytest.mark.parametrize("dangling", [False, True], ids=["link", "dangling"])
@pytest.mark.parametrize("name", LINKED)
@pytest.mark.parametrize("command", ["train", "resume", "compare", "report"])
def test_nothing_is_written_through_a_link(
    command: str, name: str, dangling: bool, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, victim = copied / "run", copied / "victim"
    if command == "report" and name != "report.html":
        pytest.skip("a report writes one file")
    if command in ("train", "compare"):
        shutil.rmtree(out)
        out.mkdir()
    is_folder = name in ("checkpoints", "recording")
    if (out / name).is_dir():
        shutil.move(out / name, victim)
    elif not dangling:
        victim.mkdir() if is_folder else victim.write_text("precious\n")
    if dangling and victim.exists():
        shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(victim)
    before = contents(victim)
    argv: dict[str, list[str | Path]] = {
        "train": ["train", *TINY, "--steps", "2", "--out", out],
        "resume": ["train", "--resume", "--out", out],
        "compare": ["compare", *TINY, "--steps", "2", "--overwrite", "--out", out],
        "report": ["report", out],
    }
    status, _, err = run(capsys, *argv[command])
    assert status == 2, err
    assert len(errors(err)) == 1
    assert contents(victim) == before
    assert not dangling or not victim.exists()


def contents(path: Path) -> Any:
    if path.is_dir():
        return {str(p): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
    return path.read_bytes() if path.exists() else None


@pytest.mark.parametrize("command", ["resume", "compare", "report"])
def test_nothing_is_written_to_the_other_names_of_a_file(
    command: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy made of hard links (``cp -al``) stays as it was; so does a stranger's file under one of our names."""
    out, other = copied / "run", copied / "other"
    if command == "compare":
        shutil.rmtree(out)
        other.mkdir()
        names = [name for name in LINKED if name not in ("checkpoints", "recording")]
        for name in names:
            (other / name).write_text("{}\n")
            (other / name).chmod(0o640)
    else:
        (out / "report.html").write_text("an old page\n")
        shutil.move(out, other)
        # a run that was killed after step 4: there is more to be written
        shutil.rmtree(max((other / "checkpoints").glob("checkpoint_step_*")))
        (other / "summary.json").unlink(missing_ok=True)
    shutil.copytree(other, out, copy_function=os.link)
    before = contents(other)
    argv: dict[str, list[str | Path]] = {
        "resume": ["train", "--resume", "--out", out],
        "compare": ["compare", *TINY, "--steps", "2", "--overwrite", "--out", out],
        "report": ["report", out],
    }
    status, _, err = run(capsys, *argv[command])
    assert status == 0, err
    assert contents(other) == before
    assert contents(out) != before


def test_a_file_that_is_appended_to_has_one_name(tmp_path: Path) -> None:
    path, other = tmp_path / "metrics.jsonl", tmp_path / "other"
    path.write_bytes(b"first\n")
    path.chmod(0o640)
    os.link(path, other)
    shared = os.fdopen(safe_files.open_append(path, written=False), "a")
    assert path.stat().st_ino == other.stat().st_ino, "a lock is one for all names"
    with shared, os.fdopen(safe_files.open_append(path), "a") as file:
        file.write("second\n")
    assert (path.read_bytes(), other.read_bytes()) == (b"first\nsecond\n", b"first\n")
    assert path.stat().st_mode & 0o777 == 0o640
    inode = path.stat().st_ino
    with os.fdopen(safe_files.open_append(path), "a") as file:
        file.write("third\n")
    assert (path.stat().st_ino, path.read_bytes()) == (inode, b"first\nsecond\nthird\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "other"]


def test_links_below_the_runs_of_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (tmp_path / "out" / "runs").mkdir(parents=True)
    (tmp_path / "out" / "runs" / "plain-s0").symlink_to(victim)
    for argv in (["compare", *TINY, "--steps", "2", "--overwrite"], ["compare", *TINY, "--resume"]):
        status, _, err = run(capsys, *argv, "--out", tmp_path / "out")
        assert status == 2, err
    assert list(victim.iterdir()) == []


def test_the_folder_itself_may_be_a_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "big disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "big disk")
    assert run(capsys, "train", *TINY, "--steps", "2", "--out", tmp_path / "run")[0] == 0


def test_a_page_may_go_where_its_user_says(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "link.html").symlink_to(copied / "page.html")
    (copied / "page.html").write_text("old")
    assert run(capsys, "report", copied / "run", "--out", copied / "link.html")[0] == 0
    assert (copied / "page.html").read_text().startswith("<!doctype html>")
    assert run(capsys, "report", copied / "run", "--out", "/dev/null")[0] == 0


# ---- hostile files ---------------------------------------------------------------------------------------


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def deep(path: Path) -> None:
    path.write_text("[" * 200_000)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def noise(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00" * 100)


def digits(path: Path) -> None:
    path.write_text('{"a": ' + "9" * 100_000 + "}")


def long_key(path: Path) -> None:
    path.write_text(".".join("a" * 20_000) + " = 1\n")


HOSTILE = [fifo, device, folder, deep, sparse, noise, digits, long_key]
READ = {
    "run.json": [["train", "--resume", "--out", "DIR"]],
    "plan.json": [["compare", "--resume", "--out", "DIR"]],
    "config.toml": [["train", "--resume", "--out", "DIR"]],
    "compare.json": [["report", "DIR"]],
    "summary.json": [["report", "DIR"]],
    "metrics.jsonl": [["report", "DIR"]],
    "given.toml": [["train", *TINY, "--config", "DIR/given.toml", "--out", "DIR/new"]],
    "result.json": [["bench", "report", "DIR"]],
    "recording/windows.json": [["bench", "predictors", "--recording", "DIR/recording"]],
    "checkpoints/checkpoint_step_6/manifest.json": [["inspect", "DIR/checkpoints/checkpoint_step_6"]],
}


@pytest.mark.parametrize("plant", HOSTILE, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("name", "argv"), [(n, a) for n, found in READ.items() for a in found])
def test_a_hostile_file_is_one_line(
    plant: Callable[[Path], None], name: str, argv: list[str], trained: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "run"
    shutil.copytree(trained / "run", out)
    path = out / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    plant(path)
    status, told, err = run(capsys, *[a.replace("DIR", str(out)) for a in argv])
    if name == "metrics.jsonl" and plant in (deep, digits, noise, long_key):
        assert status == 0, "a last line that is torn is left out"
        return
    assert status in (2, 3), (status, err)
    assert told == ""
    assert len(errors(err)) == 1
    assert len(err) < 2000


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("options.steps", 1e30), ("options.steps", 10**30), ("options.steps", -1), ("options.steps", "6"),
        ("options.steps", True), ("options.steps", [6]), ("options.threads", 1e9), ("options.threads", 10**9),
        ("options.threads", 0), ("options.batch_size", 2.5), ("options.lr", "fast"), ("options.lr", -1.0),
        ("options.task", None), ("options.task", 5), ("options.task", "x" * 5000), ("options.task", "\ud800"),
        ("options.task", "nosuch"), ("options.data", {}), ("options.data", "a\0b"),
        ("options.set", "a=1"), ("options.set", [1]), ("options.set", ["a" * 5000]), ("options.set", None),
        ("options.set", {"a": 1}), ("options.config", []), ("options.device", 7), ("options.device", "warp"),
        ("options.fused", "yes"), ("options.unheard", 1), ("options", []), ("options", None), ("seed", "3"),
        ("seed", -1), ("seed", 1e9), ("seed", None), ("plain", "no"), ("record", 1), ("data_path", 5),
        ("data_path", "z" * 5000), ("task", [1]), ("task", "gpt"), ("", []), ("", 5), ("", None),
    ],
    ids=lambda v: str(v)[:30],
)  # fmt: skip
def test_a_wrong_value_in_run_json_is_one_line(
    key: str, value: Any, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / "run" / "run.json"
    told = json.loads(path.read_text())
    at = told
    *parents, last = key.split(".")
    for name in parents:
        at = at[name]
    at[last] = value
    path.write_text(json.dumps(told if key else value))
    threads = torch.get_num_threads()
    status, out, err = run(capsys, "train", "--resume", "--out", copied / "run")
    assert (status, out) == (2, ""), err
    assert len(errors(err)) == 1
    assert len(err) < 600
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000, "half \ud800", "nul \0"], ids=["long", "deep", "half", "nul"])
@pytest.mark.parametrize(
    "argv",
    [
        ["train", *TINY, "--steps", "2", "--out"], ["train", "--resume", "--out"],
        ["compare", *TINY, "--steps", "2", "--out"], ["compare", "--resume", "--out"], ["inspect"], ["report"],
        ["bench", "report"], ["train", *TINY, "--config"], ["train", *GPT, "--data"], ["train", "--task"],
        ["train", *TINY, "--set"], ["train", *TINY, "--preset"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_names_that_cannot_be(
    argv: list[str], name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *argv, name)
    assert (status, out) == (2, ""), err
    assert len(errors(err)) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        ".".join("a" * 20_000) + " = 1", f"[{'.'.join('a' * 20_000)}]", "x = " + "[" * 50_000, "x = " + "{a=" * 50_000,
        "x = {" + ".".join("a" * 20_000) + " = 1}", '"a".' * 9 + "b = 1", "x = " + "9" * 50_000, "#" * 200_000,
        "\n".join(f"k{i} = 1" for i in range(5000)), f"k = '{'v' * 50_000}'", "training.full_steps = " + "[1," * 3000,
        ("a" * 90_000) + " = 1", "a . b . c . d . e . f . g . h . i . j = 1",
    ],
    ids=lambda t: t[:24],
)  # fmt: skip
def test_toml_bombs(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.toml").write_text(text)
    status, out, err = run(capsys, "train", *TINY, "--config", tmp_path / "c.toml", "--out", tmp_path / "run")
    assert (status, out) == (2, "")
    assert len(errors(err)) == 1
    assert len(err) < 1000


# ---- a comparison goes on -------------------------------------------------------------------------------------


def test_an_interrupted_comparison_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*TINY, "--steps", "4", "--budgets", "1", "--seeds", "2"]
    assert run(capsys, "compare", *flags, "--out", tmp_path / "straight")[0] == 0
    ran: list[str] = []
    original = compare.run_arm

    def count(setup: Any, arm: Any, seed: int, *rest: Any, **named: Any) -> Any:
        if arm.name != "discarded":
            if len(ran) == 3:
                ran.append("stopped")
                raise KeyboardInterrupt
            ran.append(f"{arm.name}-s{seed}")
        return original(setup, arm, seed, *rest, **named)

    monkeypatch.setattr(compare, "run_arm", count)
    status, _, err = run(capsys, "compare", *flags, "--out", tmp_path / "broken")
    assert (status, "add --resume to go on" in err) == (130, True)
    status, _, err = run(capsys, "compare", *flags, "--out", tmp_path / "broken")
    assert (status, "add --resume to continue it, --overwrite to replace it" in err) == (2, True)
    first, ran[:] = ran[:3], ["more"] * 4
    status, _, err = run(capsys, "compare", "--resume", "--out", tmp_path / "broken")
    assert status == 0, err
    assert not set(first) & set(ran)
    assert len(ran) == 4 + 6 - 3
    told = [json.loads((tmp_path / n / "compare.json").read_text()) for n in ("straight", "broken")]
    for a, b in zip(*(t["arms"] for t in told), strict=True):
        assert a["final_val_loss_per_seed"] == b["final_val_loss_per_seed"]
    assert told[0]["seeds"] == told[1]["seeds"] == [0, 1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", "7"], "steps 6, not 7"), (["--seeds", "3"], "seeds 1, not 3"), (["--seed", "1"], "seed 0, not 1"),
        (["--budgets", "1,4"], "budgets [1.0, 2.0], not [1.0, 4.0]"), (["--tune"], "tune False, not True"),
        (["--lr", "0.1"], "without lr, not 0.1"),
    ],
    ids=str,
)  # fmt: skip
def test_another_comparison_is_not_gone_on_with(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "run_arm", stop)
    argv = [*TINY, "--steps", "6", "--budgets", "1,2", "--out", tmp_path / "out"]
    assert run(capsys, "compare", *argv)[0] == 130
    status, _, err = run(capsys, "compare", "--resume", "--out", tmp_path / "out", *flags)
    assert (status, words in err) == (2, True), err


def test_a_comparison_cannot_be_resumed_from_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "compare", "--resume", "--out", tmp_path / "none")
    assert (status, "no comparison to resume" in err) == (2, True)
    assert run(capsys, "compare", "--resume")[0] == 2
    assert run(capsys, "compare", "--steps", "3")[0] == 2


@pytest.mark.parametrize("plant", [fifo, device, noise], ids=lambda f: f.__name__)
def test_images_that_are_no_file(
    plant: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("train", "test"):
        plant(tmp_path / f"a_{part}.npz")
    argv = ["train", "--task", "cifar", "--data", tmp_path, "--steps", "2", "--out", tmp_path / "run"]
    status, _, err = run(capsys, *argv)
    assert (status, len(errors(err))) == (2, 1), err


# ---- the reader and the writer ----------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    safe_files.write_text(path, "old")

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        safe_files.write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_lines_of_any_number_and_none_too_long(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"a\nbb\n\nccc")
    assert list(safe_files.read_lines(path)) == [b"a\n", b"bb\n", b"\n", b"ccc"]
    with pytest.raises(safe_files.UnusableFileError, match="line 2: is too long"):
        list(safe_files.read_lines(path, 2))


def test_a_lock_keeps_what_is_in_its_file(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("kept")
    with run_folder.locked(tmp_path), pytest.raises(InputError, match="another process"), run_folder.locked(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == "kept"
