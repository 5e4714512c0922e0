"""The ledger: planted effects come back, the budget holds, waiting doubles, what loses is switched off."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import Fake, config, full_batch, make_batches, setup
from hybrid_predict_trainer import GateConfig
from hybrid_predict_trainer.cost import BACKWARD_UNITS, FORWARD_UNITS, STEP_UNITS, UPDATE_UNITS, CostMeter
from hybrid_predict_trainer.cycle import predict_step
from hybrid_predict_trainer.judge.ledger import Ledger
from hybrid_predict_trainer.records import Account, Phase


def account(**changes: Any) -> Account:
    values = {
        "step": 0, "due": 10, "skipped": False, "horizon": 40, "loss": 2.0, "pace": 0.001, "usual": 0.98, "gain": 0.02,
    }  # fmt: skip
    return Account(**(values | changes))


def planted(
    effect: float,
    *,
    gain: float = 0.02,
    promise: float = 0.97,
    count: int = 200,
    seed: int = 0,
    noise: float = 0.003,
    share: float = 0.3,
) -> Ledger:
    """Jumps that take ``effect`` off the loss of the next window; ``promise`` is wrong by -0.01."""
    generator = np.random.default_rng(seed)
    ledger = Ledger(GateConfig())
    for i in range(count):
        skipped = bool(generator.random() < share)
        ratio = 0.98 - (0.0 if skipped else effect) + generator.normal(0, noise)
        ledger.on_window(promise + generator.normal(0, noise), jumped=False)
        ledger.open_account(account(step=10 * i, due=10 * i + 10, skipped=skipped, usual=promise, gain=gain))
        ledger.settle(10 * i + 10, 2.0 * ratio)
    return ledger


@pytest.mark.parametrize("effect", [-0.01, 0.0, 0.008, 0.03])
def test_planted_effect_is_found(effect: float) -> None:
    found = planted(effect).effect()
    assert found is not None
    mean, low, high = found
    assert mean == pytest.approx(effect, abs=0.002)
    assert low < effect < high
    assert high - low < 0.004


def test_interval_covers() -> None:
    inside = 0
    for seed in range(200):
        found = planted(0.005, count=40, seed=seed).effect()
        assert found is not None
        inside += found[1] < 0.005 < found[2]
    assert inside / 200 == pytest.approx(0.95, abs=0.04)


@pytest.mark.parametrize(("effect", "persistence"), [(0.0, 0.0), (0.008, 0.4), (0.02, 1.0), (0.05, 1.0), (-0.01, 0.0)])
def test_persistence_subtracts_what_the_controls_show(effect: float, persistence: float) -> None:
    """Without the control group the promise, wrong by half the gain, would be booked as effect."""
    assert planted(effect).persistence == pytest.approx(persistence, abs=0.2)


def test_persistence_before_anything_is_known() -> None:
    ledger = Ledger(GateConfig())
    assert not ledger.known
    assert ledger.persistence == pytest.approx(0.1)
    ledger.losses_are(exact=True)
    assert ledger.persistence == pytest.approx(0.5)
    assert ledger.summary()["persistence"] is None
    assert ledger.effect() is None


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1), st.booleans()), max_size=40))
@settings(max_examples=60, deadline=None)
def test_persistence_is_a_share(accounts: list[tuple[float, float, bool]]) -> None:
    ledger = Ledger(GateConfig())
    for i, (gain, change, skipped) in enumerate(accounts):
        ledger.open_account(account(gain=gain, skipped=skipped, step=i, due=i))
        ledger.settle(i, 2.0 + change)
        assert 0 <= ledger.persistence <= 1
        assert ledger.num_credited_steps >= 0


# ---------------------------------------------------------------- credits


def test_credit_is_gain_times_persistence_over_pace() -> None:
    ledger = planted(0.008)
    before, persistence = ledger.num_credited_steps, None
    ledger.open_account(account(step=5000, due=5010, gain=0.02, pace=0.001, usual=0.97))
    ledger.settle(5010, 2.0 * 0.972)
    persistence = ledger.persistence
    assert ledger.num_credited_steps - before == pytest.approx(0.02 * persistence / 0.001)
    assert ledger.returned_units == pytest.approx(ledger.num_credited_steps * STEP_UNITS)


@pytest.mark.parametrize(
    ("changes", "low", "high"),
    [
        ({"horizon": 3}, 0, 3),  # never more than was claimed
        ({"gain": 0.0}, 0, 0),
        ({"gain": -1.0}, 0, 0),
        ({"gain": math.nan}, 0, 0),
        ({"pace": 0.0}, 40, 40),  # no progress without jumps: all of it
        ({"pace": -0.1}, 40, 40),
        ({"skipped": True}, 0, 0),
    ],
)
def test_credit_is_clipped(changes: dict[str, Any], low: float, high: float) -> None:
    ledger = planted(0.02)
    before = ledger.num_credited_steps
    ledger.open_account(account(step=5000, due=5010, **changes))
    ledger.settle(5010, 1.9)
    assert low <= ledger.num_credited_steps - before <= high


def test_accounts_are_settled_when_due() -> None:
    ledger = Ledger(GateConfig())
    ledger.open_account(account(due=10))
    ledger.open_account(account(due=20))
    assert ledger.settle(9, 1.9) == []
    [first] = ledger.settle(10, 1.9)
    assert first.left == pytest.approx(0.98 - 0.95)
    assert len(ledger.open) == 1
    assert len(ledger.settle(35, 1.8)) == 1
    assert ledger.settle(100, 1.8) == []


def test_accounts_that_count_are_those_kept_and_known() -> None:
    """Kept sorted as they come: 512 at most, jumps and controls apart, without those that say nothing."""
    ledger = Ledger(GateConfig())
    for i in range(700):
        ledger.open_account(account(step=i, due=i + 1, skipped=i % 3 == 0, gain=math.nan if i % 7 == 0 else 0.1))
        ledger.settle(i + 1, 0.9)
    again = Ledger(GateConfig())
    again.load_state_dict(ledger.state_dict())
    for each in (ledger, again):
        known = [a for a in each.settled if a.known]
        assert list(each._jumps) == [a for a in known if not a.skipped]
        assert list(each._controls) == [a for a in known if a.skipped]
    assert again.persistence == ledger.persistence


def test_a_loss_that_is_not_a_number_teaches_nothing() -> None:
    ledger = Ledger(GateConfig())
    for loss in (math.nan, math.inf):
        ledger.open_account(account())
        ledger.settle(10, loss)
    ledger.open_account(account(loss=0.0))
    ledger.settle(10, 1.0)
    assert not ledger.known
    assert math.isfinite(ledger.persistence)


@pytest.mark.parametrize(
    ("accounts", "left"),
    [
        ([account(step=1)], []),
        ([account(step=1), account(step=5)], [1]),
        ([account(step=1), account(step=5), account(step=5)], [1]),  # a jump in two segments
        ([account(step=1), account(step=5), account(step=5, skipped=True)], [1, 5]),
        ([account(step=1, skipped=True)], [1]),
        ([], []),
    ],
)
def test_a_jump_taken_back_is_void(accounts: list[Account], left: list[int]) -> None:
    ledger = Ledger(GateConfig())
    for a in accounts:
        ledger.open_account(a)
    ledger.cancel_account()
    assert [a.step for a in ledger.open] == left


def test_usual_ratio_is_the_median_of_windows_without_a_jump() -> None:
    ledger = Ledger(GateConfig())
    assert ledger.usual_ratio == 1.0
    for ratio in (0.9, 0.95, 5.0):
        ledger.on_window(ratio, jumped=False)
    ledger.on_window(0.1, jumped=True)
    ledger.on_window(math.nan, jumped=False)
    assert ledger.usual_ratio == 0.95


def test_steps_gained() -> None:
    summary = planted(0.008).summary()
    assert summary["num_controls"] + summary["num_treated"] == 200
    low, high = summary["steps_gained_ci95"]
    assert low < summary["steps_gained"] < high
    assert summary["steps_gained"] == pytest.approx(0.008 / 0.001 * summary["num_treated"], rel=0.25)
    few = planted(0.008, count=4).summary()
    assert few["steps_gained"] is None
    assert "fewer than 3" in few["reason"]


# ---------------------------------------------------------------- budget and waiting


@given(
    st.lists(
        st.tuples(st.floats(0.1, 20), st.floats(0, 1), st.floats(0, 5), st.floats(0, 60)), min_size=1, max_size=80
    ),
    st.floats(0, 0.2),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_budget_is_never_exceeded(events: list[tuple[float, float, float, float]], budget: float, exact: bool) -> None:
    """Whatever is spent on proposals stays within the budget plus what came back."""
    ledger = Ledger(GateConfig(overhead_budget=budget, overhead_budget_exact=budget))
    ledger.losses_are(exact=exact)
    total = 0.0
    for price, part, returned, work in events:
        total += work
        if ledger.affordable(price, total):
            ledger.spend(price * part)  # a refusal may stop early
        ledger.returned_units += returned
        assert ledger.spent_units <= budget * total + ledger.returned_units + 1e-9


def test_budget_of_nothing_affords_nothing() -> None:
    ledger = Ledger(GateConfig(overhead_budget=0.0))
    assert not ledger.affordable(1e-6, 1e9)
    ledger.returned_units = 1.0
    assert ledger.affordable(1.0, 0.0), "what jumps returned may be spent again"


def test_planned_length_is_the_measure_where_known() -> None:
    ledger = Ledger(GateConfig(overhead_budget=0.01))
    assert not ledger.affordable(5.0, 400.0)
    assert ledger.affordable(5.0, 0.0, planned_units=500.0)
    assert not ledger.affordable(5.1, 0.0, planned_units=500.0)


def test_watching_counts_against_the_budget_but_is_no_price() -> None:
    ledger = Ledger(GateConfig(overhead_budget=0.01))
    ledger.observe(6.0)
    assert ledger.spent_units == 6.0
    assert not ledger.affordable(5.0, 1000.0)
    assert ledger.affordable(4.0, 1000.0)


def test_dear_proposals_are_expected_to_stay_dear() -> None:
    ledger = Ledger(GateConfig(overhead_budget=0.01))
    for _ in range(50):
        ledger.spend(10.0)
    assert not ledger.affordable(1.0, 50000.0 + 500.0)
    assert ledger.affordable(1.0, 51001.0)


def test_waiting_doubles_up_to_a_limit() -> None:
    ledger = Ledger(GateConfig(max_backoff=16))
    waits = []
    for _ in range(7):
        ledger.on_verdict(False)
        waits.append(ledger.wait_windows)
    assert waits == [1, 2, 4, 8, 16, 16, 16]
    for left in range(15, -1, -1):
        ledger.on_window(1.0, jumped=False)
        assert ledger.wait_windows == left
    ledger.on_window(1.0, jumped=False)
    assert ledger.wait_windows == 0
    ledger.on_verdict(True)
    assert ledger.wait_windows == 0
    ledger.on_verdict(False)
    assert ledger.wait_windows == 1, "an acceptance forgets the refusals"


@pytest.mark.parametrize(("effect", "off"), [(-0.02, True), (0.0, False), (0.02, False)])
def test_what_loses_is_switched_off(effect: float, off: bool) -> None:
    ledger = planted(effect, count=100)
    assert ledger.switched_off is off
    assert ledger.summary()["state"] == ("off" if off else "on")


def test_switching_off_takes_several_checks() -> None:
    assert not planted(-0.02, count=8, share=0.5).switched_off


# ---------------------------------------------------------------- costs and clocks


def test_costs_of_a_step() -> None:
    assert STEP_UNITS == FORWARD_UNITS + BACKWARD_UNITS + UPDATE_UNITS == pytest.approx(3.1)


@pytest.mark.parametrize(
    ("clock", "wanted"), [("cost", 100 + math.floor(31 / 3.1 + 1e-9)), ("credited", 107), ("claimed", 180)]
)
def test_clocks(clock: Any, wanted: int) -> None:
    counters = CostMeter(num_attempted_steps=100, num_forward=131, num_claimed_steps=80)
    assert counters.position(clock, 7.9) == wanted


@given(st.integers(0, 10**7), st.integers(0, 1000))
def test_the_cost_clock_of_a_plain_run_counts_steps(steps: int, extra: int) -> None:
    """Not by a float quotient, which would be one off now and then."""
    counters = CostMeter(num_attempted_steps=steps, num_forward=float(steps), num_backward=steps)
    assert counters.cost_steps == steps == counters.position("cost", 0.0)
    assert counters.cost_units == pytest.approx(STEP_UNITS * steps)
    counters.add_forwards(3.1 * extra)
    assert counters.cost_steps == steps + extra


def test_backward_reduction() -> None:
    assert CostMeter().backward_reduction_pct == 0.0
    assert CostMeter(num_backward=20, num_claimed_steps=80).backward_reduction_pct == 80.0


# ---------------------------------------------------------------- in a run


@pytest.mark.parametrize("budget", [0.01, 0.1])
def test_a_run_keeps_to_its_budget(budget: float) -> None:
    """Refused proposals, watching included, cost no more than the budget and one proposal."""
    settings_ = config(gate__overhead_budget=budget, predictor__window=10, clock="cost", warmup_steps=20)
    trainer = setup().trainer(settings_, predictor=Fake(1.0))
    trainer.fit(make_batches(500))
    assert trainer.statistics()["num_jumps_accepted"] == 0
    ledger = trainer.run.judge.ledger
    assert 0 < ledger.spent_units <= budget * trainer.run.meter.cost_units + 5
    assert trainer.run.meter.extra_units == pytest.approx(ledger.spent_units, rel=0.05)


def test_every_jump_has_an_account(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = iter([False, True] * 100)
    monkeypatch.setattr(predict_step, "_is_control", lambda run: next(draws))
    trainer = setup("mlp", "adam").trainer(config(), predictor=Fake())
    results = [trainer.step(batch) for batch in full_batch(80)]
    jumps = [
        r
        for r in results
        if r.phase is Phase.PREDICT and r.verdict is not None and r.verdict.loss_after < r.verdict.loss_before
    ]
    booked = [*trainer.run.judge.ledger.settled, *trainer.run.judge.ledger.open]
    assert len(booked) == len(jumps) - trainer.run.meter.num_rollbacks
    assert {a.skipped for a in booked} == {True, False}
    assert trainer.run.meter.num_controls == sum(a.skipped for a in booked)


def test_speedup_is_one_without_prediction() -> None:
    trainer = setup().trainer(config(enabled=False))
    assert trainer.speedup_factor == 1.0
    trainer.fit(make_batches(10))
    assert trainer.speedup_factor == pytest.approx(1.0)
    assert trainer.backward_reduction == 0.0
