"""Snapshots: everything is taken, everything comes back, nothing live is replaced."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from cases import OPTIMIZERS, assert_same, make_batches, rng, seed_all, setup
from hybrid_predict_trainer.keep.buffers import BufferGuard
from hybrid_predict_trainer.keep.isolation import side_effect_free
from hybrid_predict_trainer.keep.rng import RandomStates, rng_state, set_rng_state
from hybrid_predict_trainer.keep.snapshot import Snapshot


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("when", ["fresh", "running"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_take_and_restore(optimizer: str, when: str, offload: bool) -> None:
    made = setup("norm_dropout", optimizer, "lambda")
    batches = make_batches(8)
    if when == "running":
        made.plain(batches[:4])
    before = made.everything()
    snapshot = Snapshot.take(made.model, made.optimizer, [made.scheduler], offload=offload)
    assert_same(made.everything(), before)
    pointers = {id(t): t.data_ptr() for t in [*made.model.parameters(), *made.model.buffers()]}
    made.plain(batches[4:])
    for _ in range(2):  # a snapshot can be used again
        snapshot.restore(made.model, made.optimizer, [made.scheduler])
        assert_same(made.everything(), before)
        first = made.plain(batches[4:])
    snapshot.restore(made.model, made.optimizer, [made.scheduler])
    assert made.plain(batches[4:]) == first
    assert {id(t): t.data_ptr() for t in [*made.model.parameters(), *made.model.buffers()]} == pointers


def test_optimizer_tensors_are_written_in_place() -> None:
    made = setup("mlp", "adam")
    made.plain(make_batches(2))
    moments = [s["exp_avg"] for s in made.optimizer.state.values()]
    snapshot = Snapshot.take(made.model, made.optimizer)
    made.plain(make_batches(2))
    snapshot.restore(made.model, made.optimizer)
    assert all(a is s["exp_avg"] for a, s in zip(moments, made.optimizer.state.values(), strict=True))


def test_restore_may_leave_the_generators_alone() -> None:
    made = setup("dropout")
    snapshot = Snapshot.take(made.model, made.optimizer)
    made.plain(make_batches(2))
    after = rng()
    snapshot.restore(made.model, made.optimizer, rng=False)
    assert_same(rng(), after)
    snapshot.restore(made.model, made.optimizer)
    assert torch.equal(torch.get_rng_state(), snapshot.rng["torch"])


def test_settings_of_groups_come_back() -> None:
    made = setup("mlp", "sgd")
    snapshot = Snapshot.take(made.model, made.optimizer)
    group = made.optimizer.param_groups[0]
    group["lr"], group["extra"] = 9.0, "added"
    del group["dampening"]
    snapshot.restore(made.model, made.optimizer)
    assert (group["lr"], group["dampening"], "extra" in group) == (0.05, 0, False)


def test_float32_moments_of_bfloat16_weights_keep_their_dtype() -> None:
    made = setup("mlp", "sgd")
    made.model.to(torch.bfloat16)
    for p in made.model.parameters():
        made.optimizer.state[p]["moment"] = torch.full_like(p, 1 / 3, dtype=torch.float32)
    before = made.everything()
    snapshot = Snapshot.take(made.model, made.optimizer)
    for p in made.model.parameters():
        made.optimizer.state[p]["moment"].zero_()
        made.optimizer.state[p]["new"] = 1
    snapshot.restore(made.model, made.optimizer)
    assert_same(made.everything(), before)


def test_snapshot_is_a_copy() -> None:
    made = setup("norm_dropout", "adam", "lambda")
    made.plain(make_batches(2))
    snapshot = Snapshot.take(made.model, made.optimizer, [made.scheduler])
    size = snapshot.memory_bytes()
    weights = sum(t.numel() * t.element_size() for t in [*made.model.parameters(), *made.model.buffers()])
    assert size > 2.5 * weights
    made.plain(make_batches(3))
    again = Snapshot.from_state_dict(snapshot.state_dict())
    again.restore(made.model, made.optimizer, [made.scheduler])
    now = made.everything()
    snapshot.restore(made.model, made.optimizer, [made.scheduler])
    assert_same(made.everything(), now)


def test_parameters_only_the_optimizer_holds() -> None:
    made = setup("mlp", "sgd")
    extra = torch.nn.Parameter(torch.ones(2))
    made.optimizer.add_param_group({"params": [extra]})
    snapshot = Snapshot.take(made.model, made.optimizer)
    with torch.no_grad():
        extra.zero_()
    snapshot.restore(made.model, made.optimizer)
    assert extra.tolist() == [1.0, 1.0]


# ---------------------------------------------------------------- generators


def draw() -> list[float]:
    return [
        *torch.rand(3).tolist(),
        *torch.randn(3).tolist(),
        *np.random.rand(2),
        *np.random.randn(3),
        random.random(),
        random.gauss(0, 1),
    ]


@pytest.mark.parametrize("odd", [0, 1, 3])
def test_generators_come_back(odd: int) -> None:
    """After an odd number of normal draws numpy and Python hold one back: it must come back too."""
    seed_all(5)
    for _ in range(odd):
        np.random.randn()
        random.gauss(0, 1)
        torch.randn(1)
    state = rng_state()
    before = rng()
    first = draw()
    assert draw() != first
    set_rng_state(state)
    assert_same(rng(), before)
    assert draw() == first


def test_numpy_is_asked_only_where_its_words_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    np.random.seed(5)
    first = RandomStates()
    with monkeypatch.context() as patched:
        for name in ("get_state", "set_state"):
            patched.setattr(np.random, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))
        RandomStates().put_back()
        first.put_back()
    one = np.random.normal()  # a second normal number waits in the generator now: no word tells whether it was taken
    waiting = RandomStates()
    second = np.random.normal()
    waiting.put_back()
    assert np.random.normal() == second
    first.put_back()
    assert np.random.normal() == one


def test_generator_state_is_plain() -> None:
    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(k, str) and plain(v) for k, v in value.items())
        return (
            all(map(plain, value))
            if isinstance(value, list)
            else type(value) in (int, float, str, type(None), torch.Tensor)
        )

    assert plain(rng_state())


# ---------------------------------------------------------------- quiet forwards


@pytest.mark.parametrize("model", ["norm_dropout", "counting", "dropout"])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_quiet_forward_leaves_no_trace(model: str, fails: bool, training: bool) -> None:
    made = setup(model)
    made.model.train(training)
    made.model[0].eval()  # a mix of modes must come back as it was
    before = made.everything()
    x, _ = make_batches(1)[0]

    def run() -> None:
        with side_effect_free(made.model), torch.no_grad():
            made.model(x)
            draw()
            if fails:
                raise ValueError("in the middle")

    if fails:
        with pytest.raises(ValueError, match="middle"):
            run()
    else:
        run()
    assert_same(made.everything(), before)


def test_quiet_forward_switches_dropout_off_and_uses_batch_statistics() -> None:
    made = setup("norm_dropout")
    made.plain(make_batches(5))
    x, _ = make_batches(1, seed=9)[0]
    x = 5 * x + 3
    with side_effect_free(made.model), torch.no_grad():
        first, second = made.model(x), made.model(x)
        inner = made.model[1](made.model[0](x))
    assert torch.equal(first, second)
    assert inner.mean(0).abs().max() < 1e-5 + made.model[1].bias.abs().max()
    made.model.eval()
    with side_effect_free(made.model), torch.no_grad():
        evaluated = made.model(x)
    assert not torch.allclose(evaluated, first), "in evaluation mode the running statistics count"


# ---------------------------------------------------------------- buffer guard


def test_buffer_guard_undoes_and_learns() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3))
    model.register_buffer("mask", torch.ones(1000))
    guard = BufferGuard(model)
    x = torch.randn(8, 3)
    guard.before()
    model(x)
    guard.after()
    known = {n: b.clone() for n, b in model.named_buffers()}
    guard.before()
    model(x * float("nan"))
    assert torch.isnan(model[0].running_mean).all()
    guard.undo()
    assert_same(dict(model.named_buffers()), known)
    assert guard.changing == {f"0.{name}" for name, _ in model[0].named_buffers()}, "the mask is not copied again"


def test_buffer_guard_forgets() -> None:
    model = torch.nn.BatchNorm1d(3).eval()
    guard = BufferGuard(model)
    guard.before()
    model(torch.randn(4, 3))
    guard.after()
    model.train()
    guard.forget()
    before = {n: b.clone() for n, b in model.named_buffers()}
    guard.before()
    model(torch.randn(4, 3))
    guard.undo()
    assert_same(dict(model.named_buffers()), before)
