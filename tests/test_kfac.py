"""Kronecker factors against their definition, and against curvlinops where it is installed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hybrid_predict_trainer.observe.kfac import KfacFactors, diagonal_factors


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def test_agrees_with_the_explicit_computation() -> None:
    model, x = small_net(), torch.randn(7, 5)
    target = torch.randint(3, (7,))
    with KfacFactors(model) as factors:
        nn.functional.cross_entropy(model(x), target).backward()
    # per sample, one at a time
    A, G = torch.zeros(6, 6), torch.zeros(4, 4)
    for i in range(7):
        row = torch.cat([x[i], torch.ones(1)])
        A += torch.outer(row, row) / 7
        s = model[0](x[i : i + 1])
        s.retain_grad()
        nn.functional.cross_entropy(model[2](torch.tanh(s)), target[i : i + 1]).backward()
        G += torch.outer(s.grad[0], s.grad[0]) / 7
    torch.testing.assert_close(factors.A["0"], A)
    torch.testing.assert_close(factors.G["0"], G)


def test_convolution_agrees_with_patches() -> None:
    torch.manual_seed(1)
    conv = nn.Conv2d(2, 3, 3, padding=1, stride=2)
    x = torch.randn(4, 2, 6, 6)
    with KfacFactors(conv) as factors:
        output = conv(x)
        output.square().mean(dim=0).sum().backward()
    gradient = 2 * output.detach()  # per sample
    patches = nn.functional.unfold(x, 3, padding=1, stride=2).transpose(1, 2).reshape(-1, 18)
    rows = torch.cat([patches, torch.ones(len(patches), 1)], dim=1)
    torch.testing.assert_close(factors.A[""], rows.mT @ rows / len(rows))
    flat = gradient.permute(0, 2, 3, 1).reshape(-1, 3)
    torch.testing.assert_close(factors.G[""], flat.mT @ flat / 4)


def test_exponential_mean() -> None:
    model = nn.Linear(2, 1, bias=False)
    with KfacFactors(model, decay=0.75) as factors:
        for x in (torch.ones(1, 2), 3 * torch.ones(1, 2)):
            model(x).sum().backward()
    torch.testing.assert_close(factors.A[""], torch.full((2, 2), 0.75 * 1 + 0.25 * 9))


def test_diagonal_above_the_limit() -> None:
    model, x = small_net(), torch.randn(7, 5)
    with KfacFactors(model) as full:
        model(x).square().mean().backward()
    with KfacFactors(model, max_bytes=4 * (6 + 16 + 25 + 9)) as limited:
        model(x).square().mean().backward()
    assert limited.A["0"].shape == (6,)
    assert limited.G["0"].shape == (4, 4)
    torch.testing.assert_close(limited.A["0"], full.A["0"].diagonal())
    assert limited.memory_bytes() < full.memory_bytes()
    assert limited.traces()["0"] == pytest.approx(full.traces()["0"])


def test_memory_limit_takes_the_largest_first() -> None:
    sizes = {"a": (10, 4), "b": (6, 10)}
    whole = 4 * (100 + 16 + 36 + 100)
    assert diagonal_factors(sizes, whole) == set()
    assert diagonal_factors(sizes, whole - 1) == {("a", "A")}
    assert diagonal_factors(sizes, 4 * (10 + 16 + 36 + 10)) == {("a", "A"), ("b", "G")}
    assert diagonal_factors(sizes, 0) == {("a", "A"), ("a", "G"), ("b", "A"), ("b", "G")}


@pytest.mark.parametrize("limit", [10**9, 0], ids=["full", "diagonal"])
def test_spectra_are_traces_and_shares_of_eigenvalues(limit: int) -> None:
    model, x = small_net(), torch.randn(7, 5)
    with KfacFactors(model, max_bytes=limit) as factors:
        model(x).square().mean().backward()
    A, G = (f if f.dim() == 2 else torch.diag(f) for f in (factors.A["0"], factors.G["0"]))
    wanted = [
        v for f in (A, G) for e in (torch.linalg.eigvalsh(f.double()),) for v in (e.sum(), e.sum() ** 2 / (e @ e))
    ]
    torch.testing.assert_close(factors.spectra()["0"], torch.stack(wanted), rtol=1e-4, atol=1e-6)


def test_only_the_backward_pass_of_the_loss_is_gathered() -> None:
    """A loss that differentiates inside calls the same hooks; unarmed they gather nothing."""
    torch.manual_seed(3)
    model, x = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(5, 2, requires_grad=True)
    factors = KfacFactors(model)
    factors.attach(armed=False)
    output = model(x)
    (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    loss = slope.square().mean() + output.square().mean()
    factors.commit()
    assert not factors.A
    factors.arm()
    loss.backward()
    factors.detach()
    factors.commit()
    assert set(factors.A) == {"0", "2"}


def test_a_skipped_step_leaves_no_trace() -> None:
    model, x = small_net(), torch.randn(7, 5)
    factors = KfacFactors(model)
    for keep in (True, False):
        factors.attach()
        model(x if keep else 100 * x).square().mean().backward()
        factors.detach()
        (factors.commit if keep else factors.discard)()
        factors.commit()
    with KfacFactors(model) as once:
        model(x).square().mean().backward()
    torch.testing.assert_close(factors.A["0"], once.A["0"], rtol=0, atol=0)
    with KfacFactors(model) as other:
        model(x).square().mean().backward()
        model(x + math.inf).square().mean().backward()
    assert bool(torch.isfinite(other.A["0"]).all()), "on an accelerator an overflow is only known later"


def test_the_scale_of_a_gradient_scaler_is_taken_out() -> None:
    model, x = small_net(), torch.randn(7, 5)
    with KfacFactors(model) as plain:
        model(x).square().mean().backward()
    with KfacFactors(model) as scaled:
        scaled.arm(torch.tensor(1024.0))
        (1024 * model(x).square().mean()).backward()
    torch.testing.assert_close(scaled.G["0"], plain.G["0"])


def test_hooks_are_removed_and_the_forward_pass_is_unchanged() -> None:
    model, x = small_net(), torch.randn(7, 5)
    before = model(x)
    with KfacFactors(model):
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    with pytest.raises(RuntimeError), KfacFactors(model):
        model(x[:, :2])  # wrong shape: the hooks go all the same
    assert all(not m._forward_hooks and not m._backward_hooks for m in model.modules())
    with KfacFactors(model) as factors, torch.no_grad():
        model(x)
    assert not factors.A


def test_preconditioning_inverts_the_damped_factors() -> None:
    model, x = small_net(), torch.randn(50, 5)
    with KfacFactors(model) as factors:
        model(x).square().sum(dim=1).mean().backward()
    A, G = factors.A["0"], factors.G["0"]
    gradient = torch.randn(4, 6)
    pi = ((A.trace() / 6) / (G.trace() / 4)).sqrt()
    damped = torch.kron(G + 0.1 / pi * torch.eye(4), A + 0.1 * pi * torch.eye(6))
    expected = torch.linalg.solve(damped, gradient.reshape(-1)).view(4, 6)
    torch.testing.assert_close(factors.precondition("0", gradient, damping=0.01), expected, rtol=1e-3, atol=1e-4)


def test_round_trip() -> None:
    model, x = small_net(), torch.randn(7, 5)
    with KfacFactors(model) as factors:
        model(x).square().mean().backward()
    other = KfacFactors(small_net())
    other.load_state_dict(factors.state_dict())
    assert torch.equal(other.A["2"], factors.A["2"])
    assert other.A["2"] is not factors.A["2"]


def test_agrees_with_curvlinops() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    model, x, target = small_net(), torch.randn(9, 5), torch.randint(3, (9,))
    operator = curvlinops.KFACLinearOperator(
        model, nn.CrossEntropyLoss(), [p for p in model.parameters() if p.requires_grad], [(x, target)],
        fisher_type="empirical", separate_weight_and_bias=False,
    )  # fmt: skip
    with KfacFactors(model) as factors:
        nn.functional.cross_entropy(model(x), target).backward()
    # the operator on a unit vector of the first layer is a column of G (x) A
    columns = torch.cat([p.reshape(len(p), -1) for p in model[0].parameters()], dim=1)
    unit = [torch.zeros_like(p) for p in model.parameters()]
    unit[0][1, 2] = 1.0
    result = operator @ unit
    ours = torch.outer(factors.G["0"][:, 1], factors.A["0"][:, 2])
    assert columns.shape == ours.shape
    torch.testing.assert_close(result[0], ours[:, :5], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(result[1], ours[:, 5], rtol=1e-3, atol=1e-5)
