"""The basis against the dense reference: columns, products, windows, jumps, storage."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from cases import assert_same, loss_fn, make_batches, make_model
from hybrid_predict_trainer.observe.basis import Basis
from hybrid_predict_trainer.records import BasisSpec
from hybrid_predict_trainer.weights import algebra as weights
from hybrid_predict_trainer.weights.parameters import Groups, predicted_parameters
from hybrid_predict_trainer.weights.products import squared_norms
from reference import DenseBasis, flat

WINDOW = 3
SPECS = {
    "one": BasisSpec(num_displacements=1),
    "ring": BasisSpec(num_displacements=3),
    "secant": BasisSpec(num_displacements=4, curvature=True),
    "all": BasisSpec(num_displacements=2, lag=True, optimizer=True, gradient=True),
    "gradient": BasisSpec(num_displacements=1, gradient=True),
}


class Bench:
    """A model in training with both bases fed."""

    def __init__(self, spec: BasisSpec, *, model: str = "mlp", dtype: str = "param", offload: bool = False) -> None:
        self.model = make_model(model)
        self.optimizer = torch.optim.Adam([p for p in self.model.parameters() if p.requires_grad], lr=0.02)
        self.parameters, self.groups = predicted_parameters(self.model, self.optimizer)
        self.basis = Basis(self.parameters, self.groups, spec, dtype=dtype, offload=offload)
        self.dense = DenseBasis(self.parameters, self.groups, spec, WINDOW)
        self.batches = iter(make_batches(200))
        self.hindsight: Any = None

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss_fn(self.model, next(self.batches)).backward()
        self.basis.accumulate()
        self.dense.accumulate()
        self.basis.before_step(last=self.basis.num_steps >= WINDOW)
        self.optimizer.step()
        self.dense.close_if_full()
        if self.basis.num_steps >= WINDOW:
            self.hindsight = self.basis.close_window()

    def windows(self, count: int) -> Bench:
        for _ in range(WINDOW * count):
            self.step()
        return self

    def jump(self, scale: float = 0.5) -> torch.Tensor:
        c = torch.ones(self.groups.num_groups, self.basis.spec.num_columns, dtype=torch.float64)
        deltas = self.basis.combine(c)
        weights.move_(self.parameters, weights.clone(self.parameters), deltas, scale)
        self.basis.translate(deltas, scale)
        self.dense.jumped(scale * flat(deltas))
        return flat(deltas)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-6) -> None:
    scale = b.abs().max().clamp(min=1e-30)
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * scale, (a, b)


@pytest.mark.parametrize("num_windows", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("model", ["mlp", "tied", "frozen"])
def test_products_and_combinations(name: str, num_windows: int, model: str) -> None:
    spec = SPECS[name]
    bench = Bench(spec, model=model).windows(num_windows)
    products = bench.basis.products()
    assert bench.basis.num_columns == min(num_windows - 1, spec.num_displacements)
    assert bench.basis.ready is (num_windows > 1)
    close(products.BB, bench.dense.BB())
    close(products.gg, bench.dense.gg())
    if spec.curvature:
        close(products.BY, bench.dense.BY())
        close(products.Bg, bench.dense.Bg())
    if num_windows > 1:
        generator = torch.Generator().manual_seed(num_windows)
        for _ in range(3):
            c = torch.randn(products.num_groups, spec.num_columns, generator=generator, dtype=torch.float64)
            close(flat(bench.basis.combine(c)), bench.dense.combine(c))
        sizes = torch.tensor([p.numel() for p in bench.parameters])
        columns = bench.dense.columns()[: spec.num_displacements].square().sum(0)
        spans = torch.stack([piece.sum() for piece in columns.split(sizes.tolist())])
        close(bench.basis.displacement_rms(), (spans / sizes).sqrt())
    close(flat(bench.basis.average()), bench.dense.x)


@pytest.mark.parametrize("spec", [SPECS["secant"], SPECS["ring"], SPECS["all"]], ids=["curvature", "plain", "extras"])
def test_jump_in_between(spec: BasisSpec) -> None:
    """With curvature the pair across the jump is kept; without, the anchor moves along and drift stays drift."""
    bench = Bench(spec).windows(4)
    bench.step()
    bench.jump()
    assert bench.basis.num_steps == 0
    assert bench.basis.jumped
    bench.windows(1)
    assert bench.hindsight is None, "a window across a jump teaches nothing about drift"
    assert not bench.basis.jumped
    for _ in range(2):
        close(bench.basis.products().BB, bench.dense.BB())
        c = torch.ones(bench.groups.num_groups, spec.num_columns, dtype=torch.float64)
        close(flat(bench.basis.combine(c)), bench.dense.combine(c))
        if spec.curvature:
            close(bench.basis.products().BY, bench.dense.BY())
            close(bench.basis.products().Bg, bench.dense.Bg())
        bench.windows(1)


def test_a_jump_is_not_taken_for_drift() -> None:
    bench = Bench(SPECS["ring"]).windows(3)
    norms = bench.basis.products().BB[:, 0, 0].sum()
    bench.jump(scale=1000.0)
    bench.windows(1)
    assert bench.basis.products().BB[:, 0, 0].sum() < 10 * norms
    with_curvature = Bench(SPECS["secant"]).windows(3)
    norms = with_curvature.basis.products().BB[:, 0, 0].sum()
    with_curvature.jump(scale=1000.0)
    with_curvature.windows(1)
    assert with_curvature.basis.products().BB[:, 0, 0].sum() > 100 * norms


@pytest.mark.parametrize("name", ["ring", "all", "secant"])
@pytest.mark.parametrize("later", [0, 2, 3, 5])
def test_a_reverted_jump(name: str, later: int) -> None:
    """Weights and anchor are back: the next displacement is that of a run that never jumped."""
    bench = Bench(SPECS[name]).windows(4)
    saved, mark = weights.clone(bench.parameters), bench.basis.mark()
    x = flat(bench.basis.average())
    bench.jump()
    for _ in range(later):
        bench.step()
    weights.copy_(bench.parameters, saved)
    bench.basis.revert(mark)
    assert bench.basis.num_steps == 0
    if not bench.basis.spec.curvature:
        assert torch.equal(flat(bench.basis.average()), x)
        bench.dense.x, bench.dense.thetas, bench.dense.grads = x, [], []
        bench.windows(1)
        close(bench.basis.products().BB[:, 0, 0], bench.dense.BB()[:, 0, 0])


def test_restart_forgets_the_open_window() -> None:
    bench = Bench(SPECS["secant"]).windows(2)
    before = bench.basis.state_dict()["BB"].clone()
    bench.step()
    bench.basis.restart_window()
    bench.dense.thetas, bench.dense.grads = [], []
    assert torch.equal(bench.basis.state_dict()["BB"], before)
    bench.windows(2)
    close(bench.basis.products().BB, bench.dense.BB())


@pytest.mark.parametrize("name", ["ring", "all"])
def test_hindsight_is_the_new_displacement_in_the_old_basis(name: str) -> None:
    bench = Bench(SPECS[name]).windows(4)
    columns, gram = bench.dense.columns(), bench.dense.BB()
    bench.windows(1)
    T = bench.dense.s[0]
    close(bench.hindsight.BB, gram)
    close(bench.hindsight.BT, torch.stack([(columns * mask) @ T for mask in bench.dense.rows]))
    close(bench.hindsight.TT, torch.stack([(T * mask) @ T for mask in bench.dense.rows]))


def test_no_hindsight_at_first() -> None:
    bench = Bench(SPECS["ring"]).windows(2)
    assert bench.hindsight is None
    assert bench.windows(1).hindsight is not None


# ---------------------------------------------------------------- storage


@pytest.mark.parametrize(("dtype", "tolerance"), [("param", 1e-6), ("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("offload", [False, True])
def test_storage_types(dtype: str, tolerance: float, offload: bool) -> None:
    bench = Bench(SPECS["all"], dtype=dtype, offload=offload).windows(5)
    c = torch.ones(bench.groups.num_groups, bench.basis.spec.num_columns, dtype=torch.float64)
    deltas = bench.basis.combine(c)
    wanted = bench.dense.combine(c)
    assert (flat(deltas) - wanted).norm() <= 2 * tolerance * wanted.norm()
    close(bench.basis.products().BB, bench.dense.BB(), tolerance)
    assert all(d.shape == p.shape and d.device == p.device for d, p in zip(deltas, bench.parameters, strict=True))
    columns = bench.basis.state_dict()["columns"]
    assert {t.dtype for t in columns} == {
        {"param": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    }
    assert {t.dtype for t in bench.basis.state_dict()["x"]} == {torch.float64}


def test_half_precision_products_keep_the_small_eigenvalue() -> None:
    """Two nearly parallel displacements: a Gram matrix summed in bfloat16 would not be positive."""
    bench = Bench(BasisSpec(num_displacements=4, curvature=True), dtype="bfloat16").windows(6)
    gram = bench.basis.products().BB.sum(0)
    stored = torch.cat([c.double() for c in bench.basis.state_dict()["columns"]], dim=1)
    exact = (stored @ stored.T)[bench.basis._slots()][:, bench.basis._slots()]
    close(gram, exact, 1e-4)


def test_memory() -> None:
    spec = SPECS["secant"]
    bench = Bench(spec)
    assert bench.basis.memory_bytes() == {}, "nothing is taken before training starts"
    bench.windows(3)
    num = sum(p.numel() for p in bench.parameters)
    assert bench.basis.memory_bytes() == {"cpu": 8 * num * (4 + spec.num_columns)}
    half = Bench(spec, dtype="bfloat16").windows(3)
    assert half.basis.memory_bytes() == {"cpu": num * (4 * 8 + 2 * spec.num_columns)}


def test_large_models_are_kept_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid_predict_trainer.observe import basis as module

    monkeypatch.setattr(module, "FLOAT64_BELOW", 1)
    bench = Bench(SPECS["secant"]).windows(5)
    assert {t.dtype for t in bench.basis.state_dict()["columns"]} == {torch.float32}
    close(bench.basis.products().BB, bench.dense.BB(), 1e-4)


DIFFERENCES = BasisSpec(
    num_displacements=3, lag=True, gradient=True, curvature=True, differences=True, pooled=True
)  # fmt: skip


def test_products_with_the_gradient_are_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are carried by addition in between: what is lost there comes back."""
    from hybrid_predict_trainer.observe import basis as module

    monkeypatch.setattr(module, "RENEW_EVERY", 2)
    bench = Bench(DIFFERENCES).windows(2)  # one pair; the next one is the second
    basis = bench.basis
    basis._Bg += 1.0
    bench.windows(1)
    columns = torch.cat([column.double() for column in basis._columns], dim=1)
    g = flat(basis._g).double()
    ring = slice(0, 2 * DIFFERENCES.num_displacements)
    close(basis.products().Bg.sum(0)[ring], (columns @ g)[ring])


@pytest.mark.parametrize("num_windows", [2, 3, 4, 6])
def test_empty_columns_are_not_read(num_windows: int) -> None:
    """Numbers put into slots without data must not show in a jump, nor in a product."""
    bench = Bench(DIFFERENCES).windows(num_windows)
    basis, K = bench.basis, DIFFERENCES.num_displacements
    n = basis.num_columns
    c = torch.ones(basis.groups.num_groups, DIFFERENCES.num_columns, dtype=torch.float64)
    before, products = flat(basis.combine(c)), basis._dot_columns(basis._g)
    for column in basis._columns:
        column[n:K] = column[K + n : 2 * K] = math.nan
    assert_same(flat(basis.combine(c)), before)
    assert_same(basis._dot_columns(basis._g), products)


def test_bfloat16_weights_are_summed_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid_predict_trainer.observe import basis as module

    monkeypatch.setattr(module, "FLOAT64_BELOW", 1)
    p = nn.Parameter(torch.full((4,), 1.0, dtype=torch.bfloat16))
    groups = Groups(("p",), (0,), ("other",), (4,))
    basis = Basis([p], groups, SPECS["ring"])
    for value in (1.0, 1.0 + 2**-7, 1.0):
        with torch.no_grad():
            p.fill_(value)
        p.grad = torch.ones_like(p)
        basis.accumulate()
    basis.close_window()
    assert basis.average()[0].dtype == torch.float32
    assert basis.average()[0][0].item() == pytest.approx(1 + 2**-7 / 3, rel=1e-6)


# ---------------------------------------------------------------- edges


@pytest.mark.parametrize("shape", [(1, 3), (2, 2), (2,), (2, 3, 1)])
def test_wrong_coefficients(shape: tuple[int, ...]) -> None:
    bench = Bench(SPECS["ring"]).windows(3)
    assert bench.groups.num_groups == 2
    with pytest.raises(ValueError, match=r"\(G, K\) = \(2, 3\)"):
        bench.basis.combine(torch.zeros(shape))


def test_zero_coefficients_move_nothing() -> None:
    bench = Bench(SPECS["all"]).windows(4)
    assert not flat(bench.basis.combine(torch.zeros(2, 5))).any()


def test_missing_gradients() -> None:
    """A parameter the loss does not use has no gradient; it counts as zero."""
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    groups = Groups(("p", "q"), (0, 0), ("other",), (5,))
    basis = Basis([p, q], groups, SPECS["gradient"])
    for _ in range(2):
        p.grad = torch.full((2,), 2.0)
        basis.accumulate()
        with torch.no_grad():
            p.add_(1)
        basis.close_window()
    assert basis.products().gg.tolist() == pytest.approx([8.0])


def test_spec_columns() -> None:
    spec = SPECS["all"]
    assert spec.extras == ("lag", "optimizer", "gradient")
    assert spec.num_columns == 5


def test_squared_norms() -> None:
    values = [torch.full((4,), 3e30), torch.tensor([1e-30])]
    assert squared_norms(values).tolist() == [pytest.approx(3.6e61), pytest.approx(1e-60)]
    assert math.isfinite(float(squared_norms(values).sum()))


@pytest.mark.parametrize("name", SPECS)
def test_state_round_trip_continues_bitwise(name: str) -> None:
    bench = Bench(SPECS[name]).windows(5)
    bench.step()
    other = Bench(SPECS[name])
    with torch.no_grad():
        for mine, theirs in zip(other.parameters, bench.parameters, strict=True):
            mine.copy_(theirs)
    other.basis.load_state_dict(bench.basis.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(bench.optimizer.state_dict()))
    for _ in range(16):
        next(other.batches)
    bench.windows(3)
    other.windows(3)
    assert_same(other.basis.state_dict(), bench.basis.state_dict())


# ---------------------------------------------------------------- one vector for a small model

POOLED = {
    "curvature": BasisSpec(num_displacements=3, curvature=True, pooled=True),
    "plain": BasisSpec(num_displacements=3, lag=True, optimizer=True, pooled=True),
    "differences": DIFFERENCES,
}


def both_layouts(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Basis, Basis, Bench]:
    """One basis with all weights in a vector, one tensor by tensor, fed by the same run with a jump in it."""
    bench = Bench(POOLED[name])
    groups = bench.groups.pooled()
    one = Basis(bench.parameters, groups, POOLED[name])
    with monkeypatch.context() as patched:
        patched.setattr(weights, "SMALL", 0)
        many = Basis(bench.parameters, groups, POOLED[name])
    assert one._layout.flat
    assert not many._layout.flat
    for step in range(1, 14):
        bench.optimizer.zero_grad()
        loss_fn(bench.model, next(bench.batches)).backward()
        for basis in (one, many):
            basis.accumulate()
            basis.before_step(last=step % 2 == 0)
        bench.optimizer.step()
        for basis in (one, many) if step % 2 == 0 else ():
            basis.close_window()
        if step == 8:
            deltas = one.combine(torch.ones(1, POOLED[name].num_columns, dtype=torch.float64))
            weights.move_(bench.parameters, weights.clone(bench.parameters), deltas, 0.1)
            for basis in (one, many):
                basis.translate(deltas, 0.1)
    return one, many, bench


def assert_alike(one: Basis, many: Basis) -> None:
    K, c = one.spec.num_columns, torch.linspace(-1, 1, one.spec.num_columns, dtype=torch.float64)[None]
    close(flat(one.combine(c)), flat(many.combine(c)), 1e-12)
    close(flat(one.average()), flat(many.average()), 1e-12)
    close(flat(one.newest()), flat(many.newest()), 1e-12)
    close(one.displacement_rms(), many.displacement_rms(), 1e-12)
    found, wanted = one.products(), many.products()
    ring = slice(0, one.spec.first_extra if one.spec.differences else K)
    close(found.BB[:, ring, ring], wanted.BB[:, ring, ring], 1e-10)
    close(found.gg, wanted.gg, 1e-12)
    if one.spec.curvature:
        close(found.Bg[:, ring], wanted.Bg[:, ring], 1e-9)


@pytest.mark.parametrize("name", POOLED)
def test_in_one_vector_it_is_as_tensor_by_tensor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_alike(*both_layouts(name, monkeypatch)[:2])


@pytest.mark.parametrize("name", POOLED)
def test_a_checkpoint_says_nothing_of_the_layout(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, many, bench = both_layouts(name, monkeypatch)
    assert [t.shape for t in one.state_dict()["columns"]] == [t.shape for t in many.state_dict()["columns"]]
    mark = many.mark()
    taken, other = (Basis(bench.parameters, one.groups, one.spec) for _ in range(2))
    taken.load_state_dict(copy.deepcopy(many.state_dict()))
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert_alike(taken, many)
    assert_alike(other, one)
    taken.translate(bench.parameters, 1.0)
    taken.revert(mark)
    close(flat(taken.average()), flat(many.average()), 1e-12)


def test_a_multiple_of_a_known_jump_reads_no_displacement(monkeypatch: pytest.MonkeyPatch) -> None:
    one, _, _ = both_layouts("differences", monkeypatch)
    first_extra = one.spec.first_extra
    c = torch.linspace(-1, 1, one.spec.num_columns, dtype=torch.float64)[None]
    shorter, bent = 0.3 * c, 0.3 * c
    shorter[:, first_extra:] = torch.tensor([1.0, -0.2])
    bent[0, 0] += 1e-6
    known = c, one.combine(c)
    wanted, wanted_bent = flat(one.combine(shorter)), flat(one.combine(bent))
    close(flat(one.combine(bent, known)), wanted_bent, 1e-12)
    one._columns[0][:first_extra] = math.nan
    close(flat(one.combine(shorter, known)), wanted, 1e-12)
