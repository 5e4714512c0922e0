"""Jumps judged by a score of one's own: who has the word, what is refused, and that nothing is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import Fake, assert_same, config, everything, full_batch, loss_fn, make_batches, setup
from hybrid_predict_trainer import ConfigError, HybridTrainer, attach
from hybrid_predict_trainer.cycle.handover import MicroBatches, StepScores
from hybrid_predict_trainer.keep.subject import NegatedScore
from hybrid_predict_trainer.records import StepResult


def score(sign: float) -> Any:
    """How far the head's weights stand in a direction: a jump is as good as the sign says, whatever the loss is."""

    def judged(model: nn.Module, batch: Any) -> Tensor:
        parameter = list(model.parameters())[-1]
        return sign * parameter.sum() + 0.0 * model(batch[0]).squeeze(-1)

    return judged


def head_moves_up(model: nn.Module) -> None:
    """Real steps that all raise what the score looks at."""
    *_, last = model.parameters()
    last.register_hook(lambda gradient: -torch.ones_like(gradient))


def run(
    judge_fn: Any, *, exact: bool, enabled: bool = True, ready: bool = True, count: int = 40
) -> tuple[HybridTrainer, list[StepResult]]:
    made = setup(optimizer="sgd")
    head_moves_up(made.model)
    trainer = HybridTrainer(
        made.model, made.optimizer, config(training__enabled=enabled), loss_fn=loss_fn, predictor=Fake(ready=ready),
        judge_fn=judge_fn,
    )  # fmt: skip
    batches = full_batch(count) if exact else make_batches(count)
    return trainer, [trainer.step(batch) for batch in batches]


@pytest.mark.parametrize("exact", [False, True], ids=["noisy", "exact"])
def test_the_score_decides_and_higher_is_better(exact: bool) -> None:
    liked, disliked = (run(score(sign), exact=exact)[0].statistics() for sign in (1.0, -1.0))
    assert liked["num_jumps_proposed"] > 3
    assert liked["num_jumps_accepted"] == liked["num_jumps_proposed"]
    assert disliked["num_jumps_proposed"] > 0
    assert disliked["num_jumps_accepted"] == 0


@pytest.mark.parametrize("exact", [False, True], ids=["noisy", "exact"])
def test_a_refused_jump_leaves_no_trace(exact: bool) -> None:
    trainer, results = run(score(-1.0), exact=exact)
    assert trainer.statistics()["num_jumps_proposed"] > 0
    made = setup(optimizer="sgd")
    head_moves_up(made.model)
    batches = full_batch(40) if exact else make_batches(40)
    made.plain(batch for batch, r in zip(batches, results, strict=True) if r.num_backward)
    subject = trainer.run.subject
    assert_same(everything(subject.model, subject.optimizer), made.everything())


def test_switched_off_it_is_never_asked() -> None:
    def never(model: nn.Module, batch: Any) -> Tensor:
        raise AssertionError("asked")

    trainer, _ = run(never, exact=False, enabled=False)
    made = setup(optimizer="sgd")
    head_moves_up(made.model)
    made.plain(make_batches(40))
    assert_same(list(trainer.run.subject.model.parameters()), list(made.model.parameters()))


def test_scores_of_the_same_batch_that_differ_are_no_exact_ones() -> None:
    trainer, _ = run(lambda model, batch: model(batch[0]).squeeze(-1) + torch.randn(len(batch[0])), exact=True)
    assert trainer.run.judge.exactness.agreed is False


@pytest.mark.parametrize("make", [HybridTrainer, attach], ids=["trainer", "attach"])
def test_what_is_no_function_is_refused_in_one_line(make: Any) -> None:
    made = setup()
    with pytest.raises(ConfigError, match="judge_fn is a float") as caught:
        make(made.model, made.optimizer, loss_fn=loss_fn, judge_fn=3.0)
    assert "\n" not in str(caught.value)
    assert not made.optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("given", [torch.zeros(()), torch.zeros(3, 2), torch.zeros(0), 3.0], ids=repr)
def test_what_is_no_score_per_sample_is_said_and_training_goes_on(given: Any) -> None:
    with pytest.raises(TypeError, match=r"a score for each sample, a tensor of shape \(N,\), not") as caught:
        NegatedScore(lambda model, batch: given)(nn.Linear(1, 1), None)
    assert "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match="a score for each sample"):
        trainer, _ = run(lambda model, batch: given, exact=False, count=20)
    assert trainer.statistics()["num_jumps_accepted"] == 0


def test_rewards_that_are_whole_numbers_are_averaged() -> None:
    negated = NegatedScore(lambda model, batch: torch.tensor([True, False, True, True]))
    assert negated(nn.Linear(1, 1), None).item() == -0.75


def test_a_step_of_several_batches_is_judged_on_all_of_their_samples() -> None:
    scores = StepScores(lambda model, batch: batch)
    found = scores(nn.Linear(1, 1), MicroBatches([torch.ones(2), torch.zeros(3)]))
    assert found.tolist() == [1, 1, 0, 0, 0]
    assert torch.equal(scores(nn.Linear(1, 1), torch.ones(4)), torch.ones(4))
