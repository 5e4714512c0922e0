"""What only shows on an accelerator, on one that is pretended: mixed devices, waits, float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cases import loss_fn, make_batches
from hybrid_predict_trainer import weights
from hybrid_predict_trainer.basis import Basis, paired_dots, squared_norms
from hybrid_predict_trainer.health import measure
from hybrid_predict_trainer.records import BasisSpec
from hybrid_predict_trainer.step_scale import step_cosine
from hybrid_predict_trainer.tasks import TaskSettings, base, make_task
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
    parameters, groups = weights.predicted_parameters(model, torch.optim.SGD(model.parameters(), lr=0.1))
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
        assert weights.per_tensor_rms(deltas) == [1.0] * len(deltas)
        assert weights.all_finite(deltas)
        assert squared_norms(deltas).dtype == paired_dots(deltas, deltas).dtype == torch.float64
        measure(model)
        before = weights.clone(parameters)
        assert step_cosine([p.grad for p in parameters], before, parameters).device == DEVICE
        assert step_cosine([None] * len(parameters), before, parameters).device == DEVICE
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
