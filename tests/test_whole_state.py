"""Snapshots and checkpoints hold everything that a step can change, whatever the optimizer and the model are."""

from __future__ import annotations

import random
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cases import assert_same, difference
from hybrid_predict_trainer import CheckpointError, HybridTrainer, HybridTrainerConfig
from hybrid_predict_trainer.config.toml import with_values
from hybrid_predict_trainer.judge.noise import NoiseCheck
from hybrid_predict_trainer.keep import checkpoint, migration, optimizer_state, state_tree
from hybrid_predict_trainer.keep.buffers import BufferGuard, Buffers
from hybrid_predict_trainer.keep.rng import rng_state, set_rng_state
from hybrid_predict_trainer.keep.snapshot import Snapshot

DATA = Path(__file__).parent / "data"
NUM_BEFORE, NUM_AFTER = 5, 6


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1))


def batch(i: int, size: int = 8, width: int = 4) -> tuple[Tensor, Tensor]:
    x = torch.randn(size, width, generator=torch.Generator().manual_seed(i))
    return x, x.sum(1, keepdim=True).sin()


def mse(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(data[0]), data[1])


def take_steps(model: nn.Module, optimizer: Optimizer, start: int, count: int) -> None:
    for i in range(start, start + count):
        optimizer.zero_grad()
        mse(model, batch(i)).backward(create_graph=type(optimizer).__name__ in ("AdaHessian", "SophiaH"))
        optimizer.step()


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone(memory_format=torch.contiguous_format) for p in model.parameters()]


def everything(model: nn.Module, optimizer: Optimizer) -> list[Any]:
    tree, tensors = state_tree.encode(optimizer_state.taken(model, optimizer, lambda t, _: t.detach().clone()))
    return [
        weights_of(model),
        tree,
        {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()},
    ]


# ---------------------------------------------------------------- every optimizer


def by_dimension(model: nn.Module, **more: Any) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.ndim == 2]
    return [
        {"params": matrices, "use_muon": True, **more},
        {"params": [p for p in parameters if p.ndim != 2], "use_muon": False},
    ]


class Around(Optimizer):
    """An optimizer around an optimizer, with slow weights of its own beside the state."""

    def __init__(self, base: Optimizer, every: int = 3, table: Callable[[], Any] = OrderedDict) -> None:
        self.base, self.every, self.count = base, every, 0
        self.param_groups, self.defaults, self.state = base.param_groups, base.defaults, defaultdict(dict)
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = table(), table()
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base.step()
        self.count += 1
        if self.count % self.every == 0:
            held = [p for group in self.param_groups for p in group["params"]]
            for p, slow in zip(held, self.slow, strict=True):
                slow.lerp_(p, 0.5)
                p.copy_(slow)


def _training(optimizer: Any) -> Any:
    optimizer.train()
    return optimizer


def optimizers() -> dict[str, Callable[[nn.Module], Optimizer]]:
    """Name -> maker, of everything that can be built here; the neighbours' own are empty where they are missing."""
    made: dict[str, Callable[[nn.Module], Optimizer]] = {
        "around": lambda m: Around(torch.optim.Adam(m.parameters(), lr=0.01)),
        "around, tables that no handle can refer to": lambda m: Around(
            torch.optim.Adam(m.parameters(), lr=0.01), table=dict
        ),
        "around two": lambda m: Around(Around(torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9), 2), 3),
        "torch.Muon": lambda m: torch.optim.Muon([p for p in m.parameters() if p.ndim == 2], lr=0.01),
    }
    kinds = torch.optim
    for kind in (kinds.SGD, kinds.Adam, kinds.AdamW, kinds.NAdam, kinds.RAdam, kinds.Adamax, kinds.RMSprop, kinds.Rprop,
                 kinds.Adagrad, kinds.Adadelta, kinds.ASGD, kinds.Adafactor):  # fmt: skip
        made[f"torch.{kind.__name__}"] = lambda m, kind=kind: kind(m.parameters(), lr=0.01)
    try:
        import pytorch_optimizer as po
        import schedulefree
        from pytorch_optimizer.optimizer import OPTIMIZERS
    except ImportError:
        return made
    for name, kind in OPTIMIZERS.items():
        made[name] = lambda m, kind=kind: kind(m.parameters(), lr=0.01)
    for name in ("adago", "adamuon", "muon", "muonclip", "normuon"):
        made[name] = lambda m, kind=OPTIMIZERS[name]: kind(by_dimension(m), lr=0.01)
    projected = {"rank": 2, "update_proj_gap": 3, "scale": 1.0, "projection_type": "std"}
    made |= {
        "adammini": lambda m: OPTIMIZERS["adammini"](m, lr=0.01),
        "ranger21": lambda m: OPTIMIZERS["ranger21"](m.parameters(), num_iterations=100, lr=0.01),
        "scalableshampoo": lambda m: OPTIMIZERS["scalableshampoo"](m.parameters()),
        "spectralsphere": lambda m: OPTIMIZERS["spectralsphere"]([p for p in m.parameters() if p.ndim == 2], lr=0.01),
        "sara": lambda m: OPTIMIZERS["sara"](m.parameters(), lr=1.0),
        "dadaptsgd": lambda m: OPTIMIZERS["dadaptsgd"](m.parameters(), lr=1.0),
        "galore projected": lambda m: po.GaLore([{"params": list(m.parameters()), **projected}], lr=0.01),
        "spam, masked": lambda m: po.SPAM(by_dimension(m, density=0.5), lr=0.01, update_proj_gap=4, warmup_epoch=3),
        "stablespam, warm": lambda m: po.StableSPAM(m.parameters(), lr=0.01, t_max=20, update_proj_gap=4),
        "lookahead": lambda m: po.Lookahead(torch.optim.Adam(m.parameters(), lr=0.01), k=3),
        "lookahead, pullback": lambda m: po.Lookahead(
            torch.optim.Adam(m.parameters(), lr=0.01), k=3, pullback_momentum="pullback"
        ),
        "lookahead of madgrad": lambda m: po.Lookahead(po.MADGRAD(m.parameters(), lr=0.01), k=3),
        "orthograd": lambda m: po.OrthoGrad(torch.optim.Adam(m.parameters(), lr=0.01)),
        "trac": lambda m: po.TRAC(torch.optim.AdamW(m.parameters(), lr=0.01)),
        "trac of lookahead": lambda m: po.TRAC(po.Lookahead(torch.optim.Adam(m.parameters(), lr=0.01), k=3)),
        "pcgrad": lambda m: po.PCGrad(torch.optim.Adam(m.parameters(), lr=0.01)),
    }
    made["schedulefree"] = lambda m: _training(schedulefree.AdamWScheduleFree(m.parameters(), lr=0.01))
    made["schedule-free wrapper"] = lambda m: _training(po.ScheduleFreeWrapper(torch.optim.AdamW(m.parameters())))
    # these need a closure, a process group, a hook on every gradient, or a package that is not there
    for name in ("lbfgs", "alig", "bsam", "distributedmuon", "adalomo", "lomo", "demo"):
        made.pop(name, None)
    return made


OPTIMIZERS_HERE = optimizers()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPTIMIZERS_HERE)
def test_snapshot_and_checkpoint_are_exact_for_every_optimizer(name: str) -> None:
    random.seed(1)
    model = network()
    optimizer = OPTIMIZERS_HERE[name](model)
    take_steps(model, optimizer, 0, NUM_BEFORE)
    snapshot = Snapshot.take(model, optimizer)
    tree, tensors = state_tree.encode(optimizer_state.taken(model, optimizer, lambda t, _: t.detach()))
    on_disk = {n: t.clone() for n, t in tensors.items()}
    start, rng = weights_of(model), rng_state()
    take_steps(model, optimizer, NUM_BEFORE, NUM_AFTER)
    wanted = everything(model, optimizer)
    assert difference(wanted, [start, tree, on_disk]) is not None, "the optimizer moves something"

    snapshot.restore(model, optimizer)
    assert_same(weights_of(model), start)
    take_steps(model, optimizer, NUM_BEFORE, NUM_AFTER)
    assert_same(everything(model, optimizer), wanted)

    other = network(5)
    fresh = OPTIMIZERS_HERE[name](other)
    with torch.no_grad():
        for p, saved in zip(other.parameters(), start, strict=True):
            p.copy_(saved)
    optimizer_state.restore(other, fresh, state_tree.decode(tree, on_disk))
    set_rng_state(rng)
    take_steps(other, fresh, NUM_BEFORE, NUM_AFTER)
    assert_same(everything(other, fresh), wanted)


THROUGH_FILES = [
    *("around", "around two", "torch.AdamW", "torch.Adafactor", "torch.Muon", "kron", "magma", "spam, masked", "soap"),
    *("lookahead of madgrad", "trac of lookahead", "schedule-free wrapper", "galore projected", "scalableshampoo"),
    *("shampoo", "adashift", "sara", "scion", "emonavi", "yogi"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n in THROUGH_FILES if n in OPTIMIZERS_HERE])
def test_a_run_resumes_through_files(name: str, tmp_path: Path) -> None:
    def made() -> HybridTrainer:
        model = network()
        return HybridTrainer(model, OPTIMIZERS_HERE[name](model), HybridTrainerConfig(), mse)

    first = made()
    for i in range(4):
        first.step(batch(i))
    path = first.save_checkpoint(tmp_path)
    losses = [first.step(batch(i)).loss for i in range(4, 9)]
    again = made()
    again.load_checkpoint(path)
    assert [again.step(batch(i)).loss for i in range(4, 9)] == losses


def test_what_cannot_be_told_is_refused_with_a_sentence(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model[0].weight]["iterator"] = iter([1])
    with pytest.raises(CheckpointError, match=r"state\['state'\]\[0\]\['iterator'\] is a builtins:list_iterator"):
        Snapshot.take(model, optimizer)
    optimizer.state.clear()
    trainer = HybridTrainer(model, optimizer, HybridTrainerConfig(), mse)
    optimizer.param_groups[0]["path"] = Path("x")
    with pytest.raises(CheckpointError, match=r"\['path'\] is a pathlib"):
        trainer.save_checkpoint(tmp_path)
    assert not any(tmp_path.iterdir())


class Hidden(torch.optim.SGD):
    """Keeps what nobody can walk, but says itself what its state is."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.source = iter(range(100))
        self.count = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count = next(self.source) + 1
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad, alpha=group["lr"] / self.count)

    def state_dict(self) -> dict[str, Any]:
        return {"sgd": super().state_dict(), "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict["sgd"])
        self.count = state_dict["count"]
        self.source = iter(range(self.count, 100))


def test_its_own_state_is_used_where_an_optimizer_hides_it() -> None:
    model = network()
    optimizer = Hidden(model.parameters(), 0.1)
    take_steps(model, optimizer, 0, 4)
    snapshot = Snapshot.take(model, optimizer)
    take_steps(model, optimizer, 4, 4)
    wanted = weights_of(model)
    snapshot.restore(model, optimizer)
    assert optimizer.count == 4
    take_steps(model, optimizer, 4, 4)
    assert_same(weights_of(model), wanted)


# ---------------------------------------------------------------- groups, names, numbers


class Linked(Optimizer):
    """SGD for some and Adam for the rest: a step gives the inner ones the groups and the state of the outer one."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.sgd, self.adam = torch.optim.SGD(parameters[:1], lr=0.1, momentum=0.9), torch.optim.Adam(parameters[1:])
        groups = [{**g, "mine": inner is self.sgd} for inner in (self.sgd, self.adam) for g in inner.param_groups]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for inner, mine in ((self.sgd, True), (self.adam, False)):
            inner.state = self.state
            inner.param_groups = [group for group in self.param_groups if group["mine"] is mine]
            inner.step()


@pytest.mark.parametrize("before", [0, 2], ids=["before its first step", "after two"])
def test_inner_optimizers_may_be_given_the_outer_ones_groups_after_a_snapshot(before: int) -> None:
    """What was two things then and is one now is put back once: groups keep their own settings, and moments stay."""
    model = nn.Linear(3, 2)
    optimizer = Linked(list(model.parameters()))

    def steps(count: int) -> list[Tensor]:
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    steps(before)
    start = Snapshot.take(model, optimizer)
    expected = steps(4)
    for _ in range(3):
        start.restore(model, optimizer)
        assert [group["mine"] for group in optimizer.param_groups] == [True, False]
        assert_same(steps(4), expected)


def test_a_group_added_since_a_snapshot_stays_the_users() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    take_steps(model, optimizer, 0, 3)
    snapshot = Snapshot.take(model, optimizer)
    model.register_parameter("late", nn.Parameter(torch.full((3,), 2.0)))
    optimizer.add_param_group({"params": [model.late], "lr": 0.5})
    model.late.grad = torch.ones(3)
    before = weights_of(model)
    take_steps(model, optimizer, 3, 2)
    state = {k: torch.as_tensor(v).clone() for k, v in optimizer.state[model[0].weight].items()}
    snapshot.restore(model, optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [6, 1]
    assert optimizer.param_groups[1]["lr"] == 0.5
    assert_same(weights_of(model)[1:], before[1:])
    assert float(optimizer.state[model[0].weight]["step"]) == 3 < float(state["step"])


def test_a_group_that_is_gone_is_left_out() -> None:
    model = network()
    optimizer = torch.optim.Adam(by_dimension(model), lr=0.01)
    take_steps(model, optimizer, 0, 3)
    snapshot = Snapshot.take(model, optimizer)
    gone = optimizer.param_groups.pop(0)
    optimizer.param_groups[0]["lr"] = 1.0
    snapshot.restore(model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert gone["params"][0].ndim == 2


def test_equal_shapes_in_another_order_are_refused(tmp_path: Path) -> None:
    def made(turned: bool) -> HybridTrainer:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
        a, b, c, d, *rest = model.parameters()
        order = [c, d, a, b, *rest] if turned else [a, b, c, d, *rest]
        return HybridTrainer(model, torch.optim.Adam(order, lr=0.01), HybridTrainerConfig(), mse)

    first, other = made(False), made(True)
    first.step(batch(0))
    path = first.save_checkpoint(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"parameter 0 of the optimizer is 0\.weight .* and 2\.weight in this run"
    ):
        other.load_checkpoint(path)


@pytest.mark.parametrize("rate", [np.float64(1e-3), np.float32(1e-3), torch.tensor(1e-3), np.asarray(1e-3)])
def test_rates_of_any_library(rate: Any, tmp_path: Path) -> None:
    def made() -> HybridTrainer:
        model = network()
        return HybridTrainer(model, torch.optim.AdamW(model.parameters(), lr=rate), HybridTrainerConfig(), mse)

    first = made()
    first.fit([batch(i) for i in range(3)])
    again = made()
    again.load_checkpoint(first.save_checkpoint(tmp_path))
    found = again.run.subject.optimizer.param_groups[0]["lr"]
    assert (type(found), float(found)) == (type(rate), float(rate))


def test_a_schedule_of_numpys_makes_the_rate_one_of_numpys(tmp_path: Path) -> None:
    def made() -> HybridTrainer:
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 * (1 + np.cos(np.pi * min(s, 30) / 30)))
        return HybridTrainer(model, optimizer, HybridTrainerConfig(), mse, schedule)

    first = made()
    first.fit([batch(i) for i in range(12)])
    path = first.save_checkpoint(tmp_path)
    losses = [first.step(batch(i)).loss for i in range(12, 16)]
    again = made()
    again.load_checkpoint(path)
    assert [again.step(batch(i)).loss for i in range(12, 16)] == losses


# ---------------------------------------------------------------- memory order and subclasses


class Turned(nn.Module):
    """A weight whose memory is column-major."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 4).t())
        self.out = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(x @ self.w))


def striding(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "transposed":
        return Turned()
    layers = (nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 4, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 1))
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("how", ["fused", "foreach", "single"])
@pytest.mark.parametrize("kind", ["channels_last", "transposed"])
def test_moments_keep_their_weights_memory_order(kind: str, how: str, tmp_path: Path) -> None:
    width = 4 if kind == "transposed" else 12

    def made() -> HybridTrainer:
        model = striding(kind)
        flags = {"fused": how == "fused", "foreach": how == "foreach"}
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **flags)
        return HybridTrainer(model, optimizer, HybridTrainerConfig(enabled=False), mse)

    first, again = made(), made()
    for i in range(4):
        first.step(batch(i, width=width))
    again.load_checkpoint(first.save_checkpoint(tmp_path))
    for i in range(4, 8):
        first.step(batch(i, width=width))
        again.step(batch(i, width=width))
    assert_same(weights_of(again.run.subject.model), weights_of(first.run.subject.model))


def test_state_of_format_2_takes_on_its_weights_memory_order() -> None:
    model = striding("transposed")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    saved = {
        0: {"step": torch.tensor(3.0), "exp_avg": torch.arange(24.0).reshape(4, 6), "exp_avg_sq": torch.ones(4, 6)}
    }
    groups = [{k: v for k, v in optimizer.param_groups[0].items() if k != "params"}]
    optimizer_state.restore(model, optimizer, {"state": saved, "groups": groups})
    found = optimizer.state[model.w]["exp_avg"]
    assert found.stride() == model.w.stride() != saved[0]["exp_avg"].stride()
    assert torch.equal(found, saved[0]["exp_avg"])


class Halves(Tensor):
    """Numbers kept in two parts, as quantized state is: it knows neither how to clone nor how to be copied deeply."""

    low: Tensor
    high: Tensor

    @staticmethod
    def __new__(cls, low: Tensor, high: Tensor) -> Halves:
        made = Tensor._make_wrapper_subclass(cls, low.shape, dtype=low.dtype, device=low.device)  # type: ignore[attr-defined]
        made.low, made.high = low, high
        return made  # type: ignore[no-any-return]

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["low", "high"], {"parts": (2, "a")}

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> Halves:
        assert context == {"parts": (2, "a")}
        return cls(inner["low"], inner["high"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].low, args[0].high)
        raise NotImplementedError(str(func))


class InHalves(torch.optim.SGD):
    """Momentum kept as :class:`Halves`."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                if "m" not in self.state[p]:
                    self.state[p]["m"] = Halves(torch.zeros_like(p), torch.zeros_like(p))
                m = self.state[p]["m"]
                m.high.mul_(0.9).add_(p.grad)
                m.low.add_(m.high, alpha=0.1)
                p.sub_(m.high + m.low, alpha=0.01)


def test_tensor_subclasses_go_by_their_parts(tmp_path: Path) -> None:
    def made() -> HybridTrainer:
        model = network()
        return HybridTrainer(model, InHalves(model.parameters(), lr=0.1), HybridTrainerConfig(enabled=False), mse)

    first, again = made(), made()
    for i in range(3):
        first.step(batch(i))
    path, snapshot = first.save_checkpoint(tmp_path), first.run.take_snapshot()
    for i in range(3, 6):
        first.step(batch(i))
    wanted = weights_of(first.run.subject.model)
    first.run.restore(snapshot)
    again.load_checkpoint(path)
    for trainer in (first, again):
        for i in range(3, 6):
            trainer.step(batch(i))
        assert_same(weights_of(trainer.run.subject.model), wanted)


# ---------------------------------------------------------------- buffers and extra state


class Carrying(nn.Module):
    """Does to its buffers what forwards do to them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer = how, nn.Linear(4, 1)
        start = {"rebound": torch.zeros(4), "grown": torch.zeros(0, 4), "from none": None, "retyped": torch.zeros(4)}
        self.register_buffer("carried", start.get(how, torch.zeros(4)), persistent=how != "hidden")

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(0).detach()
        old = self.carried
        if self.how in ("rebound", "retyped", "hidden"):
            self.carried = (0.9 * old + 0.1 * mean).to(torch.float64 if self.how == "retyped" else torch.float32)
        elif self.how == "grown":
            self.carried = torch.cat([old, mean[None]])[-3:]
        elif self.how == "from none":
            self.carried = mean if old is None else 0.5 * (old + mean)
        else:
            old.mul_(0.9).add_(mean, alpha=0.1)
        held = self.carried.float()
        return self.layer(x - (held.mean(0) if held.dim() == 2 else held))


HOW = ["in place", "rebound", "grown", "from none", "retyped", "hidden"]


@pytest.mark.parametrize("how", HOW)
def test_buffers_however_a_forward_changes_them(how: str, tmp_path: Path) -> None:
    def made() -> HybridTrainer:
        torch.manual_seed(0)
        model = Carrying(how)
        return HybridTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1), HybridTrainerConfig(), mse)

    first = made()
    for i in range(4):
        first.step(batch(i))
    path, snapshot = first.save_checkpoint(tmp_path), first.run.take_snapshot()
    losses = [first.step(batch(i)).loss for i in range(4, 8)]
    held = first.run.subject.model.carried.clone()
    first.run.restore(snapshot)
    assert not torch.equal(held.float().sum(), first.run.subject.model.carried.float().sum())
    assert [first.step(batch(i)).loss for i in range(4, 8)] == losses
    again = made()
    again.load_checkpoint(path)
    assert [again.step(batch(i)).loss for i in range(4, 8)] == losses
    assert_same(again.run.subject.model.carried, first.run.subject.model.carried)


@pytest.mark.parametrize("how", HOW)
def test_one_batch_that_is_not_finite_leaves_no_trace(how: str) -> None:
    torch.manual_seed(0)
    model = Carrying(how)
    trainer = HybridTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1), HybridTrainerConfig(), mse)
    for i in range(3):
        trainer.step(batch(i))
    before = model.carried.clone()
    x, y = batch(3)
    assert trainer.step((x * float("nan"), y)).skipped
    assert_same(model.carried, before)
    assert not trainer.step(batch(4)).skipped


def test_a_buffer_that_is_the_callers_batch_is_not_written_over() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)
            self.register_buffer("last", torch.zeros(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            self.last = x
            return self.layer(x)

    model = Last()
    first, second = batch(0)[0], batch(1)[0]
    model(first)
    saved = Buffers.of(model)
    model(second)
    kept = second.clone()
    saved.put_back(model)
    assert model.last is first
    assert torch.equal(second, kept)


def test_another_models_buffer_is_no_grown_one(tmp_path: Path) -> None:
    def made(size: int) -> HybridTrainer:
        model = network()
        model.register_buffer("mask", torch.ones(size))
        return HybridTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1), HybridTrainerConfig(), mse)

    first = made(3)
    first.step(batch(0))
    with pytest.raises(CheckpointError, match="mask"):
        made(4).load_checkpoint(first.save_checkpoint(tmp_path))


class Extra(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.layer, self.value = nn.Linear(4, 1), value

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def get_extra_state(self) -> Any:
        return self.value

    def set_extra_state(self, state: Any) -> None:
        self.value = state


@pytest.mark.parametrize(
    "value", [{"a": [1, torch.ones(2)]}, 3, "x", None, b"raw", {1, 2}, torch.ones(2), np.float32(1)], ids=repr
)
def test_extra_state_of_any_kind(value: Any, tmp_path: Path) -> None:
    def made(start: Any) -> HybridTrainer:
        model = Extra(start)
        return HybridTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1), HybridTrainerConfig(), mse)

    first, again = made(value), made("another")
    first.step(batch(0))
    path, snapshot = first.save_checkpoint(tmp_path), first.run.take_snapshot()
    first.run.subject.model.value = "changed"
    first.run.restore(snapshot)
    again.load_checkpoint(path)
    for trainer in (first, again):
        assert type(trainer.run.subject.model.value) is type(value)
        assert repr(trainer.run.subject.model.value) == repr(value)


def test_buffers_that_are_only_stored() -> None:
    model = nn.Linear(2, 2)
    raw = torch.arange(4, dtype=torch.uint8)
    model.register_buffer("scales", raw.view(torch.float8_e8m0fnu).clone())
    model.register_buffer("codes", raw.view(torch.float4_e2m1fn_x2).clone())
    guard = BufferGuard(model)
    for _ in range(2):
        guard.before()
        model(torch.ones(1, 2))
        guard.after()
    assert not guard.changing
    snapshot = Snapshot.take(model, torch.optim.SGD(model.parameters()))
    for b in model.buffers():
        b.view(torch.uint8).zero_()
    snapshot.restore(model, torch.optim.SGD(model.parameters()))
    assert all(b.view(torch.uint8).tolist() == [0, 1, 2, 3] for b in model.buffers())


@pytest.mark.parametrize("table", [OrderedDict, dict])
def test_a_wrapper_of_somebody_else_trains_and_resumes(table: Callable[[], Any], tmp_path: Path) -> None:
    """Its tables of hooks may be plain dictionaries, to which torch can make no handle."""

    def made() -> HybridTrainer:
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        optimizer = Around(torch.optim.Adam(model.parameters(), lr=0.01), table=table)
        with pytest.warns(UserWarning, match="Around"):  # its slow weights pull back what else moves them
            return HybridTrainer(model, optimizer, HybridTrainerConfig(), mse)

    first, again = made(), made()
    for i in range(5):
        first.step(batch(i))
    again.load_checkpoint(first.save_checkpoint(tmp_path))
    for i in range(5, 12):
        assert first.step(batch(i)).loss == again.step(batch(i)).loss


# ---------------------------------------------------------------- an adapter over a frozen base


def adapted(seed: int = 0, include: str = "auto") -> HybridTrainer:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 300), nn.Tanh(), nn.Linear(300, 1))
    model[0].requires_grad_(False)
    chosen = with_values(HybridTrainerConfig(), {"checkpoint.include_frozen": include})
    return HybridTrainer(model, torch.optim.Adam(model[2].parameters(), lr=0.01), chosen, mse)


@pytest.mark.parametrize("include", ["auto", "never", "always"])
def test_a_frozen_base_is_left_out_and_recognised(include: str, tmp_path: Path) -> None:
    first = adapted(include=include)
    first.step(batch(0))
    snapshot = first.run.take_snapshot()
    assert snapshot.names == ["2.weight", "2.bias"]
    path = first.save_checkpoint(tmp_path)
    size = (path / "model_weights.safetensors").stat().st_size
    assert (size > 7000) == (include == "always")
    loss = first.step(batch(1)).loss
    again = adapted(include=include)
    again.load_checkpoint(path)
    assert again.step(batch(1)).loss == loss
    later = again.save_checkpoint(tmp_path / "later")  # a run that was resumed leaves it out as before
    assert ((later / "model_weights.safetensors").stat().st_size > 7000) == (include == "always")
    other = adapted(seed=1, include=include)
    if include == "always":
        other.load_checkpoint(path)
        assert other.step(batch(1)).loss == loss
    else:
        before = other.run.subject.model.state_dict()
        kept = {name: t.clone() for name, t in before.items()}
        with pytest.raises(CheckpointError, match=r"frozen weight 0\.weight is not the one"):
            other.load_checkpoint(path)
        assert_same(dict(other.run.subject.model.state_dict()), kept)


@pytest.mark.parametrize("how", ["frozen in mid-run", "merged", "small"])
def test_frozen_weights_that_cannot_be_had_again_are_stored(how: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 300), nn.Tanh(), nn.Linear(300, 1))
    layer = model[2] if how == "small" else model[0]
    layer.requires_grad_(how == "frozen in mid-run")
    trained = [p for p in model.parameters() if p.requires_grad]
    trainer = HybridTrainer(model, torch.optim.SGD(trained, lr=0.1), HybridTrainerConfig(enabled=False), mse)
    trainer.step(batch(0))
    if how == "merged":
        layer.weight.data += 1.0
    elif how == "frozen in mid-run":
        layer.requires_grad_(False)
        trainer.run.subject.optimizer.param_groups[0]["params"] = list(model[2].parameters())
    saved = trainer.save_checkpoint(tmp_path) / "model_weights.safetensors"
    assert f"{'2' if how == 'small' else '0'}.weight" in state_tree.read_tensors(saved)


# ---------------------------------------------------------------- a checkpoint of an older format


@contextmanager
def unpacked(tmp_path: Path, name: str = "format_2.zip") -> Iterator[Path]:
    with zipfile.ZipFile(DATA / name) as archive:
        archive.extractall(tmp_path)
    yield next(tmp_path.glob("checkpoint_step_*"))


def of_an_older_build(**settings: Any) -> HybridTrainer:
    """What the kept checkpoints were written from."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: max(0.05, 1 - t / 200))
    chosen = with_values(HybridTrainerConfig(), {"predictor.window": 3, "predictor.secant.num_displacements": 2,
                                                 "training.warmup_steps": 4, "training.correct_steps": 3,
                                                 **settings})  # fmt: skip
    return HybridTrainer(model, optimizer, chosen, mse, schedule)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    """Path -> value of everything in a state that is no dictionary."""
    if isinstance(value, dict) and value:
        return {p: v for key, inner in value.items() for p, v in leaves(inner, (*path, key)).items()}
    return {path: value}


def test_a_checkpoint_of_format_3_is_sorted_by_owner(tmp_path: Path) -> None:
    """Nothing is lost, nothing is made up, and the run goes on from it."""
    trainer = of_an_older_build(**{"predictor.type": "secant"})
    with unpacked(tmp_path, "format_3.zip") as path:
        loaded = checkpoint.load(path)
        former = loaded.parts["trainer"]["run"]
        trainer.load_checkpoint(path)
    assert loaded.manifest.format_version == 3
    sorted_ = migration.by_owner(former)
    assert len(leaves(sorted_)) == len(leaves(former)) > 100
    own = trainer.run.state_dict()
    own["failures"]["counts"] = {place: own["failures"]["counts"][place] for place in former["failures"]["counts"]}
    since = {
        ("windows", "keeping"), ("windows", "sketch"), ("optimizer_step", "modifiers"),
        ("proposer", "feedback", "confidence", "num_new"), ("meter", "num_priced_passes"),
        *(("optimizer_step", "of_settings", "RoleRates", name)
          for name in ("rates", "origin", "ended", "table_least", "table_length", "table_most")),
        *(("losses", "curve", name) for name in ("block", "num_open", "open", "sums")),
        *(("safety", "guard", name) for name in ("num_retries", "exact")), ("monitor", "num_large"),
        ("safety", "best_point"), ("judge", "of_labels"), ("judge", "num_samples"),
        *(("judge", "noise", name) for name in NoiseCheck().state_dict()),
        *(("optimizer_step", "scale", "multiplier", name)
          for name in ("arrived", "arrivals", "num_unsteady", "num_looks")),
    }  # fmt: skip
    assert set(leaves(own)) - set(leaves(sorted_)) == since, "what the present format has, and no more"
    for path, value in leaves(sorted_).items():
        assert_same(leaves(own)[path], value)
    assert (trainer.current_step, trainer.run.meter.num_real_steps) == (25, 24)
    assert trainer.run.judge.probation is not None, "it was taken while a jump was on probation"
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(1))
    for _ in range(5):
        result = trainer.step((x, x.sum(1, keepdim=True).sin()))
    assert result.loss < 0.12, "it was at 0.1145"
    assert trainer.save_checkpoint(tmp_path / "new").is_dir()


def test_every_place_of_format_3_has_one_owner() -> None:
    assert len(set(migration.OWNED.values())) == len(migration.OWNED)


def test_a_checkpoint_of_format_2_still_loads(tmp_path: Path) -> None:
    trainer = of_an_older_build()
    model, optimizer = trainer.run.subject.model, trainer.run.subject.optimizer
    with unpacked(tmp_path) as path:
        trainer.load_checkpoint(path)
        weights = state_tree.read_tensors(path / "model_weights.safetensors")
    assert_same(dict(sorted(model.state_dict().items())), dict(sorted(weights.items())))
    assert trainer.current_step == 21
    assert trainer.run.judge.probation is not None, "it was taken while a jump was on probation"
    assert float(optimizer.state[model[0].weight]["step"]) == 18
    trainer.run.restore(trainer.run.judge.probation.snapshot)
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(1))
    for _ in range(5):
        result = trainer.step((x, x.sum(1, keepdim=True).sin()))
    assert result.loss < 0.2, "it was at 0.129"
    assert trainer.save_checkpoint(tmp_path).is_dir()


def test_what_cannot_be_saved_is_said_when_the_trainer_is_built() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    chosen = with_values(HybridTrainerConfig(), {"checkpoint.directory": "unused"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HybridTrainer(model, optimizer, chosen, mse)
    optimizer.param_groups[0]["path"] = Path("x")
    with pytest.warns(UserWarning, match="no checkpoint of this run can be written"):
        HybridTrainer(model, optimizer, chosen, mse)
