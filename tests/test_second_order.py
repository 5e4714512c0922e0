"""References of full-batch training: each finds the minimum of what it is made for."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from hybrid_predict_trainer.experiments.baselines.second_order import Flat, dense, levenberg_marquardt, limited
from hybrid_predict_trainer.experiments.bench import clock
from hybrid_predict_trainer.tasks import TaskSettings, make_task

Batch = tuple[Tensor, Tensor]


def residuals(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1])[:, 0]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return residuals(model, batch).square().mean()


METHODS: dict[str, Callable[[Flat], Iterator[float]]] = {
    "lm": lambda flat: levenberg_marquardt(flat, residuals),
    "ssbfgs": lambda flat: dense(flat, "ssbfgs"),
    "ssbroyden": lambda flat: dense(flat, "ssbroyden"),
    "limited": lambda flat: limited(flat, 20),
}


@pytest.mark.parametrize("name", METHODS)
def test_references_solve_a_linear_problem(name: str) -> None:
    torch.manual_seed(0)
    X, y = torch.randn(30, 5, dtype=torch.float64), torch.randn(30, 1, dtype=torch.float64)
    flat = Flat(nn.Linear(5, 1).double(), loss_fn, (X, y))
    losses = list(itertools.islice(METHODS[name](flat), 160))
    ones = torch.cat([X, torch.ones(30, 1, dtype=torch.float64)], 1)
    best = (ones @ torch.linalg.lstsq(ones, y).solution - y).square().mean().item()
    assert flat.loss() == pytest.approx(best, rel=1e-9)
    assert losses[-1] <= losses[0]


@pytest.mark.parametrize(
    "name",
    [
        "pinn-poisson",
        "oscillator",
        "pinn-burgers",
        "regression",
        "pinn-allen-cahn",
        "pinn-klein-gordon",
        "pinn-inverse",
    ],
)
def test_residuals_of_the_tasks_have_their_loss(name: str) -> None:
    task = make_task(name, TaskSettings(dtype="float64"))
    model, batch = task.build_model(0), next(iter(task.batches(0)))
    r = task.residual_fn(model, batch)  # type: ignore[attr-defined]
    assert r.square().mean().item() == pytest.approx(task.loss_fn(model, batch).item(), rel=1e-12)


def test_the_clock_prints_a_line_per_method(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"task": "t", "dtype": "float64", "preset": "", "method": m, "seed": s, "cpu_s": 1.0, "loss": loss,
         "error": 0.1}
        for m, loss in (("slow", 1.0), ("good", 1e-3)) for s in (0, 1)
    ]  # fmt: skip
    lines = clock.format_table(rows).splitlines()
    assert [line.split()[3] for line in lines] == ["good", "slow"]
    assert clock.main(["--tasks", "regression", "--dtypes", "float64", "--methods", "adam", "--seconds", "0.05"]) == 0
    assert "adam" in capsys.readouterr().out
