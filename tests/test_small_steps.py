"""What a step of a small model is spared, and that it is told all the same: each piece has a known answer."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hybrid_predict_trainer.config.settings import GateConfig
from hybrid_predict_trainer.judge.ledger import Ledger
from hybrid_predict_trainer.keep.isolation import isolated
from hybrid_predict_trainer.keep.walk import modules_of
from hybrid_predict_trainer.numerics.running import newest
from hybrid_predict_trainer.numerics.tail import Tail, running_sum
from hybrid_predict_trainer.observe import same_batch
from hybrid_predict_trainer.observe.same_batch import Fingerprint, SameBatch
from hybrid_predict_trainer.records import Account
from hybrid_predict_trainer.weights import algebra as weights

# ---------------------------------------------------------------- modules


class Own(nn.Module):
    """Lists its modules in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        yield "", self


def tied() -> nn.Module:
    shared = nn.Linear(3, 3)
    return nn.Sequential(shared, nn.Sequential(nn.Tanh(), shared), nn.Tanh())


def with_none() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    model.register_module("later", None)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "one": lambda: nn.Linear(2, 2), "tied": tied, "none": with_none, "own": lambda: nn.Sequential(Own(), nn.Tanh()),
    "transformer": lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_modules_are_those_of_torch_in_its_order(name: str) -> None:
    model = MODELS[name]()
    assert modules_of(model) == list(model.modules())


# ---------------------------------------------------------------- numbers of a stream


@pytest.mark.parametrize("num", [0, 1, 4, 5, 8, 9, 23])
def test_a_tail_holds_the_last_rows(num: int) -> None:
    tail, wanted = Tail(2, 4), deque[list[float]](maxlen=4)
    for k in range(num):
        tail.push((k, -k))
        wanted.append([k, -k])
    assert (tail.rows(), len(tail)) == (list(wanted), min(num, 4))
    assert tail.newest(2).T.tolist() == list(wanted)[-2:]
    again = Tail(2, 4)
    again.refill(tail.rows())
    assert again.rows() == tail.rows()


def test_running_sums_round_as_a_loop_does() -> None:
    values = np.random.default_rng(0).normal(size=1000) * np.logspace(-8, 8, 1000)
    assert running_sum(values) == sum(values.tolist())
    assert running_sum(values) != float(values.sum()), "the case is about numbers whose order matters"


@pytest.mark.parametrize("num", [0, 1, 3, 9])
def test_newest(num: int) -> None:
    assert newest(deque([1.0, 2.0, 3.0]), num) == [1.0, 2.0, 3.0][max(3 - num, 0) :]


def account(step: int, loss: float) -> Account:
    return Account(
        step=step, due=step + 1, skipped=step % 5 == 0, horizon=4, loss=loss, pace=0.01, usual=1.0, gain=0.1, price=3.0
    )


def test_the_persistence_is_estimated_anew_when_anything_it_rests_on_changes() -> None:
    ledger = Ledger(GateConfig())
    for step in range(40):
        if step % 3 == 0:
            ledger.on_window(0.9 + 0.01 * step, jumped=False)
        if step == 20:
            ledger.losses_are(exact=True)
        ledger.open_account(account(step, 1.0))
        ledger.settle(step + 1, 0.8 + 0.003 * step)
        assert ledger.persistence == ledger._estimate()
        again = Ledger(GateConfig())
        again.load_state_dict(ledger.state_dict())
        assert (again.persistence, again.effect()) == (ledger.persistence, ledger.effect())
    controls, jumps = ([a.left for a in ledger.settled if a.skipped is skipped] for skipped in (True, False))
    effect = ledger.effect()
    assert effect is not None
    assert effect[0] == pytest.approx(np.mean(jumps) - np.mean(controls))


# ---------------------------------------------------------------- weights in one vector


def shapes() -> list[Tensor]:
    return [torch.randn(4, 3), torch.randn(3), torch.randn(())]


def test_views_are_made_when_one_is_asked_for() -> None:
    like = shapes()
    together = weights.Together(torch.arange(16.0), like)
    assert (len(together), together.lengths) == (3, [12, 3, 1])
    assert together._pieces is None
    list(zip([], together, strict=False))  # who has nothing to pair them with asks for none
    assert together._pieces is None
    assert [t.shape for t in together] == [t.shape for t in like]
    together[1].zero_()
    assert together.vector[12:15].tolist() == [0, 0, 0], "views of the vector"


def test_memory_of_the_last_copy_is_used_again() -> None:
    parameters = [nn.Parameter(t) for t in shapes()]
    first = weights.copied_together(parameters)
    with torch.no_grad():
        parameters[0].add_(1)
    again = weights.copied_together(parameters, first)
    assert again is first
    assert all(torch.equal(a, p) for a, p in zip(again, parameters, strict=True))


@pytest.mark.parametrize(
    "other",
    [lambda: shapes()[:2], lambda: [t.double() for t in shapes()], lambda: [torch.randn(3, 4), *shapes()[1:]]],
    ids=["fewer", "wider", "another shape"],
)
def test_memory_that_does_not_fit_is_left_alone(other: Callable[[], list[Tensor]]) -> None:
    old = weights.copied_together(shapes())
    assert isinstance(old, weights.Together)
    before, tensors = old.vector.clone(), other()
    found = weights.copied_together(tensors, old)
    assert all(torch.equal(f, t) and f.dtype is t.dtype for f, t in zip(found, tensors, strict=True))
    assert torch.equal(old.vector, before)


@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.complex64])
def test_finite(value: float, dtype: torch.dtype) -> None:
    tensor = torch.ones(5, dtype=dtype)
    if dtype is not torch.int64:
        tensor[3] = value
    assert weights.finite(tensor) is bool(torch.isfinite(tensor).all())
    assert weights.finite(torch.ones(2, requires_grad=True) * 2)


@pytest.mark.parametrize("after", ["_set_grad_enabled(False)", "return function(*args, **kwargs)"])
def test_an_interruption_does_not_leave_gradients_off(after: str) -> None:
    switched: list[bool] = []

    def switch(enabled: bool) -> None:
        torch._C._set_grad_enabled(enabled)
        switched.append(enabled)
        if len(switched) == (1 if "False" in after else 2):
            raise KeyboardInterrupt

    work = weights.without_graph(lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "_set_grad_enabled", switch)
        with pytest.raises(KeyboardInterrupt):
            work()
    assert torch.is_grad_enabled()


# ---------------------------------------------------------------- the same batch again


def fingerprints(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []
    original = same_batch.Fingerprint.__init__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(same_batch.Fingerprint, "__init__", counted)
    return made


def test_an_unchanged_batch_gets_no_fingerprint_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made, data, batch = fingerprints(monkeypatch), SameBatch(), (torch.randn(64, 3), torch.randn(64))
    for _ in range(10):
        data.see(batch)
    assert (len(made), data.same, data.num_seen, data.num_same) == (2, True, 10, 9)


def other_shape(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    batch[0].data = batch[0].data.reshape(3, 64)
    return batch


CHANGES: dict[str, Callable[[tuple[Tensor, Tensor]], Any]] = {
    "written by torch": lambda b: (b[0].mul_(2), b[1]),
    "written past torch": lambda b: (b[0].numpy().__imul__(2), b)[1],
    "another tensor": lambda b: (b[0], torch.randn(64)),
    "one more": lambda b: (*b, torch.ones(1)),
    "one less": lambda b: b[:1],
    "another shape": other_shape,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_batch_is_another_one(name: str) -> None:
    data, batch = SameBatch(), (torch.randn(64, 3), torch.randn(64))
    for _ in range(3):
        data.see(batch)
    assert data.same
    data.see(CHANGES[name](batch))
    assert not data.same


def test_what_a_checkpoint_says_of_the_last_batch_is_compared_as_text() -> None:
    data, batch = SameBatch(), (torch.randn(64, 3), torch.arange(64), "train")
    for _ in range(3):
        data.see(batch)
    again = SameBatch()
    again.load_state_dict(data.state_dict())
    again.see((batch[0].clone(), batch[1].clone(), "train"))
    assert again.same
    again.see((batch[0] + 1, batch[1], "train"))
    assert not again.same


# ---------------------------------------------------------------- modules that are as they were


class Marked(nn.Module):
    """Writes an attribute in every forward, and counts in a buffer where it has one."""

    def __init__(self, *, counts: bool = False) -> None:
        super().__init__()
        self.calls, self.seen = 0, set[int]()
        if counts:
            self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.add(self.calls)
        if "count" in self._buffers:
            self.count += 1
        return x


@pytest.mark.parametrize(("in_between", "counts"), list(itertools.product([0, 2], [False, True])))
def test_blocks_in_a_row_leave_no_trace_though_the_second_trusts_the_first(in_between: int, counts: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), Marked(counts=counts), nn.Tanh())
    marked, known, x = model[1], None, torch.ones(1, 2)
    assert isinstance(marked, Marked)
    for k in range(4):
        calls = in_between * k
        with isolated(model, "training", known) as isolation:
            known = isolation.lasting
            model(x)
            model(x)
        assert (marked.calls, marked.seen) == (calls, set(range(1, calls + 1)))
        assert not counts or float(marked.count) == calls
        for _ in range(in_between):
            model(x)


def test_only_what_holds_no_memory_of_a_forward_is_kept_for_the_next_block() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), Marked(counts=True), nn.Tanh())
    model[3].cache = [torch.ones(3)]
    model[0].answer = torch.ones(3)
    with isolated(model, "training") as isolation:
        assert set(isolation.lasting) == {model}
    del model[3].cache, model[0].answer
    with isolated(model, "training") as isolation:
        assert set(isolation.lasting) == {model, model[0], model[3]}


def test_what_a_module_has_noted_between_two_proposals_is_still_there_after_the_next() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    model[1].seen = []
    with isolated(model) as first:
        model(torch.zeros(1, 3))
    known = first.lasting
    assert model[1] in known
    model[1].seen.append("a step")
    with isolated(model, "quiet", known):
        model[1].seen.append("a forward")
    assert model[1].seen == ["a step"]


def test_a_batch_that_was_written_to_where_nobody_looks_is_not_still_the_same() -> None:
    batch = (torch.zeros(4096),)
    fingerprint = Fingerprint(batch)
    assert fingerprint.still(batch)
    for place in range(1, 4096, 97):
        batch[0][place] += 0.0  # the number stays, and torch counts the write
    assert not fingerprint.still(batch)
