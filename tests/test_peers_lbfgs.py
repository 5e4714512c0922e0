"""L-BFGS as an arm: the package's own iteration, every evaluation paid for, and an end at the budget."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hybrid_predict_trainer.cost import PASS_UNITS, STEP_UNITS
from hybrid_predict_trainer.experiments.arms.options import Options, build_experiment
from hybrid_predict_trainer.experiments.baselines import lbfgs
from hybrid_predict_trainer.experiments.run_arm import Arm, run_arm

START = (-1.2, 1.0)


def rosenbrock(w: Tensor) -> Tensor:
    return 100 * (w[1] - w[0] ** 2) ** 2 + (1 - w[0]) ** 2


def objective_of(budget_units: float) -> tuple[lbfgs.Objective, Tensor]:
    w = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    return lbfgs.Objective(lambda: rosenbrock(w), [w], lbfgs.Meter(budget_units)), w


def test_it_walks_as_one_long_call_of_the_package_and_pays_for_no_evaluation_twice() -> None:
    num_iterations = 12
    reference = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        reference.grad = None
        loss = lbfgs.SCALE * rosenbrock(reference)
        loss.backward()
        return loss

    torch.optim.LBFGS(
        [reference], lr=1.0, max_iter=num_iterations, max_eval=10**6, tolerance_grad=0.0, tolerance_change=0.0,
        history_size=20, line_search_fn="strong_wolfe",
    ).step(closure)  # fmt: skip

    objective, w = objective_of(1e9)

    class Enough(Exception):  # noqa: N818
        pass

    def stop(loss: float) -> None:
        if objective.meter.num_iterations == num_iterations:
            raise Enough

    with pytest.raises(Enough):
        lbfgs.minimize(objective, history=20, lr=1.0, after_iteration=stop)
    assert torch.equal(w, reference)
    assert objective.meter.num_evaluations == calls


def test_it_finds_the_minimum_and_then_stops() -> None:
    objective, w = objective_of(1e5)
    assert lbfgs.minimize(objective, history=20, lr=1.0) == ""
    torch.testing.assert_close(w.detach(), torch.ones(2, dtype=torch.float64))
    assert objective.meter.cost_units < 1e4  # nothing more is to be had


@pytest.mark.parametrize("budget", [2.0, 3.2, 10.0, 40.0, 100.0])
def test_it_never_costs_more_than_its_budget(budget: float) -> None:
    objective, w = objective_of(budget)
    before = float(rosenbrock(w.detach()))
    lbfgs.minimize(objective, history=20, lr=1.0)
    meter = objective.meter
    assert meter.cost_units <= budget
    assert meter.cost_units > budget - 3 - 0.1 - PASS_UNITS * lbfgs.two_loop_passes(20)
    assert float(rosenbrock(w.detach())) <= before
    assert meter.cost_units == pytest.approx(3 * meter.num_evaluations + meter.iteration_units)


def test_a_longer_history_costs_more_per_iteration() -> None:
    assert lbfgs.two_loop_passes(100) - lbfgs.two_loop_passes(20) == 800


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    w = torch.ones(2, requires_grad=True)
    objective = lbfgs.Objective(lambda: (w * math.inf).sum(), [w], lbfgs.Meter(100.0))
    assert "diverged" in lbfgs.minimize(objective, history=20, lr=1.0)


def test_a_trial_beyond_the_numbers_is_stepped_back_from() -> None:
    w = torch.tensor([4.0], dtype=torch.float64, requires_grad=True)
    # a first step as long as the gradient says leaves the domain of the logarithm
    objective = lbfgs.Objective(lambda: (w - torch.log(w)).sum(), [w], lbfgs.Meter(300.0))
    assert lbfgs.minimize(objective, history=20, lr=64.0) == ""
    assert float(w.detach()) == pytest.approx(1.0)


def test_the_arm_ends_at_its_budget_with_every_evaluation_counted() -> None:
    setup = build_experiment(Options(task="pinn-poisson", batch_size=24, steps=60, threads=1))
    run = run_arm(setup, Arm(name="lbfgs-20", kind="peer", lr=1.0), seed=0)
    counts = run.counts
    assert 60 - 4 < run.cost_units / STEP_UNITS <= 60
    assert counts["num_forward"] == counts["num_backward"] >= counts["num_real_steps"] > 20
    assert run.cost_units > 3 * counts["num_backward"]
    assert run.final_val_loss < run.curve[0][1]
    assert run.curve[-1] == (run.cost_units, run.final_val_loss)
    assert not run.error
