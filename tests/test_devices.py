"""What only shows on an accelerator, on one that is pretended: mixed devices, waits, float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cases import Fake, assert_same, config, loss_fn, make_batches, put_into_subject, setup
from hybrid_predict_trainer import HybridTrainer
from hybrid_predict_trainer.cycle import predict_step
from hybrid_predict_trainer.cycle.real_step import settle_rollback_point
from hybrid_predict_trainer.experiments.arms.drive import wait_for_device
from hybrid_predict_trainer.keep import optimizer_state
from hybrid_predict_trainer.keep.rng import rng_state, set_rng_state
from hybrid_predict_trainer.keep.snapshot import Snapshot, paired
from hybrid_predict_trainer.move.lookahead import DriftLookahead
from hybrid_predict_trainer.move.lr_multiplier import step_cosines
from hybrid_predict_trainer.numerics.streaming import CountSketch
from hybrid_predict_trainer.observe.basis import Basis
from hybrid_predict_trainer.observe.gradient_health import measure
from hybrid_predict_trainer.observe.history import Readout
from hybrid_predict_trainer.records import BasisSpec, Phase, Reason, StateDict, Verdict
from hybrid_predict_trainer.tasks import TaskSettings, base, make_task
from hybrid_predict_trainer.weights import algebra as weights
from hybrid_predict_trainer.weights import offload as host
from hybrid_predict_trainer.weights.parameters import predicted_parameters
from hybrid_predict_trainer.weights.products import paired_dots, squared_norms
from pretended import DEVICE, Accelerator


def device_model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).to(DEVICE)


def with_gradients(model: nn.Module) -> nn.Module:
    loss_fn(model, [t.to(DEVICE) for t in make_batches(1)[0]]).backward()
    return model


# ---- sums ---------------------------------------------------------------------------------------


def test_no_float64_where_there_is_none() -> None:
    assert weights.accumulate_dtype(torch.device("mps")) is torch.float32
    assert weights.accumulate_dtype(torch.device("cuda", 1)) is torch.float64
    assert weights.accumulate_dtype(torch.device("cpu")) is torch.float64


def test_scalars_of_several_devices_come_to_the_host_together() -> None:
    scalars = [torch.tensor(2.0), torch.zeros((), device=DEVICE), torch.tensor(3.0, dtype=torch.float64),
               torch.zeros((), device=DEVICE, dtype=torch.bfloat16)]  # fmt: skip
    with Accelerator() as accelerator:
        assert weights.on_host(scalars).tolist() == [2.0, 1.0, 3.0, 1.0]
    assert len(accelerator.waits) == 1
    assert weights.on_host([]).tolist() == []


@pytest.mark.parametrize("dtype", ["param", "float32", "bfloat16"])
def test_nothing_is_widened_on_a_device_without_float64(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "WITHOUT_FLOAT64", frozenset({"meta"}))
    model = with_gradients(device_model())
    parameters, groups = predicted_parameters(model, torch.optim.SGD(model.parameters(), lr=0.1))
    spec = BasisSpec(num_displacements=2, lag=True, optimizer=True, gradient=True, curvature=True)
    basis = Basis(parameters, groups, spec, dtype=dtype)
    with Accelerator() as accelerator:
        for step in range(8):
            basis.accumulate()
            basis.before_step(last=step % 2 == 1)
            if step % 2 == 1:
                basis.close_window()
        deltas = basis.combine(torch.ones(groups.num_groups, spec.num_columns, dtype=torch.float64))
        assert basis.products().BB.dtype == torch.float64
        assert weights.per_tensor_rms(deltas) == [1 / math.sqrt(d.numel()) for d in deltas], "of lengths that read as 1"
        assert weights.all_finite(deltas)
        assert squared_norms(deltas).dtype == paired_dots(deltas, deltas).dtype == torch.float64
        measure(model)
        before = weights.clone(parameters)
        assert step_cosines([p.grad for p in parameters], before, parameters, groups).device == DEVICE
        assert step_cosines([None] * len(parameters), before, parameters, groups).device == DEVICE
    assert accelerator.wide == []


# ---- batches --------------------------------------------------------------------------------------


@pytest.fixture
def queueing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies to the pretended accelerator need not be waited for, as on CUDA."""
    monkeypatch.setattr(base, "QUEUEING", frozenset({"meta"}))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)


@pytest.mark.parametrize("name", ["gpt", "digits", "bert", "cifar"])
def test_batches_do_not_wait_for_the_device(name: str, queueing: None, tmp_path: Path) -> None:
    images = tmp_path / "images.npz"
    x = np.zeros((24, 8, 8, 3), dtype=np.uint8)
    np.savez(images, x=x, y=np.arange(24) % 2)
    settings = {
        "gpt": TaskSettings(preset="0.3M", batch_size=2, context=8, data_bytes=20_000, device="meta"),
        "cifar": TaskSettings(preset="narrow", data=images, batch_size=4, device="meta"),
    }
    task = make_task(name, settings.get(name, TaskSettings(device="meta")))
    with Accelerator() as accelerator:
        for _, batch in zip(range(7), task.batches(0), strict=False):
            assert all(part.device == DEVICE for part in batch)
    assert accelerator.waits == []


# ---- copies in host memory ------------------------------------------------------------------------


def test_copies_are_made_in_the_memory_of_old_ones() -> None:
    source = torch.randn(3, 4, requires_grad=True)
    for to_host in (False, True):
        first = host.copied(source, to_host=to_host)
        second = host.copied(source * 2, first, to_host=to_host)
        assert second.data_ptr() == first.data_ptr() != source.data_ptr()
        assert torch.equal(second, source * 2)
        assert not second.requires_grad
        for other in (torch.randn(4, 3), torch.randn(3, 4).double(), None, 1.0):
            assert host.copied(source, other, to_host=to_host).data_ptr() != getattr(other, "data_ptr", int)()


def host_pointers(basis: Basis) -> set[int]:
    return {t.data_ptr() for t in basis._landing._places.values()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_on_the_host_is_added_a_step_later_and_no_different(dtype: torch.dtype) -> None:
    """Between devices of the same machine: the path of an accelerator, with the bits of the usual one."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameters, groups = predicted_parameters(model, optimizer)
    spec = BasisSpec(num_displacements=3, lag=True, optimizer=True, gradient=True, curvature=True)
    plain, sent = Basis(parameters, groups, spec), Basis(parameters, groups, spec)
    sent._offloaded = True
    pointers = set()
    for step, batch in enumerate(make_batches(24)):
        optimizer.zero_grad()
        loss_fn(model, [t.to(dtype) for t in batch]).backward()
        if step % 5 == 3:
            parameters[1].grad = None
        for basis in (plain, sent):
            basis.accumulate()
            basis.before_step(last=step % 3 == 2)
        optimizer.step()
        if step == 13:
            for basis in (plain, sent):
                basis.restart_window()
        if step % 3 == 2:
            for basis in (plain, sent):
                basis.close_window()
        if step > 4:
            pointers |= host_pointers(sent)
    assert_same(sent.state_dict(), plain.state_dict())
    assert pointers == host_pointers(sent), "no step takes new memory"
    assert sent.memory_bytes()["cpu"] > plain.memory_bytes()["cpu"]


def test_basis_of_an_accelerator_on_the_host() -> None:
    model = with_gradients(device_model())
    parameters, groups = predicted_parameters(model, torch.optim.SGD(model.parameters(), lr=0.1))
    basis = Basis(parameters, groups, BasisSpec(num_displacements=2, lag=True, gradient=True), offload=True)
    with Accelerator():
        for step in range(6):
            basis.accumulate()
            pointers = host_pointers(basis)
            if step % 2:
                basis.close_window()
        assert {t.device.type for t in basis.average()} == {"meta"}
        assert {t.tolist()[0] for t in basis._x if t.dim() == 1} == {1.0}
    assert host_pointers(basis) == pointers
    assert set(basis.memory_bytes()) == {"cpu"}


# ---- snapshots ------------------------------------------------------------------------------------


def pointers_of(snapshot: Snapshot) -> list[int]:
    found: list[int] = []
    for part in (snapshot.parameters, snapshot.buffers, snapshot.optimizer, snapshot.others):
        paired(part, None, lambda t, _: found.append(t.data_ptr()) or t)
    return found


def test_snapshot_in_the_memory_of_another() -> None:
    made = setup("norm_dropout", "adam", "lambda")
    lookahead = DriftLookahead(0.5, every=1)
    made.plain(make_batches(3))
    lookahead.before_step(list(made.model.parameters()))
    lookahead.after_step(list(made.model.parameters()), 1.0, pull=1.0, strength=1.0)
    old = Snapshot.take(made.model, made.optimizer, [made.scheduler, lookahead])
    pointers = pointers_of(old)
    made.plain(make_batches(3, seed=3))
    before = made.everything()
    new = Snapshot.take(made.model, made.optimizer, [made.scheduler, lookahead], into=old)
    assert pointers_of(new) == pointers
    made.plain(make_batches(3, seed=4))
    new.restore(made.model, made.optimizer, [made.scheduler, lookahead])
    assert_same(made.everything(), before)
    assert len(pointers) > 3 * len(list(made.model.parameters()))


def test_anchors_share_one_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Readout, "due", property(lambda self: len(self._pending) >= self.interval))
    made = setup("norm_dropout", "adam", "lambda")
    trainer = made.trainer(config(divergence__check_interval_steps=3, predictor__window=50), predictor=Fake())
    put_into_subject(trainer, on_cpu=False)
    batches, seen = make_batches(12), []
    for batch in batches[:3]:
        trainer.step(batch)
    for batch in batches[3:]:
        trainer.step(batch)
        if trainer.run.rollback.point is not None:
            seen.append(pointers_of(trainer.run.rollback.point))
        assert trainer.memory_usage()["snapshots"] > 0, "held between two anchors too"
    assert len(seen) == 6
    assert seen.count(seen[0]) == 6


def test_what_only_a_snapshot_holds_goes_to_the_host_and_comes_back() -> None:
    """The lookahead is part of it: two copies of the weights."""
    model = with_gradients(device_model())
    optimizer = torch.optim.Adam(model.parameters(), fused=False)
    lookahead = DriftLookahead(0.5, every=1)
    with Accelerator():
        optimizer.step()
        lookahead.before_step(list(model.parameters()))
        lookahead.after_step(list(model.parameters()), 1.0, pull=1.0, strength=1.0)
        snapshot = Snapshot.take(model, optimizer, [lookahead], offload=True)
        held = snapshot.others[0]["theta_0"]
        assert {t.device.type for t in [*snapshot.parameters, *held]} == {"cpu"}
        assert snapshot.memory_bytes() > 5 * sum(4 * p.numel() for p in model.parameters())
        snapshot.restore(model, optimizer, [lookahead])
        lookahead.after_step(list(model.parameters()), 1.0, pull=1.0, strength=1.0)
    assert all(t.device == DEVICE for t in lookahead.state_dict()["theta_0"])


@pytest.mark.parametrize("flag", ["fused", "capturable", None])
def test_step_counts_of_a_checkpoint_go_where_the_optimizer_counts(flag: str | None) -> None:
    """A fused or capturable optimizer counts on the device; others on the host."""
    p = nn.Parameter(torch.zeros(3, device=DEVICE))
    optimizer = torch.optim.AdamW([p])
    saved = {"step": torch.tensor(4.0), "exp_avg": torch.ones(3), "pairs": [torch.ones(3)]}
    groups = [{k: v for k, v in optimizer.param_groups[0].items() if k != "params"}]
    settings = [{**groups[0], **({flag: True} if flag else {})}]
    optimizer_state.restore(nn.ParameterList([p]), optimizer, {"state": {0: saved}, "groups": settings})
    state = optimizer.state[p]
    assert state["step"].device.type == ("meta" if flag else "cpu")
    assert state["exp_avg"].device == state["pairs"][0].device == DEVICE


def test_generators_of_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are here come back; the rest is left."""
    given: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda.random, "set_rng_state", lambda state, device: given.append(device))
    set_rng_state({**rng_state(), "cuda": [torch.zeros(16, dtype=torch.uint8)] * 2})
    assert given == [0]


def test_generator_of_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.ones(3, dtype=torch.uint8))
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: given.append(state.tolist()))
    set_rng_state(rng_state())
    assert given == [[1, 1, 1]]


def test_a_sketch_is_read_in_one_transfer_and_added_up_on_the_host() -> None:
    sketch = CountSketch([(3, 4), (5,)], 7)
    with Accelerator() as accelerator:
        found = sketch([torch.zeros(12, device=DEVICE), torch.zeros(5, device=DEVICE)])
    assert accelerator.waits == ["_to_copy"]
    assert torch.equal(found, sketch([torch.ones(12), torch.ones(5)]))


# ---- whole steps ----------------------------------------------------------------------------------


def device_trainer(**changes: object) -> HybridTrainer:
    model = device_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)
    return HybridTrainer(
        model, optimizer, config(gradient_clip_norm=1.0, **changes), loss_fn, schedule, predictor=Fake(ready=False)
    )


def device_batches(count: int) -> list[list[torch.Tensor]]:
    return [[t.to(DEVICE) for t in batch] for batch in make_batches(count)]


@pytest.mark.parametrize("enabled", [True, False])
def test_steps_between_two_readings_do_not_wait(enabled: bool) -> None:
    trainer = device_trainer(
        enabled=enabled, divergence__check_interval_steps=100, predictor__window=100,
        lookahead__damping=0.5, lookahead__extrapolation=0.3,
        lookahead__scope="all", gate__exact="never",  # what is read here is ones: all batches would look alike
    )  # fmt: skip
    batches = device_batches(12)
    with Accelerator() as accelerator:
        for batch in batches:
            trainer.step(batch)
        assert accelerator.waits == []
        trainer.summary()
        assert len(accelerator.waits) <= 1


@pytest.mark.parametrize("offload", [False, True])
def test_training_goes_on_from_a_checkpoint_in_host_memory(offload: bool) -> None:
    """Everything read from a file is in host memory: what is beside the weights has to go where they are."""
    settings = {
        "encoder__low_rank": 2, "encoder__kfac": True, "lookahead__damping": 0.5, "predictor__offload": offload,
        "divergence__check_interval_steps": 4, "lookahead__scope": "all", "gate__exact": "never",
    }  # fmt: skip
    first, again = device_trainer(**settings), device_trainer(**settings)
    batches = device_batches(12)

    def on_host(state: StateDict) -> StateDict:
        return paired(state, None, lambda t, _: t.cpu())

    with Accelerator():
        for batch in batches[:10]:
            first.step(batch)
        assert first.run.rollback.point is not None
        again.run.windows.basis.load_state_dict(on_host(first.run.windows.basis.state_dict()))
        again.run.windows.observer.load_state_dict(on_host(first.run.windows.observer.state_dict()))
        again.run.load_state_dict(on_host(first.run.state_dict()))
        settle_rollback_point(again.run, finite=False)
        for batch in batches:
            again.step(batch)
        again.run.optimizer_step.lookahead.translate([torch.zeros_like(p) for p in again.run.subject.parameters], 1.0)
    assert again.run.optimizer_step.lookahead.memory_bytes() > 0
    assert again.statistics()["num_real_steps"] == 21, "the step since the anchor is lost"


def test_a_jump_is_read_from_the_device_once_per_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tensors and steps on probation there are."""

    def approved(*args: Any) -> Verdict:
        return Verdict(accepted=True, reason=Reason.ACCEPTED, scale=1.0, loss_before=1.0, loss_after=0.5)

    monkeypatch.setattr(predict_step, "judge", approved)
    trainer = device_trainer(
        divergence__check_interval_steps=100, predictor__window=4, warmup_steps=2, correct_steps=3, gate__exact="never"
    )
    trainer.run.proposer.predictor.is_ready = True
    waits: dict[Phase, list[int]] = {}
    with Accelerator() as accelerator:
        for batch in device_batches(40):
            accelerator.waits.clear()
            waits.setdefault(trainer.step(batch).phase, []).append(len(accelerator.waits))
    assert trainer.statistics()["num_jumps_accepted"] > 1
    assert max(waits[Phase.PREDICT]) == 2, "coefficients, and lengths that tell whether all numbers are finite"
    assert waits[Phase.CORRECT][:3] == [0, 0, 1]


def test_readings_and_the_mean_loss_of_an_epoch_take_one_transfer() -> None:
    trainer = device_trainer(divergence__check_interval_steps=4, predictor__window=100, gate__exact="never")
    batches = device_batches(12)
    with Accelerator() as accelerator:
        epoch = trainer.fit(batches)
    assert epoch.mean_loss == epoch.final_loss == 1.0
    looks = accelerator.waits.count("equal")
    assert len(accelerator.waits) - looks == 3 + 3, "three readings, mean and last loss, are the weights finite"
    assert looks <= 4, "one look per reading whether somebody has written to the weights"


def test_loss_and_norm_may_be_on_different_devices() -> None:
    """A model on two devices: its loss is on the last, the norm of its gradients on the first."""
    readout = Readout(2)
    with Accelerator():
        readout.push(1, torch.tensor(3.0, device=DEVICE), torch.tensor(2.0))
        readout.push(2, torch.tensor(5.0, device=DEVICE), None)
        readings = readout.read()
    assert [(r.step, r.loss, r.gradient_norm) for r in readings] == [(1, 1.0, 2.0), (2, 1.0, None)]


def test_a_clock_waits_for_the_devices_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever kind they are; nothing is waited for on the CPU."""
    waited: list[object] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    wait_for_device(setup().trainer(config()))
    assert waited == []
    wait_for_device(device_trainer())
    assert waited == [DEVICE]
