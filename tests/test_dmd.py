"""Dynamic mode decomposition against linear systems with a known answer."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dynamics import (
    assert_degenerate_windows_are_harmless,
    assert_global_random_state_untouched,
    assert_resumes_bitwise,
    errors,
    turning,
)
from hybrid_predict_trainer.config.settings import DmdConfig
from hybrid_predict_trainer.experiments.bench.predictors import measure
from hybrid_predict_trainer.experiments.bench.trajectories import CASES, flat, generate, observe
from hybrid_predict_trainer.predictors.dmd import Dmd, LossRecurrence, power_sum, recurrence, snapshot_operator, stacked


def make() -> Dmd:
    return Dmd(DmdConfig())


def test_operator_has_the_eigenvalues_of_the_system() -> None:
    torch.manual_seed(0)
    A = torch.diag(torch.tensor([0.9, 0.6, -0.3], dtype=torch.float64))
    Q = torch.linalg.qr(torch.randn(20, 3, dtype=torch.float64))[0]
    states = [torch.ones(3, dtype=torch.float64)]
    for _ in range(7):
        states.append(A @ states[-1])
    columns = torch.stack(states[::-1]) @ Q.mT  # newest first
    T, operator, start, residual = snapshot_operator(columns @ columns.mT, 1e-6)
    values = torch.linalg.eigvals(operator).real.sort().values
    torch.testing.assert_close(values, torch.tensor([-0.3, 0.6, 0.9], dtype=torch.float64), atol=1e-6, rtol=0)
    assert residual < 1e-10
    predicted = (T @ power_sum(operator, start, 3)) @ columns[:-1]
    exact = Q @ sum(torch.matrix_power(A, j) @ states[-1] for j in (1, 2, 3))
    torch.testing.assert_close(predicted, exact, atol=1e-8, rtol=0)


def test_growth_is_pulled_back_to_the_unit_circle() -> None:
    A = torch.diag(torch.tensor([2.0, 0.5], dtype=torch.float64))
    start = torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(power_sum(A, start, 4), torch.tensor([4.0, 1.875], dtype=torch.float64))
    rotation = torch.tensor([[0.0, -1.1], [1.1, 0.0]], dtype=torch.float64)
    assert float(power_sum(rotation, start, 1000).norm()) < 10


def test_broken_number_of_windows_and_defective_operators() -> None:
    A, start = torch.tensor([[0.5]], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert 0 < float(power_sum(A, start, 0.5)) < float(power_sum(A, start, 1.0))
    jordan = torch.tensor([[0.5, 1.0], [0.0, 0.5]], dtype=torch.float64)
    expected = sum(torch.matrix_power(jordan, j) for j in range(3)) @ torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(power_sum(jordan, torch.ones(2, dtype=torch.float64), 3), expected)


def test_stacking_is_the_gram_matrix_of_stacked_columns() -> None:
    columns = torch.randn(6, 10, dtype=torch.float64)
    explicit = torch.cat([columns[:-1], columns[1:]], dim=1)
    torch.testing.assert_close(stacked(columns @ columns.mT, 2), explicit @ explicit.mT)


@pytest.mark.parametrize("case", ["quadratic", "momentum", "two_scales"])
def test_noise_free_linear_systems(case: str) -> None:
    for row in measure(["dmd"], [case], [0], quick=True):
        assert row["displacement_cosine"] > 0.99, row
        assert row["displacement_rel_err"] < 0.05, row


@pytest.mark.parametrize("case", ["quadratic", "momentum", "two_scales", "switching"])
def test_loss_is_forecast_better_than_by_its_slope(case: str) -> None:
    """``hold`` continues the slope, ``zero`` says that the loss stays."""
    table = measure(["dmd", "hold", "zero"], [case], [0], quick=True)
    missed = {(row["predictor"], row["horizon"]): row["loss_mae_rel"] for row in table}
    for horizon in (10, 20, 40):
        assert missed["dmd", horizon] < 0.8 * min(missed["hold", horizon], missed["zero", horizon]), (case, horizon)


def test_recurrence_of_a_sum_of_exponentials() -> None:
    n = torch.arange(24, dtype=torch.float64)
    series = 2 * 0.9**n - 0.5**n
    companion = recurrence(series)
    ahead = power_sum(companion, companion @ series.flip(0)[: len(companion)], 3)[0]
    exact = sum(2 * 0.9**i - 0.5**i for i in (24, 25, 26))
    assert float(ahead) == pytest.approx(exact, rel=0.01)


def test_the_recurrence_is_of_changes_per_learning_rate() -> None:
    """A loss that falls by e^-rate: whatever the rates were, the next change follows the planned ones."""
    loss, found = 1.0, LossRecurrence()
    (step, *_) = turning(make().spec, 1)
    before = replace(step.window, loss=loss)
    for i in range(12):
        rate = 0.4 if i % 3 == 0 else 0.1
        loss *= math.exp(-rate)
        after = replace(before, loss=loss)
        found.observe(before, after, rate)
        before = after
    assert found.change(1.0, 0.2, 0.2) == pytest.approx(-0.2, rel=1e-2)
    assert found.change(3.0, 0.1, 0.3) == pytest.approx(-0.7, rel=1e-2)
    held = found.change(1.0, 0.2, 0.2)
    found.observe(before, replace(before, loss=loss / 100, jumped=True), 0.1)
    assert found.change(1.0, 0.2, 0.2) == held  # a jump is no dynamics


def test_momentum_needs_the_delays() -> None:
    found = []
    trajectory = generate(CASES["two_scales"], 0, num_windows=60)
    means = trajectory.means
    for delays in (1, 2):
        predictor, worst = Dmd(DmdConfig(delays=delays)), 0.0
        for window, basis in observe(trajectory, predictor.spec):
            predictor.observe(window)
            if 30 <= window.index < 56:
                actual = means[window.index + 4] - means[window.index]
                error = (flat(basis.combine(predictor.predict(40).coefficients)) - actual).norm() / actual.norm()
                worst = max(worst, float(error))
        found.append(worst)
    assert found[1] < 0.15 < 0.5 < found[0]


def test_unpredictable_displacements_shrink_the_jump() -> None:
    predictor = make()
    found = errors(predictor, 40)
    assert sum(found[10:]) / len(found[10:]) < 1.15
    assert predictor.predict(10).confidence < 0.2


def test_behaves() -> None:
    assert_resumes_bitwise(make)
    assert_global_random_state_untouched(make)
    assert_degenerate_windows_are_harmless(make)
