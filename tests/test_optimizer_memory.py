"""Optimizers that compute weights from a copy of their own, found out by a probe, against a measurement of its own."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import pytorch_optimizer as po
import schedulefree
import torch
from prodigyopt import Prodigy
from torch import Tensor, nn

from cases import OPTIMIZERS, assert_same, config, loss_fn, make_batches, make_model, rng
from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig
from hybrid_predict_trainer.move import optimizer_memory as memory

Maker = Callable[[list[nn.Parameter]], Any]


def _split(kind: Any, **settings: Any) -> Maker:
    """Muon and its like: matrices one way, all else another."""
    return lambda ps: kind(
        [
            {"params": [p for p in ps if p.dim() > 1], "use_muon": True},
            {"params": [p for p in ps if p.dim() < 2], "use_muon": False},
        ],
        **settings,
    )


def _makers() -> dict[str, Maker]:
    found: dict[str, Maker] = {}
    for name in po.get_supported_optimizers():
        kind = po.load_optimizer(name)
        found[f"po.{kind.__name__}"] = kind
    for kind in (po.Muon, po.AdaMuon, po.AdaGO, po.NorMuon):
        found[f"po.{kind.__name__}"] = _split(kind)
    found["po.Ranger21"] = lambda ps: po.Ranger21(ps, num_iterations=100)
    for name, kind in vars(torch.optim).items():
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer:
            found[f"torch.{name}"] = lambda ps, kind=kind: kind(ps, lr=0.01)
    found["torch.Muon"] = lambda ps: torch.optim.Muon([p for p in ps if p.dim() > 1])
    for name, kind in vars(schedulefree).items():
        if isinstance(kind, type) and "Wrapper" not in name:
            found[f"schedulefree.{name}"] = kind
    found["schedulefree.ScheduleFreeWrapper"] = lambda ps: schedulefree.ScheduleFreeWrapper(
        torch.optim.SGD(ps, lr=0.01)
    )
    found["prodigyopt.Prodigy"] = Prodigy
    for wrapper in (po.Lookahead, po.TRAC, po.ScheduleFreeWrapper, po.OrthoGrad):
        found[f"{wrapper.__name__}(AdamW)"] = lambda ps, w=wrapper: w(torch.optim.AdamW(ps, lr=0.01))
    return found


MAKERS = _makers()
#: Those that need a model, a closure, other arguments or a package that is not there.
CANNOT_BE_BUILT = {"po.AdaLOMO", "po.AdamMini", "po.BSAM", "po.DeMo", "po.DistributedMuon", "po.LOMO", "po.MuonClip"}
CANNOT_STEP = {
    "po.AdaHessian", "po.AliG", "po.LBFGS", "po.SophiaH", "torch.LBFGS", "torch.SparseAdam",
    "schedulefree.AdamWScheduleFreeClosure", "schedulefree.RAdamScheduleFreeClosure",
    "schedulefree.SGDScheduleFreeClosure", "po.SpectralSphere", "po.LoRARite",
}  # fmt: skip
#: What pulls back slowly: less than a half is left after 400 steps, more than three quarters after 20.
SLOW = {"po.AccSGD"}


def pieces(seed: int = 3) -> list[nn.Parameter]:
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(7))]


def measured(make: Maker) -> float:
    """The same question asked of other weights, of other gradients, with the settings as they are, decay included."""

    def end(added: float) -> list[Tensor]:
        weights = pieces()
        optimizer = make(weights)
        if hasattr(optimizer, "train"):
            optimizer.train()
        generator = torch.Generator().manual_seed(5)
        for t in range(25):
            for p in weights:
                if t == 5:
                    p.data += added
                p.grad = torch.randn(p.shape, generator=generator) * (t < 5)
            torch.manual_seed(t)
            optimizer.step()
        return [p.detach().clone() for p in weights]

    held = make(pieces()).param_groups
    shapes = {tuple(p.shape) for group in held for p in group["params"]}
    shares = [float((a - b).mean()) for a, b in zip(end(1.0), end(0.0), strict=True) if tuple(a.shape) in shapes]
    return min(shares)


@pytest.mark.parametrize("name", sorted(set(MAKERS) - CANNOT_BE_BUILT - CANNOT_STEP))
@pytest.mark.filterwarnings("ignore")
def test_the_verdict_is_what_is_measured(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    make = MAKERS[name]
    optimizer, share = make(pieces()), measured(make)
    capsys.readouterr()
    left = memory.share_left(optimizer)
    assert capsys.readouterr().out == ""
    assert left is not None
    if name != "TRAC(AdamW)":  # which depends on the loss scale of its gradients: less than a tenth either way
        assert left == pytest.approx(share, abs=0.03)
    refused = memory.reason_to_leave_alone(optimizer) is not None
    assert refused == (share < memory.LEAST_SHARE or name in SLOW), (share, left)


@pytest.mark.parametrize("name", sorted(CANNOT_STEP))
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_tried_is_known_by_name_or_taken_for_ordinary(name: str) -> None:
    refused = memory.reason_to_leave_alone(MAKERS[name](pieces())) if name != "po.SpectralSphere" else None
    assert (refused is not None) == ("ScheduleFree" in name)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_ordinary_optimizers_are_taken_as_they_are(name: str) -> None:
    optimizer = OPTIMIZERS[name](pieces()[:1] if "muon" in name else pieces())
    assert memory.reason_to_leave_alone(optimizer) is None


class Anchored(torch.optim.Optimizer):
    """Computes weights from where they were when it was made; its constructor cannot be called from its settings."""

    def __init__(self, model: nn.Module, rate: float) -> None:
        super().__init__(model.parameters(), {"lr": rate})
        self.rate_of_all = rate

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["start"], state["sum"] = p.detach().clone(), torch.zeros_like(p)
                state["sum"] += p.grad
                p.data = state["start"] - self.rate_of_all * state["sum"]


def test_a_class_that_cannot_be_built_again_is_copied() -> None:
    model = make_model("mlp")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = Anchored(model, 0.01)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1.0)  # binds a step of its own to the instance
    assert memory.share_left(optimizer) == pytest.approx(0.0, abs=1e-6)
    assert_same(before, {n: p.detach() for n, p in model.named_parameters()})
    assert not optimizer.state
    assert "leaves 0.00" in str(memory.reason_to_leave_alone(optimizer))


@pytest.mark.parametrize("rate", [0.0, 0.01])
@pytest.mark.parametrize("settings", [{}, {"fused": True}, {"foreach": True}, {"weight_decay": 0.5}])
def test_a_rate_of_zero_or_another_implementation_changes_nothing(rate: float, settings: dict[str, Any]) -> None:
    left = memory.share_left(torch.optim.AdamW(pieces(), lr=rate, **settings))
    assert left == pytest.approx(1.0, abs=1e-3)


def test_the_probe_leaves_no_trace() -> None:
    weights = pieces()
    optimizer = po.MADGRAD(weights, lr=0.01)
    called: list[int] = []
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    for p in weights:
        p.grad = torch.ones_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    called.clear()
    before = rng(), [p.detach().clone() for p in weights], [p.grad.clone() for p in weights], optimizer.state_dict()
    memory.share_left(optimizer)
    after = rng(), [p.detach() for p in weights], [p.grad for p in weights], optimizer.state_dict()
    assert_same(before, after)
    assert called == []
    assert torch.is_grad_enabled()


def test_draws_of_the_optimizer_are_the_same_in_both_runs() -> None:
    class Noisy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step()
            for p in self.param_groups[0]["params"]:
                p.data += torch.randn_like(p) + float(np.random.rand()) + random.random()

    assert memory.share_left(Noisy(pieces(), lr=0.01)) == pytest.approx(1.0, abs=1e-5)


REFUSED: dict[str, Maker] = {
    "MADGRAD": lambda ps: po.MADGRAD(ps, lr=0.01), "FTRL": lambda ps: po.FTRL(ps, lr=0.05),
    "Nero": lambda ps: po.Nero(ps, lr=0.01), "Ranger": lambda ps: po.Ranger(ps, lr=0.01), "SRMM": po.SRMM,
    "Lookahead": lambda ps: po.Lookahead(torch.optim.Adam(ps, lr=0.01)),
    "TRAC": lambda ps: po.TRAC(torch.optim.AdamW(ps, lr=0.01)), "DAdaptSGD": po.DAdaptSGD,
    "ScheduleFree": lambda ps: schedulefree.AdamWScheduleFree(ps, lr=0.01),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(REFUSED))
@pytest.mark.filterwarnings("ignore")
def test_a_refused_run_is_the_plain_one(name: str) -> None:
    """Jumps forced, lookahead and early cuts on: weights are those of the plain loop, bit for bit."""
    ends = []
    for enabled in (True, False):
        model = make_model("mlp")
        optimizer = REFUSED[name](list(model.parameters()))
        if hasattr(optimizer, "train"):
            optimizer.train()
        schedule = None
        if isinstance(optimizer, torch.optim.Optimizer) and name != "TRAC":
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 - s / 80)
        settings = config(enabled=enabled, lookahead__extrapolation=0.3, lookahead__damping=0.25, min_group_factor=0.01)
        trainer = HybridTrainer(model, optimizer, settings, loss_fn, schedule)
        for batch in make_batches(60):
            trainer.step(batch)
        ends.append([p.detach().clone() for p in model.parameters()])
        assert (trainer.statistics()["hands_off"] is not None) == enabled
        assert trainer.statistics()["num_jumps_proposed"] == 0
    assert_same(*ends)


def test_the_reason_is_said_once_and_not_when_nothing_would_move() -> None:
    model = make_model("mlp")
    with pytest.warns(UserWarning, match="MADGRAD computes weights from a copy of its own: no jumps") as said:
        HybridTrainer(model, po.MADGRAD(model.parameters()), HybridTrainerConfig(), loss_fn)
    assert len(said) == 1
    HybridTrainer(model, po.MADGRAD(model.parameters()), HybridTrainerConfig(enabled=False), loss_fn)
