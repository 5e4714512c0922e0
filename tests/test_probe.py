"""A probe leaves the user's model, optimizer, loader and random states bit for bit alone, and tells regimes apart."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hybrid_predict_trainer
from hybrid_predict_trainer import ConfigError, HybridTrainerConfig, load_config
from hybrid_predict_trainer.cli import main
from hybrid_predict_trainer.experiments.compare.equal_loss import Point
from hybrid_predict_trainer.experiments.probe import observe, of_task
from hybrid_predict_trainer.experiments.probe.pilots import Pilot, Replicate
from hybrid_predict_trainer.experiments.probe.run import Options, Report, format_text, gain, recommended
from hybrid_predict_trainer.experiments.probe.run import probe as run_probe
from hybrid_predict_trainer.experiments.probe.subject import Subject


def loss_fn(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    x, y = batch
    return nn.functional.mse_loss(model(x), y)


def data(count: int = 64) -> TensorDataset:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, generator=draw)
    return TensorDataset(x, torch.sin(x.sum(1, keepdim=True)))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def full_batch() -> list[tuple[torch.Tensor, ...]]:
    return [data().tensors]


QUICK = Options(pilot_steps=30, replicates=1)


def test_nothing_of_the_users_is_touched() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(data(), batch_size=16, shuffle=True, generator=generator)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    loss_fn(model, next(iter(loader))).backward()
    optimizer.step()
    schedule.step()

    def state() -> tuple[object, ...]:
        return (
            copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()),
            [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            generator.get_state(), torch.get_rng_state(), np.random.get_state()[1].tolist(), model.training,
        )  # fmt: skip

    before = state()
    report = hybrid_predict_trainer.probe(model, optimizer, loader, loss_fn, total_steps=30, options=QUICK)
    torch.testing.assert_close(state(), before, rtol=0, atol=0, equal_nan=True)
    assert report.steps == 30
    assert not optimizer._optimizer_step_pre_hooks


@pytest.fixture(scope="module")
def exact() -> Report:
    model = network()
    return run_probe(model, torch.optim.Adam(model.parameters(), lr=1e-3), full_batch(), loss_fn, total_steps=60,
                     options=Options(pilot_steps=60, replicates=1))  # fmt: skip


def test_full_batch_training_is_a_go_for_jumps(exact: Report) -> None:
    assert exact.regime == "deterministic"
    assert (exact.total.verdict, exact.jumps.verdict) == ("go", "go")
    assert exact.jumps.jumps > 0
    assert exact.total.low > 1
    assert exact.gradient_cosine == pytest.approx(1.0)
    assert exact.learning_rate == "too small"
    assert "jumps alone: go" in format_text(exact)
    json.dumps(exact.to_json())


def test_the_recommended_settings_can_be_loaded(exact: Report, tmp_path: Path) -> None:
    path = tmp_path / "probe.toml"
    path.write_text(exact.to_toml())
    assert load_config(path).predictor_type == HybridTrainerConfig.preset("full_batch").predictor_type


def test_regimes_are_told_apart() -> None:
    def subject(model: nn.Module, loader: object) -> Subject:
        return Subject(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=loss_fn,
                       loader=loader, schedule=lambda share: 1.0)  # type: ignore[arg-type]  # fmt: skip

    batches = [tuple(t[i : i + 16] for t in data().tensors) for i in range(0, 64, 16)]
    assert observe.is_deterministic(subject(network(), full_batch()), network(), loss_fn)
    assert not observe.is_deterministic(subject(network(), batches), network(), loss_fn)
    assert not observe.is_pretrained(subject(network(), batches), batches)
    trained = network()
    optimizer = torch.optim.Adam(trained.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        loss_fn(trained, list(data().tensors)).backward()
        optimizer.step()
    assert observe.is_pretrained(subject(trained, batches), batches)
    frozen = network()
    next(frozen.parameters()).requires_grad_(False)
    assert observe.is_pretrained(subject(frozen, batches), batches)


@pytest.mark.parametrize(("regime", "optimizer", "key"), [
    ("deterministic", torch.optim.Adam, "full_batch"), ("fine-tuning", torch.optim.AdamW, "finetune"),
])  # fmt: skip
def test_a_preset_is_recommended(regime: object, optimizer: type[torch.optim.Adam], key: str) -> None:
    found = recommended(regime, optimizer(network().parameters()), None)  # type: ignore[arg-type]
    assert found == HybridTrainerConfig.preset(key)


def test_many_epochs_have_windows_of_an_epoch() -> None:
    sgd, adam = (o(network().parameters(), lr=0.1) for o in (torch.optim.SGD, torch.optim.Adam))
    assert recommended("many epochs", sgd, 23).predictor.window == 23
    assert recommended("many epochs", sgd, 23).lookahead.damping == 0
    assert recommended("many epochs", adam, 23).lookahead.damping > 0


def test_noise_scale_of_a_known_noise() -> None:
    """Gradients are 1 + noise of variance 4 per weight: tr / |G|^2 = 4."""
    model = nn.Linear(400, 1, bias=False)
    draw = torch.Generator().manual_seed(0)

    def batches() -> Iterator[torch.Tensor]:
        while True:
            yield 1 + 2 * torch.randn(1, 400, generator=draw)

    found = observe.noise_scale(model, lambda m, b: m(b).sum(), batches())
    assert found["batches"] == pytest.approx(4.0, rel=0.25)
    assert found["cosine"] == pytest.approx(0.2, rel=0.25)


def test_displacements_of_a_straight_line_go_on() -> None:
    model = nn.Linear(10, 1, bias=False)
    seen = observe.Displacements(model)
    for _ in range(200):
        with torch.no_grad():
            model.weight += 0.01
        seen.step()
    assert seen.table() == pytest.approx({5: 1.0, 10: 1.0, 20: 1.0, 40: 1.0}, abs=1e-4)
    draw = torch.Generator().manual_seed(0)
    wide = nn.Linear(2000, 1, bias=False)
    walk = observe.Displacements(wide)
    for _ in range(400):
        with torch.no_grad():
            wide.weight += torch.randn(wide.weight.shape, generator=draw)
        walk.step()
    assert all(abs(c - 0.25) < 0.1 for c in walk.table().values())  # means of a walk share a quarter of their variance


def replicate_of(loss: float, jumps: int = 0) -> Replicate:
    """Plain pilots of one to four lengths end at 1 / length; the predicted one at ``loss``."""
    plain = {b: Pilot(100 * b, 1 / b) for b in (1.0, 2.0, 4.0)}
    return Replicate(plain=plain, parts={name: Pilot(100.0, loss, jumps) for name in ("all", "jumps", "sizes")})


def test_a_gain_has_an_interval_that_grows_with_the_run() -> None:
    runs = [replicate_of(1 / 1.9), replicate_of(1 / 2.1)]
    found = gain(runs, "all", 1.0)
    assert found.speedup == pytest.approx(math.sqrt(1.9 * 2.1), rel=1e-3)
    assert found.verdict == "go"
    assert found.high is not None
    assert found.contains(2.0)
    assert not found.contains(4.0)
    longer = gain(runs, "all", 20.0)
    assert longer.low < found.low < found.high < longer.high  # type: ignore[operator]


@pytest.mark.parametrize(("loss", "jumps", "part", "verdict"), [
    (1 / 2, 3, "jumps", "go"), (1 / 2, 0, "jumps", "no-go"), (1.0, 3, "jumps", "no-go"), (1 / 1.1, 3, "all", "unclear"),
    (math.nan, 0, "all", "unclear"),
])  # fmt: skip
def test_verdicts(loss: float, jumps: int, part: str, verdict: str) -> None:
    assert gain([replicate_of(loss, jumps), replicate_of(loss, jumps)], part, 1.0).verdict == verdict


def test_a_bound_is_open() -> None:
    found = gain([replicate_of(0.01), replicate_of(0.01)], "all", 1.0)
    assert found.high is None
    assert found.low < 4.0
    assert found.contains(100.0)
    assert Pilot(3.0, 1.0).point == Point(3.0, 1.0)


@pytest.mark.parametrize(("change", "said"), [
    ({"loader": iter(full_batch())}, "once only"), ({"loader": []}, "no batches"),
    ({"loader": lambda seed: iter(full_batch())}, "ended after 1 batches"),
    ({"minutes": 0.0}, "above 0"), ({"minutes": 1e-6, "options": Options()}, "minutes"),
    ({"total_steps": 0}, "total_steps = 0"), ({"options": Options(pilot_steps=0)}, "pilot_steps = 0"),
    ({"loss": lambda m, b: loss_fn(m, b) * math.nan}, "as it is is nan"),
    ({"loss": lambda m, b: loss_fn(m, b).detach()}, "no gradient"),
    ({"loss": lambda m, b: float(loss_fn(m, b).detach())}, "not float"),
    ({"loss": lambda m, b: {"loss": loss_fn(m, b)}}, "not dict"),
    ({"loss": lambda m, b: (m(b[0]) - b[1]).square()}, r"shape \(64, 1\)"),
    ({"loader": None}, "not NoneType"), ({"loader": lambda: iter(full_batch())}, "with a seed alone"),
    ({"loader": lambda seed: 3}, r"loader\(0\) is int"), ({"options": Options(replicates=0)}, "replicates = 0"),
    ({"options": Options(schedule="cosin")}, "did you mean 'cosine'"),  # type: ignore[arg-type]
    ({"options": Options(warmup=100)}, "warmup = 100"),
    ({"options": replace(QUICK, val_fn=lambda m: math.nan)}, "validation loss of the model as it is is nan"),
    ({"loss": lambda m, b: torch.zeros((), requires_grad=True)}, "does not depend on the weights"),
])  # fmt: skip
def test_what_cannot_be_probed_is_said(change: dict[str, object], said: str) -> None:
    model = network()
    asked = {"loader": full_batch(), "options": QUICK, "minutes": 5.0, "loss": loss_fn, **change}
    loader, loss = asked.pop("loader"), asked.pop("loss")
    with pytest.raises(ConfigError, match=said) as caught:
        run_probe(model, torch.optim.SGD(model.parameters(), lr=0.1), loader, loss, **asked)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pending", [False, True])
def test_a_loss_of_the_users_own_model_is_refused_and_leaves_it_alone(pending: bool) -> None:
    """A closure over the model that was handed in would have every pilot train that one."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if pending:
        loss_fn(model, full_batch()[0]).backward()
    before = [(p.detach().clone(), None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    for own in (lambda _, b: loss_fn(model, b), lambda m, b: loss_fn(m, b) + loss_fn(model, b)):
        with pytest.raises(ConfigError, match="trains copies only: use the model"):
            run_probe(model, optimizer, full_batch(), own, options=QUICK)
        for p, (value, grad) in zip(model.parameters(), before, strict=True):
            assert torch.equal(p, value)
            assert (p.grad is None) == (grad is None)
            assert grad is None or torch.equal(p.grad, grad)  # type: ignore[arg-type]


def test_a_rate_that_diverges_is_too_large() -> None:
    model = network()
    found = run_probe(
        model, torch.optim.SGD(model.parameters(), lr=1e6), full_batch(), loss_fn, options=replace(QUICK, rates=True)
    )
    assert found.learning_rate == "too large"
    assert "S is not known" in format_text(found)
    assert found.total.verdict == "unclear"


def test_a_model_that_is_all_frozen_is_refused() -> None:
    model = network().requires_grad_(False)
    with pytest.raises(ConfigError, match="no weights that train"):
        run_probe(model, torch.optim.SGD(model.parameters(), lr=0.1), full_batch(), loss_fn, options=QUICK)


def test_an_optimizer_of_other_weights_is_refused() -> None:
    other = torch.optim.SGD(network().parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="not the model's"):
        run_probe(network(1), other, full_batch(), loss_fn, options=QUICK)


def test_the_command_writes_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.toml"
    told = ["probe", "--task", "regression", "--batch-size", "32", "--steps", "40", "--pilot-steps", "20"]
    assert main([*told, "--toml", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["regime"] == "deterministic"
    assert load_config(path).predictor_type == "portfolio"
    assert main(["probe"]) == 2


def test_the_five_regimes_are_known() -> None:
    from hybrid_predict_trainer.cli.names import PROBED

    assert tuple(k.name for k in of_task.KNOWN) == PROBED
