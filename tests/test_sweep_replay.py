"""Replays of recorded runs: the books balance, and what is replayed is what a study does."""

from __future__ import annotations

import math

import numpy as np
import pytest

optuna = pytest.importorskip("optuna")

from hybrid_predict_trainer.experiments.sweep import grids, program, replay  # noqa: E402
from hybrid_predict_trainer.experiments.sweep.grids import Trial  # noqa: E402
from hybrid_predict_trainer.forecast.schedules import planned_rates  # noqa: E402
from hybrid_predict_trainer.records import ConfigError  # noqa: E402
from hybrid_predict_trainer.sweeps.pruner import HybridPruner  # noqa: E402

optuna.logging.set_verbosity(optuna.logging.ERROR)


def trial(k: int, rows: int = 60) -> Trial:
    """The k-th ends worse than those before it from its start on."""
    at = np.arange(1, 61)[:rows] * 10.0
    values = (1.0 + 0.5 * (k > 0) + 0.05 * k) * (1 + 2 * np.arange(1, rows + 1) ** -0.7)
    return Trial(
        params={"schedule": "linear"}, at=at, valid=values, train=values, steps=600, cost=1.0 + k,
        rates=planned_rates("linear", 600),
    )  # fmt: skip


LADDER = [trial(k) for k in range(6)]


def test_running_all_costs_all_and_finds_the_best() -> None:
    assert replay.run_all(LADDER) == replay.Outcome(pytest.approx(1.0), 0.0, False, pytest.approx(1 / 21), 0.0)


def test_random_search_spends_what_it_may() -> None:
    found = replay.random_search(LADDER[::-1], 0.6)
    assert found.spent == pytest.approx((6 + 5) / 21)
    assert found.regret == pytest.approx(LADDER[4].final / LADDER[0].final - 1)
    assert found.winner_stopped
    assert found.found_after == 1.0


@pytest.mark.parametrize("way", [replay.freeze_thaw, replay.one_by_one])
def test_ours_find_the_best_and_spend_less(way: program.Way) -> None:
    found = way(LADDER)
    assert (found.regret, found.winner_stopped) == (0.0, False)
    assert found.spent < 0.7


@pytest.mark.parametrize("forecast", [False, True])
def test_trials_that_are_given_one_at_a_time(forecast: bool) -> None:
    found = replay.one_at_a_time(LADDER, share=1.0, forecast=forecast)
    assert (found.regret, found.winner_stopped) == (0.0, False)
    few = replay.one_at_a_time(LADDER, share=2 / 21, forecast=forecast)
    assert few.regret == math.inf, "the budget goes into the beginnings of the first six"
    assert 0.06 < few.spent <= 2 / 21 + 1e-9


def test_forecasts_choose_a_better_trial_than_comes_next() -> None:
    """Of trials that end the better the higher their rate is, the best comes last."""

    def of(k: int) -> Trial:
        found = trial(k)
        return Trial(**{**{f: getattr(found, f) for f in found.__slots__}, "params": {"lr": 10.0**-k},
                        "rates": 10.0**-k * found.rates, "cost": 1.0})  # fmt: skip

    ladder = [of(k) for k in range(12, -1, -1)]
    blind, seeing = (replay.one_at_a_time(ladder, share=0.5, first=3, forecast=f) for f in (False, True))
    assert seeing.regret < blind.regret


def test_lowest_first_finds_the_best_after_the_first_looks() -> None:
    found = replay.lowest_first(LADDER)
    assert found.regret == 0.0
    assert 1 / 21 < found.found_after < 0.25
    assert found.quarter == 0.0


def test_regret_at_a_quarter_counts_what_was_complete_by_then() -> None:
    assert replay.run_all(LADDER[::-1]).quarter == math.inf, "the first costs 6 of 21"
    assert replay.run_all(LADDER[1:]).quarter == 0.0


def test_one_by_one_is_what_the_pruner_does_in_a_study() -> None:
    pruner = HybridPruner(schedule="linear", total_steps=600, min_gain=replay.REGRET)
    assert replay.with_optuna(LADDER, pruner) == replay.one_by_one(LADDER)


def test_a_bracket_of_hyperband_hangs_on_the_problem_alone() -> None:
    def search() -> replay.Outcome:
        pruner = optuna.pruners.HyperbandPruner(min_resource=40, max_resource=600, reduction_factor=2)
        return replay.with_optuna([*LADDER, *LADDER], pruner, 2)

    assert len({search() for _ in range(4)}) == 1


def test_a_run_that_diverged_has_no_end() -> None:
    broken = trial(0, rows=20)
    assert broken.final == math.inf
    for way in (replay.freeze_thaw, replay.one_by_one, replay.run_all):
        found = way([broken, *LADDER[1:]])
        assert found.regret == 0.0, "the best of those that ended"


def test_a_problem_is_a_part_of_a_grid() -> None:
    assert replay.problem(LADDER, 3) == replay.problem(LADDER, 3)
    assert len(replay.problem(LADDER, 3)) == 4


def test_the_recorded_grids_are_whole() -> None:
    for name in program.names():
        if name == program.PUBLISHED:
            continue
        found = grids.load(name)
        assert len(found) == len(list(grids.GRIDS[name].params())) >= 32
        assert all(t.cost > 0 and len(t.at) == len(t.valid) == len(t.train) for t in found)
        assert sum(math.isfinite(t.final) for t in found) >= 0.75 * len(found)
        assert program.crossings(found) > 0.05, "curves that cross are among the cases"
    size = sum(path.stat().st_size for path in grids.FOLDER.glob("*.gz"))
    assert size < 1_000_000


def test_how_many_are_before_the_later_winner() -> None:
    assert program.behind(LADDER) == 0
    late = Trial(
        **{
            **{f: getattr(LADDER[0], f) for f in LADDER[0].__slots__},
            "valid": LADDER[0].valid + 9.0 * (LADDER[0].at < 300),
        }
    )
    assert program.behind([late, *LADDER[1:]]) == 5


def test_unknown_grid() -> None:
    with pytest.raises(ConfigError, match="unknown grid 'gpt'"):
        program.measure(["gpt"], 1, print)


def test_verdicts_compare_with_pruners_that_find_the_best_as_often() -> None:
    def row(compute: float, met: float) -> dict[str, float]:
        return {"compute": compute, "regret_met": met, "winner_stopped": 1 - met}

    rows = {"all": row(1.0, 1.0), program.QUARTER: row(0.2, 0.96), "freeze and thaw": row(0.7, 0.96),
            "HybridPruner": row(0.7, 0.97), "MedianPruner": row(0.1, 0.5),
            "Hyperband": row(0.4, 0.97), "random, a quarter": row(0.25, 1.0)}  # fmt: skip
    found = program.verdicts(rows)
    assert found["best_other"] == "Hyperband"
    assert found["times_less"] == pytest.approx(2.0)
    assert all(found["verdicts"].values())
    rows[program.QUARTER], rows["freeze and thaw"] = row(0.3, 0.9), row(0.7, 0.9)
    assert list(program.verdicts(rows)["verdicts"].values()) == [False, False, False, False]


def test_what_forecasts_of_a_known_error_would_find() -> None:
    trials = [trial(k) for k in range(8)]
    share = trials[0].cost / sum(t.cost for t in trials)
    assert replay.foretold(trials, 0.2, 0.0, 0) == pytest.approx(0.2 + 0.8 * share)
    found = [replay.foretold(trials, 0.2, 5.0, seed) for seed in range(20)]
    assert min(found) < 0.5 < max(found) <= 1.0
