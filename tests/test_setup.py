"""Which trainer settings a task gets when the command line says nothing, and what it may overrule."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hybrid_predict_trainer.experiments.arms.options import Options, build_experiment, config_of
from hybrid_predict_trainer.tasks import make_task


def config(task: str, *sets: str, predictor: str | None = None):
    made = make_task(task)
    return config_of(Options(task=task, predictor=predictor, set=sets), made.defaults, made.steps_per_epoch), made


@pytest.mark.parametrize("task", ["regression", "pinn-poisson", "pinn-burgers", "oscillator"])
def test_full_batch_tasks_propose_at_every_step(task: str) -> None:
    found, _ = config(task)
    assert (found.predictor_type, found.predictor.window, found.correct_steps) == ("portfolio", 1, 0)
    assert found.gate.overhead_budget_exact == 1.0


@pytest.mark.parametrize("task", ["digits", "digits-mlp"])
def test_tasks_that_see_their_data_often_have_epochs_for_windows(task: str) -> None:
    found, made = config(task)
    assert (found.predictor_type, found.predictor.window) == ("hold", made.steps_per_epoch)
    assert found.lookahead.extrapolation == 0.0  # two motions along the same drift
    # AdamW's steps have one length whatever the gradient, so they oscillate
    assert (found.lookahead.damping, found.lookahead.drift) == (0.25, 0.0)


def test_with_sgd_there_is_no_smoothing_over_epochs() -> None:
    made = make_task("digits")
    found = config_of(Options(task="digits"), replace(made.defaults, optimizer="sgd"), made.steps_per_epoch)
    assert (found.predictor_type, found.lookahead.damping) == ("hold", 0.0)


def test_fine_tuning_has_calm_without_drift_and_muon_neither() -> None:
    found, _ = config("finetune")
    assert (found.lookahead.damping, found.lookahead.drift, found.lookahead.extrapolation) == (0.4, 0.0, 0.0)
    made = make_task("gpt")
    muon = config_of(Options(task="gpt"), replace(made.defaults, optimizer="muon"))
    assert (muon.lookahead.damping, muon.lookahead.extrapolation, muon.min_group_factor) == (0.0, 0.0, 1.0)


def test_another_predictor_gets_its_own_settings() -> None:
    for task in ("regression", "digits"):
        found, _ = config(task, predictor="secant")
        assert (found.predictor_type, found.predictor.window, found.correct_steps) == ("secant", 10, 5)
    hold, _ = config("regression", predictor="hold")
    assert hold.predictor.window == 10  # a full batch is an epoch of one step: no window to average over


def test_the_command_line_has_the_last_word() -> None:
    found, _ = config("digits", "predictor.window=7", "lookahead.extrapolation=0.1")
    assert (found.predictor.window, found.lookahead.extrapolation) == (7, 0.1)


def test_an_ordinary_task_has_the_defaults() -> None:
    setup = build_experiment(Options(task="gpt", preset="0.3M", data_bytes=200_000, steps=50))
    assert (setup.config.predictor_type, setup.config.predictor.window) == ("secant", 10)
    assert setup.config.max_lr_multiplier > 1
