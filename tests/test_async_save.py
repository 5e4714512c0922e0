"""Checkpoints written while training goes on; the newest good one of a folder; torn lines of a record."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import assert_same, config, make_batches, setup
from hybrid_predict_trainer import CheckpointError
from hybrid_predict_trainer.experiments.report.data import read_metrics
from hybrid_predict_trainer.keep import checkpoint, housekeeping, manifest
from hybrid_predict_trainer.keep.background import BackgroundWriter
from hybrid_predict_trainer.keep.periodic import PeriodicSaver
from hybrid_predict_trainer.records import DamagedCheckpointError
from hybrid_predict_trainer.tell.sinks import JsonlSink


def names(folder: Path) -> list[str]:
    return [p.name for p in housekeeping.checkpoints(folder)]


# ---------------------------------------------------------------- in the background


def test_what_is_captured_is_one_moments_state(tmp_path: Path) -> None:
    """Written ten steps later it is the checkpoint that was written at once, to the last byte of every file."""
    batches = make_batches(30)
    trainer = setup("norm_dropout", "adamw", "lambda").trainer(config())
    for batch in batches[:20]:
        trainer.step(batch)
    at_once = trainer.save_checkpoint(tmp_path / "at_once")
    write = trainer.capture_checkpoint(tmp_path / "later")
    for batch in batches[20:]:
        trainer.step(batch)
    later = write()
    for name in manifest.verify(at_once).files:
        assert (later / name).read_bytes() == (at_once / name).read_bytes(), name


def test_a_run_that_saves_in_the_background_is_the_same_run(tmp_path: Path) -> None:
    batches = make_batches(40)
    plain = setup("norm_dropout", "adamw", "lambda")
    plain.trainer(config()).fit(batches)
    wanted = plain.everything()
    keys = {"checkpoint__directory": str(tmp_path), "checkpoint__save_interval": 10, "checkpoint__async_save": True}
    ours = setup("norm_dropout", "adamw", "lambda")
    trainer = ours.trainer(config(**keys))
    trainer.fit(batches)
    assert_same(ours.everything(), wanted)
    steps = [int(n.rpartition("_")[2]) for n in names(tmp_path)]
    assert steps[-1] == trainer.current_step
    assert len(steps) >= 2
    again = setup("norm_dropout", "adamw", "lambda", seed=9)
    resumed = again.trainer(config())
    resumed.load_checkpoint(tmp_path / names(tmp_path)[-2])
    resumed.fit(batches[resumed.num_batches :])
    assert_same(again.everything(), wanted)


class Disk:
    """Writes when it is let, or fails."""

    def __init__(self) -> None:
        self.gate, self.written, self.fail = threading.Event(), [], False
        self.step = 0

    def capture(self, folder: Path) -> Any:
        step = self.step

        def write() -> Path:
            assert self.gate.wait(10)
            if self.fail:
                raise CheckpointError(f"no space at {step}")
            self.written.append(step)
            return folder

        return write

    def save(self, folder: Path) -> None:
        if self.fail:
            raise CheckpointError(f"no space at {self.step}")
        self.written.append(self.step)

    def saver(self, folder: Path) -> PeriodicSaver:
        return PeriodicSaver(folder, 10, self.save, self.capture)


def test_one_at_a_time_and_none_is_left_out(tmp_path: Path) -> None:
    disk = Disk()
    saver = disk.saver(tmp_path)
    for step in range(1, 26):
        disk.step = step
        if saver.due(step):
            saver.keep_up(step)
        if step == 23:
            disk.gate.set()  # the first one was being written until now
            saver._writer._thread.join()
    assert saver.attempt(25) is None
    assert disk.written == [10, 24, 25]
    assert saver.saved == 25


def test_what_was_written_in_the_background_is_not_written_again(tmp_path: Path) -> None:
    disk = Disk()
    disk.gate.set()
    saver = disk.saver(tmp_path)
    disk.step = 10
    saver.keep_up(10)
    assert saver.attempt(10) is None, "the last of a run that ends there"
    assert disk.written == [10]
    disk.step, disk.fail = 20, True
    with pytest.warns(UserWarning, match="the newest is of step 10"):
        saver.attempt(20)


def test_a_failure_in_the_background_is_told_once_and_the_next_interval_tries_again(tmp_path: Path) -> None:
    disk = Disk()
    disk.gate.set()
    saver = disk.saver(tmp_path)
    disk.fail = True

    def three_intervals() -> None:
        for disk.step in (10, 20, 30):
            assert saver.due(disk.step)
            saver.keep_up(disk.step)
            saver._writer._thread.join()

    with pytest.warns(UserWarning, match="no space at 10; training goes on") as caught:
        three_intervals()
    assert len(caught) == 1
    disk.fail, disk.step = False, 40
    saver.keep_up(40)  # tells of the one at 30, and begins another
    saver._writer._thread.join()
    disk.step = 45
    assert saver.attempt(45) is None
    assert disk.written == [40, 45]
    disk.fail, disk.step = True, 50
    with pytest.warns(UserWarning, match="the newest is of step 45"):
        assert "no space" in str(saver.attempt(50))


def test_whatever_raises_in_the_thread_is_a_checkpoint_error() -> None:
    writer = BackgroundWriter()
    writer.wait()

    def write() -> Path:
        raise ZeroDivisionError("a bug")

    writer.start(write)
    with pytest.raises(RuntimeError, match="still being written"):
        writer.start(write)
    with pytest.raises(CheckpointError, match="ZeroDivisionError: a bug"):
        writer.wait()
    writer.wait()
    assert not writer.pending
    assert not copy.deepcopy(writer).busy


# ---------------------------------------------------------------- the newest good one


def saved_run(folder: Path) -> list[Path]:
    made = setup("mlp", "adam")
    trainer = made.trainer(config(checkpoint__keep_last_n=9))
    paths = []
    for batch in make_batches(3):
        trainer.step(batch)
        paths.append(trainer.save_checkpoint(folder))
    return paths


def test_a_broken_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path: Path) -> None:
    first, second, third = saved_run(tmp_path)
    (third / "model_weights.safetensors").write_bytes(b"torn")
    (second / "MANIFEST.json").unlink()
    trainer = setup("mlp", "adam", seed=4).trainer(config())
    with pytest.raises(DamagedCheckpointError):
        trainer.load_checkpoint(third)  # whoever names one gets that one or none
    assert third.exists()
    with pytest.warns(UserWarning, match="it is checkpoint_step_.[.]corrupt now") as caught:
        trainer.load_latest(tmp_path)
    assert len(caught) == 2
    assert trainer.current_step == 1
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == [
        first.name, f"{second.name}.corrupt", f"{third.name}.corrupt",
    ]  # fmt: skip


def test_a_checkpoint_that_does_not_fit_is_not_got_round(tmp_path: Path) -> None:
    """Of another model, or of a newer build: it is whole, and an older one would be another run's as well."""
    paths = saved_run(tmp_path)
    trainer = setup("mlp", "sgd").trainer(config())
    with pytest.raises(CheckpointError) as other:
        trainer.load_latest(tmp_path)
    assert not isinstance(other.value, DamagedCheckpointError)
    fields = json.loads((paths[-1] / "MANIFEST.json").read_text())
    del fields["sha256"]
    (paths[-1] / "MANIFEST.json").write_text(manifest.manifest_text({**fields, "format_version": 99}))
    with pytest.raises(CheckpointError, match="upgrade the library"):
        setup("mlp", "adam").trainer(config()).load_latest(tmp_path)
    assert names(tmp_path) == [p.name for p in paths]


def test_what_the_disk_does_not_give_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = saved_run(tmp_path)
    real = checkpoint.read_document

    def read(path: Path) -> Any:
        if path == paths[-1]:
            raise manifest.unreadable(path, OSError(5, "Input/output error")) from OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(checkpoint, "read_document", read)
    trainer = setup("mlp", "adam").trainer(config())
    with pytest.warns(UserWarning, match="skipping a checkpoint: .*Input/output error"):
        trainer.load_latest(tmp_path)
    assert trainer.current_step == 2
    assert names(tmp_path) == [p.name for p in paths]


# ---------------------------------------------------------------- torn lines

TAILS = {
    "nothing": (b"", b""),
    "whole": (b'{"step":1}\n', b'{"step":1}\n'),
    "without its end": (b'{"step":1}\n{"step":2}', b'{"step":1}\n{"step":2}\n'),
    "a note of the user's": (b'{"step":1}\nnote', b'{"step":1}\nnote\n'),
    "torn": (b'{"step":1}\n{"step":2,"los', b'{"step":1}\n'),
    "nothing else": (b'{"event":"st', b""),
    "torn in a character": ('{"a":1}\n{"n":"ü'.encode()[:-1], b'{"a":1}\n'),
}


@pytest.mark.parametrize("follow_links", [True, False])
@pytest.mark.parametrize("tail", TAILS)
def test_a_torn_last_line_is_dropped_and_said(tail: str, follow_links: bool, tmp_path: Path) -> None:
    before, kept = TAILS[tail]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(before)
    if len(kept) < len(before):
        with pytest.warns(UserWarning, match="the last line was torn"):
            sink = JsonlSink(path, follow_links=follow_links)
    else:
        sink = JsonlSink(path, follow_links=follow_links)
    sink.write({"step": 3, "event": "x"})
    sink.close()
    assert path.read_bytes() == kept + b'{"step":3,"event":"x"}\n'


def test_a_record_that_was_torn_and_gone_on_with_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event":"step","step":1,"phase":"full","loss":2.0}\n{"event":"step","st')
    with pytest.warns(UserWarning, match="torn"):
        sink = JsonlSink(path)
    sink.write({"event": "step", "step": 2, "phase": "full", "loss": 1.0})
    sink.close()
    steps, _, notices = read_metrics(path)
    assert [s.step for s in steps] == [1, 2]
    assert not notices


def test_saved_tensors_are_not_the_live_ones() -> None:
    live = torch.zeros(3)
    drafted = checkpoint.draft(1, {"model": {"w": live}}, copy=True)
    live.add_(1.0)
    assert drafted.encoded["model"][1]["w"].tolist() == [0, 0, 0]
