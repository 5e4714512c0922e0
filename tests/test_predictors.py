"""Predictors against closed forms: a quadratic's minimiser, a linear recurrence, the formulas by hand."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cases import Fake, config, full_batch, make_batches, setup
from hybrid_predict_trainer import ConfigError, HybridTrainerConfig, LinearConfig, SecantConfig
from hybrid_predict_trainer.numerics.ridge import OnlineRidge, SelectedRidge, solve_ridge, solve_ridges
from hybrid_predict_trainer.observe.basis import Basis
from hybrid_predict_trainer.observe.window import window_from_state, window_state
from hybrid_predict_trainer.predictors import PREDICTORS, Heuristic, Hold, Linear, Predictor, Secant, build
from hybrid_predict_trainer.predictors._common import linear_loss_trajectory
from hybrid_predict_trainer.predictors.linear import relative_error
from hybrid_predict_trainer.predictors.secant import damped_step, decay_factor, orthonormaliser, quadratic_model
from hybrid_predict_trainer.records import BasisSpec, Products, Window
from hybrid_predict_trainer.weights.parameters import Groups

D = torch.float64


def products(spec: BasisSpec, G: int = 2) -> Products:
    K = spec.num_columns
    gram = torch.eye(K, dtype=D).expand(G, K, K)
    return Products(BB=gram, BY=gram, Bg=-torch.ones(G, K, dtype=D), gg=torch.ones(G, dtype=D))


def window(spec: BasisSpec, **changes: Any) -> Window:
    values = {
        "index": 3,
        "num_steps": 10,
        "num_columns": spec.num_displacements,
        "step": 40,
        "loss": 2.0,
        "loss_slope": -0.01,
        "gradient_norm": 1.0,
        "learning_rate": 0.1,
        "lr_integral": 1.0,
        "lr_ahead": 1.0,
        "jumped": False,
        "features": torch.zeros(32),
        "products": products(spec),
        "hindsight": None,
        "group_sizes": (3, 4),
    }
    return Window(**(values | changes))


# ---------------------------------------------------------------- a run on a known function


class Quadratic:
    """f(x) = (x - m)' H (x - m) / 2 + level, trained by gradient descent, seen through a basis."""

    def __init__(
        self, spec: BasisSpec, eigenvalues: list[float], seed: int = 0, steps: int = 2, lr: float = 0.05
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        size = len(eigenvalues)
        q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=D))
        self.H = q @ torch.diag(torch.tensor(eigenvalues, dtype=D)) @ q.T
        self.minimum = torch.randn(size, generator=generator, dtype=D)
        self.x = nn.Parameter(torch.zeros(size, dtype=D))
        self.basis = Basis([self.x], Groups(("x",), (0,), ("other",), (size,)), spec)
        self.steps, self.lr = steps, lr

    def loss(self, x: Tensor) -> float:
        return float(0.5 * (x - self.minimum) @ self.H @ (x - self.minimum))

    def window(self) -> Window:
        for _ in range(self.steps):
            self.x.grad = self.H @ (self.x.detach() - self.minimum)
            self.basis.accumulate()
            with torch.no_grad():
                self.x -= self.lr * self.x.grad
        hindsight = self.basis.close_window()
        return window(
            self.basis.spec,
            num_steps=self.steps,
            num_columns=self.basis.num_columns,
            products=self.basis.products(),
            hindsight=hindsight,
            group_sizes=(len(self.x),),
            lr_integral=self.lr * self.steps,
            lr_ahead=self.lr * self.steps,
            loss=self.loss(self.x.detach()),
        )


SECANT = SecantConfig(num_displacements=6, damping=(1e-9,), rank_tolerance=1e-6)


@pytest.mark.parametrize("eigenvalues", [[1.0, 2.0, 5.0, 10.0], [0.1, 0.5, 8.0], [3.0, 3.0, 3.0]])
def test_secant_reaches_the_minimum_of_a_quadratic(eigenvalues: list[float]) -> None:
    """From the mean of the last window, the Newton step of the whole space the trajectory has spanned."""
    predictor = Secant(SECANT)
    task = Quadratic(predictor.spec, eigenvalues)
    for _ in range(len(eigenvalues) + 2):
        predictor.observe(task.window())
    assert predictor.ready
    prediction = predictor.predict(10)
    [delta] = task.basis.combine(prediction.coefficients)
    [origin] = task.basis.average()
    newton = task.minimum - origin
    assert torch.cosine_similarity(delta, newton, dim=0) > 1 - 1e-6
    assert torch.allclose(delta, newton, rtol=1e-3, atol=1e-6)
    assert prediction.predicted_reduction == pytest.approx(task.loss(origin), rel=1e-3)


def test_secant_finds_the_minimum_in_the_span() -> None:
    """Fewer displacements than dimensions: the minimiser among the points that can be reached."""
    predictor = Secant(SecantConfig(num_displacements=2, damping=(1e-9,), rank_tolerance=1e-8))
    task = Quadratic(predictor.spec, [1.0, 2.0, 5.0, 10.0, 0.3])
    for _ in range(5):
        predictor.observe(task.window())
    [delta] = task.basis.combine(predictor.predict(10).coefficients)
    [origin] = task.basis.average()
    S = task.basis.state_dict()["columns"][0].T
    best = S @ torch.linalg.solve(S.T @ task.H @ S, S.T @ task.H @ (task.minimum - origin))
    assert torch.allclose(delta, best, rtol=1e-3, atol=1e-6)
    assert task.loss(origin + delta) < 0.7 * task.loss(origin)


def test_secant_leaves_a_saddle() -> None:
    """Negative curvature is a direction to leave: the step goes downhill along it, not to the saddle."""
    predictor = Secant(SECANT)
    task = Quadratic(predictor.spec, [2.0, -1.0])
    for _ in range(4):
        predictor.observe(task.window())
    [delta] = task.basis.combine(predictor.predict(5).coefficients)
    [origin] = task.basis.average()
    assert (
        task.loss(origin + delta) < task.loss(origin) < task.loss(task.minimum) + 1e-9 or task.loss(origin + delta) < 0
    )


def test_secant_dampings_are_alternatives() -> None:
    predictor = Secant(SecantConfig(num_displacements=6, damping=(0.5, 0.01), rank_tolerance=1e-6, max_scale=4.0))
    task = Quadratic(predictor.spec, [1.0, 2.0, 5.0, 10.0])
    for _ in range(6):
        predictor.observe(task.window())
    prediction = predictor.predict(10)
    [careful], [bold] = (task.basis.combine(c) for c in (prediction.coefficients, prediction.alternatives[0]))
    assert len(prediction.alternatives) == 1
    assert careful.norm() < bold.norm()
    assert prediction.max_scale == 4.0


def test_secant_finite_horizon_is_gradient_flow() -> None:
    """(1 - (1 - eta mu)^Y) / mu: what Y gradient steps would do."""
    predictor = Secant(replace(SECANT, finite_horizon=True))
    task = Quadratic(predictor.spec, [1.0, 2.0, 4.0], steps=1)
    for _ in range(6):
        predictor.observe(task.window())
    [short], [long] = (task.basis.combine(predictor.predict(y).coefficients) for y in (1, 10**6))
    [origin] = task.basis.average()
    assert torch.allclose(long, task.minimum - origin, rtol=1e-3, atol=1e-6)
    gradient = task.H @ (origin - task.minimum)
    assert short.norm() < long.norm()
    assert torch.cosine_similarity(short, -gradient, dim=0) > 0.99


@pytest.mark.parametrize("horizon", [1, 5, 100, math.inf])
def test_decay_factor(horizon: float) -> None:
    mu = torch.tensor([0.01, 1.0, 5.0], dtype=D)
    eta = 0.1
    wanted = (
        [eta * sum((1 - eta * float(m)) ** t for t in range(int(horizon))) for m in mu]
        if horizon < math.inf
        else (1 / mu).tolist()
    )
    assert decay_factor(mu, horizon, eta).tolist() == pytest.approx(wanted)


def test_damping_limits_the_step() -> None:
    mu, slopes = torch.tensor([1e-8, 1.0], dtype=D), torch.tensor([1.0, 1.0], dtype=D)
    assert damped_step(mu, slopes, 0.1, math.inf, 0.0).tolist() == pytest.approx([-10.0, -1.0])


def test_negative_curvature_counts_by_its_size() -> None:
    """|mu|: as long a step as along a positive curvature of that size, and downhill."""
    mu, slopes = torch.tensor([-2.0, 1.0, 4.0], dtype=D), torch.tensor([1.0, -1.0, 1.0], dtype=D)
    assert damped_step(mu, slopes, 0.1, math.inf, 0.0).tolist() == pytest.approx([-0.5, 1.0, -0.25])


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 100), st.floats(-12, 12))
@settings(max_examples=60, deadline=None)
def test_orthonormaliser(columns: int, rank: int, seed: int, exponent: float) -> None:
    """T' gram T = I, for any rank and any scale; the span is kept."""
    rank = min(columns, rank)
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(rank, columns, generator=generator, dtype=D) * 10.0**exponent
    gram = factor.T @ factor
    T = orthonormaliser(gram, 1e-6)
    assert T.shape[0] == columns
    assert T.shape[1] <= rank
    assert torch.allclose(T.T @ gram @ T, torch.eye(T.shape[1], dtype=D), atol=1e-4)


def test_orthonormaliser_drops_rounding_noise_and_zero() -> None:
    gram = torch.diag(torch.tensor([1.0, 0.0, 4.0], dtype=D))
    assert orthonormaliser(gram, 1e-2).shape == (3, 2)
    assert orthonormaliser(torch.zeros(3, 3, dtype=D), 1e-2).shape == (3, 0)
    nearly = torch.tensor([[1.0, 1 - 1e-9], [1 - 1e-9, 1.0]], dtype=D)
    assert orthonormaliser(nearly, 1e-2).shape == (2, 1)
    assert orthonormaliser(nearly, 1e-6).shape == (2, 2)


def test_quadratic_model_has_the_curvatures() -> None:
    H = torch.diag(torch.tensor([1.0, 3.0, 9.0], dtype=D))
    S = torch.randn(3, 3, dtype=D, generator=torch.Generator().manual_seed(0))
    mu, directions, slopes = quadratic_model(S.T @ S, S.T @ H @ S, S.T @ torch.ones(3, dtype=D), 1e-8)
    assert mu.tolist() == pytest.approx([1.0, 3.0, 9.0])
    assert torch.allclose((S @ directions).abs(), torch.eye(3, dtype=D), atol=1e-6)
    assert slopes.abs().tolist() == pytest.approx([1.0, 1.0, 1.0])


# ---------------------------------------------------------------- ridge


@given(st.integers(1, 6), st.integers(7, 30), st.floats(1e-6, 10), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_ridge_is_the_augmented_least_squares(features: int, rows: int, l2: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    X, y, prior = generator.normal(size=(rows, features)), generator.normal(size=rows), generator.normal(size=features)
    A, b = torch.tensor(X.T @ X), torch.tensor(X.T @ y)
    strength = l2 * float(A.diagonal().mean()) + 1e-12
    for start in (np.zeros(features), prior):
        augmented = np.vstack([X, math.sqrt(strength) * np.eye(features)])
        wanted, *_ = np.linalg.lstsq(augmented, np.concatenate([y, math.sqrt(strength) * start]), rcond=None)
        found = solve_ridge(A, b, l2, torch.tensor(start))
        assert found.numpy() == pytest.approx(wanted, rel=1e-6, abs=1e-8)
    assert solve_ridge(A, b, l2).numpy() == pytest.approx(solve_ridge(A, b, l2, torch.zeros(features, dtype=D)).numpy())


def test_ridge_has_no_units() -> None:
    A, b = torch.diag(torch.tensor([1.0, 4.0], dtype=D)), torch.tensor([1.0, 2.0], dtype=D)
    assert torch.allclose(solve_ridge(A, b, 0.1), solve_ridge(1e6 * A, 1e6 * b, 0.1))


def test_online_ridge_learns_a_line() -> None:
    generator = torch.Generator().manual_seed(0)
    true, bias = torch.tensor([[1.0, -2.0, 0.5]], dtype=D), 3.0
    ridge = OnlineRidge(3, 1, l2=1e-6, forgetting=1.0)
    assert ridge.predict(torch.ones(3)).tolist() == [0.0]
    for _ in range(400):
        x = torch.randn(3, generator=generator, dtype=D)
        ridge.observe(x, true @ x + bias)
    x = torch.tensor([0.3, 0.1, -0.2], dtype=D)
    assert float(ridge.predict(x)) == pytest.approx(float(true @ x) + bias, abs=0.15)


def test_online_ridge_forgets() -> None:
    ridge = OnlineRidge(1, 1, l2=1e-6, forgetting=0.8)
    for target in [0.0] * 50 + [5.0] * 50:
        ridge.observe(torch.ones(1), torch.tensor([target], dtype=D))
    assert float(ridge.predict(torch.ones(1))) == pytest.approx(5.0, abs=0.01)


def test_online_ridge_does_not_extrapolate_wildly() -> None:
    ridge = OnlineRidge(1, 1, l2=1e-6, forgetting=1.0)
    for i in range(50):
        ridge.observe(torch.tensor([float(i % 2)]), torch.tensor([float(i % 2)], dtype=D))
    assert abs(float(ridge.predict(torch.tensor([1e9])))) < 10


def test_many_ridges_are_one_each() -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(3, 2, 9, 4, generator=generator, dtype=D)
    A, b, prior = X.mT @ X, X.sum(dim=2), torch.randn(3, 2, 4, generator=generator, dtype=D)
    strengths = torch.tensor([[1e-3], [0.1], [10.0]], dtype=D)
    found = solve_ridges(A, b, strengths, prior)
    for i in range(3):
        for j in range(2):
            wanted = solve_ridge(A[i, j], b[i, j], float(strengths[i]), prior[i, j])
            torch.testing.assert_close(found[i, j], wanted)


def taught(targets: list[float], features: list[Tensor]) -> list[int]:
    """Which candidate speaks after every observation: 0 the ridge, 1 the mean, 2 zero."""
    ridge = SelectedRidge(len(features[0]), 1, strengths=(1e-6,), forgetting=0.99)
    chosen = []
    for x, y in zip(features, targets, strict=True):
        said = ridge.candidates(x)
        assert torch.equal(ridge.predict(x), ridge.choose(said))
        ridge.observe(0, x, y, said[:, 0])
        chosen.append(int(ridge._errors[:, 0].argmin()))
    return chosen


def test_the_ridge_that_predicts_best_speaks() -> None:
    """A line: the ridge.  Noise around 3: the mean.  Noise around 0: hardly ever the ridge."""
    generator = torch.Generator().manual_seed(0)
    x = list(torch.randn(120, 30, generator=generator, dtype=D))
    noise = torch.randn(120, generator=generator, dtype=D).tolist()
    assert set(taught([float(v.sum()) for v in x], x)[60:]) == {0}
    assert taught([3 + n for n in noise], x).count(1) > 100
    assert taught(noise, x).count(0) < 20


def test_selected_ridge_is_least_squares_with_a_mean() -> None:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(40, 3, generator=generator, dtype=D) + 5
    y = X @ torch.tensor([1.0, -2.0, 0.5], dtype=D) + 7 + 0.1 * torch.randn(40, generator=generator, dtype=D)
    ridge = SelectedRidge(3, 1, strengths=(1e-12,), forgetting=1.0)
    assert ridge.predict(X[0]).tolist() == [0.0]
    for row, target in zip(X, y.tolist(), strict=True):
        ridge.observe(0, row, target, ridge.candidates(row)[:, 0])
    design = torch.cat([X, torch.ones(40, 1, dtype=D)], dim=1)
    wanted = torch.linalg.lstsq(design, y[:, None]).solution[:, 0]
    probe = torch.tensor([4.0, 6.0, 5.0, 1.0], dtype=D)
    assert float(ridge.candidates(probe[:3])[0]) == pytest.approx(float(probe @ wanted), rel=1e-6)
    assert float(ridge.candidates(probe[:3])[1]) == pytest.approx(float(y.mean()))
    assert 0 < float(ridge.spread) < 1


# ---------------------------------------------------------------- linear


class Recurrence:
    """Steps v' = A v + noise with A a damped rotation: the displacements of windows follow a linear recurrence."""

    def __init__(self, spec: BasisSpec, noise: float, steps: int = 1) -> None:
        c, s = math.cos(0.5), math.sin(0.5)
        self.A = 0.97 * torch.tensor([[c, -s], [s, c]], dtype=D)
        self.steps = steps
        self.generator = torch.Generator().manual_seed(0)
        self.noise = noise
        self.velocity = torch.tensor([1.0, 0.2], dtype=D)
        self.x = nn.Parameter(torch.zeros(2, dtype=D))
        self.basis = Basis([self.x], Groups(("x",), (0,), ("other",), (2,)), spec)
        self.count = 0

    def window(self) -> Window:
        self.x.grad = torch.zeros(2, dtype=D)
        for _ in range(self.steps):
            self.basis.accumulate()
            self.basis.before_step(last=True)
            with torch.no_grad():
                self.x += self.velocity
            kick = torch.randn(2, generator=self.generator, dtype=D)
            self.velocity = self.A @ self.velocity + self.noise * kick
        hindsight = self.basis.close_window()
        self.count += 1
        return window(
            self.basis.spec,
            index=self.count,
            num_steps=self.steps,
            num_columns=self.basis.num_columns,
            products=self.basis.products(),
            hindsight=hindsight,
            group_sizes=(2,),
            loss=1.0 / self.count,
            features=torch.zeros(32),
        )


def test_linear_learns_a_linear_recurrence() -> None:
    predictor = Linear(LinearConfig(l2_regularization=1e-9, forgetting=0.99), 1)
    run = Recurrence(predictor.spec, 0.0)
    for _ in range(60):
        predictor.observe(run.window())
    assert predictor.ready
    assert predictor.explained > 0.99


def test_linear_knows_noise_for_what_it_is() -> None:
    predictor = Linear(LinearConfig(), 1)
    run = Recurrence(predictor.spec, 1.0, steps=20)
    run.A = torch.zeros(2, 2, dtype=D)
    for _ in range(80):
        predictor.observe(run.window())
    # a random walk: half of the mean's displacement is the known way from the mean to the end of the window
    assert 0.0 <= predictor.explained < 0.65
    assert predictor.predict(1).confidence == predictor.explained


@pytest.mark.parametrize("ahead", [1, 2, 4, 7])
def test_linear_continues_an_oscillation(ahead: int) -> None:
    """Two windows of a rotation determine all later ones: the recurrence applied to its own predictions."""
    predictor = Linear(LinearConfig(), 1)
    run = Recurrence(predictor.spec, 0.0)
    for _ in range(40):
        predictor.observe(run.window())
    x = run.basis.average()[0].clone()  # its storage is used again
    [delta] = run.basis.combine(predictor.predict(ahead).coefficients)
    for _ in range(ahead):
        run.window()
    torch.testing.assert_close(x + delta, run.basis.average()[0], rtol=1e-3, atol=1e-3)


def test_linear_does_not_continue_growth_without_bound() -> None:
    predictor = Linear(LinearConfig(), 1)
    run = Recurrence(predictor.spec, 0.0)
    run.A = run.A * 1.3
    for _ in range(20):
        predictor.observe(run.window())
    lengths = [float(run.basis.combine(predictor.predict(m).coefficients)[0].norm()) for m in (1, 40)]
    assert lengths[1] < 40 * lengths[0]


def test_linear_follows_the_learning_rate() -> None:
    """Plain gradient descent on a line: displacements are as long as the learning rate says."""

    def run(plan: list[float]) -> tuple[Linear, Basis]:
        predictor = Linear(LinearConfig(), 1)
        x = nn.Parameter(torch.zeros(2, dtype=D))
        basis = Basis([x], Groups(("x",), (0,), ("other",), (2,)), predictor.spec)
        for i, rate in enumerate(plan[:-1]):
            x.grad = torch.ones(2, dtype=D)
            for _ in range(4):
                basis.accumulate()
                basis.before_step(last=True)
                with torch.no_grad():
                    x -= rate * x.grad
            hindsight = basis.close_window()
            values = {"num_columns": basis.num_columns, "products": basis.products(), "hindsight": hindsight}
            values |= {"lr_integral": 4 * rate, "lr_ahead": 4 * plan[i + 1], "group_sizes": (2,), "num_steps": 4}
            predictor.observe(window(predictor.spec, index=i, features=torch.zeros(32), loss=1.0, **values))
        return predictor, basis

    plan = [1.0, 1.0, 0.25, 0.25, 1.0, 0.5] * 5 + [0.125]
    predictor, basis = run(plan)
    [delta] = basis.combine(predictor.predict(12).coefficients)
    # the last window's steps from its mean to its end, then two windows and the way to the third's mean
    wanted = -(2.5 * plan[-2] + (4 + 4 + 1.5) * plan[-1])
    torch.testing.assert_close(delta, torch.full((2,), wanted, dtype=D), rtol=0.02, atol=0.0)


def test_linear_reads_the_encoded_state() -> None:
    """The loss change is told by one number of the encoding: without it there is nothing to know."""
    generator = torch.Generator().manual_seed(0)
    errors = {}
    for encoded in (True, False):
        predictor, loss, misses = Linear(LinearConfig(), 2), 1.0, []
        told = torch.randn(200, generator=generator).tolist()
        for i, tell in enumerate(told):
            encoding = torch.zeros(300)
            encoding[100] = tell
            state = window(predictor.spec, index=i, loss=loss, features=torch.zeros(32), lr_integral=1.0)
            predictor.observe(replace(state, encoding=encoding if encoded else None))
            loss *= math.exp(0.1 * tell)
            if i > 100 and predictor._waiting:
                said = float(predictor._loss.choose(predictor._waiting[-1].said)[0])
                misses.append(abs(said - 0.1 * tell))
        errors[encoded] = sum(misses) / len(misses)
    assert errors[True] < 0.05 * errors[False]


def test_linear_is_not_ready_at_first() -> None:
    predictor = Linear(LinearConfig(), 1)
    run = Recurrence(predictor.spec, 0.1)
    ready = []
    for _ in range(6):
        predictor.observe(run.window())
        ready.append(predictor.ready)
    assert ready == sorted(ready)
    assert ready[0] is False
    assert ready[-1] is True


def test_linear_uncertainty_grows_with_the_horizon() -> None:
    predictor = Linear(LinearConfig(), 1)
    run = Recurrence(predictor.spec, 0.1)
    for _ in range(30):
        predictor.observe(run.window())
    widths = [b - a for a, b in (predictor.predict(y).loss_interval for y in (1, 4, 16))]
    assert 0 < widths[0] < widths[1] < widths[2]


def test_relative_error_by_hand() -> None:
    from hybrid_predict_trainer.records import Hindsight

    b, T = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=D), torch.tensor([2.0, 3.0], dtype=D)
    hindsight = Hindsight(BB=(b @ b.T)[None], BT=(b @ T)[None], TT=(T @ T)[None])
    for c in ([0.0, 0.0], [-1.0, 3.0], [1.0, 1.0]):
        coefficients = torch.tensor([c], dtype=D)
        wanted = float((T - coefficients[0] @ b).square().sum() / T.square().sum())
        assert relative_error(coefficients, hindsight) == pytest.approx(wanted, abs=1e-12)


# ---------------------------------------------------------------- hold and heuristic


@pytest.mark.parametrize(
    ("horizon", "ahead", "wanted"), [(10, 1.0, 1.0), (40, 1.0, 4.0), (10, 0.5, 0.5), (20, 0.0, 0.0)]
)
def test_hold_continues_the_last_displacement(horizon: int, ahead: float, wanted: float) -> None:
    predictor = Hold()
    assert not predictor.ready
    predictor.observe(window(predictor.spec, lr_ahead=ahead))
    prediction = predictor.predict(horizon)
    assert prediction.coefficients.tolist() == [[wanted], [wanted]]
    assert prediction.predicted_loss == pytest.approx(2.0 - 0.01 * horizon)
    assert prediction.predicted_reduction == pytest.approx(0.01 * horizon)
    assert prediction.horizon == horizon


def test_hold_moves_along_the_trajectory() -> None:
    """A straight run: the prediction for Y steps is where the run is Y steps later."""
    predictor = Hold()
    task = Quadratic(predictor.spec, [1.0, 1.0], steps=4, lr=1e-5)
    for _ in range(3):
        predictor.observe(task.window())
    [x] = task.basis.average()
    [delta] = task.basis.combine(predictor.predict(8).coefficients)
    predicted = x + delta
    task.window()
    task.window()
    assert torch.allclose(predicted, task.basis.average()[0], rtol=1e-3)


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_heuristic_formula(scale: float) -> None:
    predictor = Heuristic(scale)
    predictor.observe(window(predictor.spec))
    prediction = predictor.predict(20)
    predicted = 2.0 - 0.01 * 20
    wanted = -0.1 * (1 + scale) * (1 + (2.0 - predicted) / 2.0) * 20
    assert prediction.coefficients.tolist() == [[0.0, pytest.approx(wanted)]] * 2
    assert prediction.predicted_loss == pytest.approx(predicted)


@pytest.mark.parametrize(
    ("loss", "slope", "horizon", "end"),
    [(2.0, -0.1, 10, 1.0), (2.0, -1.0, 10, 0.0), (-2.0, -1.0, 10, -12.0), (2.0, 0.1, 1, 2.1)],
)
def test_loss_trajectory(loss: float, slope: float, horizon: int, end: float) -> None:
    trajectory = linear_loss_trajectory(loss, slope, horizon)
    assert trajectory[-1] == (horizon, pytest.approx(end))
    steps = [s for s, _ in trajectory]
    assert steps == sorted(set(steps))


# ---------------------------------------------------------------- all of them


def make(name: str) -> Predictor:
    return PREDICTORS[name](HybridTrainerConfig(), 2)


DEGENERATE = {
    "zero products": lambda p: replace(p, BB=0 * p.BB, BY=0 * p.BY, Bg=0 * p.Bg, gg=0 * p.gg),
    "zero curvature": lambda p: replace(p, BY=0 * p.BY),
    "negative curvature": lambda p: replace(p, BY=-p.BY),
    "zero gradient": lambda p: replace(p, Bg=0 * p.Bg, gg=0 * p.gg),
    "parallel": lambda p: replace(p, BB=torch.ones_like(p.BB), BY=torch.ones_like(p.BY)),
    "tiny": lambda p: replace(p, BB=1e-200 * p.BB, BY=1e-200 * p.BY, Bg=1e-100 * p.Bg, gg=1e-100 * p.gg),
    "huge": lambda p: replace(p, BB=1e200 * p.BB, BY=1e200 * p.BY, Bg=1e100 * p.Bg, gg=1e100 * p.gg),
}


@pytest.mark.parametrize("degenerate", DEGENERATE)
@pytest.mark.parametrize("name", PREDICTORS)
def test_degenerate_windows_do_not_raise(name: str, degenerate: str) -> None:
    predictor = make(name)
    before = torch.get_rng_state()
    for i in range(6):
        w = window(predictor.spec, index=i, loss=1.0, loss_slope=0.0, lr_integral=0.0, lr_ahead=0.0)
        predictor.observe(replace(w, products=DEGENERATE[degenerate](w.products)))
    if predictor.ready:
        prediction = predictor.predict(10)
        assert prediction.coefficients.shape == (1 if predictor.spec.pooled else 2, predictor.spec.num_columns)
        assert torch.isfinite(prediction.coefficients).all()
        assert math.isfinite(prediction.predicted_loss)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is not touched"


@pytest.mark.parametrize("name", PREDICTORS)
@pytest.mark.parametrize("data", ["exact", "noisy"])
def test_contract_of_predictions(name: str, data: str) -> None:
    """Shape, ranges, an ordered trajectory, no trace of predict() in what is learnt."""
    trainer = setup("mlp", "adam").trainer(config(predictor_type=name))
    for batch in (full_batch if data == "exact" else make_batches)(50):
        trainer.step(batch)
    predictor = trainer.run.proposer.predictor
    assert predictor.ready
    for horizon in (1, 7, 80):
        saved = copy.deepcopy(predictor.state_dict())
        p = predictor.predict(horizon)
        predictor.load_state_dict(saved)
        again = predictor.predict(horizon)
        assert torch.equal(p.coefficients, again.coefficients)
        assert p.coefficients.dtype == D
        assert p.coefficients.shape == (trainer.run.windows.groups.num_groups, predictor.spec.num_columns)
        assert p.horizon == horizon
        assert p.predicted_loss >= 0
        assert p.predicted_reduction >= 0
        assert 0 <= p.confidence <= 1
        assert [s for s, _ in p.loss_trajectory] == sorted({s for s, _ in p.loss_trajectory})
        assert p.loss_trajectory[-1][0] == horizon
        assert p.loss_interval[0] <= p.predicted_loss <= p.loss_interval[1]
        assert all(a.shape == p.coefficients.shape for a in p.alternatives)


@pytest.mark.parametrize("name", PREDICTORS)
def test_predictions_move_the_weights(name: str) -> None:
    """A silent no-op was what the first implementation did: after an accepted jump every predicted tensor has moved."""
    made = setup("mlp", "adam")
    trainer = made.trainer(config(predictor_type=name))
    for batch in full_batch(80):
        before = [p.detach().clone() for p in made.model.parameters()]
        if trainer.step(batch).was_predicted:
            assert all(not torch.equal(a, b) for a, b in zip(before, made.model.parameters(), strict=True))
            return
    raise AssertionError("no jump was accepted")


def test_names_and_unknown_names() -> None:
    assert {name: make(name).name for name in PREDICTORS} == {name: name for name in PREDICTORS}
    with pytest.raises(ConfigError, match=r"'secand' is unknown.*did you mean 'secant'"):
        build(HybridTrainerConfig(predictor_type="secand"), 2)
    with pytest.raises(ConfigError, match=r"memory_budget_mb = 1e-06 is too small: linear needs"):
        build(HybridTrainerConfig(predictor_type="linear", predictor_memory_mb=1e-6), 2)


def test_window_round_trip() -> None:
    from hybrid_predict_trainer.records import Hindsight

    spec = BasisSpec(num_displacements=2)
    w = window(spec, hindsight=Hindsight(BB=torch.eye(2)[None], BT=torch.ones(1, 2), TT=torch.ones(1)))
    again = window_from_state(window_state(w))
    assert again is not None
    assert window_state(again).keys() == window_state(w).keys()
    assert again.hindsight is not None
    assert again.group_sizes == w.group_sizes
    assert window_from_state(None) is None
    assert window_state(None) is None


# ---------------------------------------------------------------- what they observe


def test_windows_are_described_rightly() -> None:
    """Losses, norms, learning rates and slopes of every window, recomputed from the results."""
    made = setup("mlp", "adam", "lambda")
    predictor = Fake(ready=False)
    trainer = made.trainer(config(predictor__window=4), predictor=predictor)
    rates, results = [], []
    for batch in make_batches(24):
        rates.append(made.optimizer.param_groups[0]["lr"])
        results.append(trainer.step(batch))
    assert [w.index for w in predictor.observed] == list(range(6))
    for i, w in enumerate(predictor.observed):
        own = results[4 * i : 4 * i + 4]
        assert (w.num_steps, w.step, w.num_columns) == (4, 4 * i + 4, min(i, 1))
        assert w.loss == pytest.approx(np.mean([r.loss for r in own]))
        assert w.gradient_norm == pytest.approx(np.mean([r.gradient_norm for r in own]))
        assert w.lr_integral == pytest.approx(sum(rates[4 * i : 4 * i + 4]))
        assert not w.jumped
    planned = [w.lr_ahead for w in predictor.observed[:-1]]
    happened = [w.lr_integral for w in predictor.observed[1:]]
    assert planned == pytest.approx(happened), "a LambdaLR's future is known"


def test_a_jump_is_marked() -> None:
    predictor = Fake()
    trainer = setup("mlp", "adam").trainer(config(), predictor=predictor)
    for batch in full_batch(40):
        trainer.step(batch)
    assert trainer.statistics()["num_jumps_accepted"] > 0
    marks = [w.jumped for w in predictor.observed]
    assert marks[:2] == [False, False]
    assert any(marks)
