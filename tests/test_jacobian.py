"""Per-sample Jacobians read off one backward, against one backward per row; the closed form against known answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hybrid_predict_trainer.numerics.closed_form import (
    Damped,
    Nystroem,
    Spectrum,
    conjugate_gradients,
    gram,
    outer_gram_pays,
)
from hybrid_predict_trainer.propose.sources.jacobian import Linearizer, completed
from hybrid_predict_trainer.propose.sources.solve import Linearized, form_for

D = torch.float64


class Nested(nn.Module):
    """Residuals that hold derivatives with respect to the input, by autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_(True)
        u = self.net(x)
        (g,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g[:, 0].sum(), x, create_graph=True)
        return h[:, 0] + g[:, 1] - u[:, 0]


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.tokens(x)).mean(1))


class ByHand(nn.Module):
    """Weights used as matrices on either side, selected, scaled and subtracted."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.V = nn.Parameter(torch.randn(3, 9)), nn.Parameter(torch.randn(9, 9))
        self.b, self.gain, self.last = nn.Parameter(torch.randn(9)), nn.Parameter(torch.randn(9)), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(x @ self.W - self.b) * self.gain
        z = torch.tanh((self.V @ z.T).T)
        return z @ self.last.weight[1] + self.last.bias[0]


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 9))
    model[2].weight = model[0].weight
    return model


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 12), nn.ReLU(),
                                  nn.Linear(12, 2)), (7, 3), True),
    "sequences": (lambda: nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 12)), (7, 5, 3), True),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(4, 5, 3),
                                          nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)), (6, 2, 8, 8), True),
    "embedding": (lambda: nn.Sequential(nn.Embedding(9, 5), nn.Flatten(), nn.Linear(20, 3)), (6, 4), True),
    "transformer": (Transformer, (5, 4), True),
    "nested": (Nested, (9, 2), True),
    "by hand": (ByHand, (7, 3), True),
    "tied": (_tied, (5, 9), True),
    "batch norm": (lambda: nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)), (7, 3),
                   False),
}  # fmt: skip


def outputs_of(name: str) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(1)
    make, shape, _ = CASES[name]
    model = make().to(D)
    has_tokens = any(isinstance(m, nn.Embedding) for m in model.modules())
    out = model(torch.randint(0, 9, shape) if has_tokens else torch.randn(shape, dtype=D))
    return list(model.parameters()), out.mean(1) if out.dim() == 3 else out


def by_rows(out: Tensor, parameters: list[Tensor], cotangents: list[Tensor]) -> Tensor:
    rows = []
    for c in cotangents:
        for n in range(len(out)):
            seed = torch.zeros_like(out)
            seed[n] = c[n]
            found = torch.autograd.grad(out, parameters, seed, retain_graph=True, allow_unused=True)
            flat = [(torch.zeros_like(p) if g is None else g) for g, p in zip(found, parameters, strict=True)]
            rows.append(torch.cat([g.reshape(-1) for g in flat]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", CASES)
def test_jacobian_is_the_one_by_rows(name: str) -> None:
    parameters, out = outputs_of(name)
    columns = 1 if out.dim() == 1 else out.shape[1]
    ones = torch.linspace(0.5, 2, len(out), dtype=D)
    cotangents = [ones] if out.dim() == 1 else [
        F.one_hot(torch.tensor(k), columns) * ones[:, None] for k in range(columns)
    ]  # fmt: skip
    linearizer = Linearizer(parameters, chunk_rows=3, memory_mb=10)
    expected = by_rows(out, parameters, cotangents)
    for _ in range(2):  # the second time from what was learnt
        A = linearizer.jacobian(out, cotangents, check=True)
        torch.testing.assert_close(A.dense(), expected, rtol=1e-10, atol=1e-12)
    assert linearizer.separable is CASES[name][2], linearizer.why_not
    d, u = torch.randn(A.num_weights, dtype=D), torch.randn(A.num_rows, dtype=D)
    torch.testing.assert_close(A.jvp(d), expected @ d)
    torch.testing.assert_close(A.vjp(u), u @ expected)
    torch.testing.assert_close(A.gram(), expected @ expected.T)
    torch.testing.assert_close(A.normal(), expected.T @ expected)
    assert A.squared_norm() == pytest.approx(float(expected.square().sum()))


def test_rows_that_wake_up_are_found_again() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 1)).to(D)
    x = torch.randn(6, 3, dtype=D)
    with torch.no_grad():
        model[0].bias.fill_(-50.0)  # every unit is dead
    linearizer = Linearizer(list(model.parameters()), chunk_rows=4, memory_mb=10)
    for bias in (-50.0, 0.3):
        with torch.no_grad():
            model[0].bias.fill_(bias)
        r = model(x)[:, 0]
        A = linearizer.jacobian(r, [torch.ones_like(r)], check=False)
        torch.testing.assert_close(A.dense(), by_rows(r, list(model.parameters()), [torch.ones_like(r)]))
    assert linearizer.separable


def test_rows_that_show_nothing_lie_as_all_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a ReLU layer's units are off, others every time: which rows lead where is found out once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 1)).to(D)
    x, ends = torch.randn(20, 3, dtype=D), torch.randn(5, 3, dtype=D)
    linearizer = Linearizer(list(model.parameters()), chunk_rows=4, memory_mb=10)
    learnt = 0
    learn = Linearizer._learn

    def counted(self: Linearizer, *args: Any) -> None:
        nonlocal learnt
        learnt += 1
        learn(self, *args)

    monkeypatch.setattr(Linearizer, "_learn", counted)
    for seed in range(6):
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(std=0.7)
        r = torch.cat([model(x)[:, 0], 3 * model(ends)[:, 0]])
        A = linearizer.jacobian(r, [torch.ones_like(r)], check=True)
        torch.testing.assert_close(A.dense(), by_rows(r, list(model.parameters()), [torch.ones_like(r)]))
    assert linearizer.separable
    assert learnt == 1


def test_rows_that_do_not_lie_as_the_others_are_found_out() -> None:
    """Two samples change places, and nothing shows it while their units are off."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).to(D)
    with torch.no_grad():
        model[0].weight.abs_()
        model[0].bias.zero_()
    linearizer = Linearizer(list(model.parameters()), chunk_rows=4, memory_mb=10)
    x = torch.rand(6, 3, dtype=D)
    for sign in (-1.0, 1.0, 1.0):
        x[2:4] = sign * x[2:4].abs()
        r = model(x)[[0, 1, 3, 2, 4, 5], 0]
        A = linearizer.jacobian(r, [torch.ones_like(r)], check=True)
        torch.testing.assert_close(A.dense(), by_rows(r, list(model.parameters()), [torch.ones_like(r)]))
    assert linearizer.separable


@pytest.mark.parametrize(
    ("known", "count", "wanted"),
    [
        ([0, 0, -1, 1, -1, 2], 3, [0, 0, 1, 1, 2, 2]),
        ([-1, 4, -1, 6], 8, [3, 4, 5, 6]),
        ([0, -1, 2, 0, 1, -1], 3, [0, 1, 2, 0, 1, 2]),
        ([0, 1, 1, -1], 3, None),
        ([-1, -1, -1, 0], 1, None),
        ([-1, -1, 0, 1], 2, [0, 1, 0, 1]),
        ([-1, -1, 0, 1, 2], 3, None),  # the first ones would lie before all residuals
        ([0, 1, -1, -1], 3, None),
        ([2, -1, 1, 0], 4, None),
    ],
)
def test_what_rows_lead_to_is_completed_where_the_order_is_regular(
    known: list[int], count: int, wanted: list[int] | None
) -> None:
    assert completed(torch.tensor(known), count).tolist() == (known if wanted is None else wanted)


def test_one_row_for_two_residuals_is_no_mistake() -> None:
    model = nn.Linear(3, 1).to(D)
    z = model(torch.randn(4, 3, dtype=D))[:, 0]
    r = torch.cat([z, z * z])  # every sample leads to two
    linearizer = Linearizer(list(model.parameters()), chunk_rows=4, memory_mb=10)
    A = linearizer.jacobian(r, [torch.ones_like(r)], check=True)
    torch.testing.assert_close(A.dense(), by_rows(r, list(model.parameters()), [torch.ones_like(r)]))
    assert linearizer.separable is False


def test_too_large_a_jacobian_says_what_to_set() -> None:
    parameters, out = outputs_of("batch norm")
    linearizer = Linearizer(parameters, chunk_rows=3, memory_mb=1e-4)
    with pytest.raises(MemoryError, match=r"raise predictor\.gauss_newton\.memory_mb"):
        linearizer.jacobian(out, [torch.ones_like(out)], check=False)


# ---- closed form -------------------------------------------------------------------------------------


def problem(rows: int, weights: int, rank: int | None = None) -> tuple[Linearized, dict[str, Linearized], Tensor]:
    """A random least-squares problem in all three forms."""
    torch.manual_seed(rows * weights)
    model = nn.Linear(weights, 1, bias=False).to(D)
    X = torch.randn(rows, weights, dtype=D)
    if rank is not None:
        X = X[:, :rank] @ torch.randn(rank, weights, dtype=D)
    r = model(X)[:, 0]
    A = Linearizer(list(model.parameters()), chunk_rows=8, memory_mb=10).jacobian(r, [torch.ones_like(r)], check=True)
    forms = {f: Linearized(A, f, rank=8, max_iterations=500, seed=0) for f in ("kernel", "weight", "cg")}
    return forms["kernel"], forms, torch.randn(rows, dtype=D)


@pytest.mark.parametrize(("rows", "weights", "rank"), [(6, 20, None), (20, 6, None), (9, 9, None), (12, 15, 4)])
@pytest.mark.parametrize("kind", ["damped", "flow"])
def test_forms_agree(rows: int, weights: int, rank: int | None, kind: str) -> None:
    _, forms, rho = problem(rows, weights, rank)
    for damping in (0.1, 30.0):
        moves = {f: m.move(rho, damping, kind) for f, m in forms.items() if kind == "damped" or f != "cg"}
        for d in moves.values():
            torch.testing.assert_close(d, moves["kernel"], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(("rows", "weights", "rank"), [(6, 20, None), (20, 6, None), (12, 15, 4)])
@pytest.mark.parametrize("form", ["kernel", "weight"])
def test_infinite_time_is_least_squares(rows: int, weights: int, rank: int | None, form: str) -> None:
    _, forms, rho = problem(rows, weights, rank)
    A = forms[form].A.dense()
    expected = -torch.linalg.pinv(A, rtol=1e-10) @ rho  # of smallest norm, where there are many
    torch.testing.assert_close(forms[form].move(rho, 0.0), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("t", [1e-6, 0.05, 3.0])
def test_finite_time_is_gradient_flow(t: float) -> None:
    kernel, _, rho = problem(5, 9)
    A = kernel.A.dense()
    steps, d = 1200, torch.zeros(9, dtype=D)
    h = t / steps
    for _ in range(steps // 4):  # Runge and Kutta's fourth order of d' = -A'(rho + A d), four steps' length at a time
        f = lambda d: -A.T @ (rho + A @ d)  # noqa: E731
        k1 = f(d)
        k2 = f(d + 2 * h * k1)
        k3 = f(d + 2 * h * k2)
        d = d + 4 * h / 6 * (k1 + 2 * k2 + 2 * k3 + f(d + 4 * h * k3))
    torch.testing.assert_close(kernel.move(rho, 1 / t, "flow"), d, rtol=1e-7, atol=1e-12)
    (loss,) = kernel.spectrum.loss_curve(rho, [t])
    assert loss == pytest.approx(0.5 * float((rho + A @ d).square().sum()), rel=1e-7)


def test_lazy_model_follows_the_predicted_curve() -> None:
    """Wide, in NTK scaling (Jacot et al. 2018): the curve of the linearised model is the measured one within 1 %."""
    torch.manual_seed(0)
    width, n = 2048, 6
    X, y = torch.randn(n, 3, dtype=D), torch.randn(n, dtype=D)
    W, a = torch.randn(width, 3, dtype=D, requires_grad=True), torch.randn(width, dtype=D, requires_grad=True)

    def rho() -> Tensor:
        return (torch.tanh(X @ W.T) @ a / width**0.5 - y) * (2 / n) ** 0.5

    r = rho()
    A = Linearizer([W, a], chunk_rows=8, memory_mb=100).jacobian(r, [torch.ones_like(r)], check=True)
    model = Linearized(A, "kernel", rank=5, max_iterations=10, seed=0)
    rate, every = 0.04, 50
    predicted = model.spectrum.loss_curve(r.detach(), [rate * every * k for k in range(5)])
    measured = []
    for step in range(4 * every + 1):
        loss = 0.5 * rho().square().sum()
        if step % every == 0:
            measured.append(loss.item())
        g = torch.autograd.grad(loss, [W, a])
        with torch.no_grad():
            W -= rate * g[0]
            a -= rate * g[1]
    assert measured[-1] < 0.5 * measured[0]
    assert measured == pytest.approx(predicted, rel=0.01)


def test_preconditioned_iterations_are_few() -> None:
    torch.manual_seed(3)
    Q = torch.linalg.qr(torch.randn(60, 60, dtype=D)).Q
    M = Q @ torch.diag(10.0 ** -torch.linspace(0, 12, 60, dtype=D)) @ Q.T
    b, damping = torch.randn(60, dtype=D), 1e-6
    apply = lambda v: M @ v + damping * v  # noqa: E731
    nystroem = Nystroem(lambda v: M @ v, b, 45, torch.Generator().manual_seed(0))
    x, spent = conjugate_gradients(apply, b, lambda v: nystroem.precondition(v, damping), tolerance=1e-10,
                                   max_iterations=200)  # fmt: skip
    _, plain = conjugate_gradients(apply, b, lambda v: v, tolerance=1e-10, max_iterations=200)
    torch.testing.assert_close(x, Damped(M, damping).solve(b), rtol=1e-6, atol=1e-6)
    assert spent < 15 < plain


def test_what_cannot_be_solved_is_said() -> None:
    with pytest.raises(ArithmeticError, match="positive definite"):
        Damped(torch.full((3, 3), float("nan")), 1.0)
    with pytest.raises(ArithmeticError, match="curvature"):
        conjugate_gradients(lambda v: -v, torch.ones(3), lambda v: v, tolerance=1e-8, max_iterations=5)
    assert float(Spectrum(torch.zeros(3, 3, dtype=D)).apply(float("inf"), torch.ones(3, dtype=D)).norm()) == 0


@pytest.mark.parametrize(("rows", "weights", "expected"), [(10, 20, "kernel"), (20, 10, "weight"), (2000, 3000, "cg")])
def test_the_smaller_form_is_taken(rows: int, weights: int, expected: str) -> None:
    assert form_for(rows, weights, largest=1000, memory_mb=1000) == expected
    assert form_for(rows, weights, largest=10_000, memory_mb=1e-4) == "cg"


def test_gram_by_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid_predict_trainer.numerics import closed_form

    monkeypatch.setattr(closed_form, "WHOLE_ROWS", 4)
    A = torch.randn(37, 11, dtype=D)
    out = torch.full((37, 37), float("nan"), dtype=D)
    closed_form._gram_into(out, A)
    torch.testing.assert_close(out, A @ A.T)
    torch.testing.assert_close(gram(A), A @ A.T)


@pytest.mark.parametrize(
    ("rows", "c", "a", "b"), [(7, 1, 3, 5), (150, 1, 4, 2), (150, 3, 4, 5), (61, 4, 2, 2), (0, 2, 3, 3)]
)
def test_gram_of_outer_products(rows: int, c: int, a: int, b: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid_predict_trainer.numerics import closed_form

    monkeypatch.setattr(closed_form, "PIECE", 64 * rows)  # several pieces, the last one shorter
    left, right = torch.randn(rows, c, a, dtype=D), torch.randn(rows, c, b, dtype=D)
    written = torch.einsum("rka,rkb->rab", left, right).flatten(1)
    found = closed_form.outer_gram(left, right)
    torch.testing.assert_close(found, written @ written.T)


def test_outer_products_are_written_out_where_that_is_cheaper() -> None:
    assert outer_gram_pays(512, 1, 48, 48), "one product per row: 48 + 48 multiplications instead of 48 x 48"
    assert outer_gram_pays(1217, 4, 70, 70)
    assert not outer_gram_pays(1217, 4, 32, 32), "sixteen pairs of products per pair of rows"
    assert not outer_gram_pays(258, 1, 70, 1)


def test_what_matrices_take_is_known_before_they_are_made() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 40), torch.nn.Tanh(), torch.nn.Linear(40, 1)).double()
    x = torch.randn(20, 3, dtype=D)
    linearizer = Linearizer(list(model.parameters()), chunk_rows=3, memory_mb=10)
    out = model(x)[:, 0]
    before = linearizer.counted(out, [torch.ones(20, dtype=D)])
    A = linearizer.jacobian(out, [torch.ones(20, dtype=D)], check=False)
    assert before == A.counts
    assert (before.num_rows, before.num_weights) == (20, 201)
    written = 20 * 201
    assert before.num_products == written, "a single outer product per row has as many multiplications as columns"
    assert before.num_gram_products < written * 20 / 2 + written
    assert before.num_normal_products == written * 201 / 2 + before.num_products
    assert linearizer.num_backward(1, 20) == 1


def test_rows_that_cannot_be_read_off_are_counted_as_written_out() -> None:
    weight = torch.randn(6, 6, dtype=D, requires_grad=True)
    out = torch.linalg.solve(weight, torch.randn(6, 1, dtype=D))[:, 0]  # a layer that nothing is known of
    linearizer = Linearizer([weight], chunk_rows=4, memory_mb=10)
    counts = linearizer.counted(out, [torch.ones(6, dtype=D)])
    assert linearizer.separable is False
    assert (counts.num_products, counts.num_gram_products, counts.num_normal_products) == (216, 648, 3888)
    assert linearizer.num_backward(1, 6) == pytest.approx(2, rel=1e-3), "6 rows, 4 at a time, hardly any arithmetic"
