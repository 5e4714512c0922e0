"""The quasi-Newton predictor: its recursion against the dense BFGS matrix, its columns against the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig
from hybrid_predict_trainer.config.presets import PRESETS
from hybrid_predict_trainer.config.settings import QuasiNewtonConfig
from hybrid_predict_trainer.config.toml import with_values
from hybrid_predict_trainer.judge import gate
from hybrid_predict_trainer.predictors import QuasiNewton
from hybrid_predict_trainer.predictors.quasi_newton import (
    direction,
    history_that_fits,
    log_scaling,
    newest_first,
    oldest_first,
    square,
    step_of,
)
from hybrid_predict_trainer.records import Products, Reason, Window


def dense_direction(s: Sequence[Tensor], y: Sequence[Tensor], taus: Sequence[float], gamma: float, g: Tensor) -> Tensor:
    """-H g with H divided by tau before each BFGS update (Nocedal & Wright, eq. 6.17), pairs oldest first."""
    eye = torch.eye(g.numel(), dtype=g.dtype)
    H = gamma * eye
    for a, b, tau in zip(s, y, taus, strict=True):
        rho = 1 / (a @ b)
        left = eye - rho * torch.outer(a, b)
        H = left @ (H / tau) @ left.T + rho * torch.outer(a, a)
    return -H @ g


def random_pairs(num_pairs: int, n: int = 9, seed: int = 0) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """(s, y, g, A) of a random convex quadratic with Hessian A, pairs oldest first."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    root = draw(n, n)
    A = root @ root.T + torch.eye(n, dtype=torch.float64)
    s = [draw(n) for _ in range(num_pairs)]
    return s, [A @ v for v in s], draw(n), A


@pytest.mark.parametrize("num_pairs", [1, 2, 5, 12])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_compact_form_is_the_dense_matrix(num_pairs: int, scaled: bool) -> None:
    s, y, g, _ = random_pairs(num_pairs, seed=num_pairs)
    taus = [1.0 - 0.9 * (i % 3) / 3 if scaled else 1.0 for i in range(num_pairs)]
    S, Y = torch.stack(s), torch.stack(y)
    of_s, of_y, of_g = direction(S @ Y.T, Y @ Y.T, S @ g, Y @ g, torch.tensor(taus, dtype=torch.float64).log(), 0.3)
    assert torch.allclose(of_s @ S + of_y @ Y + of_g * g, dense_direction(s, y, taus, 0.3, g), rtol=1e-8)


def test_hundreds_of_scalings_do_not_overflow() -> None:
    s, y, g, _ = random_pairs(6, seed=4)
    S, Y = torch.stack(s), torch.stack(y)
    steep = torch.full((6,), -1000.0, dtype=torch.float64)
    of_s, of_y, of_g = direction(S @ Y.T, Y @ Y.T, S @ g, Y @ g, steep, 0.3)
    assert torch.isfinite(of_s).all()
    assert torch.isfinite(of_y).all()
    assert math.isfinite(of_g)


def ring_products(s: Sequence[Tensor], y: Sequence[Tensor], g: Tensor, num_places: int) -> Products:
    """Products as a basis with differences hands them out, written from its description: pairs oldest first."""
    K, count = num_places, len(s)
    columns = torch.zeros(2 * K + 2, g.numel(), dtype=torch.float64)
    for number, (a, b) in enumerate(zip(s, y, strict=True)):
        columns[number % K], columns[K + number % K] = a, b
    newest = (count - 1) % K
    return Products(
        BB=(columns @ columns.T)[None], BY=torch.zeros(1, 0, 0), Bg=(columns @ g)[None], gg=(g @ g)[None], newest=newest
    )


@pytest.mark.parametrize(("first", "n"), [(0, 1), (0, 5), (2, 3), (3, 5), (4, 2)])
def test_numbers_by_place_come_oldest_first(first: int, n: int) -> None:
    M = np.arange(25.0).reshape(5, 5)
    places = (first + np.arange(n)) % 5
    assert (oldest_first(M[0], first, n) == M[0, places]).all()
    assert (square(M, first, n) == M[np.ix_(places, places)]).all()


def test_pairs_left_out_are_as_if_they_were_not_there() -> None:
    s, y, g, _ = random_pairs(6, seed=4)
    S, Y, tau = torch.stack(s), torch.stack(y), torch.linspace(-0.5, 0, 6, dtype=torch.float64)
    kept = [0, 2, 5]
    wanted = direction(S[kept] @ Y[kept].T, Y[kept] @ Y[kept].T, S[kept] @ g, Y[kept] @ g, tau[kept], 0.3)
    found = direction(S @ Y.T, Y @ Y.T, S @ g, Y @ g, tau, 0.3, np.array([1, 3, 4]))
    assert found[2] == pytest.approx(wanted[2])
    for a, b in zip(found[:2], wanted[:2], strict=True):
        assert torch.allclose(a[kept], b, rtol=1e-10)
        assert not a[[1, 3, 4]].any()


@pytest.mark.parametrize(("num_pairs", "num_places"), [(1, 4), (3, 4), (4, 4), (11, 4)])
def test_a_step_uses_the_pairs_in_the_ring(num_pairs: int, num_places: int) -> None:
    """Wherever the ring's head stands, and with the oldest pairs written over."""
    s, y, g, _ = random_pairs(num_pairs, seed=3)
    products = ring_products(s, y, g, num_places)
    held = min(num_pairs, num_places)
    found = step_of(products, torch.zeros(num_places, dtype=torch.float64), held, num_places)
    s, y = s[-held:], y[-held:]
    gamma = max(float(a @ b / (b @ b)) for a, b in zip(s, y, strict=True))
    wanted = dense_direction(s, y, [1.0] * held, gamma, g)
    c = torch.from_numpy(newest_first(found.c.numpy(), products.newest))
    got = sum(c[i] * s[-1 - i] + c[num_places + i] * y[-1 - i] for i in range(held)) + found.of_g * g
    assert torch.allclose(got, wanted)
    assert found.slope == pytest.approx(float(g @ wanted))
    assert found.along == pytest.approx(float(y[-1] @ wanted))


def test_pairs_without_positive_curvature_are_left_out() -> None:
    s, y, g, _ = random_pairs(3, seed=1)
    bent = [y[0], -y[1], y[2]]
    found = step_of(ring_products(s, bent, g, 3), torch.zeros(3, dtype=torch.float64), 3, 3)
    alone = step_of(ring_products(s[::2], y[::2], g, 2), torch.zeros(2, dtype=torch.float64), 2, 2)
    assert float(found.c[1]) == float(found.c[4]) == 0.0
    assert torch.allclose(found.c[[0, 2, 3, 5]], alone.c)
    assert found.of_g == alone.of_g


def test_without_pairs_it_is_the_gradient() -> None:
    _, _, g, _ = random_pairs(0)
    found = step_of(ring_products([g], [-g], g, 2), torch.zeros(2, dtype=torch.float64), 1, 2)
    assert not found.c.any()
    assert (found.of_g, found.slope) == (-1.0, pytest.approx(-float(g @ g)))


@pytest.mark.parametrize("t", [1.0, 0.3, 0.05])
def test_a_pair_scales_the_matrix_by_what_its_step_found(t: float) -> None:
    """tau = s'y / s'B s, where s = t d and so B s = -t g: written out with the dense matrix."""
    s, y, g, A = random_pairs(4, seed=5)
    step = step_of(ring_products(s, y, g, 8), torch.zeros(8, dtype=torch.float64), 4, 8)
    gamma = max(float(a @ b / (b @ b)) for a, b in zip(s, y, strict=True))
    d = dense_direction(s, y, [1.0] * 4, gamma, g)
    for flatter in (0.01, 1.0):  # the loss curves a hundredth of what the pairs say, or as much
        new_s, new_y = t * d, flatter * (A @ (t * d))
        after = ring_products([*s, new_s], [*y, new_y], g + new_y, 8)
        B_s = -t * g
        wanted = min(1.0, float(new_s @ new_y) / float(new_s @ B_s))
        assert log_scaling(after, step, 8) == pytest.approx(math.log(wanted))


def test_other_displacements_scale_nothing() -> None:
    """What the base optimizer did says nothing of B s."""
    s, y, g, A = random_pairs(4, seed=5)
    step = step_of(ring_products(s, y, g, 8), torch.zeros(8, dtype=torch.float64), 4, 8)
    other = -0.01 * g
    after = ring_products([*s, other], [*y, 0.01 * (A @ other)], g + 0.01 * (A @ other), 8)
    assert log_scaling(after, step, 8) == 0.0
    assert log_scaling(after, None, 8) == 0.0


@pytest.mark.parametrize(
    ("num_weights", "memory_mb", "wanted"),
    [
        (2_209, 64.0, 400),
        (10_221, 64.0, 400),
        (200_000, 64.0, 41),
        (200_000, 128.0, 83),
        (200_000, 256.0, 167),
        (100_000, 256.0, 167),
        (10**9, 64.0, 20),
        (2_209, 0.1, 20),
    ],
)
def test_the_history_fits_the_memory(num_weights: int, memory_mb: float, wanted: int) -> None:
    """Two vectors per pair, of 8 bytes per weight for small models and of 4 for others."""
    config = QuasiNewtonConfig(pairs_memory_mb=memory_mb)
    assert history_that_fits(config, num_weights) == wanted
    assert history_that_fits(replace(config, history=7), num_weights) == 7


def test_a_model_gets_the_history_that_fits() -> None:
    model = nn.Linear(1_000, 1_000, bias=False)
    config = with_values(
        HybridTrainerConfig(), {**PRESETS["full_batch"], "predictor.quasi_newton.pairs_memory_mb": 200.0}
    )
    trainer = HybridTrainer(model, torch.optim.Adam(model.parameters()), config)
    assert trainer.run.proposer.predictor.spec.num_displacements == 26
    assert trainer.run.windows.groups.num_groups == 1


def make_window(products: Products, num_columns: int) -> Window:
    return Window(
        index=3, num_steps=1, num_columns=num_columns, step=40, loss=2.0, loss_slope=-0.01, gradient_norm=1.0,
        learning_rate=0.1, lr_integral=1.0, lr_ahead=1.0, jumped=False, features=torch.zeros(32), products=products,
        hindsight=None, group_sizes=(9,),
    )  # fmt: skip


def test_a_refused_step_clears_the_memory() -> None:
    """Pairs that made a step no multiple of which helps say nothing of this place."""
    s, y, g, _ = random_pairs(5, seed=2)
    predictor = QuasiNewton(QuasiNewtonConfig(history=8))
    window = make_window(ring_products(s[:4], y[:4], g, 8), 4)
    for _ in range(4):
        predictor.observe(window)
    assert predictor.predict(1).coefficients[0, :4].all()
    predictor.observe(replace(window, products=ring_products(s, y, g, 8), num_columns=5, refused=True))
    told = predictor.predict(1).coefficients[0]
    assert told[0] != 0
    assert not told[1:5].any()


def full_batch_config(**changes: object) -> HybridTrainerConfig:
    return with_values(HybridTrainerConfig(), {**PRESETS["full_batch"], "training.warmup_steps": 5, **changes})


def quadratic(num_steps: int, **changes: object) -> tuple[list[float], HybridTrainer]:
    """Losses of an ill-conditioned quadratic in 12 dimensions under Adam."""
    torch.manual_seed(0)
    model = nn.Linear(12, 1, bias=False).double()
    scales = torch.logspace(0, 2, 12, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def loss_fn(m: nn.Module, batch: Tensor) -> Tensor:
        return 0.5 * (batch * (m.weight[0] - 1) ** 2).sum()

    trainer = HybridTrainer(model, optimizer, full_batch_config(**changes), loss_fn=loss_fn)
    return [trainer.step(scales).loss for _ in range(num_steps)], trainer


def test_it_ends_a_quadratic_that_adam_crawls_on() -> None:
    plain, _ = quadratic(120, **{"training.enabled": False})
    losses, trainer = quadratic(120)
    assert min(losses) < 1e-12 * plain[-1]
    assert trainer.statistics()["num_jumps_accepted"] > 10


def test_the_jump_starts_where_the_gradient_was_taken() -> None:
    """theta + delta = x + d: the base optimizer's own step is taken back by the lag column."""
    _, trainer = quadratic(12)
    run = trainer.run
    while not run.windows.just_closed:
        trainer.step(torch.logspace(0, 2, 12, dtype=torch.float64))
    prediction = run.proposer.predictor.predict(1)
    x = run.windows.basis.average()[0]
    back = run.windows.basis.combine(prediction.alternatives[-1])[0]
    assert torch.allclose(run.subject.parameters[0].detach() + back, x)
    d = run.windows.basis.combine(prediction.coefficients)[0] - back
    third = run.windows.basis.combine(prediction.alternatives[0])[0] - back
    assert torch.allclose(third, 0.3 * d)
    g = torch.logspace(0, 2, 12, dtype=torch.float64) * (x[0] - 1)
    assert float(g @ d[0]) < 0


def test_differences_are_columns_of_their_own() -> None:
    _, trainer = quadratic(30)
    basis, spec = trainer.run.windows.basis, trainer.run.proposer.predictor.spec
    assert isinstance(trainer.run.proposer.predictor, QuasiNewton)
    products = basis.products()
    K, n = spec.num_displacements, basis.num_columns
    scales = torch.logspace(0, 2, 12, dtype=torch.float64)

    def column(index: int) -> Tensor:
        c = torch.zeros(1, spec.num_columns, dtype=torch.float64)
        c[0, index] = 1.0
        return basis.combine(c)[0][0]

    place = {age: (products.newest - age) % K for age in range(n)}
    for age in range(min(n, 5)):
        assert torch.allclose(column(K + age), scales * column(age), atol=1e-12)
    # what is known: lengths, s with newer y, s with the y before, all of Y'Y
    known = [((False, 0), (False, 0)), ((False, 2), (True, 1)), ((False, 0), (True, 1)), ((True, 1), (True, 3))]
    known += [((True, age), (False, age)) for age in range(4)]
    for (a_is_y, a), (b_is_y, b) in known:
        i, j = K * a_is_y + place[a], K * b_is_y + place[b]
        wanted = float(column(K * a_is_y + a) @ column(K * b_is_y + b))
        assert float(products.BB[0, i, j]) == pytest.approx(wanted, rel=1e-9, abs=1e-18)
    g = column(spec.first_extra + 1)
    for is_y, age in [(False, 0), (False, 3), (True, 0), (True, 4)]:
        wanted = float(column(K * is_y + age) @ g)
        assert float(products.Bg[0, K * is_y + place[age]]) == pytest.approx(wanted, rel=1e-6, abs=1e-15)


# ---- the gate's rules for it ------------------------------------------------------------------------------


def judge(losses: dict[tuple[int, float], float], known: float, num: int, way_back: int | None) -> tuple:
    asked = []

    def evaluate(candidate: int, scale: float, part: str) -> list[float]:
        asked.append((candidate, scale))
        return [losses[candidate, scale]]

    verdict = gate.judge_exact(evaluate, num, max_scale=1.0, known_before=known, way_back=way_back, first_fit=True)
    return verdict, asked


def test_first_fit_takes_the_first_that_helps_for_one_forward() -> None:
    verdict, asked = judge({(0, 1.0): 0.9, (1, 1.0): 0.1}, 1.0, 2, None)
    assert (verdict.accepted, verdict.candidate, verdict.num_forward) == (True, 0, 1.0)
    assert asked == [(0, 1.0)]
    verdict, asked = judge({(0, 1.0): 1.1, (1, 1.0): 0.5}, 1.0, 2, None)
    assert (verdict.accepted, verdict.candidate, verdict.num_forward) == (True, 1, 2.0)


@pytest.mark.parametrize(("here", "accepted"), [(2.0, True), (0.5, False), (float("nan"), True)])
def test_where_nothing_helps_it_goes_back_if_here_is_worse(here: float, accepted: bool) -> None:
    verdict, asked = judge({(0, 1.0): 1.1, (0, 0.0): here}, 1.0, 1, 1)
    assert verdict.accepted is accepted
    assert asked == [(0, 1.0), (0, 0.0)]
    if accepted:
        assert verdict.reason is Reason.WAY_BACK
        assert (verdict.candidate, verdict.loss_after) == (1, 1.0)


def test_a_step_from_the_mean_is_never_cut_into_segments() -> None:
    _, trainer = quadratic(40, **{"training.segments": 3})
    assert trainer.statistics()["num_jumps_accepted"] > 5
    assert trainer.run.proposer.segment is None
