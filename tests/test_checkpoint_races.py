"""Others are at a folder of checkpoints too: who writes, rotates, resumes or copies at the same time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cases import assert_same, config, loss_fn, make_batches, setup
from hybrid_predict_trainer import CheckpointError, attach
from hybrid_predict_trainer.experiments.faults import files
from hybrid_predict_trainer.experiments.faults.material import fingerprint
from hybrid_predict_trainer.keep import checkpoint, housekeeping, manifest, resume
from hybrid_predict_trainer.records import DamagedCheckpointError

BATCHES = make_batches(8)


def run_of(folder: Path, steps: int = 3, seed: int = 1) -> tuple[Any, list[Path]]:
    trainer = setup("mlp", "adam", seed=seed).trainer(config(checkpoint__keep_last_n=9))
    paths = []
    for batch in BATCHES[:steps]:
        trainer.step(batch)
        paths.append(trainer.save_checkpoint(folder))
    return trainer, paths


def bits(trainer: Any) -> str:
    return fingerprint(resume.parts(trainer.run, trainer.run.recorder))


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir())


# ---- while it is read ----------------------------------------------------------------------------------------


def replaced(path: Path, other: Path) -> None:
    (path / files.MODEL).unlink()
    shutil.copyfile(other / files.MODEL, path / files.MODEL)


def written_again(path: Path, other: Path) -> None:
    content = (other / files.MODEL).read_bytes()
    with (path / files.MODEL).open("r+b") as file:
        file.write(content)


def added_to(path: Path, other: Path) -> None:
    (path / "more").touch()


@pytest.mark.parametrize("act", [replaced, written_again, added_to], ids=lambda act: act.__name__)
def test_what_is_written_to_while_it_is_read_is_refused(
    act: Callable[[Path, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashes were right; then another process put weights of another step there."""
    _, paths = run_of(tmp_path / "run")
    live, _ = run_of(tmp_path / "other", 1, seed=4)
    before, real = bits(live), checkpoint.read_document

    def read(path: Path) -> Any:
        act(path, paths[0])
        return real(path)

    monkeypatch.setattr(checkpoint, "read_document", read)
    with pytest.raises(CheckpointError, match="was written to while it was read; load it again") as refused:
        live.load_checkpoint(paths[-1])
    assert not isinstance(refused.value, DamagedCheckpointError), "it is not set aside"
    assert bits(live) == before


@pytest.mark.parametrize("where", ["is_dir", "read_manifest", "read_document"])
def test_one_that_is_rotated_out_meanwhile_is_passed_over(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that evaluates looks for the newest while the one that trains deletes old ones."""
    _, paths = run_of(tmp_path)
    module: Any = {"is_dir": housekeeping, "read_manifest": manifest, "read_document": checkpoint}[where]
    name = "verify" if where == "is_dir" else where
    if where == "is_dir":
        module, name = checkpoint, "verify"
    real = getattr(module, name)

    def look(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path == paths[-1] and path.exists():
            shutil.rmtree(path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(module, name, look)
    trainer = setup("mlp", "adam", seed=4).trainer(config())
    with pytest.warns(UserWarning, match="skipping a checkpoint"):
        trainer.load_latest(tmp_path)
    assert trainer.current_step == 2
    assert names(tmp_path) == [p.name for p in paths[:-1]]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_several_resume_at_once_from_a_folder_with_a_damaged_one(tmp_path: Path) -> None:
    """All take the same one; the damaged one is set aside once."""
    _, paths = run_of(tmp_path)
    (paths[-1] / files.MODEL).write_bytes(b"torn")
    start, go = os.pipe()
    children = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            status = 9
            try:
                warnings.simplefilter("ignore")
                trainer = setup("mlp", "adam", seed=4).trainer(config())
                os.read(start, 1)
                trainer.load_latest(tmp_path)
                status = trainer.current_step
            finally:
                os._exit(status)
        children.append(pid)
    os.write(go, b"4444")
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [2] * 4
    assert names(tmp_path) == [paths[0].name, paths[1].name, f"{paths[2].name}.corrupt"]
    os.close(start)
    os.close(go)


# ---- copies that share their files ---------------------------------------------------------------------------


def test_a_copy_of_hard_links_is_loaded_and_what_is_done_to_one_is_not_done_to_the_other(tmp_path: Path) -> None:
    trainer, paths = run_of(tmp_path / "run")
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "run", copy, copy_function=os.link)
    contents = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    again = setup("mlp", "adam", seed=4).trainer(config(checkpoint__keep_last_n=1))
    again.load_latest(copy)
    assert bits(again) == bits(trainer)
    again.save_checkpoint(copy)  # of the same step
    again.step(BATCHES[4])
    again.save_checkpoint(copy)  # and rotates
    assert names(copy) == ["checkpoint_step_4"]
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == contents
    assert names(tmp_path / "run") == [p.name for p in paths]


# ---- a manifest with something odd in it ---------------------------------------------------------------------

ODD: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a size below zero": lambda f: f["files"][files.MODEL].update(bytes=-1),
    "a size of exabytes": lambda f: f["files"][files.MODEL].update(bytes=10**30),
    "a size that is no number": lambda f: f["files"][files.MODEL].update(bytes="many"),
    "no hash": lambda f: f["files"][files.MODEL].pop("sha256"),
    "a hash of something else": lambda f: f["files"][files.MODEL].update(sha256="0" * 64),
    "a file twice": lambda f: f["files"].update({files.MODEL.upper(): f["files"][files.MODEL]}),
    "a shape below zero": lambda f: next(iter(f["tensors"]["model"].values())).update(shape=[-1, 2]),
    "another part": lambda f: f["tensors"].update(x={}),
    "a part that is no name": lambda f: f["tensors"].update({"../x": {}}),
    "a step below zero": lambda f: f.update(step=-1),
    "a format below one": lambda f: f.update(format_version=0),
    "a format that never will be": lambda f: f.update(format_version=10**30),
    "nothing about tensors": lambda f: f.update(tensors={}),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_manifest_is_refused_and_got_round(kind: str, tmp_path: Path) -> None:
    _, paths = run_of(tmp_path)
    fields = files.read(paths[-1])
    ODD[kind](fields)
    (paths[-1] / manifest.MANIFEST).write_text(manifest.manifest_text(fields))
    live, _ = run_of(tmp_path / "other", 1, seed=4)
    before = bits(live)
    with pytest.raises(DamagedCheckpointError):
        live.load_checkpoint(paths[-1])
    assert bits(live) == before
    with pytest.warns(UserWarning, match="skipping a checkpoint"):
        live.load_latest(tmp_path)
    assert live.current_step == 2


def test_a_key_that_stands_twice_in_a_manifest_is_refused(tmp_path: Path) -> None:
    _, paths = run_of(tmp_path, 1)
    file = paths[0] / manifest.MANIFEST
    file.write_text(file.read_text().replace('"step": 1', '"step": 7,\n "step": 1'))
    with pytest.raises(DamagedCheckpointError, match="does not match its own SHA-256"):
        checkpoint.load(paths[0])


@pytest.mark.parametrize(
    "text", ["cos\nsystem\n(S'x'\ntR.", "a = ", ".".join("a" * 20_000) + " = 1", "a = " + "[" * 20_000]
)
def test_a_configuration_that_is_none_is_damage(text: str, tmp_path: Path) -> None:
    _, paths = run_of(tmp_path)
    (paths[-1] / manifest.CONFIG).write_text(text)
    files.reseal(paths[-1])
    live, _ = run_of(tmp_path / "other", 1, seed=4)
    with pytest.raises(DamagedCheckpointError, match=r"config\.toml that cannot be read"):
        live.load_checkpoint(paths[-1])
    with pytest.warns(UserWarning, match="skipping a checkpoint"):
        live.load_latest(tmp_path)


# ---- parts that are not the run's own ------------------------------------------------------------------------


def edited(path: Path, act: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((path / manifest.STATE).read_text())
    act(document["trees"])
    (path / manifest.STATE).write_text(json.dumps(document))
    files.reseal(path)


def ridden(seed: int = 1) -> tuple[Any, Any]:
    made = setup("mlp", "adam", seed=seed)
    return made, attach(made.model, made.optimizer, config(), loss_fn=loss_fn, lr_scheduler=made.scheduler)


def ride(made: Any, engine: Any, batch: Any) -> None:
    made.optimizer.zero_grad()
    loss = loss_fn(made.model, batch)
    loss.backward()
    engine.note(loss, batch)
    made.optimizer.step()


@pytest.mark.parametrize(
    "act",
    [
        lambda t: t.update(engine=1), lambda t: t["engine"].update(decision={"phase": "x"}),
        lambda t: t["engine"].update(forms=3), lambda t: t["engine"].pop("looked"),
        lambda t: t["engine"].update(spent=[]),
    ],
)  # fmt: skip
def test_an_engine_takes_its_own_part_or_nothing(act: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    made, engine = ridden()
    for batch in BATCHES[:5]:
        ride(made, engine, batch)
    path = engine.save_checkpoint(tmp_path)
    edited(path, act)
    live, again = ridden(4)
    ride(live, again, BATCHES[0])
    before = live.everything(), again.run.meter.num_steps
    with pytest.raises(CheckpointError):
        again.load_checkpoint(path)
    assert_same(live.everything(), before[0])
    assert again.run.meter.num_steps == before[1]


@pytest.mark.parametrize("part", [1, {"position": 1}, {"again": []}, {"position": 1, "again": 1}])
def test_a_position_that_no_loader_has_written_changes_nothing(part: Any, tmp_path: Path) -> None:
    _, paths = run_of(tmp_path, 2)
    edited(paths[-1], lambda trees: trees.update(loader=part))
    live, _ = run_of(tmp_path / "other", 1, seed=4)
    before = bits(live)
    with pytest.raises(CheckpointError, match="the position in the data cannot be read"):
        live.load_checkpoint(paths[-1])
    assert bits(live) == before


# ---- a signal in a loop of the user's own ---------------------------------------------------------------------


def ride_on(directory: str, behind: bool, until: int) -> Any:
    """A loop of the user's own, from the newest checkpoint on; it answers to no signal."""
    made = setup("norm_dropout", "adamw", "lambda")
    settings = config(checkpoint__directory=directory, checkpoint__save_interval=3, checkpoint__async_save=behind)
    engine = attach(made.model, made.optimizer, settings, loss_fn=loss_fn, lr_scheduler=made.scheduler)
    if directory and housekeeping.checkpoints(directory):
        engine.load_latest(directory)
    while engine.run.meter.num_real_steps < until:
        ride(made, engine, LONG[engine.run.meter.num_real_steps])
    return made


LONG = make_batches(25)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize("behind", [False, True])
def test_a_loop_that_is_ended_by_a_signal_goes_on_from_its_newest_checkpoint(behind: bool, tmp_path: Path) -> None:
    """SIGTERM without a handler ends a process at once, in the middle of whatever it does."""
    for delay in (0.02, 0.05, 0.1):
        pid = os.fork()
        if pid == 0:
            for number in (signal.SIGTERM, signal.SIGALRM):
                signal.signal(number, signal.SIG_DFL)
            try:
                ride_on(str(tmp_path), behind, len(LONG))
            finally:
                os._exit(0)
        time.sleep(delay)
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        for path in housekeeping.checkpoints(tmp_path):
            manifest.verify(path)
    assert_same(ride_on(str(tmp_path), behind, len(LONG)).everything(), ride_on("", False, len(LONG)).everything())
    assert not list(tmp_path.glob(".tmp-*"))
