"""A predictor that is too slow is dropped after the call that shows it, said once; clocks are handed in."""

from __future__ import annotations

from pathlib import Path

import pytest

from cases import Fake, assert_same, config, make_batches, setup
from hybrid_predict_trainer import HybridTrainer
from hybrid_predict_trainer.predictors import PREDICTORS
from hybrid_predict_trainer.propose.time_budget import (
    FLOOR_SECONDS,
    MAX_CALL_SECONDS,
    MAX_SHARE,
    OWN_CALL_SECONDS,
    STEPS,
    TimeBudget,
)
from hybrid_predict_trainer.records import PhasePrediction, Window


class Clock:
    """Seconds that pass only where somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def spend(budget: TimeBudget, clock: Clock, *, call: float, step: float, steps: int = STEPS) -> None:
    for _ in range(steps):
        with budget.call():
            clock.now += call
        budget.on_step(step)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("paced", [True, False])
@pytest.mark.parametrize("step", [1e-4, 1e-2, 1.0])
def test_the_share_beyond_the_floor(step: float, paced: bool, own: bool) -> None:
    most = (FLOOR_SECONDS + MAX_SHARE * step * STEPS) / STEPS
    for factor, dropped in ((0.99, False), (1.01, not paced and not own)):
        clock = Clock()
        budget = TimeBudget(own=own, paced=paced, clock=clock)
        spend(budget, clock, call=min(factor * most, MAX_CALL_SECONDS), step=step, steps=STEPS - 1)
        assert budget.objection is None, "over a hundred steps, not before"
        spend(budget, clock, call=min(factor * most, MAX_CALL_SECONDS), step=step, steps=1)
        assert (budget.objection is not None) is dropped


@pytest.mark.parametrize(("share", "dropped"), [(0.99, False), (1.01, True)])
@pytest.mark.parametrize("paced", [True, False])
@pytest.mark.parametrize(("own", "longest"), [(False, MAX_CALL_SECONDS), (True, OWN_CALL_SECONDS)])
def test_one_call(share: float, dropped: bool, paced: bool, own: bool, longest: float) -> None:
    clock, seconds = Clock(), share * longest
    budget = TimeBudget(own=own, paced=paced, clock=clock)
    with budget.call():
        clock.now += seconds
    assert (budget.objection is not None) is dropped


class Slow(Fake):
    """Takes its time in one of its methods."""

    def __init__(self, where: str, seconds: float, clock: Clock) -> None:
        super().__init__(1.0)
        self.where, self.seconds, self.clock = where, seconds, clock

    def observe(self, window: Window) -> None:
        self.clock.now += self.seconds * (self.where == "observe")
        super().observe(window)

    def predict(self, horizon: int) -> PhasePrediction:
        self.clock.now += self.seconds * (self.where == "predict")
        return super().predict(horizon)


def slow_trainer(where: str, seconds: float, *, step: float = 1e-3) -> tuple[HybridTrainer, Slow]:
    clock = Clock()
    made = setup("mlp", "adam")
    predictor = Slow(where, seconds, clock)

    def loss(model, batch):  # type: ignore[no-untyped-def]
        clock.now += step
        return ((model(batch[0]) - batch[1]) ** 2).mean()

    trainer = made.trainer(config(), predictor=predictor, loss_fn=loss)
    trainer.run.proposer.time.clock = clock
    return trainer, predictor


@pytest.mark.parametrize("where", ["observe", "predict"])
@pytest.mark.parametrize("seconds", [0.3, 2.0])
def test_dropped_in_a_run(where: str, seconds: float, tmp_path: Path) -> None:
    trainer, predictor = slow_trainer(where, seconds)
    batches = make_batches(400)
    with pytest.warns(UserWarning, match="predictor 'fake' is too slow") as told:
        trainer.fit(batches[:200])
    assert len(told) == 1
    asked = (len(predictor.observed), predictor.num_predictions)
    proposed = trainer.statistics()["num_jumps_proposed"]
    trainer.fit(batches[200:])
    assert (len(predictor.observed), predictor.num_predictions) == asked, "nobody asks it again"
    assert trainer.statistics()["num_jumps_proposed"] == proposed
    assert trainer.summary()["failures"]["predictor"]["left_alone"] is True
    other, fresh = slow_trainer(where, seconds)
    other.load_checkpoint(trainer.save_checkpoint(tmp_path))
    other.fit(batches[:50])
    assert fresh.num_predictions == 0, "the decision is part of a checkpoint"


def test_a_quick_one_is_kept() -> None:
    trainer, predictor = slow_trainer("predict", 1e-4)
    trainer.fit(make_batches(250))
    assert predictor.num_predictions > 20
    assert trainer.summary()["failures"] == {}


@pytest.mark.parametrize("name", ["hold", "linear", "secant", "dmd"])
def test_those_of_this_package_are_known(name: str) -> None:
    trainer = setup("mlp", "adam").trainer(config(predictor_type=name))
    assert name in PREDICTORS
    assert trainer.run.proposer.time._longest == OWN_CALL_SECONDS
    assert setup().trainer(config(), predictor=Fake()).run.proposer.time._longest == MAX_CALL_SECONDS


def test_it_changes_nothing_else() -> None:
    runs = []
    for seconds in (0.0, 0.009):
        trainer, _ = slow_trainer("predict", seconds)
        made = trainer.run
        trainer.fit(make_batches(60))
        runs.append({n: p.detach().clone() for n, p in made.subject.model.named_parameters()})
    assert_same(*runs)
