"""DeepXDE's problem, points and network in our loop: what it squares is what we solve for."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

os.environ.setdefault("DDE_BACKEND", "pytorch")
dde = pytest.importorskip("deepxde", reason="pip install deepxde")
EXAMPLE = Path(__file__).parents[1] / "examples" / "pinn_deepxde.py"


@pytest.fixture(autouse=True)
def _float32_again() -> Iterator[None]:
    """What it is told about numbers holds for everything else that torch makes in this process."""
    yield
    dde.config.set_default_float("float32")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pinn_deepxde", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_the_mean_square_of_the_residuals_is_the_sum_of_its_losses(example: ModuleType) -> None:
    dde.config.set_default_float("float64")
    data: Any = example.problem()
    net = dde.nn.FNN([2, 8, 8, 1], "tanh", "Glorot normal")
    model = dde.Model(data, net)
    model.compile("adam", lr=1e-3, verbose=0)
    theirs = sum(loss.item() for loss in model.outputs_losses_train(*data.train_next_batch())[1])
    ours = example.residuals_of(data)(net, torch.from_numpy(data.train_x)).square().mean().item()
    assert ours == pytest.approx(theirs, rel=1e-12)


def test_evaluations_beside_the_loop_leave_no_graph_alive(example: ModuleType) -> None:
    """The library remembers derivatives by tensor (1.15.0): without clearing, every judgement would leak a graph."""
    data: Any = example.problem()
    net, residuals = dde.nn.FNN([2, 8, 8, 1], "tanh", "Glorot normal"), example.residuals_of(data)
    outputs: list[weakref.ref[torch.Tensor]] = []
    net.register_forward_hook(lambda module, args, u: outputs.append(weakref.ref(u)))
    for _ in range(5):
        residuals(net, torch.from_numpy(data.train_x).float()).square().mean().backward()
    gc.collect()
    assert sum(ref() is not None for ref in outputs) <= 1  # the last one, until the next evaluation clears it


def test_the_example_ends_far_below_the_loop_of_the_library(
    example: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pinn_deepxde.py", "16"])
    example.main()
    lines = capsys.readouterr().out.splitlines()
    theirs, ours = (float(line.split("loss")[1].split(",")[0]) for line in lines if " loss " in line)
    assert ours < 0.1 * theirs
    assert lines[-1].endswith("predictor portfolio")
