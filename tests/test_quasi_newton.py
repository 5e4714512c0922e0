"""The quasi-Newton predictor: its recursion against the dense BFGS matrix, its columns against the weights."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig, gate
from hybrid_predict_trainer.predictors import QuasiNewton
from hybrid_predict_trainer.predictors.quasi_newton import two_loop
from hybrid_predict_trainer.presets import PRESETS
from hybrid_predict_trainer.records import Reason
from hybrid_predict_trainer.toml_io import with_values


def dense_direction(s: Sequence[Tensor], y: Sequence[Tensor], g: Tensor) -> Tensor:
    """-H g with H from the BFGS update formula, pairs oldest first (Nocedal & Wright, eq. 6.17)."""
    n = g.numel()
    eye = torch.eye(n, dtype=g.dtype)
    H = (s[-1] @ y[-1]) / (y[-1] @ y[-1]) * eye
    for a, b in zip(s, y, strict=True):
        rho = 1 / (a @ b)
        left = eye - rho * torch.outer(a, b)
        H = left @ H @ left.T + rho * torch.outer(a, a)
    return -H @ g


@pytest.mark.parametrize("num_pairs", [1, 2, 5])
def test_two_loop_is_the_dense_matrix(num_pairs: int) -> None:
    torch.manual_seed(num_pairs)
    n, K = 7, 6
    A = torch.randn(n, n, dtype=torch.float64)
    A = A @ A.T + torch.eye(n, dtype=torch.float64)
    s = [torch.randn(n, dtype=torch.float64) for _ in range(num_pairs)]
    y, g = [A @ v for v in s], torch.randn(n, dtype=torch.float64)
    columns = torch.zeros(2 * K, n, dtype=torch.float64)
    for age, (a, b) in enumerate(zip(reversed(s), reversed(y), strict=True)):
        columns[age], columns[K + age] = a, b
    c, of_g = two_loop(columns @ columns.T, columns @ g, num_pairs)
    assert torch.allclose(c @ columns + of_g * g, dense_direction(s, y, g))


def test_pairs_without_positive_curvature_are_left_out() -> None:
    torch.manual_seed(0)
    s, g = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    good, bad = torch.stack([s, s]), torch.stack([-s, s])  # y of two pairs: the newest one curves downwards
    columns = torch.cat([torch.stack([g + s, s]), bad])
    c, of_g = two_loop(columns @ columns.T, columns @ g, 2)
    alone = torch.cat([s[None], good[1:]])
    want, want_g = two_loop(alone @ alone.T, alone @ g, 1)
    assert float(c[0]) == float(c[2]) == 0.0
    assert (float(c[1]), float(c[3]), of_g) == pytest.approx((float(want[0]), float(want[1]), want_g))


def test_without_pairs_it_is_the_gradient() -> None:
    c, of_g = two_loop(torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64), 0)
    assert not c.any()
    assert of_g == -1.0


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
    while not run.window_just_closed:
        trainer.step(torch.logspace(0, 2, 12, dtype=torch.float64))
    prediction = run.predictor.predict(1)
    x = run.basis.average()[0]
    back = run.basis.combine(prediction.alternatives[-1])[0]
    assert torch.allclose(run.parameters[0].detach() + back, x)
    d = run.basis.combine(prediction.coefficients)[0] - back
    third = run.basis.combine(prediction.alternatives[0])[0] - back
    assert torch.allclose(third, 0.3 * d)
    g = torch.logspace(0, 2, 12, dtype=torch.float64) * (x[0] - 1)
    assert float(g @ d[0]) < 0


def test_differences_are_columns_of_their_own() -> None:
    _, trainer = quadratic(30)
    basis, spec = trainer.run.basis, trainer.run.predictor.spec
    assert isinstance(trainer.run.predictor, QuasiNewton)
    products = basis.products()
    K, n = spec.num_displacements, basis.num_columns
    scales = torch.logspace(0, 2, 12, dtype=torch.float64)

    def column(index: int) -> Tensor:
        c = torch.zeros(1, spec.num_columns, dtype=torch.float64)
        c[0, index] = 1.0
        return basis.combine(c)[0][0]

    for age in range(min(n, 5)):
        assert torch.allclose(column(K + age), scales * column(age), atol=1e-12)
    for i, j in [(0, 0), (0, K), (1, K + 2), (K + 1, K + 3), (K, K)]:
        assert float(products.BB[0, i, j]) == pytest.approx(float(column(i) @ column(j)), rel=1e-9, abs=1e-18)
    g = column(spec.first_extra + 1)
    for i in (0, 3, K, K + 4):
        assert float(products.Bg[0, i]) == pytest.approx(float(column(i) @ g), rel=1e-6, abs=1e-15)


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
    assert trainer.run.segment is None
