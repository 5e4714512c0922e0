"""What teaches the confidence: a refusal at once, an approved jump when it is known whether it paid."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from hybrid_predict_trainer import HybridTrainerConfig
from hybrid_predict_trainer.cost import STEP_UNITS
from hybrid_predict_trainer.propose.confidence import Evidence
from hybrid_predict_trainer.propose.feedback import Feedback, pays
from hybrid_predict_trainer.records import Account, BasisSpec

WINDOW = 10


def make() -> Feedback:
    return Feedback(HybridTrainerConfig(), BasisSpec(num_displacements=2), 1)


def account(**changes: object) -> Account:
    """A jump at step 50 credited with 4 steps at the price of 2."""
    known = Account(
        step=50, due=60, skipped=False, horizon=20, loss=1.0, pace=0.01, usual=0.9, gain=0.1,
        price=2 * STEP_UNITS, left=0.1, credited=4.0,
    )  # fmt: skip
    return replace(known, **changes)  # type: ignore[arg-type]


def stated(adaptation: Feedback, raw: float = 0.5) -> Evidence:
    evidence = Evidence(raw=raw, record=0.5)
    adaptation.state_confidence(evidence)
    return evidence


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"credited": 2.0}, True),  # exactly its price
        ({"credited": 1.9}, False),
        ({"credited": 0.0}, False),
        ({"left": math.nan, "credited": 0.0}, True),  # worth unknown: kept is enough
        ({"price": 0.0, "credited": 0.0}, True),
    ],
)
def test_a_jump_pays_where_its_credit_covers_its_price(changes: dict[str, float], expected: bool) -> None:
    assert pays(account(**changes)) is expected
    adaptation = make()
    stated(adaptation)
    adaptation.on_approval(50)
    adaptation.on_outcome(True)  # kept
    assert adaptation.confidence.num_outcomes == 0, "whether it pays is not known yet"
    adaptation.on_settled(account(**changes), WINDOW)
    assert list(adaptation.confidence.state_dict()["kept"]) == [float(expected)]


def test_refused_taken_back_and_skipped_jumps() -> None:
    refused, back, control = make(), make(), make()
    for adaptation in (refused, back, control):
        stated(adaptation)
    refused.on_outcome(False)
    assert refused.confidence.state_dict()["kept"] == [0.0]
    back.on_approval(50)
    back.on_taken_back(account(), 5, WINDOW)
    back.on_outcome(False)
    assert back.confidence.state_dict()["kept"] == [0.0], "once, though it was approved first"
    assert back.record.num_outcomes == 1
    control.on_approval(50)
    control.on_settled(account(skipped=True, credited=0.0), WINDOW)
    assert control.confidence.num_outcomes == 0, "it was not made, so nothing came of it"
    assert control.state_dict()["approved"] == {}


def test_the_evidence_learnt_from_is_that_of_the_jump_and_survives_a_checkpoint() -> None:
    adaptation = make()
    first = stated(adaptation, raw=0.9)
    adaptation.on_approval(50)
    stated(adaptation, raw=0.1)  # the next proposal is considered before the account is due
    resumed = make()
    resumed.load_state_dict(adaptation.state_dict())
    for each in (adaptation, resumed):
        each.on_settled(account(), WINDOW)
        assert each.confidence.state_dict()["evidence"] == [first.features().tolist()]
        each.on_outcome(False)
        assert each.confidence.state_dict()["kept"] == [1.0, 0.0]
