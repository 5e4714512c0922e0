"""`hpt doctor`: one deliberately broken run for every row of the table, and healthy ones that it leaves alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hybrid_predict_trainer import ConfigError, HybridTrainer, HybridTrainerConfig, load_config, with_values
from hybrid_predict_trainer.cli import main
from hybrid_predict_trainer.doctor import RunRecord, diagnose, read_record
from hybrid_predict_trainer.doctor.signals import SIGNALS
from hybrid_predict_trainer.tell.sinks import JsonlSink

QUIET = {"training.max_predict_steps": 0, "training.max_lr_multiplier": 1.0, "lookahead.extrapolation": 0.0,
         "lookahead.damping": 0.0, "training.min_group_factor": 1.0}  # fmt: skip
Batch = tuple[torch.Tensor, torch.Tensor]


def net(activation: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), activation or nn.Tanh(), nn.Linear(16, 1))


def data(num: int, *, noise: float = 0.1, seed: int = 0, size: int = 32) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(num):
        x = torch.randn(size, 4, generator=generator)
        found.append((x, torch.sin(x.sum(1, keepdim=True)) + noise * torch.randn(size, 1, generator=generator)))
    return found


def trained(
    folder: Path, batches: list[Batch], *, lr: float = 1e-2, sgd: bool = False, settings: dict[str, Any] | None = None,
    model: nn.Module | None = None, before: Callable[[int, nn.Module, Any], None] | None = None,
    valid: list[Batch] | None = None, scale: Callable[[int], float] = lambda step: 1.0,
) -> Path:  # fmt: skip
    """A run of a trainer over the batches, recorded in ``folder``."""
    model = model or net()
    optimizer = torch.optim.SGD(model.parameters(), lr) if sgd else torch.optim.Adam(model.parameters(), lr)
    config = with_values(HybridTrainerConfig(), {**QUIET, **(settings or {})})
    step = [0]

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1]) * scale(step[0])

    trainer = HybridTrainer(model, optimizer, config, loss_fn=loss_fn)
    trainer.metrics.write_to(JsonlSink(folder / "metrics.jsonl"))
    for number, batch in enumerate(batches):
        step[0] = number
        if before is not None:
            before(number, model, optimizer)
        trainer.step(batch)
        if valid is not None and number % 20 == 19:
            with torch.no_grad():
                trainer.metrics.validation(trainer.run, float(loss_fn(model, valid[0])), 0.0)
    trainer.metrics.sink.close()
    return folder


def broken_weights(number: int, model: nn.Module, optimizer: Any) -> None:
    """Saturate every unit, as one far too long step does."""
    if number == 30:
        with torch.no_grad():
            model[0].bias.add_(1e4)  # type: ignore[index]
            model[2].bias.zero_()  # type: ignore[index]
            model[2].weight.mul_(1e-4)  # type: ignore[index]
            model[2].bias.requires_grad_(False)  # type: ignore[index]
            model[2].weight.requires_grad_(False)  # type: ignore[index]


def spiked(num: int) -> list[Batch]:
    batches = data(num)
    x, y = batches[40]
    return [*batches[:40], (x * 30, y + 3000), *batches[41:]]


def blank() -> nn.Module:
    """A straight line for data that are none."""
    model = nn.Linear(4, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


def bounded() -> nn.Module:
    """A net that cannot blow up."""
    return nn.Sequential(net(), nn.Tanh())


UNSURE = {"training.confidence_threshold": 0.99, "training.explore_outcomes": 0, "training.warmup_steps": 10,
         "training.max_predict_steps": 20, "predictor.window": 4, "predictor.type": "hold",
         "training.full_steps": 4, "gate.overhead_budget": 1.0}  # fmt: skip

#: Row of the table -> the run that is broken in that way.
BROKEN: dict[str, Callable[[Path], Path]] = {
    "NaN or infinity": lambda f: trained(
        f, [*data(30), (torch.full((32, 4), torch.nan), torch.zeros(32, 1)), *data(5)]
    ),
    "gradient explosion": lambda f: trained(f, spiked(80)),
    "vanishing gradient": lambda f: trained(f, data(120), before=broken_weights),
    "frequent divergence": lambda f: trained(
        f, data(120, noise=1.0, size=4), settings={"training.divergence_threshold": 0.3, "training.warmup_steps": 10}
    ),
    "low confidence": lambda f: trained(f, data(200), settings=UNSURE),
    "prediction divergence": lambda f: trained(
        f, data(1) * 200,
        settings={"training.max_predict_steps": 80, "training.warmup_steps": 10, "training.full_steps": 5,
                  "predictor.type": "linear", "predictor.window": 4, "training.confidence_threshold": 0.0},
    ),
    "overfitting": lambda f: trained(
        f, data(1, noise=1.0, size=8) * 300, lr=2e-2, valid=data(1, noise=1.0, seed=5, size=200)
    ),
    "underfitting": lambda f: trained(f, data(150), model=blank()),
    "plateau": lambda f: trained(f, data(1) * 120, lr=1e-9),
    "oscillation": lambda f: trained(f, data(1, noise=0.0) * 150, lr=6.0, sgd=True, model=bounded()),
    "rising gradient variance": lambda f: trained(
        f, [*data(60, size=256), *data(60, size=2, noise=3.0, seed=3)], lr=1e-3, sgd=True
    ),
    "gradient norm out of its zone": lambda f: trained(f, data(60), scale=lambda step: 1e4, lr=1e-9, sgd=True),
    "checklist": lambda f: trained(
        f, data(60), scale=lambda step: 1e4, lr=1e-9, sgd=True,
        settings={"encoder.health": 1, "predictor.window": 4, "training.max_predict_steps": 20,
                  "training.warmup_steps": 5},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", BROKEN)
def test_a_run_that_is_broken_on_purpose_is_named(name: str, tmp_path: Path) -> None:
    found = {f.name: f for f in diagnose(read_record(BROKEN[name](tmp_path))).findings}
    assert name in found, list(found)
    finding = found[name]
    assert all((finding.seen, finding.healthy, finding.meaning, finding.remedy))


def test_every_signal_has_its_broken_run() -> None:
    assert len(BROKEN) == len(SIGNALS)


HEALTHY: dict[str, Callable[[Path], Path]] = {
    "new data": lambda f: trained(f, data(300)),
    "noisy": lambda f: trained(f, data(300, noise=0.3, size=16)),
    "full batch": lambda f: trained(f, data(1) * 200),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_is_left_alone(name: str, tmp_path: Path) -> None:
    found = diagnose(read_record(HEALTHY[name](tmp_path)))
    assert [f.name for f in found.findings if f.severity.value != "notice"] == []


def test_the_patch_is_a_configuration_and_the_worse_finding_decides(tmp_path: Path) -> None:
    config = with_values(HybridTrainerConfig(), {"training.full_steps": 30})
    norms = [1.0] * 30 + [1e4]
    alarms = [{"event": "divergence", "signal": "loss"}] * 5
    run = RunRecord(losses=(1.0,) * 31, norms=tuple(norms), rates=(0.1,) * 31, phases=("full",) * 31,
                    reasons=("",) * 31, alarms=tuple(alarms), config=config, lr=0.1)  # fmt: skip
    found = diagnose(run)
    assert [f.name for f in found.findings][:2] == ["gradient explosion", "frequent divergence"]
    text = found.as_toml()
    assert "# hpt train --lr 0.05   (gradient explosion)" in text
    (tmp_path / "patch.toml").write_text(text)
    patched = load_config(tmp_path / "patch.toml")
    assert (patched.gradient_clip_norm, patched.divergence_threshold, patched.max_predict_steps) == (1.0, 4.0, 40)


def test_the_command_reads_a_run_and_writes_the_patch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path, spiked(60))
    patch = tmp_path / "patch.toml"
    assert main(["doctor", str(tmp_path), "--patch", str(patch)]) == 0
    said = capsys.readouterr().out
    assert "gradient explosion" in said
    assert "clip gradients at 1.0 and halve the learning rate" in said
    assert load_config(patch).gradient_clip_norm == 1.0
    assert main(["doctor", str(tmp_path / "metrics.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["patch"] == {"training.gradient_clip_norm": 1.0}


@pytest.mark.parametrize("content", [None, "", "{}\n", '{"event": "health"}\n', "no json\n"])
def test_without_records_it_is_one_line(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ConfigError, match="records") as caught:
        read_record(tmp_path)
    assert "\n" not in str(caught.value)


def step_lines(count: int) -> str:
    rows = (
        {"event": "step", "step": i, "phase": "full", "loss": 1.0, "gradient_norm": 1.0, "lr": 0.1}
        for i in range(count)
    )
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("content", "unread", "said"),
    [
        (step_lines(5), 0, "tell"),
        (step_lines(5) + '{"event": "st', 1, "a line of the record is torn and was left out"),
        (step_lines(5)[:-9], 1, "a line of the record is torn and was left out"),
        (step_lines(5) + "\n\n", 0, "tell"),
        ("\x00\x00\nnothing\n" + step_lines(5), 2, "2 lines of the record cannot be read and were left out"),
    ],
)
def test_a_record_that_is_half_written_says_so(
    content: str, unread: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    assert main(["doctor", str(tmp_path)]) == 0
    assert said in capsys.readouterr().out
    assert main(["doctor", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_unread"] == unread


def test_a_record_without_a_whole_line_says_so(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "step", "st')
    with pytest.raises(ConfigError, match=r"no records of steps \(1 of its 1 lines cannot be read\)"):
        read_record(tmp_path)


@pytest.mark.parametrize(
    ("places", "words"),
    [
        (["trials/0000", "trials/0001"], "is a folder of 2 runs and no run: name one, such as .*trials.0000"),
        (["runs/hybrid-0"], "is a folder of a run and no run: name one, such as .*hybrid-0"),
        (["mine"], "is a folder of a run and no run: name one, such as .*mine"),
        ([], "no records of a run can be read"),
    ],
)
def test_a_folder_of_runs_names_one(places: list[str], words: str, tmp_path: Path) -> None:
    for place in places:
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "metrics.jsonl").write_text(step_lines(3))
    with pytest.raises(ConfigError, match=words):
        read_record(tmp_path)
