"""``training.step``: hidden matrices stepped by Muon or SOAP around Adam, as two optimizers by hand would."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hybrid_predict_trainer import CheckpointError, ConfigError, HybridTrainer, HybridTrainerConfig, attach, with_values
from hybrid_predict_trainer.keep.subject import Subject
from hybrid_predict_trainer.move.matrix_step import hidden_matrices
from hybrid_predict_trainer.recovery import IntegrationError

STEPS = 24


class Net(nn.Module):
    """Two hidden matrices, a head, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.first(x).tanh()).tanh())
        return out


def network(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return functional.mse_loss(model(batch[0]), batch[1])


def batches(count: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(8, 4, generator=generator)
    return [(x := torch.randn(32, 8, generator=generator), x @ w) for _ in range(count)]


def settings(kind: str, **more: Any) -> HybridTrainerConfig:
    return with_values(HybridTrainerConfig(), {"training.step": kind, "training.max_lr_multiplier": 1.0, **more})


def falling(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / STEPS)


def package(kind: str, matrices: Sequence[Tensor], lr: float, decay: float) -> torch.optim.Optimizer:
    if kind == "muon":
        return torch.optim.Muon(matrices, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    made: torch.optim.Optimizer = pytest.importorskip("pytorch_optimizer").SOAP(matrices, lr=lr, weight_decay=decay)
    return made


def by_hand(kind: str, adam: type[torch.optim.Optimizer], decay: float, clip: float = 0.0) -> Net:
    """The loop of somebody who builds two optimizers and two schedules."""
    model = network()
    hidden = [model.first.weight, model.second.weight]
    rest = [p for p in model.parameters() if all(p is not h for h in hidden)]
    decoupled = decay if adam is torch.optim.AdamW else 0.0
    both = [package(kind, hidden, 1e-2, decoupled), adam(rest, lr=1e-2, weight_decay=decay)]  # type: ignore[call-arg]
    schedules = [falling(optimizer) for optimizer in both]
    for batch in batches():
        model.zero_grad()
        loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        for part in (*both, *schedules):
            part.step()
    return model


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


# ---------------------------------------------------------------- what it is


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize(
    ("adam", "decay"), [(torch.optim.AdamW, 0.1), (torch.optim.AdamW, 0.0), (torch.optim.Adam, 0.0)]
)
@pytest.mark.parametrize("kind", ["muon", "soap"])
def test_it_is_the_loop_with_two_optimizers(kind: str, adam: Any, decay: float, clip: float) -> None:
    expected = by_hand(kind, adam, decay, clip)
    model = network()
    optimizer = adam(model.parameters(), lr=1e-2, weight_decay=decay)
    config = settings(kind, **{"training.gradient_clip_norm": clip})
    trainer = HybridTrainer(model, optimizer, config, loss_fn=loss_fn, lr_scheduler=falling(optimizer))
    for batch in batches():
        trainer.step(batch)
    assert_equal(model, expected)
    assert len(optimizer.state) == 4, "Adam keeps no moments of the matrices"


@pytest.mark.parametrize("kind", ["muon", "soap"])
def test_it_rides_along_with_a_loop_of_ones_own(kind: str) -> None:
    expected = by_hand(kind, torch.optim.AdamW, 0.1)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = falling(optimizer)
    engine = attach(model, optimizer, settings(kind), loss_fn=loss_fn)
    for batch in batches():
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        engine.note(loss, batch)
        optimizer.step()
        assert model.first.weight.grad is not None, "gradients are back where backward left them"
        schedule.step()
    assert_equal(model, expected)


@pytest.mark.parametrize(("kind", "grows"), [("optimizer", True), ("muon", False), ("soap", True)])
def test_steps_that_are_equally_long_everywhere_are_never_lengthened(kind: str, grows: bool) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = with_values(HybridTrainerConfig(), {"training.step": kind})
    trainer = HybridTrainer(model, optimizer, config, loss_fn=loss_fn, lr_scheduler=falling(optimizer))
    assert trainer.run.optimizer_step.scale.may_grow is grows


def test_switched_off_it_is_the_optimizer_alone() -> None:
    model, plain = network(), network()
    optimizer, its = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, plain))
    trainer = HybridTrainer(model, optimizer, settings("muon", **{"training.enabled": False}), loss_fn=loss_fn)
    for batch in batches(5):
        trainer.step(batch)
        its.zero_grad()
        loss_fn(plain, batch).backward()  # type: ignore[no-untyped-call]
        its.step()
    assert_equal(model, plain)


# ---------------------------------------------------------------- which matrices


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.up_proj, self.norm, self.lm_head = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 11)


class TableIsHead(nn.Module):
    """A table that the output shares, registered by the layer whose name says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.up_proj = nn.Linear(8, 11, bias=False), nn.Linear(8, 8)
        self.words = nn.Embedding(11, 8)
        self.words.weight = self.decoder.weight
        self.down_proj = nn.Linear(8, 8)


class Nameless(nn.Module):
    """Two hidden matrices and an output that no rule knows by its name."""

    def __init__(self, out: int = 3, *, frozen: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, out)
        self.decoder.weight.requires_grad_(not frozen)


class Adapted(nn.Module):
    """Two low-rank factors beside a frozen matrix, under a frozen head."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head, self.base = nn.Linear(8, 11), nn.Linear(8, 8)
        self.requires_grad_(False)
        self.lora_a, self.lora_b = nn.Linear(8, 2), nn.Linear(2, 8)


HIDDEN: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "named head": (Net, ["first.weight", "second.weight"]),
    "language model": (Language, ["up_proj.weight"]),
    "last matrix": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), ["0.weight"]),
    "no row": (lambda: nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 4), nn.Linear(4, 2)), ["1.weight"]),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 2)), ["1.weight"]),
    "shared table": (TableIsHead, ["up_proj.weight", "down_proj.weight"]),
    "nameless head": (Nameless, ["a.weight", "b.weight"]),
    "one output": (lambda: Nameless(1), ["a.weight", "b.weight"]),
    "head that is frozen": (lambda: Nameless(frozen=True), ["a.weight", "b.weight"]),
    "known head that is frozen": (Adapted, ["lora_a.weight", "lora_b.weight"]),
    "convolution at the end": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 2, 1)), ["0.weight"]),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 8), [
        "self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight"]),
}  # fmt: skip


def subject(model: nn.Module) -> Subject:
    return Subject.of(model, torch.optim.AdamW(model.parameters()), loss_fn, None, None)


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_matrices(name: str) -> None:
    build, expected = HIDDEN[name]
    found = subject(build())
    assert [found.groups.names[i] for i in hidden_matrices(found)] == expected


def test_hidden_matrices_do_not_depend_on_the_order_of_the_groups() -> None:
    model = Nameless()
    body = [*model.a.parameters(), *model.b.parameters()]
    groups = [{"params": list(model.decoder.parameters()), "lr": 1e-2}, {"params": body}]
    found = Subject.of(model, torch.optim.AdamW(groups), loss_fn, None, None)
    assert [found.groups.names[i] for i in hidden_matrices(found)] == ["a.weight", "b.weight"]


@pytest.mark.parametrize("how", ["frozen", "rate 0", "removed", "unused"])
def test_a_matrix_that_does_not_train_stays(how: str) -> None:
    model = network()
    groups = [{"params": [model.first.weight], "lr": 0.0 if how == "rate 0" else 1e-2, "weight_decay": 0.0},
              {"params": [p for p in model.parameters() if p is not model.first.weight]}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=1e-2)

    def loss(net: Any, batch: Any) -> Tensor:
        if how == "unused":
            return functional.mse_loss(net.head(net.second(batch[0].repeat(1, 2)).tanh()), batch[1])
        return loss_fn(net, batch)

    trainer = HybridTrainer(model, optimizer, settings("muon"), loss_fn=loss)
    for number, batch in enumerate(batches(12)):
        if number == 6:
            kept = model.first.weight.detach().clone()
            if how == "frozen":
                model.first.weight.requires_grad_(False)
                model.first.weight.grad = None
            if how == "removed":
                optimizer.param_groups[0]["params"].clear()
        trainer.step(batch)
    assert torch.equal(model.first.weight, kept)
    assert not torch.equal(model.second.weight, network().second.weight)


# ---------------------------------------------------------------- it is part of the state


def full_batch_run(kind: str) -> tuple[Net, HybridTrainer]:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = settings(kind, **{"training.warmup_steps": 4, "training.full_steps": 2, "predictor.window": 2})
    return model, HybridTrainer(model, optimizer, config, loss_fn=loss_fn, lr_scheduler=falling(optimizer))


@pytest.mark.parametrize("kind", ["muon", "soap"])
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    batch = batches(1)[0]
    model, trainer = full_batch_run(kind)
    for step in range(2 * STEPS):
        if step == STEPS:
            saved = trainer.save_checkpoint(tmp_path)
        trainer.step(batch)
    again, resumed = full_batch_run(kind)
    resumed.load_checkpoint(saved)
    for _ in range(STEPS):
        resumed.step(batch)
    assert_equal(again, model)
    assert trainer.statistics()["num_jumps_proposed"] > 0


@pytest.mark.parametrize("kind", ["muon", "soap"])
def test_a_state_can_be_gone_back_to_twice(kind: str) -> None:
    """What was put back is a copy: steps after it do not write into what is kept."""
    _, trainer = full_batch_run(kind)
    step = trainer.run.optimizer_step.modifiers[-1]
    for batch in batches(6):
        trainer.step(batch)
    kept = copy.deepcopy(step.state_dict())
    for _ in range(2):
        step.load_state_dict(kept)
        assert repr(step.state_dict()) == repr(kept)
        for batch in batches(4):
            trainer.step(batch)
        assert repr(step.state_dict()) != repr(kept)


def test_a_step_that_a_scaler_leaves_out_puts_the_gradients_back() -> None:
    _, trainer = full_batch_run("muon")
    step = trainer.run.optimizer_step.modifiers[-1]
    parameters = trainer.run.subject.parameters
    for p in parameters:
        p.grad = torch.ones_like(p)
    step.before_step(parameters)
    assert [p.grad is None for p in parameters] == [True, False, True, False, False, False]
    step.on_skip()
    assert all(p.grad is not None for p in parameters)


@pytest.mark.parametrize(
    ("saved", "now", "expected"),
    [
        ({"training.step": "muon"}, {}, 'training.step = "muon", and is continued without: set'),
        ({"training.step": "soap"}, {}, 'training.step = "soap", and is continued without: set'),
        (
            {"training.recipe": "prior"}, {"training.step": "muon", "training.recipe": "off"},
            r'by role \(training.recipe\), and is continued without but with training.step = "muon": set',
        ),
    ],
)  # fmt: skip
def test_a_run_is_continued_with_the_step_that_it_was_begun_with(
    saved: dict[str, Any], now: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    """The line names settings, which a user can set, and no class of ours."""

    def run(changes: dict[str, Any]) -> HybridTrainer:
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        config = with_values(HybridTrainerConfig(), changes)
        return HybridTrainer(model, optimizer, config, loss_fn=loss_fn, lr_scheduler=falling(optimizer))

    trainer = run(saved)
    trainer.step(batches(1)[0])
    path = trainer.save_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=expected):
        run(now).load_checkpoint(path)


# ---------------------------------------------------------------- who cannot have it


def test_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = network()
    with pytest.raises(ConfigError, match="not of SGD"):
        HybridTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1), settings("muon"), loss_fn=loss_fn)
    climbing = torch.optim.AdamW(model.parameters(), maximize=True)
    with pytest.raises(ConfigError, match="negate the loss"):
        HybridTrainer(model, climbing, settings("muon"), loss_fn=loss_fn)
    line = nn.Linear(3, 1)
    with pytest.raises(ConfigError, match="has none"):
        HybridTrainer(line, torch.optim.AdamW(line.parameters()), settings("muon"), loss_fn=loss_fn)
    with pytest.raises(ConfigError, match=r"training\.step"):
        settings("shampoo")
    _, trainer = full_batch_run("muon")
    trainer.step(batches(1)[0])
    saved = trainer.save_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r'training\.step = "muon"'):
        full_batch_run("soap")[1].load_checkpoint(saved)
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(IntegrationError, match="pip install"):
        full_batch_run("soap")
