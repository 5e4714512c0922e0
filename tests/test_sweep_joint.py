"""Ends foretold from parameters and all looks at once, and what the rest of a budget is kept for."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("scipy")

from hybrid_predict_trainer.sweeps.allocate import kept_for
from hybrid_predict_trainer.sweeps.curves import LOOKS, TrialCurve
from hybrid_predict_trainer.sweeps.joint import Surface, ends_jointly, spread_first

STEPS = 100


def curve(key: int, x: float, upto: int) -> TrialCurve:
    """A trial whose end is x + 1, as it is seen after some steps."""
    reports = [(s, x + (s / STEPS) ** -0.5) for s in range(2, upto + 1, 2)]
    return TrialCurve.of(key, reports, np.ones(STEPS), params={"x": x}, complete=upto == STEPS)


def test_a_trial_that_nobody_has_begun_is_foretold_from_those_near_it() -> None:
    xs = (-1.0, -0.7, -0.3, 0.3, 0.7, 1.0)
    ends = ends_jointly([*(curve(k, x, STEPS) for k, x in enumerate(xs)), curve(6, -0.9, 0), curve(7, 0.9, 0)])
    assert [end.mean for end in ends[:6]] == pytest.approx([x + 1 for x in xs])
    assert all(end.scale == 0 for end in ends[:6])
    assert ends[6].look == ends[7].look == 0.0
    assert ends[6].mean == pytest.approx(0.1, abs=0.1)
    assert ends[7].mean == pytest.approx(1.9, abs=0.1)


def test_more_of_a_run_makes_its_end_surer() -> None:
    done = [curve(k, x, STEPS) for k, x in enumerate((-1.0, -0.4, 0.4, 1.0))]
    scales = [ends_jointly([*done, curve(9, 0.7, upto)])[-1].scale for upto in (0, 30, 74)]
    assert scales[0] > scales[1] > scales[2] > 0
    assert ends_jointly([*done, curve(9, 0.7, 74)])[-1].look == LOOKS[-2]


def test_a_run_that_blows_up_does_not_hide_how_the_others_differ() -> None:
    xs = (-1.0, -0.7, -0.3, 0.3, 0.7)
    calm = [curve(k, x, STEPS) for k, x in enumerate(xs)]
    wild = TrialCurve.of(8, [(s, 1e9) for s in range(2, 30, 2)], np.ones(STEPS), params={"x": 0.9})
    ends = ends_jointly([*calm, wild, curve(9, -0.9, 20)])
    assert ends[6].scale < 1.0
    assert ends[6].mean < ends[5].mean


def test_without_a_level_nothing_is_known() -> None:
    assert all(math.isnan(e.mean) and e.scale == math.inf for e in ends_jointly([curve(0, 0.1, 0), curve(1, 0.2, 0)]))
    assert ends_jointly([]) == []


def test_more_reports_than_may_be_leave_every_trial_its_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrid_predict_trainer.sweeps.joint.MOST_POINTS", 12)
    ends = ends_jointly([curve(k, 0.1 * k, 60) for k in range(10)])
    assert all(end.look == 0.53 and math.isfinite(end.mean) for end in ends)


def test_the_first_trials_are_unlike_one_another() -> None:
    curves = [curve(k, x, 0) for k, x in enumerate((0.0, 0.01, 0.02, 1.0, 0.99, 0.5))]
    assert {round(curves[i].params["x"], 1) for i in spread_first(curves, 2)} == {0.0, 1.0}
    assert sorted(spread_first(curves, 99)) == list(range(6))


@pytest.mark.parametrize(
    ("done", "left", "kept"),
    [
        ((), 1.0, []),  # nobody has begun
        ((0,), 1.0, [0]),  # another worker has it and has not reported: what it needs is kept
        ((6,), 0.94, [0]),
        ((6,), 0.9, []),  # the rest completes none
        ((30, 38), 0.75, [0, 1]),
        ((6, 38), 0.7, [1]),
        ((6, 38), 1.5, []),  # enough for everything
        ((6, STEPS), 0.94, []),  # one is complete
    ],
)
def test_the_rest_of_a_budget_is_kept_for_an_end(done: tuple[int, ...], left: float, kept: list[int]) -> None:
    curves = [curve(k, 0.1, upto) for k, upto in enumerate(done)]
    assert kept_for(curves, [not c.complete for c in curves], left, STEPS) == kept


def test_one_length_alone_is_a_model_too() -> None:
    curves = [curve(k, x, STEPS) for k, x in enumerate((0.0, 0.5, 1.0))] + [curve(3, 0.25, 0)]
    assert math.isfinite(ends_jointly(curves, surface=Surface(lengths=(1.0,)))[-1].mean)
