"""The closed-form source in a run: known answers, refusals, checkpoints, and loops of somebody else's."""

from __future__ import annotations

import copy
import itertools
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cases import WIDTH, full_batch, loss_fn, make_batches, make_model, plain_loop
from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig, attach
from hybrid_predict_trainer.config.toml import with_values
from hybrid_predict_trainer.propose.sources.gauss_newton import GaussNewton
from hybrid_predict_trainer.propose.sources.least_squares import Convex, LeastSquares, ResidualError
from hybrid_predict_trainer.propose.sources.portfolio import Portfolio
from hybrid_predict_trainer.records import ConfigError, Phase, Reason, Verdict

Batch = tuple[Tensor, Tensor]


def residuals(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1])[:, 0]


def built(model: nn.Module, *, residual_fn: Any = residuals, **values: Any) -> HybridTrainer:
    config = with_values(HybridTrainerConfig(), {
        "predictor.type": "gauss_newton", "training.warmup_steps": 3,
        **{key.replace("__", "."): value for key, value in values.items()},
    })  # fmt: skip
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    return HybridTrainer(model, optimizer, config, loss_fn=loss_fn, residual_fn=residual_fn)


def loss_at(model: nn.Module, batch: Batch) -> float:
    return loss_fn(model, batch).item()


def doubled(batches: list[Batch]) -> list[Batch]:
    return [(x.double(), y.double()) for x, y in batches]


# ---- known answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gauss_newton", "ntk"])
@pytest.mark.parametrize("form", ["auto", "kernel", "weight", "cg"])
def test_a_linear_model_is_solved_by_one_jump(name: str, form: str) -> None:
    model = nn.Linear(WIDTH, 1).double()
    (batch,) = doubled(make_batches(1, 40))
    trainer = built(model, predictor__type=name, predictor__gauss_newton__form=form)
    while trainer.run.meter.num_jumps_accepted < 1:
        trainer.step(batch)
    X = torch.cat([batch[0], torch.ones(40, 1, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(X, batch[1]).solution[:, 0]
    found = torch.cat([model.weight[0], model.bias]).detach()
    assert float((found - expected).norm() / expected.norm()) < 1e-10
    assert trainer.statistics()["regime"] == "lazy"


def test_it_ends_far_below_the_optimizer_alone() -> None:
    batch = doubled(full_batch(1))[0]
    model, plain = make_model("mlp").double(), make_model("mlp").double()
    trainer = built(model)
    trainer.fit([batch], total_steps=120)
    plain_loop(plain, torch.optim.Adam(plain.parameters(), lr=0.01), [batch] * 120)
    assert loss_at(model, batch) < 1e-6 * loss_at(plain, batch)
    assert trainer.statistics()["num_predictor_failures"] == 0


def test_a_run_does_not_end_where_a_real_step_has_left_it() -> None:
    """A real step from a minimum leads away from it; the run goes on until it is back."""
    model, batch = nn.Linear(WIDTH, 1).double(), doubled(make_batches(1, 40))[0]
    trainer, seen = built(model), []
    for total in range(40, 70):
        trainer.fit([batch], total_steps=total)
        seen.append(loss_at(model, batch))
    assert max(seen) <= min(seen) * (1 + 1e-12)
    assert trainer.run.meter.num_real_steps > 5


@pytest.mark.parametrize("columns", [1, 3])
def test_convex_losses_give_gradient_and_gauss_newton_matrix(columns: int) -> None:
    """A linear classifier: the matrix is the Hessian itself."""
    torch.manual_seed(0)
    X = torch.randn(9, 4, dtype=torch.float64)
    y = torch.arange(9) % max(columns, 2)
    W = torch.randn(4, columns, dtype=torch.float64, requires_grad=True)

    def loss(z: Tensor) -> Tensor:
        if z.dim() == 1:
            return F.binary_cross_entropy_with_logits(z, y.double())
        return F.cross_entropy(z, y)

    def outputs(w: Tensor) -> Tensor:
        return (X @ w)[:, 0] if columns == 1 else X @ w

    point = Convex(lambda model, batch: (outputs(W), loss)).at(nn.Identity(), None)
    rows = torch.cat([
        torch.autograd.grad(point.outputs[n], W, c[n], retain_graph=True)[0].reshape(1, -1)
        for c in point.cotangents for n in range(9)
    ])  # fmt: skip
    value = loss(outputs(W))
    (g,) = torch.autograd.grad(value, W)
    H = torch.autograd.functional.hessian(lambda w: loss(outputs(w)), W).reshape(4 * columns, 4 * columns)
    assert point.loss == pytest.approx(value.item())
    torch.testing.assert_close(rows.T @ point.rho, g.reshape(-1))
    torch.testing.assert_close(rows.T @ rows, H)


def test_residuals_of_two_dimensions() -> None:
    r = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64, requires_grad=True)
    point = LeastSquares(lambda model, batch: r).at(nn.Identity(), None)
    assert point.loss == pytest.approx(float(r.detach().square().mean()))
    torch.testing.assert_close(point.rho, r.detach().T.reshape(-1) * (2 / 6) ** 0.5)
    torch.testing.assert_close(point.folded(r.detach()), point.rho)


@pytest.mark.parametrize("logit", [20.0, 30.0, 36.0, 40.0, 700.0])
def test_saturated_outputs_have_no_curvature_and_are_no_error(logit: float) -> None:
    z = torch.zeros(6, 3, dtype=torch.float64)
    y = torch.arange(6) % 3
    z[range(6), y] = logit + torch.linspace(0, 1, 6, dtype=torch.float64)
    z.requires_grad_(True)
    point = Convex(lambda model, batch: (1 * z, lambda u: F.cross_entropy(u, y))).at(nn.Identity(), None)
    assert bool(torch.isfinite(point.rho).all())
    assert point.loss >= 0


def test_classification() -> None:
    torch.manual_seed(0)
    X = torch.randn(60, WIDTH)
    y = (X[:, 0] * X[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 2))
    plain = copy.deepcopy(model)

    def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    config = with_values(HybridTrainerConfig(), {"predictor.type": "gauss_newton", "training.warmup_steps": 3})
    trainer = HybridTrainer(
        model, torch.optim.Adam(model.parameters(), lr=0.01), config, loss_fn=cross_entropy,
        output_fn=lambda model, batch: (model(batch[0]), lambda z: F.cross_entropy(z, batch[1])),
    )  # fmt: skip
    trainer.fit([(X, y)], total_steps=150)
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
    plain_loop(plain, optimizer, [(X, y)] * 150, loss=cross_entropy)
    assert trainer.statistics()["num_predictor_failures"] == 0
    assert cross_entropy(model, (X, y)).item() < 0.1 * cross_entropy(plain, (X, y)).item()


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("kind", ["damped", "flow"])
def test_every_filter_descends(kind: str, second_order: bool) -> None:
    batch = doubled(full_batch(1))[0]
    model = make_model("mlp").double()
    trainer = built(
        model, predictor__gauss_newton__filter=kind, predictor__gauss_newton__second_order=second_order
    )  # fmt: skip
    before = loss_at(model, batch)
    results = [trainer.step(batch) for _ in range(12)]
    assert loss_at(model, batch) < 1e-2 * before
    accepted = [r.verdict for r in results if r.was_predicted and r.verdict is not None]
    assert len(accepted) >= 2
    assert all(v.loss_after < v.loss_before for v in accepted)


# ---- no harm -----------------------------------------------------------------------------------------


def test_off_is_the_plain_loop() -> None:
    model, plain = make_model("dropout"), make_model("dropout")
    batches = make_batches(8)
    torch.manual_seed(3)
    trainer = built(model, training__enabled=False, residual_fn=None)
    for batch in batches:
        trainer.step(batch)
    torch.manual_seed(3)
    plain_loop(plain, torch.optim.Adam(plain.parameters(), lr=0.01), batches)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def two_columns(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1])[:, :, None]


BAD: dict[str, tuple[Callable[..., Any], str]] = {
    "scalar": (lambda m, b: residuals(m, b).square().mean(), r"shape \(R,\) or \(R, C\).*float32 of shape \(\)"),
    "three dimensions": (two_columns, r"shape \(R,\) or \(R, C\).*not float32 of shape \(16, 1, 1\)"),
    "no graph": (lambda m, b: residuals(m, b).detach(), "without a graph"),
    "a list": (lambda m, b: [1.0], "not list"),
    "whole numbers": (lambda m, b: torch.ones(4, dtype=torch.long), "int64"),
    "complex": (lambda m, b: residuals(m, b).to(torch.complex64), "complex64"),
    "none at all": (lambda m, b: residuals(m, b)[:0], r"shape \(0,\)"),
    "another loss": (lambda m, b: 2 * residuals(m, b), "they must be the same"),
    "raises": (lambda m, b: 1 / 0, "ZeroDivisionError"),
    "not finite": (lambda m, b: residuals(m, b) * float("nan"), "not finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_residuals_are_one_clear_line_and_no_end(name: str) -> None:
    residual_fn, said = BAD[name]
    model = make_model("mlp")
    trainer = built(model, residual_fn=residual_fn)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in full_batch(14):
            trainer.step(batch)
    texts = [str(w.message) for w in caught]
    assert len(texts) == 1, texts
    assert "\n" not in texts[0]
    assert re.search(said, texts[0]), texts[0]
    assert trainer.statistics()["num_predictor_failures"] == 3
    assert trainer.run.meter.num_real_steps >= 8


@pytest.mark.parametrize(("ours", "theirs", "same"), [(9.7e-9, 6.6e-9, True), (2e-3, 1e-3, False), (1.0, 0.995, True)])
def test_a_loss_that_is_all_rounding_is_the_same_loss(ours: float, theirs: float, same: bool) -> None:
    """A fitted network's cross-entropy in float32 is 1e-8, and off by as much."""
    trainer = built(make_model("mlp"))
    source = trainer.run.proposer.source
    assert isinstance(source, GaussNewton)
    source._proposed = ours, []
    verdict = Verdict(accepted=False, reason=Reason.NO_DESCENT, loss_before=theirs, loss_after=theirs)
    if same:
        source.on_verdict(verdict)
    else:
        with pytest.raises(ResidualError, match="they must be the same"):
            source.on_verdict(verdict)


def test_a_function_of_residuals_is_asked_for() -> None:
    model = make_model("mlp")
    with pytest.raises(ConfigError, match="needs residuals: pass residual_fn"):
        built(model, residual_fn=None)
    with pytest.raises(ConfigError, match="residual_fn must be a function"):
        built(model, residual_fn=3)
    config = with_values(HybridTrainerConfig(), {"predictor.type": "gauss_newton"})
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ConfigError, match="two ways"):
        HybridTrainer(model, optimizer, config, residual_fn=residuals, output_fn=lambda m, b: (m(b), None))
    with pytest.raises(ConfigError, match="needs residuals"):
        attach(model, optimizer, config)
    with pytest.raises(ConfigError, match="eigenvectors"):
        with_values(config, {"predictor.gauss_newton.filter": "flow", "predictor.gauss_newton.form": "cg"})


@pytest.mark.parametrize(
    "found", [3, (1, 2), (torch.ones(3, requires_grad=True), 1.0),
              (torch.ones(3, requires_grad=True), lambda z: -z.square().mean()),
              (torch.ones(3, requires_grad=True), lambda z: z)],
)  # fmt: skip
def test_bad_outputs_say_what_is_wanted(found: Any) -> None:
    with pytest.raises(ResidualError, match=r"output_fn must return \(outputs of shape"):
        Convex(lambda model, batch: found).at(nn.Identity(), None)


@pytest.mark.parametrize("name", ["batchnorm", "dropout", "tied", "frozen", "norm_dropout", "counting"])
def test_models_of_all_kinds_come_through(name: str) -> None:
    model = make_model(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = built(model, training__warmup_steps=2)
    batch = full_batch(1)[0]
    losses = [float(trainer.step(batch).loss) for _ in range(20)]  # of a proposal that was refused: none
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert [loss for loss in losses if loss == loss][-1] <= losses[0]
    if name == "frozen":
        assert torch.equal(model[0].weight, before["0.weight"])
        assert trainer.run.meter.num_jumps_accepted > 0
    if name == "batchnorm":  # buffers count real steps and nothing else
        assert int(model[1].num_batches_tracked) == trainer.run.meter.num_real_steps


def test_complex_weights_are_refused() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(WIDTH, 1, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return (x.to(torch.complex64) @ self.w).real

    trainer = built(Complex())
    with pytest.warns(UserWarning, match="needs real parameters"):
        trainer.fit(full_batch(1), total_steps=10)


@pytest.mark.parametrize("dead", ["rank", "zero"])
def test_jacobians_without_full_rank(dead: str) -> None:
    model = nn.Linear(WIDTH, 1).double()
    x, y = doubled(make_batches(1, 12))[0]
    x = x[:, :1].expand(-1, WIDTH).contiguous() if dead == "rank" else x * 0
    trainer = built(model)
    trainer.fit([(x, y)], total_steps=30)
    X = torch.cat([x, torch.ones(12, 1, dtype=torch.float64)], 1)
    best = float((X @ torch.linalg.pinv(X) @ y - y).square().mean())
    assert loss_at(model, (x, y)) == pytest.approx(best, rel=1e-6)
    assert trainer.statistics()["num_predictor_failures"] == 0


def test_weights_that_somebody_else_changes() -> None:
    """Weights from before are not come back to."""
    model, batch = nn.Linear(WIDTH, 1).double(), doubled(make_batches(1, 40))[0]
    trainer = built(model)
    trainer.fit([batch], total_steps=12)
    source = trainer.run.proposer.source
    assert source is not None
    assert source.knows_better
    trainer.run.overwritten()
    assert not source.knows_better


# ---- checkpoints -------------------------------------------------------------------------------------


def tensors(trainer: HybridTrainer) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.run.subject.parameters]


@pytest.mark.parametrize("at", [3, 5, 6, 9, 17])
def test_resume_is_bitwise(at: int, tmp_path: Path) -> None:
    batch = full_batch(1)[0]
    whole = built(make_model("mlp"), predictor__gauss_newton__linearizations=2)
    for _ in range(at):
        whole.step(batch)
    path = whole.save_checkpoint(tmp_path)
    other = built(make_model("mlp", seed=9), predictor__gauss_newton__linearizations=2)
    other.load_checkpoint(path)
    torch.manual_seed(11)
    first = [whole.step(batch).reason for _ in range(15)]
    torch.manual_seed(11)
    assert [other.step(batch).reason for _ in range(15)] == first
    assert all(torch.equal(a, b) for a, b in zip(tensors(whole), tensors(other), strict=True))
    assert whole.run.meter.cost_units == other.run.meter.cost_units


def test_a_refused_jump_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model("mlp"), full_batch(1)[0]
    trainer = built(model)
    monkeypatch.setattr("hybrid_predict_trainer.judge.gate.agrees", lambda *a: False)
    while trainer.run.meter.num_jumps_proposed < 1:
        before = tensors(trainer), [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        trainer.step(batch)
    assert all(torch.equal(a, b) for a, b in zip(before[0], tensors(trainer), strict=True))
    after = [p.grad for p in model.parameters()]
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(before[1], after, strict=True))  # type: ignore[arg-type]


# ---- loops of somebody else's ------------------------------------------------------------------------


def test_attached_to_a_loop() -> None:
    model, batch = make_model("mlp").double(), doubled(full_batch(1))[0]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    config = with_values(HybridTrainerConfig(), {"predictor.type": "gauss_newton", "training.warmup_steps": 3})
    with attach(model, optimizer, config, loss_fn=loss_fn, residual_fn=residuals) as engine:
        for _ in range(20):
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()
            engine.note(loss, batch)
            optimizer.step()
        steps = engine.run.meter
        assert steps.num_jumps_accepted > 5
        assert steps.num_jumps_proposed <= steps.num_real_steps  # one between two steps, at most
    assert loss_at(model, batch) < 1e-8


def test_micro_batches_have_the_residuals_of_their_mean_loss() -> None:
    from hybrid_predict_trainer.cycle.handover import MicroBatches, StepLoss, StepResiduals

    model, parts = make_model("mlp"), MicroBatches([*make_batches(1, 5), *make_batches(1, 11, seed=8)])
    r = StepResiduals(residuals)(model, parts)
    assert len(r) == 16
    assert r.square().mean().item() == pytest.approx(StepLoss(loss_fn)(model, parts).item(), rel=1e-5)


def test_chains_are_bounded() -> None:
    trainer = built(make_model("mlp"), predictor__gauss_newton__chain=3, predictor__gauss_newton__linearizations=1)
    batch = full_batch(1)[0]
    phases = [trainer.step(batch).phase for _ in range(40)]
    runs = [len(list(group)) for phase, group in itertools.groupby(phases) if phase is Phase.PREDICT]
    assert max(runs) == 3


@pytest.mark.parametrize("name", ["gauss_newton", "portfolio"])
def test_residuals_that_differentiate_inside_are_never_read_at_other_weights(name: str) -> None:
    """Their graph is always there, and that of a trial that was given up is none of the present weights."""

    def burgers(model: nn.Module, points: Tensor) -> Tensor:
        x = points.clone().requires_grad_(True)
        u = model(x)
        slopes = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        curvature = torch.autograd.grad(slopes[:, 0].sum(), x, create_graph=True)[0][:, 0]
        inside = slopes[:, 1] + u[:, 0] * slopes[:, 0] - 0.03 * curvature
        start = torch.stack([torch.linspace(-1, 1, 20, dtype=x.dtype), torch.zeros(20, dtype=x.dtype)], dim=1)
        return torch.cat([inside, (model(start) + torch.sin(math.pi * start[:, :1]))[:, 0]])

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 1)).double()
    points = torch.rand(80, 2, dtype=torch.float64) * torch.tensor([2.0, 1.0]) - torch.tensor([1.0, 0.0])
    trainer = HybridTrainer(
        model, torch.optim.Adam(model.parameters(), lr=1e-2), HybridTrainerConfig(predictor_type=name),
        loss_fn=lambda m, b: burgers(m, b).square().mean(), residual_fn=burgers,
    )  # fmt: skip
    trainer.fit(itertools.repeat(points), total_steps=200)
    assert trainer.statistics()["num_predictor_failures"] == 0
    source = trainer.run.proposer.source
    if isinstance(source, Portfolio):
        assert "gauss_newton" in source.arms.left
    assert burgers(model, points).square().mean().item() < 1e-3
