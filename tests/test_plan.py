"""Memory that is planned: against what is allocated, and as the command line tells it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hybrid_predict_trainer import cli
from hybrid_predict_trainer.cli import plan as cli_plan
from hybrid_predict_trainer.config.toml import loads
from hybrid_predict_trainer.experiments import plan, plan_check
from hybrid_predict_trainer.tasks.language.gpt import Gpt, GptConfig

TINY = GptConfig(num_layers=1, width=64, num_heads=1, context=16, lr=1e-4, vocab_size=300, tied=True)
WIDTH = 96
NUM_WEIGHTS = 2 * 4 * WIDTH**2 + 4 * WIDTH


@pytest.fixture(scope="module", autouse=True)
def mem_tracker() -> None:
    """Seconds that the first test would pay alone."""
    from torch.distributed._tools import mem_tracker as _  # noqa: F401


class Net(nn.Module):
    """Two wide layers around a narrow one, computed again in the backward pass if so wanted."""

    def __init__(self, checkpointing: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.Tanh(), nn.Linear(4 * WIDTH, WIDTH, bias=False))
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(self.body, x, use_reentrant=False) if self.checkpointing else self.body(x)
        return found


def net_loss(model: nn.Module, batch: Tensor, bf16: bool) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found = model(batch)
    return (found.float() - batch).square().mean()


NET = plan.Subject("net", Net, lambda size: torch.randn(size, WIDTH), net_loss)


def test_sizes_become_shapes() -> None:
    assert sum(p.numel() for p in Gpt(TINY).parameters()) == plan.num_weights(TINY)
    for wanted in (350e6, 1e9, 3e9):
        assert plan.num_weights(plan.gpt_of(round(wanted), context=1024)) == pytest.approx(wanted, rel=0.1)


def test_a_deep_model_is_known_from_shallow_ones() -> None:
    def deep(num_blocks: int) -> plan.Subject:
        return replace(NET, build=lambda _: nn.Sequential(*(Net(False) for _ in range(num_blocks))))

    setup = plan.Setup(batch_size=2, ours=False)
    found = plan.estimate(replace(deep(6), shallow=(deep(2), deep(4), 1.0)), setup)
    whole = plan.estimate(deep(6), setup)
    assert found.num_parameters == whole.num_parameters == 6 * NUM_WEIGHTS
    assert found.total == pytest.approx(whole.total, rel=0.01)


def different_batches(size: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size, WIDTH) for _ in range(plan_check.NUM_STEPS)]


@pytest.mark.parametrize(
    "changes",
    [{}, {"bf16": True}, {"checkpointing": True}, {"activation_offload": True},
     {"activation_offload": True, "bf16": True}, {"ternary": True}],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")  # torchao's import
def test_what_is_planned_is_what_is_allocated(changes: dict[str, bool]) -> None:
    setup = plan.Setup(batch_size=64, ours=False, **changes)
    row = plan_check.compared(NET, setup, different_batches(64))
    assert row["num_parameters"] == NUM_WEIGHTS
    assert abs(row["error"]) < 0.05


def test_what_the_library_holds_is_planned_too() -> None:
    torch.manual_seed(0)
    batches = [torch.randint(0, 300, (2, TINY.context + 1)) for _ in range(plan_check.NUM_STEPS)]
    row = plan_check.compared(plan._of_shape(TINY), plan.Setup(batch_size=2), batches)
    assert abs(row["error"]) < plan_check.TOLERANCE


def test_every_remedy_needs_less() -> None:
    setup = plan.Setup(batch_size=1024)
    subject = replace(NET, build=lambda checkpointing: nn.Sequential(*(Net(checkpointing) for _ in range(3))))
    ours, plain, away, eight, again, half = (
        plan.estimate(subject, replace(setup, **changes))
        for changes in ({}, {"ours": False}, {"offload": True}, {"eight_bit": True}, {"checkpointing": True},
                        {"bf16": True})
    )  # fmt: skip
    elsewhere = plan.estimate(subject, replace(setup, activation_offload=True))
    assert elsewhere.parts["activations"] < 0.5 * ours.parts["activations"]
    assert elsewhere.total < ours.total
    assert elsewhere.host - ours.host >= 3 * 2 * 1024 * 4 * WIDTH * 4, "each block's inputs: of its layers and of tanh"
    assert plain.total < ours.total > max(away.total, eight.total, again.total, half.total)
    assert "lookahead" not in plain.parts
    for name in ("lookahead", "copy to come back to", "copy before a raise", "basis"):
        assert name in ours.parts
        assert name not in away.parts
    assert away.host - ours.host == sum(ours.parts[name] for name in ours.parts if name not in away.parts)
    assert eight.parts["optimizer state"] == pytest.approx(ours.parts["optimizer state"] / 4, rel=0.02)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_forward_of_a_task_runs_in_bf16(bf16: bool) -> None:
    subject = plan.of_task("gpt", preset="0.3M", context=8)
    model = subject.build(False)
    seen = set()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _m, _x, out: seen.add(out.dtype))
    subject.loss(model, subject.batch(1), bf16)
    assert seen == {torch.bfloat16 if bf16 else torch.float32}


def test_the_largest_that_fits_is_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    def pretended(subject: plan.Subject, setup: plan.Setup) -> plan.Estimate:
        size = int(subject.name.split()[2].replace(",", ""))
        return plan.Estimate(setup=setup, num_parameters=size, parts={"weights": 16 * size}, host=0)

    monkeypatch.setattr(plan, "estimate", pretended)
    found = plan.largest_that_fits(16e9, plan.Setup(), context=1024)
    wider = min(n for n in (plan.num_weights(plan._shaped(h, 1024)) for h in range(1, 60)) if n > found)
    assert found <= 1e9 < wider
    assert plan.largest_that_fits(1e3, plan.Setup(), context=1024) == 0


def test_the_check_prints_rows_as_they_come(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {
        "preset": "0.3M", "ours": True, "bf16": True, "checkpointing": False, "activation_offload": False,
        "ternary": False, "estimated_bytes": 1.1e6,
        "measured_bytes": 1e6, "error": 0.1, "within": True,
    }  # fmt: skip
    shown = []

    def pretended() -> Iterator[plan_check.Row]:
        yield row
        shown.append(capsys.readouterr().out)
        yield row | {"ours": False, "within": False}

    monkeypatch.setattr(plan_check, "rows", pretended)
    assert cli.main(["plan", "--check"]) == 1
    assert shown[0].splitlines()[-1].split() == ["0.3M", "ours", "bf16", "1.10", "MB", "1.00", "MB", "+10.0%"]
    assert cli.main(["plan", "--check", "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]) == 2


def test_the_command_suggests_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--params", "5M", "--context", "64", "--batch-size", "2", "--gpu", "0.12GB"]
    assert cli.main([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    totals = [one["total_bytes"] for one in told["estimates"]]
    assert told["fits"]
    assert len(totals) > 1
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] <= told["usable_bytes"] < totals[-2]
    patch = "\n".join(cli_plan._patch(plan.Setup(batch_size=4, bf16=True, offload=True, eight_bit=True)))
    assert "--batch-size 4 --bf16 --optimizer adamw8bit --config" in patch
    assert patch.endswith("[predictor]\noffload = true")
    patch = "\n".join(cli_plan._patch(plan.Setup(activation_offload=True, ternary=True)))
    assert "--ternary" in patch
    assert loads(patch).activation_offload is True


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--params", "many"], "--params many: a size such as 350M"),
        (["--params", "1B", "--gpu", "0GB"], "--gpu 0GB: a size such as 350M"),
        ([], "give a size"),
        (["--params", "1B", "--task", "gpt"], "one of both"),
        (["--task", "gpt", "--preset", "none"], "none"),
        (["--task", "digits", "--ternary"], "ternary layers need at least one hidden nn.Linear"),
    ],
)
def test_bad_input(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *argv]) == 2
    assert words in capsys.readouterr().err
