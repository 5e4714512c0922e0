"""A single run is stopped when its forecast says so, and never before the schedule's decay could still pay."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig, attach
from hybrid_predict_trainer.forecast.final_loss import Forecast
from hybrid_predict_trainer.forecast.schedules import planned_rates
from hybrid_predict_trainer.forecast.stopping import FIRST_SHARE, NUM_LOOKS, StopWhen, fall_done
from hybrid_predict_trainer.records import ConfigError

T = 1000


def told(low: float, last: float = 2.0) -> Forecast:
    return Forecast(
        final_loss=low * 1.01, low=low, high=low * 1.02, level=0.9, step=1, total_steps=T, last_value=last,
        power_law=None, log_line=None, points=(), prior=(),
    )  # fmt: skip


def stops_at(rule: StopWhen, low: float, rates: np.ndarray) -> int | None:
    levels: list[float] = []

    def foretell(level: float) -> Forecast:
        levels.append(level)
        return told(low)

    for step in range(1, T + 1):
        if rule.ask(step, T, foretell, lambda: rates):
            return step
    assert len(levels) == NUM_LOOKS
    assert levels[0] == pytest.approx(1 - 2 * 0.05 / NUM_LOOKS)
    return None


def test_a_target_that_will_not_be_met_stops_at_the_first_look_and_one_that_may_be_does_not() -> None:
    rates = planned_rates("linear", T)
    assert stops_at(StopWhen(target=1.5), 1.6, rates) == FIRST_SHARE * T
    assert stops_at(StopWhen(target=1.5), 1.4, rates) is None


@pytest.mark.parametrize(
    ("schedule", "earliest"),
    [("constant", 250), ("linear", 500), ("cosine", 500), ("wsd:decay=0.2", 900), ("stages:700=0.3,900=0.1", 700)],
)
def test_want_of_a_gain_stops_nothing_before_half_of_the_fall_is_over(schedule: str, earliest: int) -> None:
    step = stops_at(StopWhen(min_gain=0.01), 1.999, planned_rates(schedule, T))
    assert step is not None
    assert earliest <= step < earliest + T * (1 - FIRST_SHARE) / NUM_LOOKS + 1
    assert stops_at(StopWhen(min_gain=0.01), 1.9, planned_rates(schedule, T)) is None


def test_a_rate_that_rises_again_has_its_fall_before_it() -> None:
    rates = np.concatenate([np.linspace(1, 0, 500), np.linspace(1, 0, 500)])
    assert fall_done(rates, 499) == 0.0
    assert fall_done(rates, 900) == pytest.approx(0.8, abs=0.01)
    assert fall_done(rates, 1000) == 1.0


def test_what_cannot_be_foretold_stops_nothing() -> None:
    def refuse(level: float) -> Forecast:
        raise ConfigError("too few losses")

    rule = StopWhen(target=0.1)
    assert not any(rule.ask(step, T, refuse, lambda: planned_rates("linear", T)) for step in range(1, T))
    assert rule.advice is None


def test_only_telling_warns_once_and_goes_on() -> None:
    rule = StopWhen(target=1.5, only_tell=True)
    with pytest.warns(UserWarning, match=r"step 250: the target 1.5 will not be met.*at least 1.6") as said:
        assert stops_at(rule, 1.6, planned_rates("linear", T)) is None
    assert len(said) == 1
    assert rule.advice is not None
    assert rule.advice.stop


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({}, "needs target="), ({"target": -1.0}, "above 0"), ({"target": float("nan")}, "above 0"),
        ({"min_gain": 0.0}, "between 0 and 1"), ({"min_gain": 1.5}, "between 0 and 1"),
        ({"target": 1.0, "confidence": 1.0}, "confidence"),
    ],
)  # fmt: skip
def test_bad_rules(kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        StopWhen(**kwargs)


# ---- in a trainer ----------------------------------------------------------------------------------------


def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        x = torch.randn(16, 4, generator=generator)
        yield x, x.sum(1, keepdim=True) + 0.5 * torch.randn(16, 1, generator=generator)


def trainer(*, enabled: bool = True) -> HybridTrainer:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: max(0.0, 1 - n / 120))
    config = HybridTrainerConfig(enabled=enabled, warmup_steps=10)
    return HybridTrainer(model, optimizer, config, loss_fn=nn.MSELoss(), lr_scheduler=schedule)


def test_a_run_with_a_target_out_of_reach_ends_early_and_in_a_consistent_state() -> None:
    pytest.importorskip("scipy")
    rule = StopWhen(target=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mine = trainer()
        result = mine.fit(batches(), total_steps=120, stop_when=rule)
        assert result.stopped_early
        assert 0.25 * 120 <= mine.current_step < 120
        assert rule.advice is not None
        assert "will not be met" in rule.advice.reason
        whole = trainer().fit(batches(), total_steps=120, stop_when=StopWhen(target=100.0))
    assert not whole.stopped_early


def test_an_engine_is_asked_between_steps() -> None:
    pytest.importorskip("scipy")

    def stopped_at(rule: StopWhen) -> int:
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: max(0.0, 1 - n / 120))
        config = HybridTrainerConfig(warmup_steps=10)
        engine = attach(model, optimizer, config, loss_fn=nn.MSELoss(), lr_scheduler=schedule, total_steps=120)
        for step, (x, y) in enumerate(batches()):
            if step == 120 or engine.finished or engine.should_stop(rule):
                engine.detach()
                return step
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            engine.note(loss.detach(), batch=(x, y))
            loss.backward()
            optimizer.step()
        raise AssertionError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        early, late = stopped_at(StopWhen(target=1e-6)), stopped_at(StopWhen(target=100.0))
    assert 20 <= early < late


def test_an_engine_needs_an_end_and_losses() -> None:
    for enabled, match in ((True, "needs the end of the run"), (False, "none are kept")):
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine = attach(model, optimizer, HybridTrainerConfig(enabled=enabled), loss_fn=nn.MSELoss())
        with pytest.raises(ConfigError, match=match):
            engine.should_stop(StopWhen(target=1.0))
        engine.detach()


def test_a_rule_needs_an_end_and_losses() -> None:
    with pytest.raises(ConfigError, match="needs the end of the run"):
        trainer().fit(batches(), stop_when=StopWhen(target=1.0))
    with pytest.raises(ConfigError, match="none are kept"):
        trainer(enabled=False).fit(batches(), total_steps=10, stop_when=StopWhen(target=1.0))
