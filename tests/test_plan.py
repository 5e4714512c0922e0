"""Memory that is planned: against what is allocated, and as the command line tells it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from hybrid_predict_trainer import cli
from hybrid_predict_trainer.cli import plan as cli_plan
from hybrid_predict_trainer.experiments import plan, plan_check
from hybrid_predict_trainer.tasks.language.gpt import Gpt, GptConfig

TINY = GptConfig(num_layers=3, width=64, num_heads=1, context=32, lr=1e-4, vocab_size=300, tied=True)


def test_sizes_become_shapes() -> None:
    assert sum(p.numel() for p in Gpt(TINY).parameters()) == plan.num_weights(TINY)
    for wanted in (350e6, 1e9, 3e9):
        assert plan.num_weights(plan.gpt_of(round(wanted), context=1024)) == pytest.approx(wanted, rel=0.1)


def test_a_deep_model_is_known_from_shallow_ones() -> None:
    walked = plan._of_shape(TINY)
    one, two = (plan._of_shape(replace(TINY, num_layers=n)) for n in (1, 2))
    setup = plan.Setup(batch_size=2, ours=False)
    found = plan.estimate(replace(walked, shallow=(one, two, 1.0)), setup)
    whole = plan.estimate(walked, setup)
    assert found.num_parameters == whole.num_parameters == plan.num_weights(TINY)
    assert found.total == pytest.approx(whole.total, rel=0.01)


def test_what_is_planned_is_what_is_allocated() -> None:
    row = plan_check.compared("0.3M", plan.of_task("gpt", preset="0.3M"), plan.Setup(batch_size=2, ours=False))
    assert abs(row["error"]) < 0.02


def test_every_remedy_needs_less() -> None:
    subject = plan.of_size(5_000_000, context=64)
    setup = plan.Setup(batch_size=2)
    ours, plain, away, eight, again = (
        plan.estimate(subject, replace(setup, **changes))
        for changes in ({}, {"ours": False}, {"offload": True}, {"eight_bit": True}, {"checkpointing": True})
    )
    assert plain.total < ours.total > max(away.total, eight.total, again.total)
    assert "lookahead" not in plain.parts
    assert away.host == ours.host + ours.parts["lookahead"]
    assert eight.parts["optimizer state"] == pytest.approx(ours.parts["optimizer state"] / 4, rel=0.02)


def test_the_command_suggests_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--params", "5M", "--context", "64", "--batch-size", "2", "--gpu", "0.12GB"]
    assert cli.main([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    totals = [one["total_bytes"] for one in told["estimates"]]
    assert told["fits"]
    assert len(totals) > 1
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] <= told["usable_bytes"] < totals[-2]
    patch = "\n".join(cli_plan._patch(plan.Setup(batch_size=4, bf16=True, offload=True)))
    assert "--batch-size 4 --bf16 --config" in patch
    assert patch.endswith("[predictor]\noffload = true")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--params", "many"], "--params many: a size such as 350M"),
        (["--params", "1B", "--gpu", "0GB"], "--gpu 0GB: a size such as 350M"),
        ([], "give a size"),
        (["--params", "1B", "--task", "gpt"], "one of both"),
        (["--task", "gpt", "--preset", "none"], "none"),
    ],
)
def test_bad_input(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *argv]) == 2
    assert words in capsys.readouterr().err
