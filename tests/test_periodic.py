"""Checkpoints while training goes on: whoever sets a directory has them, and they are whole."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import Setup, assert_same, config, full_batch, make_batches, seed_all, setup
from hybrid_predict_trainer import DivergenceError, HybridTrainer
from hybrid_predict_trainer.experiments.train import Position, Saver
from hybrid_predict_trainer.keep import checkpoint, housekeeping
from hybrid_predict_trainer.observe.history import Readout


def names(folder: Path) -> list[str]:
    """Checkpoints of a folder, oldest first."""
    return [p.name for p in housekeeping.checkpoints(folder)]


def into(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"checkpoint__directory": str(folder), "checkpoint__save_interval": 10, **changes}


def by_fit(trainer: HybridTrainer, batches: list[Any]) -> None:
    trainer.fit(batches)


def by_epoch(trainer: HybridTrainer, batches: list[Any]) -> None:
    trainer.train_epoch(batches)


def by_step(trainer: HybridTrainer, batches: list[Any]) -> None:
    for batch in batches:
        trainer.step(batch)


def by_steps(trainer: HybridTrainer, batches: list[Any]) -> None:
    trainer.step_n(batches, len(batches))


#: Ways to train, and the last checkpoint of 35 steps.
LOOPS = {"fit": (by_fit, 35), "train_epoch": (by_epoch, 30), "step": (by_step, 30), "step_n": (by_steps, 30)}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("enabled", [True, False])
def test_every_loop_writes_them_and_keeps_the_last(loop: str, enabled: bool, tmp_path: Path) -> None:
    drive, last = LOOPS[loop]
    settings = config(**into(tmp_path, checkpoint__keep_last_n=2), max_predict_steps=0, enabled=enabled)
    drive(setup("mlp", "adam").trainer(settings), make_batches(35))
    assert names(tmp_path) == [f"checkpoint_step_{20 if last == 30 else 30}", f"checkpoint_step_{last}"]


def test_without_a_directory_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    setup("mlp", "adam").trainer(config(checkpoint__save_interval=1)).fit(make_batches(5))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("data", ["noisy", "full"])
def test_a_run_goes_on_from_them_bit_for_bit(data: str, tmp_path: Path) -> None:
    batches = make_batches(60) if data == "noisy" else full_batch(60)
    straight = setup("dropout", "adamw", "lambda")
    straight.trainer(config(**into(tmp_path / "straight"))).fit(batches)
    state = straight.everything()
    first = setup("dropout", "adamw", "lambda")
    first.trainer(config(**into(tmp_path / "run"))).fit(batches[:37])
    second = setup("dropout", "adamw", "lambda", seed=5)
    trainer = second.trainer(config(**into(tmp_path / "run")))
    trainer.load_checkpoint(tmp_path / "run" / names(tmp_path / "run")[-2])
    assert 0 < trainer.num_batches <= 37
    trainer.fit(batches[trainer.num_batches :])
    assert_same(second.everything(), state)
    assert names(tmp_path / "run")[-1] == names(tmp_path / "straight")[-1]


def refuse(monkeypatch: pytest.MonkeyPatch, *, after: int = 0) -> None:
    """A disk that is full."""
    original = checkpoint._write

    def write(path: Path, content: bytes) -> None:
        named = re.search(r"checkpoint_step_(\d+)", f"{path.parent.name} {path.name}")
        if named is not None and int(named[1]) > after:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        original(path, content)

    monkeypatch.setattr(checkpoint, "_write", write)


def test_one_that_fails_warns_once_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ours = setup("mlp", "adam"), setup("mlp", "adam")
    plain.plain(make_batches(35))
    refuse(monkeypatch, after=10)
    trainer = ours.trainer(config(**into(tmp_path), max_predict_steps=0))
    with pytest.warns(UserWarning, match="training goes on.*the newest is of step 10") as told:
        trainer.fit(make_batches(35))
    assert len(told) == 1
    assert names(tmp_path) == ["checkpoint_step_10"]
    assert_same(ours.everything()["parameters"], plain.everything()["parameters"])
    monkeypatch.undo()
    trainer.fit(make_batches(5))
    assert names(tmp_path) == ["checkpoint_step_10", "checkpoint_step_40"]


def test_those_of_another_run_are_left_alone(tmp_path: Path) -> None:
    settings = config(**into(tmp_path), max_predict_steps=0)
    setup("mlp", "adam").trainer(settings).fit(make_batches(35))
    before = names(tmp_path)
    trainer = setup("mlp", "adam").trainer(settings)
    with pytest.warns(UserWarning, match="holds checkpoints of another run, up to step 35: load one to continue"):
        trainer.fit(make_batches(50))
    assert names(tmp_path) == before
    # who has loaded one of them goes on with them, from an earlier one too
    trainer = setup("mlp", "adam").trainer(settings)
    trainer.load_checkpoint(tmp_path / "checkpoint_step_20")
    trainer.fit(make_batches(15))
    assert names(tmp_path)[-1] == "checkpoint_step_35"


def test_an_epoch_that_diverges_leaves_the_good_one(tmp_path: Path) -> None:
    trainer = setup("mlp", "adam").trainer(config(**into(tmp_path), max_predict_steps=0))
    trainer.fit(make_batches(10))
    with torch.no_grad():
        next(trainer.run.subject.model.parameters()).fill_(float("nan"))
    with pytest.raises(DivergenceError):
        trainer.fit(make_batches(3))
    assert names(tmp_path) == ["checkpoint_step_10"]


# ---------------------------------------------------------------- what is read late


class Clock:
    """In the place of the validation: knows the wall time."""

    def wall_s(self) -> float:
        return 1.0


def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are read every ten steps, as on an accelerator."""
    monkeypatch.setattr(Readout, "due", property(lambda self: len(self._pending) >= self.interval))


@pytest.mark.parametrize("by", ["hpt train", "directory"])
def test_losses_that_are_read_late_are_in_it(by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late(monkeypatch)

    def build(**changes: Any) -> tuple[Setup, HybridTrainer]:
        made = setup("mlp", "adam")
        return made, made.trainer(config(max_predict_steps=0, divergence__check_interval_steps=10, **changes))

    _, trainer = build(**(into(tmp_path, checkpoint__save_interval=13) if by == "directory" else {}))
    for batch in make_batches(13):
        trainer.step(batch)
    if by == "hpt train":
        assert trainer.run.losses.readout.waiting, "three losses have not been read"
        Saver(trainer, tmp_path, Position(), Clock(), saved=-1).save()  # type: ignore[arg-type]
    _, again = build()
    again.load_checkpoint(tmp_path / "checkpoint_step_13")
    assert again.run.losses.history.losses == trainer.run.losses.history.losses
    assert len(again.run.losses.history.losses) == 13


def test_more_parts_of_the_callers_come_back(tmp_path: Path) -> None:
    trainer = setup("mlp", "adam").trainer(config())
    by_step(trainer, make_batches(3))
    seed_all(1)
    path = trainer.save_checkpoint(tmp_path, extra={"mine": {"epoch": 2, "order": torch.randperm(4)}})
    other = setup("mlp", "adam").trainer(config())
    parts = other.load_checkpoint(path)
    assert parts["mine"]["epoch"] == 2
    assert sorted(parts["mine"]["order"].tolist()) == [0, 1, 2, 3]
