"""Which trainer settings a task gets when the command line says nothing, and what it may overrule."""

from __future__ import annotations

import pytest

from hybrid_predict_trainer.experiments.setup import Options, build_setup, config_of
from hybrid_predict_trainer.tasks import make_task


def config(task: str, *sets: str, predictor: str | None = None):
    made = make_task(task)
    return config_of(Options(task=task, predictor=predictor, set=sets), made.defaults, made.steps_per_epoch), made


@pytest.mark.parametrize("task", ["regression", "pinn-poisson", "pinn-burgers", "oscillator"])
def test_full_batch_tasks_propose_at_every_step(task: str) -> None:
    found, _ = config(task)
    assert (found.predictor_type, found.predictor.window, found.correct_steps) == ("quasi_newton", 1, 0)
    assert found.gate.overhead_budget_exact == 1.0


@pytest.mark.parametrize("task", ["digits", "digits-mlp"])
def test_tasks_that_see_their_data_often_have_epochs_for_windows(task: str) -> None:
    found, made = config(task)
    assert (found.predictor_type, found.predictor.window) == ("hold", made.steps_per_epoch)
    assert found.lookahead == 0.0  # two motions along the same drift


def test_another_predictor_gets_its_own_settings() -> None:
    for task in ("regression", "digits"):
        found, _ = config(task, predictor="secant")
        assert (found.predictor_type, found.predictor.window, found.correct_steps) == ("secant", 10, 5)
    hold, _ = config("regression", predictor="hold")
    assert hold.predictor.window == 10  # a full batch is an epoch of one step: no window to average over


def test_the_command_line_has_the_last_word() -> None:
    found, _ = config("digits", "predictor.window=7", "training.lookahead=0.1")
    assert (found.predictor.window, found.lookahead) == (7, 0.1)


def test_an_ordinary_task_has_the_defaults() -> None:
    setup = build_setup(Options(task="gpt", preset="0.3M", data_bytes=200_000, steps=50))
    assert (setup.config.predictor_type, setup.config.predictor.window) == ("secant", 10)
    assert setup.config.max_learned_scale > 1
