"""Batches: sizes, pieces, and whether this is the batch of last time."""

from __future__ import annotations

import gc
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import Output, config, full_batch, make_batches, setup
from hybrid_predict_trainer import batches

Pair = namedtuple("Pair", "x y")
X, Y = torch.arange(12.0).reshape(6, 2), torch.arange(6)

BATCHES: dict[str, Any] = {
    "tensor": X,
    "tuple": (X, Y),
    "list": [X, Y],
    "named": Pair(X, Y),
    "dict": {"x": X, "y": Y, "text": ["a", "b"], "none": None, "n": 3},
    "ordered": OrderedDict(x=X, y=Y),
    "user": UserDict(x=X, y=Y),
    "default": defaultdict(list, x=X, y=Y),
    "output": Output(x=X, y=Y),
    "nested": {"inputs": (X, {"deep": [Y]}), "labels": Y},
}


@pytest.mark.parametrize("name", BATCHES)
def test_size_and_pieces(name: str) -> None:
    batch = BATCHES[name]
    assert batches.num_samples(batch) == 6
    piece = batches.narrow(batch, 2, 5)
    assert batches.num_samples(piece) == 3
    originals, pieces = list(batches.tensors(batch)), list(batches.tensors(piece))
    assert len(originals) == len(pieces)
    for a, b in zip(originals, pieces, strict=True):
        assert torch.equal(a[2:5], b)
        assert b.untyped_storage().data_ptr() == a.untyped_storage().data_ptr(), "views, not copies"
    if isinstance(batch, tuple | list) or name in ("ordered", "user"):
        assert type(piece) is type(batch)


def test_other_things_are_handed_on() -> None:
    piece = batches.narrow(BATCHES["dict"], 0, 1)
    assert (piece["text"], piece["none"], piece["n"]) == (["a", "b"], None, 3)


@pytest.mark.parametrize(
    "batch",
    [None, "text", 3, (), {}, (X, torch.zeros(5)), torch.tensor(1.0), {"x": X, "temperature": torch.tensor(1.0)}],
    ids=["none", "text", "number", "empty tuple", "empty dict", "different lengths", "scalar", "with a scalar"],
)
def test_no_common_size(batch: Any) -> None:
    assert batches.num_samples(batch) == 0


@pytest.mark.parametrize(
    ("start", "stop", "num", "sizes"),
    [(0, 6, 3, [2, 2, 2]), (0, 6, 4, [1] * 4), (1, 6, 2, [2, 2]), (0, 6, 99, [1] * 6), (5, 6, 8, [1])],
)
def test_chunks_are_equal(start: int, stop: int, num: int, sizes: list[int]) -> None:
    pieces = batches.chunks((X, Y), start, stop, num)
    assert [batches.num_samples(p) for p in pieces] == sizes
    together = torch.cat([p[1] for p in pieces])
    assert torch.equal(together, Y[start : start + len(together)])


# ---------------------------------------------------------------- identity


def test_same_tensors_match() -> None:
    a, b = batches.Fingerprint((X, Y)), batches.Fingerprint({"x": X, "y": Y})
    assert a.matches(a)
    assert a.matches(b)


def test_different_tensors_do_not_match() -> None:
    a = batches.Fingerprint((X, Y))
    assert not a.matches(batches.Fingerprint((X.clone(), Y)))
    assert not a.matches(batches.Fingerprint((X,)))
    assert not a.matches(batches.Fingerprint((Y, X)))


def test_changed_tensor_does_not_match() -> None:
    x = torch.zeros(3)
    before = batches.Fingerprint(x)
    x.add_(1)
    assert not batches.Fingerprint(x).matches(before)
    assert batches.Fingerprint(x).matches(batches.Fingerprint(x))


def test_freed_tensor_does_not_match_whatever_its_address() -> None:
    x = torch.zeros(1000)
    before, address = batches.Fingerprint(x), x.data_ptr()
    del x
    gc.collect()
    others = [torch.zeros(1000) for _ in range(50)]
    assert not any(batches.Fingerprint(o).matches(before) for o in others)
    assert address is not None
    gone = batches.Fingerprint(torch.zeros(2))
    assert not gone.matches(gone), "nobody can pass it again"


def test_no_tensors_never_match() -> None:
    assert not batches.Fingerprint([1, 2]).matches(batches.Fingerprint([1, 2]))


def test_fingerprint_keeps_nothing_alive() -> None:
    x = torch.zeros(3)
    mark = batches.Fingerprint(x)
    import weakref

    alive = weakref.ref(x)
    del x
    gc.collect()
    assert alive() is None
    assert mark is not None


def test_inference_tensors() -> None:
    with torch.inference_mode():
        x = torch.zeros(3)
    assert batches.Fingerprint(x).matches(batches.Fingerprint(x))
    trainer = setup().trainer(config(enabled=False))
    with torch.inference_mode():
        batch = tuple(t.clone() for t in make_batches(1)[0])
    trainer.step(tuple(t.clone() for t in batch))


# ---------------------------------------------------------------- in a run


def loader(data: list[tuple[Tensor, Tensor]], kind: str) -> list[Any]:
    return [(x.clone(), y) for x, y in data] if kind == "new inputs" else data


@pytest.mark.parametrize(("kind", "same"), [("full", True), ("fresh", False), ("new inputs", False)])
def test_full_batch_training_is_noticed(kind: str, same: bool) -> None:
    data = make_batches(8) if kind == "fresh" else loader(full_batch(8), kind)
    trainer = setup().trainer(config())
    for batch in data:
        trainer.step(batch)
    assert trainer.run.same_batch is same
    assert trainer.run.deterministic is same


@pytest.mark.parametrize(("setting", "exact"), [("always", True), ("never", False)])
def test_the_user_may_know_better(setting: str, exact: bool) -> None:
    for data in (full_batch(6), make_batches(6)):
        trainer = setup().trainer(config(gate__exact=setting))
        for batch in data:
            trainer.step(batch)
        assert trainer.run.deterministic is exact


def test_two_batches_in_turn_are_not_one() -> None:
    a, b = make_batches(2)
    trainer = setup().trainer(config())
    seen = []
    for batch in [a, b] * 4:
        trainer.step(batch)
        seen.append(trainer.run.same_batch)
    assert not any(seen)
