"""Full-batch training is noticed whichever way the data come, and nothing else is taken for it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from cases import config, full_batch, make_batches, setup
from hybrid_predict_trainer.observe import same_batch
from hybrid_predict_trainer.observe.same_batch import Fingerprint, SameBatch, digest_of

X, Y = torch.arange(200.0).reshape(100, 2), torch.arange(100)


def copies(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.clone()
    if isinstance(batch, np.ndarray):
        return batch.copy()
    if isinstance(batch, dict):
        return {k: copies(v) for k, v in batch.items()}
    if isinstance(batch, SimpleNamespace):
        return SimpleNamespace(**copies(vars(batch)))
    return type(batch)(copies(v) for v in batch) if isinstance(batch, tuple | list) else batch


#: Batches of every kind that a whole data set comes as.
KINDS: dict[str, Any] = {
    "tensor": X,
    "pair": (X, Y),
    "mapping": {"x": X, "y": Y, "name": "all"},
    "array": (X.numpy(), Y.numpy()),
    "object": SimpleNamespace(x=X, edge_index=Y.reshape(2, 50)),
    "lists": (X, list(range(100))),
    "half": (X.half(), X.bfloat16()),
    "complex": (torch.complex(X, X), Y),
    "bools": (X > 3, Y),
    "strided": (X.t(), Y[::2]),
    "scalar": (X, torch.tensor(2.0)),
    "empty": (X, torch.zeros(0, 3)),
    "ragged": [torch.zeros(3, 4), torch.zeros(2, 2)],
    "sparse": (torch.eye(5).to_sparse(), Y),
}


def changed(batch: Any) -> Any:
    """A copy with one number in the middle of one tensor another one, which no sample looks at."""
    batch = copies(batch)
    parts = [v for v in same_batch.leaves(batch) if isinstance(v, Tensor | np.ndarray)]
    first = parts[0]
    if isinstance(first, Tensor) and first.is_sparse:
        first._values()[3] += 1  # type: ignore[attr-defined]
    elif isinstance(first, Tensor) and first.dtype is torch.bool:
        first[41, 1] = ~first[41, 1]
    else:
        place = (1, 53) if first.shape == (2, 100) else (min(53, len(first) - 1), 1)
        first[place] += 1
    return batch


def seen(batches: Iterable[Any]) -> list[bool]:
    data = SameBatch()
    found = []
    for batch in batches:
        data.see(batch)
        found.append(data.same)
    return found


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_recognised(name: str) -> None:
    batch = KINDS[name]
    assert seen([batch] * 5) == [False] + [True] * 4, "the very same objects"
    assert seen([copies(batch) for _ in range(5)]) == [False] + [True] * 4, "new but equal"
    assert seen([batch, changed(batch), batch]) == [False] * 3
    assert seen([batch, batch, changed(batch), batch]) == [False, True, False, False]


@pytest.mark.parametrize("small", [True, False])
def test_a_change_no_sample_sees_is_found_by_the_digest(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same_batch, "SMALL_BYTES", 1 << 14 if small else 0)
    base = torch.zeros(1000)
    other = base.clone()
    other[501] = 1.0
    assert Fingerprint(base).alike(Fingerprint(other)), "the case is about numbers that are not looked at"
    found = seen([base.clone() for _ in range(5)] + [other.clone() for _ in range(40)])
    assert found[:5] == [False] + [True] * 4
    first = found[5:].index(False)
    assert first == 0 if small else first < same_batch.DIGEST_EVERY
    assert found[-1], "the other one is recognised in its turn"


def test_other_data_are_not_the_same() -> None:
    different: dict[str, Callable[[], list[Any]]] = {
        "drawn afresh": lambda: [torch.rand(8, 3) for _ in range(6)],
        "in turn": lambda: [X, X + 1] * 3,
        "another order": lambda: [(X[torch.randperm(100)], Y) for _ in range(6)],
        "shuffled loader": lambda: list(DataLoader(TensorDataset(X, Y), batch_size=50, shuffle=True)) * 3,
        "another number beside": lambda: [(X, i) for i in range(6)],
        "another string beside": lambda: [{"x": X, "name": str(i)} for i in range(6)],
        "another list beside": lambda: [(X, [0] * 99 + [i]) for i in range(6)],
        "another object beside": lambda: [(X, iter(())) for _ in range(6)],
        "another size": lambda: [X[: 50 + i] for i in range(6)],
        "another type": lambda: [X.float(), X.double()] * 3,
        "no tensors": lambda: [[1, 2]] * 6,
        "nothing": lambda: [None] * 6,
    }
    for name, make in different.items():
        assert not any(seen(make())), name


def test_tensors_written_to() -> None:
    x = torch.zeros(3)
    found = []
    data = SameBatch()
    for _ in range(4):
        data.see(x)
        found.append(data.same)
        x.add_(1)
    assert not any(found)
    array = np.zeros(3)  # torch does not see that somebody writes to it
    wrapped = torch.from_numpy(array)
    data = SameBatch()
    data.see(wrapped)
    array += 1
    data.see(wrapped)
    assert not data.same


def test_a_batch_given_again_says_nothing() -> None:
    data = SameBatch()
    data.see(X)
    data.see(X, again=True)
    assert not data.same
    data.see(X + 1)
    assert not data.same


def test_fingerprints_keep_nothing_alive() -> None:
    x = torch.zeros(1000)
    data = SameBatch()
    data.see((x, SimpleNamespace(x=x)))
    alive = weakref.ref(x)
    del x
    gc.collect()
    assert alive() is None


def test_inference_tensors() -> None:
    with torch.inference_mode():
        x = torch.zeros(3)
    assert seen([x, x]) == [False, True]


def test_unreadable_tensors_are_recognised_by_themselves_only() -> None:
    class Opaque(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (Tensor.detach, Tensor.cpu):
                raise NotImplementedError("no numbers here")
            return super().__torch_function__(func, types, args, kwargs or {})

    x = torch.zeros(3).as_subclass(Opaque)
    assert seen([x] * 4) == [False, False, True, True]
    assert not any(seen([torch.zeros(3).as_subclass(Opaque) for _ in range(4)]))
    assert digest_of(x) is None


def test_an_accelerator_is_rarely_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading numbers would wait for the device: with fresh batches in the first steps only."""
    asked = []
    original = same_batch.Fingerprint

    def counting(batch: Any, *, values: bool = True, found: list[Any] | None = None) -> Fingerprint:
        asked.append(values)
        return original(batch, values=values, found=found)

    monkeypatch.setattr(same_batch, "Fingerprint", counting)
    monkeypatch.setattr(same_batch, "_on_host", lambda found: False)
    seen([torch.rand(4) for _ in range(100)])
    assert asked[:4] == [True] * 4
    assert not any(asked[4:])


@pytest.mark.parametrize("kind", ["the same", "copies", "fresh", "later"])
@pytest.mark.parametrize("cut", range(1, 6))
def test_resumed_as_if_it_had_gone_on(kind: str, cut: int) -> None:
    batches = {
        "the same": lambda: [X] * 8,
        "copies": lambda: [X.clone() for _ in range(8)],
        "fresh": lambda: [torch.full((3,), float(i)) for i in range(8)],
        "later": lambda: [torch.full((3,), float(i)) for i in range(3)] + [X] * 5,
    }[kind]()
    wanted = seen(batches)
    data = SameBatch()
    for batch in batches[:cut]:
        data.see(batch)
    resumed = SameBatch()
    resumed.load_state_dict(data.state_dict())
    found = []
    for batch in batches[cut:]:
        resumed.see(batch)
        found.append(resumed.same)
    assert found == wanted[cut:]


# ---------------------------------------------------------------- in a run


@pytest.mark.parametrize(("kind", "same"), [("full", True), ("fresh", False), ("loader", True), ("one new", True)])
def test_full_batch_training_is_noticed(kind: str, same: bool) -> None:
    whole = full_batch(1)[0]
    data: dict[str, Callable[[], list[Any]]] = {
        "full": lambda: full_batch(8),
        "fresh": lambda: make_batches(8),
        "loader": lambda: [b for _ in range(8) for b in DataLoader(TensorDataset(*whole), batch_size=len(whole[0]))],
        "one new": lambda: [(x.clone(), y) for x, y in full_batch(8)],
    }
    trainer = setup().trainer(config())
    for batch in data[kind]():
        trainer.step(batch)
    assert trainer.run.batches.same is same
    assert trainer.run.full_batch is same


@pytest.mark.parametrize(("setting", "exact"), [("always", True), ("never", False)])
def test_the_user_may_know_better(setting: str, exact: bool) -> None:
    for data in (full_batch(6), make_batches(6)):
        trainer = setup().trainer(config(gate__exact=setting))
        for batch in data:
            trainer.step(batch)
        assert trainer.run.full_batch is exact


def test_a_disabled_run_does_not_look() -> None:
    trainer = setup().trainer(config(enabled=False))
    with torch.inference_mode():
        batch = tuple(t.clone() for t in make_batches(1)[0])
    trainer.step(tuple(t.clone() for t in batch))
    assert trainer.run.batches.same_batch.num_seen == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16])
def test_views_are_sampled_in_the_order_of_their_numbers(dtype: torch.dtype) -> None:
    whole = (100 * torch.rand(9, 31)).to(dtype)
    for view in (whole, whole[:, :-1], whole[:, 1:], whole.t(), whole[::2]):
        step = view.numel() // same_batch.NUM_SAMPLED
        wanted = view.contiguous().reshape(-1)[::step].contiguous().view(torch.uint8).numpy().tobytes()
        assert same_batch._sampled(view) == wanted
