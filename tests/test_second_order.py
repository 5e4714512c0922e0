"""References of full-batch training: each finds the minimum of what it is made for."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybrid_predict_trainer.experiments.arms.drive import seeded_model
from hybrid_predict_trainer.experiments.arms.options import Options, build_experiment
from hybrid_predict_trainer.experiments.baselines import run_baseline, second_order
from hybrid_predict_trainer.experiments.baselines.base import BaselineJob
from hybrid_predict_trainer.experiments.baselines.flat import train
from hybrid_predict_trainer.experiments.baselines.second_order import (
    Flat,
    dense,
    levenberg_marquardt,
    limited,
    nys_newton_cg,
)
from hybrid_predict_trainer.experiments.bench import clock
from hybrid_predict_trainer.experiments.run_arm import Arm, run_arm
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
    "nysnewton-cg": nys_newton_cg,
}


@pytest.mark.parametrize("name", METHODS)
def test_references_solve_a_linear_problem(name: str) -> None:
    torch.manual_seed(0)
    X, y = torch.randn(30, 5, dtype=torch.float64), torch.randn(30, 1, dtype=torch.float64)
    flat = Flat(nn.Linear(5, 1).double(), loss_fn, (X, y))
    losses = list(itertools.islice(METHODS[name](flat), 260))
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


def test_the_clock_prints_a_line_per_method(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = [
        {"task": "t", "dtype": "float64", "preset": "", "method": m, "seed": s, "cpu_s": 1.0, "loss": loss,
         "error": 0.1}
        for m, loss in (("slow", 1.0), ("good", 1e-3)) for s in (0, 1)
    ]  # fmt: skip
    lines = clock.format_table(rows).splitlines()
    assert [line.split()[3] for line in lines] == ["good", "slow"]
    picture, kept = tmp_path / "loss.svg", tmp_path / "rows.jsonl"
    told = ["--tasks", "regression,oscillator,pinn-poisson", "--dtypes", "float64", "--methods", "adam,lm,portfolio"]
    assert clock.main([*told, "--seconds", "0.05", "--plot", str(picture), "--out", str(kept)]) == 0
    assert "adam" in capsys.readouterr().out
    drawn = picture.read_text(encoding="utf-8")
    assert all(name in drawn for name in ("regression float64", "lm", "portfolio", "CPU seconds"))
    for line in kept.read_text(encoding="utf-8").splitlines():
        seconds, losses = zip(*json.loads(line)["curve"], strict=True)
        assert list(seconds) == sorted(seconds)
        assert list(losses) == sorted(losses, reverse=True)


def test_newtons_method_ends_a_quadratic_in_few_steps() -> None:
    """With a damping of a hundredth each step leaves at most so much of the flattest direction, curvature 2 here."""
    torch.manual_seed(0)
    X, y = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q * 8**0.5, torch.ones(8, 1, dtype=torch.float64)
    flat = Flat(nn.Linear(8, 1, bias=False).double(), loss_fn, (X, y))
    product, f, g = flat.hessian()
    assert f == pytest.approx(flat.loss())
    torch.testing.assert_close(product(torch.eye(8, dtype=torch.float64)[0]), 2 * torch.eye(8, dtype=torch.float64)[0])
    d = second_order._newton_direction(product, g, lambda v: v)
    torch.testing.assert_close(d, -g / (2 + second_order.NEWTON_DAMPING))
    assert flat.backtrack(f, g, d)
    assert flat.loss() < 1e-4 * f


def test_a_direction_that_leads_nowhere_leaves_the_weights() -> None:
    flat = Flat(nn.Linear(2, 1).double(), loss_fn, (torch.eye(2).double(), torch.ones(2, 1).double()))
    f, g = flat.loss_and_gradient()
    before = flat.x.clone()
    assert not flat.backtrack(f, -g, g)  # uphill, and told to be downhill
    assert torch.equal(flat.x, before)


# ---- as arms of a comparison -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lm", "ssbfgs", "ssbroyden", "lbfgs-400", "nysnewton-cg"])
def test_arms_stay_within_their_budget(name: str) -> None:
    options = Options(task="regression", steps=140, batch_size=32)
    setup = build_experiment(options)
    run = run_baseline(setup, Arm(name=name, kind="peer", lr=1.0), seed=0)
    plain = run_arm(setup, Arm(name="plain", kind="plain", lr=setup.recipe.lr), seed=0)
    assert run.cost_units <= 3.1 * 140
    assert run.cost_units > 0.8 * 3.1 * 140
    assert run.counts["num_forward"] > 50
    assert run.counts["num_backward"] > 20
    assert run.final_val_loss < run.curve[0][1]
    assert run.final_val_loss < plain.curve[0][1]
    assert 0 < run.solution_error < 1
    assert plain.solution_error > 0


def test_an_iteration_that_is_not_paid_for_to_its_end_leaves_the_weights_of_before() -> None:
    def iterations(task: Any, flat: Flat) -> Iterator[float]:
        while True:
            yield flat.loss()
            flat.x += 1
            flat.pay(10.0)
            flat.x -= 1

    setup = build_experiment(Options(task="regression", steps=10, batch_size=32))
    seen: list[Tensor] = []

    def kept(task: Any, flat: Flat) -> Iterator[float]:
        seen.append(flat.x)
        yield from iterations(task, flat)

    order = BaselineJob(setup=setup, arm=Arm(name="lm", kind="peer", lr=1.0), seed=0, values={})
    model = seeded_model(setup, 0)
    run = train(kept)(order)
    start = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(seen[0], start, atol=1e-5, rtol=0)
    assert run.cost_units == 23.0  # three evaluations and two iterations; a third one has no room
    assert run.counts["num_real_steps"] == 3
