"""Ways to train in less memory: the same run where they change nothing of it, a resume to the bit where they do."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import Fake, assert_same, config
from frameworks import framework, weights_of
from hybrid_predict_trainer import ConfigError, HybridTrainer, attach, cli
from hybrid_predict_trainer.tasks import TaskSettings, make_task
from hybrid_predict_trainer.tasks.base import TaskDefaults
from hybrid_predict_trainer.tasks.low_bit import adamw_8bit, ternary
from hybrid_predict_trainer.tasks.recipes import build_optimizer
from hybrid_predict_trainer.weights import offload

WIDTH = 64


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    layers = (nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(dropout), nn.Linear(WIDTH, WIDTH), nn.Tanh())
    return nn.Sequential(*layers, nn.Linear(WIDTH, 1))


def batch(i: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(i))
    return x, x[:, :1].sin()


def mse(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


# ---------------------------------------------------------------- activations in host memory


class Copies(torch.autograd.graph.saved_tensors_hooks):
    """In place of torch's ``save_on_cpu``, which copies nothing that is in host memory already."""

    shapes: list[tuple[int, ...]]

    def __init__(self, pin_memory: bool = False) -> None:
        super().__init__(self.taken, torch.clone)

    @classmethod
    def taken(cls, tensor: Tensor) -> list[Tensor]:  # a list: only weights may come as they are
        cls.shapes.append(tuple(tensor.shape))
        return tensor.clone()


def curvature(model: nn.Module, batch: Any) -> Tensor:
    """A loss of second derivatives, as equations have them: its forward differentiates."""
    x = batch[0].requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return mse(model, batch) + 1e-3 * slope.square().mean()


@pytest.mark.parametrize("loss", [mse, curvature])
@pytest.mark.parametrize("enabled", [True, False])
def test_activations_in_host_memory_change_no_bit(
    loss: Callable[..., Tensor], enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Copies)
    found = {}
    for away in (False, True):
        Copies.shapes = []
        model = network(dropout=0.2)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        trainer = HybridTrainer(
            model, optimizer, config(enabled=enabled, training__activation_offload=away), loss, predictor=Fake()
        )
        losses = [trainer.step(batch(i)).loss for i in range(20)]
        found[away] = [losses, weights_of(model), trainer.statistics()["num_jumps_accepted"]]
        assert bool(Copies.shapes) is away
    assert_same(found[False], found[True])
    assert (32, WIDTH) in Copies.shapes, "activations are away"
    assert not {(WIDTH, WIDTH), (1, WIDTH)} & set(Copies.shapes), "weights stay"


def test_what_is_away_comes_back() -> None:
    away = offload.activations_on_host(network().parameters(), torch.autograd.graph.saved_tensors_hooks(
        torch.zeros_like, torch.clone
    ))  # fmt: skip
    model = network()
    with away:
        loss = mse(model, batch(0))
    loss.backward()
    assert model[0].weight.grad.abs().max() == 0, "what came back is what was packed"


def test_a_loop_of_ones_own_is_told_what_to_do() -> None:
    model = network()
    with pytest.raises(ConfigError, match=r"activation_offload.*save_on_cpu"):
        attach(model, torch.optim.Adam(model.parameters()), config(training__activation_offload=True), loss_fn=mse)
    with pytest.raises(ConfigError, match=r"training.activation_offload = 'yes' must be true or false"):
        config(training__activation_offload="yes")


# ---------------------------------------------------------------- 8 bits


@pytest.fixture
def eager() -> Iterator[None]:
    """Without the seconds that torchao's step takes to be compiled."""
    framework("torchao")
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("low", ["adamw8bit", "ternary", "both"])
def test_a_resume_is_exact(low: str, tmp_path: Path) -> None:
    def made() -> HybridTrainer:
        model = network() if low == "adamw8bit" else ternary(network())
        recipe = TaskDefaults(lr=1e-3, steps=52, optimizer="adamw" if low == "ternary" else "adamw8bit")
        optimizer = build_optimizer(model, recipe)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 200)
        return HybridTrainer(model, optimizer, config(), mse, schedule, predictor=Fake())

    first, again = made(), made()
    for i in range(40):
        first.step(batch(i))
    path = first.save_checkpoint(tmp_path)
    losses = [first.step(batch(i)).loss for i in range(40, 52)]
    assert first.statistics()["num_jumps_accepted"] > 0
    again.load_checkpoint(path)
    assert [again.step(batch(i)).loss for i in range(40, 52)] == losses
    assert_same(plain(again), plain(first))
    assert losses[-1] < 0.5


def plain(trainer: HybridTrainer) -> dict[str, Tensor]:
    return {name: offload.local(p).detach().clone() for name, p in trainer.run.subject.model.named_parameters()}


@pytest.mark.usefixtures("eager")
@pytest.mark.filterwarnings("ignore")
def test_states_are_held_in_8_bits() -> None:
    model = network()
    optimizer = adamw_8bit([{"params": list(model.parameters())}], lr=1e-3)
    mse(model, batch(0)).backward()
    optimizer.step()
    moment: Any = optimizer.state[model[0].weight]["exp_avg"]
    assert moment.codes.dtype is torch.uint8
    assert moment.codes.numel() == WIDTH**2
    assert moment.scale.numel() == WIDTH**2 // 256
    assert type(optimizer.state[model[0].bias]["exp_avg"]) is Tensor


# ---------------------------------------------------------------- ternary layers


@pytest.mark.usefixtures("eager")
@pytest.mark.filterwarnings("ignore")
def test_hidden_layers_are_ternary() -> None:
    model = ternary(network())
    x = torch.eye(WIDTH)
    values = model[0](x) - model[0].bias
    steps = values / offload.local(model[0].weight).abs().mean()
    assert (steps - steps.round()).abs().max() < 0.02
    assert set(steps.round().unique().tolist()) == {-1.0, 0.0, 1.0}
    assert [type(model[i].weight) is nn.Parameter for i in (0, 3, 5)] == [False, False, True], "the head is as it was"


@pytest.mark.usefixtures("eager")
@pytest.mark.filterwarnings("ignore")
def test_a_jump_moves_what_a_ternary_layer_sees() -> None:
    model = ternary(network())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    trainer = HybridTrainer(model, optimizer, config(), mse, predictor=Fake())
    for i in range(30):
        before = offload.local(model[0].weight).detach().clone()
        if trainer.step(batch(i)).was_predicted:
            break
    assert not torch.equal(before, offload.local(model[0].weight))


# ---------------------------------------------------------------- what cannot be had


def without(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As where a module is not installed."""
    for known in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, known)
    monkeypatch.setitem(sys.modules, name, None)


def test_torchao_is_asked_for_by_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "torchao")
    for what in (lambda: ternary(network()), lambda: adamw_8bit([{"params": [nn.Parameter(torch.ones(2))]}], lr=1.0)):
        with pytest.raises(ModuleNotFoundError, match=r"pip install \"hybrid-predict-trainer\[torchao\]\""):
            what()


def test_another_torchao_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    other = types.ModuleType("torchao")
    other.__version__ = "9.9"  # type: ignore[attr-defined]
    without(monkeypatch, "torchao")
    monkeypatch.setitem(sys.modules, "torchao", other)
    with pytest.raises(ValueError, match=r"torchao 9.9 has no BitNet layers to train .*install 0.18"):
        ternary(network())


def test_without_a_compiler_nothing_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    framework("torchao")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"C\+\+ compiler: install g\+\+, or take adamw"):
        adamw_8bit([{"params": [nn.Parameter(torch.ones(2))]}], lr=1.0)


def test_nothing_to_make_ternary() -> None:
    for model in (nn.Linear(3, 1), nn.Sequential(nn.Conv2d(1, 1, 1), nn.Linear(2, 2)), nn.Embedding(2, 2)):
        with pytest.raises(ValueError, match=r"hidden nn\.Linear"):
            ternary(model)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--task", "gpt", "--ternary", "--bf16"], "autocast on CUDA only"),
        (["--task", "pinn-poisson", "--ternary"], "no use for the setting 'ternary'"),
        (["--task", "finetune", "--ternary"], "no use for the setting 'ternary'"),
        (["--task", "gpt", "--optimizer", "adamw8bits"], "did you mean 'adamw8bit'"),
        (
            ["--task", "gpt", "--set", "training.activation_offload=1", "--data-bytes", "4000"],
            "training.activation_offload = 1 must be true",
        ),
    ],
)
def test_bad_input(argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    try:
        status = cli.main(["train", *argv, "--out", str(out)])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.usefixtures("eager")
@pytest.mark.filterwarnings("ignore")
def test_the_command_line_has_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        *("train", "--task", "gpt", "--preset", "0.3M", "--batch-size", "1", "--context", "8", "--steps", "3"),
        *("--ternary", "--optimizer", "adamw8bit", "--gradient-checkpointing", "--data-bytes", "4000"),
        *("--set", "training.activation_offload=true", "--set", "predictor.offload=true", "--json"),
    ]
    assert cli.main([*argv, "--out", str(tmp_path / "run")]) == 0
    assert '"completed": true' in capsys.readouterr().out
    assert cli.main(["train", "--resume", "--out", str(tmp_path / "run"), "--bf16"]) == 2


def test_tasks_know_of_it() -> None:
    framework("torchao")
    task = make_task("gpt", TaskSettings(preset="0.3M", context=8, batch_size=1, ternary=True))
    model = task.build_model(0)
    kinds = {name for name, p in model.named_parameters() if type(p) is not nn.Parameter}
    assert "blocks.0.up_proj.weight" in kinds
    assert not {"lm_head.weight", "embed_tokens.weight"} & kinds
