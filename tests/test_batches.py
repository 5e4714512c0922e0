"""Batches: how many samples they hold, pieces of them, copies of their containers."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from cases import Output
from hybrid_predict_trainer.observe import batches

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


#: Batches that cannot be cut truly, or that hold no samples.
UNCUT: dict[str, Any] = {
    "none": None,
    "text": "text",
    "number": 3,
    "empty tuple": (),
    "empty dict": {},
    "different lengths": (X, torch.zeros(5)),
    "scalar": torch.tensor(1.0),
    "sparse": (torch.eye(6).to_sparse(), Y),
    "nested": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
    "packed": pack_sequence([torch.zeros(4, 2), torch.zeros(3, 2)]),
    "images of several sizes": ([torch.zeros(3, 8, 8), torch.zeros(3, 9, 7)], torch.zeros(2)),
    "a list of targets": (torch.zeros(2, 3), [{"boxes": torch.zeros(4, 4)}, {"boxes": torch.zeros(1, 4)}]),
    "ragged pairs": {"items": [(X, Y), (X[:5], Y[:5])]},
    "graph": {"x": X, "edge_index": torch.zeros(2, 9, dtype=torch.long), "y": Y},
    "an object": SimpleNamespace(x=X, y=Y),
    "an object inside": {"x": X, "graph": SimpleNamespace(edges=Y)},
    "a set": (X, {1, 2}),
    "arrays of other lengths": (np.zeros((6, 2)), np.zeros(5)),
}


@pytest.mark.parametrize("name", UNCUT)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_no_common_size(name: str) -> None:
    assert batches.num_samples(UNCUT[name]) == 0


#: What belongs to every sample, and what is cut with them: batch, and the last of its parts in the piece 2 .. 5.
BESIDE: dict[str, tuple[Any, Any]] = {
    "a scalar": ((X, torch.tensor(1.0)), torch.tensor(1.0)),
    "a mask for all": ((X, torch.ones(1, 2)), torch.ones(1, 2)),
    "labels in a list": ((X, [0, 1, 2, 3, 4, 5]), [2, 3, 4]),
    "names in a tuple": ((X, ("a", "b", "c", "d", "e", "f")), ("c", "d", "e")),
    "ragged lists": ((X, [[1], [2, 2], [3], [4], [], [6]]), [[3], [4], []]),
    "a short list": ((X, ["red", "green"]), ["red", "green"]),
    "an array": ((X, np.arange(6)), np.array([2, 3, 4])),
    "a number array": ((X, np.float64(3.0)), np.float64(3.0)),
    "a dtype": ((X, torch.float16), torch.float16),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_is_beside_the_samples(name: str) -> None:
    batch, wanted = BESIDE[name]
    assert batches.num_samples(batch) == 6
    piece = batches.narrow(batch, 2, 5)
    assert torch.equal(piece[0], X[2:5])
    found = piece[1]
    assert type(found) is type(wanted)
    if isinstance(wanted, Tensor):
        assert torch.equal(found, wanted)
    elif isinstance(wanted, np.ndarray):
        assert found.tolist() == wanted.tolist()
    else:
        assert found == wanted


def test_one_sample_is_a_batch() -> None:
    assert batches.num_samples((X[:1], Y[:1])) == 1


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("tensors_too", [False, True])
def test_copies_of_containers(name: str, tensors_too: bool) -> None:
    batch = BATCHES[name]
    copy = batches.copied(batch, tensors_too=tensors_too)
    for a, b in zip(batches.tensors(batch), batches.tensors(copy), strict=True):
        assert torch.equal(a, b)
        assert (a is b) is not tensors_too
    if isinstance(batch, dict):
        copy.clear()
        assert batch


def test_an_object_is_copied_one_level_deep() -> None:
    batch = SimpleNamespace(x=X, labels=Y)
    own = batches.copied(batch, tensors_too=False)
    del own.labels
    assert batch.labels is Y
    handle = iter(())
    assert batches.copied({"h": handle}, tensors_too=True)["h"] is not None


def test_pieces_of_at_least_two() -> None:
    assert [batches.num_samples(p) for p in batches.chunks((X, Y), 0, 6, 8, 2)] == [2, 2, 2]
    assert [batches.num_samples(p) for p in batches.chunks((X, Y), 0, 5, 8, 2)] == [2, 2]
    assert [batches.num_samples(p) for p in batches.chunks((X, Y), 0, 3, 8, 2)] == [3]


def test_layouts_do_not_depend_on_sizes() -> None:
    assert batches.layout((X, Y)) == batches.layout((X[:4], Y[:4])) == batches.layout((torch.zeros(3, 9), Y[:3]))
    different = [(X, Y), [X, X], {"x": X, "y": Y}, {"x": X, "z": Y}, (X, Y, 3), (X, Y, torch.ones(1)), (X, [1] * 6)]
    assert len({batches.layout(b) for b in different}) == len(different)


@pytest.mark.parametrize(
    ("start", "stop", "num", "sizes"),
    [(0, 6, 3, [2, 2, 2]), (0, 6, 4, [1] * 4), (1, 6, 2, [2, 2]), (0, 6, 99, [1] * 6), (5, 6, 8, [1])],
)
def test_chunks_are_equal(start: int, stop: int, num: int, sizes: list[int]) -> None:
    pieces = batches.chunks((X, Y), start, stop, num)
    assert [batches.num_samples(p) for p in pieces] == sizes
    together = torch.cat([p[1] for p in pieces])
    assert torch.equal(together, Y[start : start + len(together)])
