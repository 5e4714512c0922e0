"""A load takes everything or nothing: where a checkpoint is refused the live objects are as before."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import assert_same, full_batch, setup
from cases import config as settings
from hybrid_predict_trainer import CheckpointError, HybridTrainer
from hybrid_predict_trainer.keep import checkpoint
from hybrid_predict_trainer.keep import resume as persistence
from hybrid_predict_trainer.keep.state_tree import Mark

GONE = object()
NUM_CHANGES = 14


def made(**more: Any) -> HybridTrainer:
    return setup("norm_dropout", "adamw", "lambda").trainer(settings(predictor_type="secant", **more))


def state_of(trainer: HybridTrainer) -> Any:
    return copy.deepcopy(persistence.parts(trainer.run, trainer.metrics))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all leaves and containers, the first two items of every list."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list | tuple):
        for i in range(min(len(value), 2)):
            yield from places(value[i], (*path, i))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    items = dict(value) if isinstance(value, dict) else dict(enumerate(value))
    if new is GONE and len(path) == 1:
        del items[path[0]]
    else:
        items[path[0]] = changed(items[path[0]], path[1:], new)
    return items if isinstance(value, dict) else type(value)(items.values())


def wrong(value: Any) -> list[Any]:
    """Values of other types."""
    if isinstance(value, Tensor):
        return ["x", 5, torch.ones(1, 2, 3, 4), GONE]
    if isinstance(value, bool | int | float):
        return ["x", [1], None, GONE]
    if isinstance(value, str):
        return [7, GONE]
    return ["x", 7, GONE] if value is not None else ["x", 7]


@pytest.mark.parametrize("forms", [True, False], ids=["as written", "with forms to match"])
def test_one_change_of_a_type_is_refused_and_leaves_no_trace(
    forms: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = full_batch(30, 32)
    first, live = made(), made()
    for batch in batches[:20]:
        first.step(batch)
    for batch in batches[:6]:
        live.step(batch)
    path = first.save_checkpoint(tmp_path)
    loaded = checkpoint.load(path)
    whole = loaded.parts
    before = state_of(live)
    if not forms:  # what is left to find then is found leaf by leaf, or put back
        monkeypatch.setattr(persistence, "_check_forms", lambda path, parts: None)
    cases = [(place, new) for place in places(whole) for new in wrong(at(whole, place))]
    random.Random(0).shuffle(cases)
    refused = 0
    for place, new in cases[:NUM_CHANGES]:
        if place[:2] == ("trainer", "forms") or place == ("predictor",):
            continue
        parts = changed(whole, place, new)
        again = replace(loaded, parts=copy.deepcopy(parts))
        monkeypatch.setattr(checkpoint, "load", lambda path, again=again: again)
        try:
            live.load_checkpoint(path)
        except CheckpointError:
            refused += 1
            assert_same(state_of(live), before)
        else:
            assert not forms, place
            live = made()
            for batch in batches[:6]:
                live.step(batch)
            before = state_of(live)
    assert refused > (0.9 if forms else 0.4) * min(NUM_CHANGES, len(cases))


@pytest.mark.parametrize("name", ["run", "metrics", "basis", "optimizer", "scheduler", "savable"])
@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_what_raises_in_the_middle_is_put_back(
    name: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = full_batch(30, 32)
    first = made()
    losses = [first.step(batch).loss for batch in batches[:20]][13:]
    live = made()
    for batch in batches[:13]:
        live.step(batch)
    path, before = first.save_checkpoint(tmp_path), state_of(live)
    wanted = [copy.deepcopy(live.run.subject.model.state_dict())]

    def fails(*args: Any, **kwargs: Any) -> None:
        raise error

    run = live.run
    owner, method = {
        "run": (type(run), "load_state_dict"), "metrics": (type(live.metrics), "load_state_dict"),
        "basis": (type(run.windows.basis), "load_state_dict"), "optimizer": (persistence.optimizer_state, "restore"),
        "scheduler": (type(run.schedule.scheduler), "load_state_dict"), "savable": (persistence, "check_savable"),
    }[name]  # fmt: skip
    real = getattr(owner, method)
    calls = iter([fails])
    monkeypatch.setattr(owner, method, lambda *a, **k: next(calls, real)(*a, **k))
    with pytest.raises(CheckpointError if isinstance(error, Exception) else KeyboardInterrupt):
        live.load_checkpoint(path)
    monkeypatch.undo()
    assert_same(state_of(live), before)
    assert_same(dict(live.run.subject.model.state_dict()), dict(wanted[0]))
    assert [live.step(batch).loss for batch in batches[13:20]] == losses


@pytest.mark.parametrize(
    ("saved", "live", "words"),
    [
        ({}, {"predictor__secant__num_displacements": 4}, r"predictor\.secant\.num_displacements is 16 .* and 4"),
        ({"lookahead__extrapolation": 0.0, "lookahead__damping": 0.0}, {}, r"lookahead\.extrapolation is switched off"),
        ({"max_lr_multiplier": 1.0, "min_group_factor": 1.0}, {}, r"training\.max_lr_multiplier is switched off"),
        ({"enabled": False}, {}, r"training\.enabled is switched off"),
        ({"max_predict_steps": 0}, {}, r"training\.max_predict_steps is switched off"),
    ],
)
def test_settings_that_the_state_does_not_fit_are_named(
    saved: dict[str, Any], live: dict[str, Any], words: str, tmp_path: Path
) -> None:
    motion = {
        "lookahead__extrapolation": 0.5, "lookahead__damping": 0.25, "lookahead__scope": "all",
        "max_lr_multiplier": 50.0, "min_group_factor": 0.1,
    }  # fmt: skip
    first, other = made(**{**motion, **saved}), made(**{**motion, **live})
    for batch in full_batch(8, 32):
        first.step(batch)
    before = state_of(other)
    with pytest.raises(CheckpointError, match=words):
        other.load_checkpoint(first.save_checkpoint(tmp_path))
    assert_same(state_of(other), before)


def test_other_roles_are_named(tmp_path: Path) -> None:
    first = made()
    first.step(full_batch(1, 32)[0])
    built = setup("norm_dropout", "adamw", "lambda")
    name = next(n for n, p in built.model.named_parameters() if p.dim() == 2)
    other = built.trainer(settings(predictor_type="secant"), roles={name: "head"})
    with pytest.raises(CheckpointError, match=rf"the role of {name} is"):
        other.load_checkpoint(first.save_checkpoint(tmp_path))


def test_no_class_of_a_file_is_made_that_is_not_the_optimizers(tmp_path: Path) -> None:
    trainer = made()
    trainer.step(full_batch(1, 32)[0])
    path = trainer.save_checkpoint(tmp_path)
    for name in ("subprocess:Popen", "os:_wrap_close", "hybrid_predict_trainer.cycle.state:Run", "torch.nn:Linear"):
        parts = copy.deepcopy(checkpoint.load(path).parts)
        parts["optimizer"]["rest"]["attributes"]["more"] = Mark("object", [name, {}])
        parts["trainer"]["forms"]["optimizer"] = persistence.schema.form(parts["optimizer"])
        own = {k: v for k, v in parts["trainer"].items() if k != "forms"}
        parts["trainer"]["forms"]["trainer"] = persistence.schema.form(own)
        before = state_of(trainer)
        changed_path = checkpoint.save(tmp_path / "changed", 1, parts, config_toml=(path / "config.toml").read_text())
        with pytest.raises(CheckpointError, match=name.split(":")[1]):
            trainer.load_checkpoint(changed_path)
        assert_same(state_of(trainer), before)


def test_modules_keep_their_modes(tmp_path: Path) -> None:
    trainer = made()
    trainer.step(full_batch(1, 32)[0])
    path = trainer.save_checkpoint(tmp_path)
    assert isinstance(trainer.run.subject.model, nn.Module)
    trainer.run.subject.model.eval()
    trainer.load_checkpoint(path)
    assert not trainer.run.subject.model.training
