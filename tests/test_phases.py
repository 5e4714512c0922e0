"""The cycle: which transitions are legal, and what is decided in which situation."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import Fake, config, full_batch, make_batches, setup
from hybrid_predict_trainer.cycle.phases import (
    LEGAL,
    IllegalTransitionError,
    NeverPredict,
    PhaseController,
    PhaseState,
    Signals,
    controller_for,
    validate_transition,
)
from hybrid_predict_trainer.records import HybridError, Phase, Reason

W, F, P, C = Phase.WARMUP, Phase.FULL, Phase.PREDICT, Phase.CORRECT
WANTED = {(W, W), (W, F), (F, F), (F, P), (P, P), (P, C), (P, F), (C, C), (C, F)}


@pytest.mark.parametrize("source", Phase)
@pytest.mark.parametrize("target", Phase)
def test_transition_table(source: Phase, target: Phase) -> None:
    assert (target in LEGAL[source]) is ((source, target) in WANTED)
    if (source, target) in WANTED:
        validate_transition(source, target)
    else:
        with pytest.raises(IllegalTransitionError, match=f"{source.value} -> {target.value} is not.*legal:") as caught:
            validate_transition(source, target)
        assert isinstance(caught.value, HybridError)


def test_only_predict_computes_no_backward() -> None:
    assert [p for p in Phase if not p.computes_backward] == [Phase.PREDICT]


#: Full steps, a window just closed, nothing in the way: predict.
READY = Signals(
    phase=F,
    num_real_steps=500,
    num_real_steps_since_predict=50,
    loss_ema_stable=True,
    baseline_known=True,
    window_just_closed=True,
    predictor_ready=True,
    confidence=0.9,
    num_outcomes=50,
    num_windows_since_proposal=1,
    horizon=40,
    affordable=True,
    promising=True,
    num_windows_to_wait=0,
    switched_off=False,
    num_forced_full_steps=0,
    forced_by_alarm=False,
    num_full_steps_due=20,
    num_probation_steps=0,
    num_segments_left=0,
    goes_on=False,
    fallback_threshold=4.0,
)
CONTROLLER = PhaseController(
    config(warmup_steps=100, full_steps=20, explore_outcomes=3, confidence_threshold=0.5, gate__max_backoff=16)
)

CASES: dict[str, tuple[dict, Phase, Reason]] = {
    "ready": ({}, P, Reason.CONFIDENT),
    "few outcomes": ({"num_outcomes": 2, "confidence": 0.1}, P, Reason.EXPLORING),
    "none for long": ({"num_windows_since_proposal": 16, "confidence": 0.1}, P, Reason.EXPLORING),
    "not confident": ({"confidence": 0.49}, F, Reason.NOT_CONFIDENT),
    "just confident": ({"confidence": 0.5}, P, Reason.CONFIDENT),
    "forced": ({"num_forced_full_steps": 1}, F, Reason.FORCED_FULL),
    "alarm": ({"num_forced_full_steps": 1, "forced_by_alarm": True}, F, Reason.RECENT_ALARM),
    "window open": ({"window_just_closed": False}, F, Reason.WINDOW_OPEN),
    "too soon": ({"num_real_steps_since_predict": 19, "num_full_steps_due": 20}, F, Reason.WINDOW_OPEN),
    "soon enough": ({"num_real_steps_since_predict": 20}, P, Reason.CONFIDENT),
    "off": ({"switched_off": True}, F, Reason.SWITCHED_OFF),
    "predictor": ({"predictor_ready": False}, F, Reason.NOT_READY),
    "waiting": ({"num_windows_to_wait": 1}, F, Reason.BACKING_OFF),
    "budget": ({"affordable": False}, F, Reason.OVER_BUDGET),
    "promises too little": ({"promising": False}, F, Reason.NOT_PROMISING),
    "the bandit would rather not": ({"horizon": 0}, F, Reason.WAITING),
    "budget holds while exploring": ({"affordable": False, "num_outcomes": 0}, F, Reason.OVER_BUDGET),
    "after a refusal": ({"phase": P}, F, Reason.WINDOW_OPEN),
    "after correction": ({"phase": C}, F, Reason.WINDOW_OPEN),
    "probation": ({"phase": P, "num_probation_steps": 5}, C, Reason.PROBATION),
    "probation goes on": ({"phase": C, "num_probation_steps": 1}, C, Reason.PROBATION),
    "segment": ({"phase": P, "num_segments_left": 1}, P, Reason.SEGMENT),
    "a source goes on": ({"phase": P, "goes_on": True, "window_just_closed": False}, P, Reason.CONFIDENT),
    "not after a real step": ({"goes_on": True, "window_just_closed": False}, F, Reason.WINDOW_OPEN),
    "a source waits for probation": ({"phase": P, "goes_on": True, "num_probation_steps": 5}, C, Reason.PROBATION),
    "a source waits for full steps": ({"phase": P, "goes_on": True, "num_forced_full_steps": 1}, F, Reason.FORCED_FULL),
    "a source that was switched off": (
        {"phase": P, "goes_on": True, "switched_off": True, "window_just_closed": False},
        F,
        Reason.WINDOW_OPEN,
    ),
    "warm-up": ({"phase": W, "num_real_steps": 99}, W, Reason.WARMING_UP),
    "warm-up over": ({"phase": W, "num_real_steps": 100}, F, Reason.WINDOW_OPEN),
    "loss unsettled": ({"phase": W, "num_real_steps": 100, "loss_ema_stable": False}, W, Reason.BASELINE_UNSTABLE),
    "no baseline": ({"phase": W, "num_real_steps": 100, "baseline_known": False}, W, Reason.BASELINE_UNSTABLE),
    "patience ends": ({"phase": W, "num_real_steps": 400, "loss_ema_stable": False}, F, Reason.WINDOW_OPEN),
}


@pytest.mark.parametrize("name", CASES)
def test_decisions(name: str) -> None:
    changes, phase, reason = CASES[name]
    signals = replace(READY, **changes)
    decision = CONTROLLER.decide(signals)
    assert (decision.phase, decision.reason) == (phase, reason)
    validate_transition(signals.phase, decision.phase)
    if phase is P:
        assert (decision.horizon, decision.fallback_threshold) == (40, 4.0)
    else:
        assert decision.horizon == 0


def test_every_signal_matters() -> None:
    """Each field is changed by some case of the table, or handed through."""
    used = {key for changes, _, _ in CASES.values() for key in changes}
    assert {f.name for f in fields(Signals)} - used == {"fallback_threshold"}


@given(
    st.builds(
        Signals,
        phase=st.sampled_from(list(Phase)),
        num_real_steps=st.integers(0, 1000),
        num_real_steps_since_predict=st.integers(0, 100),
        loss_ema_stable=st.booleans(),
        baseline_known=st.booleans(),
        window_just_closed=st.booleans(),
        predictor_ready=st.booleans(),
        confidence=st.floats(0, 1),
        num_outcomes=st.integers(0, 10),
        num_windows_since_proposal=st.integers(0, 100),
        horizon=st.integers(1, 100),
        affordable=st.booleans(),
        promising=st.booleans(),
        num_windows_to_wait=st.integers(0, 3),
        switched_off=st.booleans(),
        num_forced_full_steps=st.integers(0, 3),
        num_full_steps_due=st.sampled_from([0, 20]),
        forced_by_alarm=st.booleans(),
        num_probation_steps=st.just(0),
        num_segments_left=st.integers(0, 2),
        goes_on=st.booleans(),
        fallback_threshold=st.floats(0, 10),
    )
)
@settings(max_examples=300, deadline=None)
def test_every_decision_is_legal(signals: Signals) -> None:
    """Probation exists only after a jump; all else is arbitrary."""
    if signals.phase in (P, C):
        validate_transition(signals.phase, CONTROLLER.decide(replace(signals, num_probation_steps=1)).phase)
    decision = CONTROLLER.decide(signals)
    validate_transition(signals.phase, decision.phase)
    if decision.phase is P and decision.reason is not Reason.SEGMENT:
        assert not signals.switched_off
        if not (signals.phase is P and signals.goes_on):  # whoever goes on is ready and affordable (cycle/inputs)
            assert signals.affordable
            assert signals.predictor_ready


@pytest.mark.parametrize(
    ("changes", "kind"),
    [({}, PhaseController), ({"enabled": False}, NeverPredict), ({"max_predict_steps": 0}, NeverPredict),
     ({"confidence_threshold": 1.0}, NeverPredict), ({"confidence_threshold": 0.999}, PhaseController)],
)  # fmt: skip
def test_null_object(changes: dict, kind: type) -> None:
    controller = controller_for(config(**changes))
    assert type(controller) is kind
    if kind is NeverPredict:
        assert controller.decide(READY).phase is F
        assert controller.decide(replace(READY, phase=W, num_real_steps=3)).phase is (F if "enabled" in changes else W)
        assert controller.decide(replace(READY, phase=W, num_real_steps=4)).reason is Reason.NEVER


# ---------------------------------------------------------------- in a run


@pytest.mark.parametrize("window", [1, 2, 3, 5])
@pytest.mark.parametrize("full_steps", [1, 4])
@pytest.mark.parametrize("correct_steps", [0, 1, 3, 6])
@pytest.mark.parametrize("segments", [1, 3])
def test_any_lengths_make_legal_cycles(window: int, full_steps: int, correct_steps: int, segments: int) -> None:
    """The trainer itself raises on an illegal transition: every combination of lengths must get through."""
    settings = config(predictor__window=window, full_steps=full_steps, correct_steps=correct_steps, segments=segments)
    trainer = setup("mlp", "adam").trainer(settings, predictor=Fake())
    phases = [trainer.step(batch).phase for batch in full_batch(50)]
    assert P in phases
    assert phases[:4] == [W] * 4
    counts = {p: phases.count(p) for p in Phase}
    assert trainer.run.meter.steps_by_phase == counts


def test_forced_full_steps() -> None:
    trainer = setup("mlp", "adam").trainer(config(), predictor=Fake())
    batches = make_batches(80)
    for batch in batches[:4]:
        trainer.step(batch)
    trainer.force_full_phase(30)
    results = [trainer.step(batch) for batch in batches[4:60]]
    phases = [r.phase for r in results]
    assert all(p is F for p in phases[:30])
    assert P in phases[30:40]
    assert results[5].reason == Reason.FORCED_FULL.value
    with pytest.raises(ValueError, match=">= 0"):
        trainer.force_full_phase(-1)


def test_correction_lasts_as_long_as_asked() -> None:
    trainer = setup("mlp", "adam").trainer(config(correct_steps=4), predictor=Fake())
    phases = [trainer.step(batch).phase for batch in full_batch(40)]
    first = phases.index(P)
    assert phases[first : first + 6] == [P, C, C, C, C, F]


def test_horizon_never_above_the_maximum() -> None:
    trainer = setup("mlp", "adam").trainer(config(max_predict_steps=7, min_predict_steps=2), predictor=Fake())
    results = [trainer.step(batch) for batch in full_batch(80)]
    claimed = {r.num_claimed_steps for r in results if r.was_predicted}
    assert claimed
    assert all(2 <= y <= 7 for y in claimed)


def test_step_n() -> None:
    trainer = setup().trainer(config())
    assert len(trainer.step_n(make_batches(5), 3)) == 3
    with pytest.raises(ValueError, match="needs 9 batches, got 5"):
        trainer.step_n(make_batches(5), 9)


def test_the_place_in_the_cycle_goes_through_a_state_dict() -> None:
    place, again = PhaseState(CONTROLLER), PhaseState(CONTROLLER)
    place.enter(F)
    place.force_full(7, by_alarm=True)
    place.count_real_step()
    again.load_state_dict(place.state_dict())
    assert again.current is F
    assert (again.num_forced_full_steps, again.forced_by_alarm, again.num_real_steps_since_predict) == (6, True, 1)
    assert again.state_dict() == place.state_dict()
