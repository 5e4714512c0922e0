"""The pruner: known answers on curves of the law, and what Optuna really does with reports."""

from __future__ import annotations

import math
import pickle
import random
import warnings
from collections.abc import Callable

import numpy as np
import pytest

optuna = pytest.importorskip("optuna")

from hybrid_predict_trainer.forecast.law import Plan, losses  # noqa: E402
from hybrid_predict_trainer.forecast.schedules import planned_rates  # noqa: E402
from hybrid_predict_trainer.records import ConfigError  # noqa: E402
from hybrid_predict_trainer.sweeps.allocate import Rules, next_slice  # noqa: E402
from hybrid_predict_trainer.sweeps.curves import LOOKS, Scale, TrialCurve  # noqa: E402
from hybrid_predict_trainer.sweeps.decide import bar_of, cannot_win, chances  # noqa: E402
from hybrid_predict_trainer.sweeps.ends import _column, ends_of, nearest  # noqa: E402
from hybrid_predict_trainer.sweeps.looks import optimistic, pessimistic, spent_at_a_look  # noqa: E402
from hybrid_predict_trainer.sweeps.pruner import HybridPruner  # noqa: E402

optuna.logging.set_verbosity(optuna.logging.ERROR)
T = 400
SCHEDULES = ("linear", "cosine", "wsd:decay=0.25")


def family(seed: int, count: int = 24, noise: float = 0.002) -> list[tuple[dict[str, object], np.ndarray, np.ndarray]]:
    """(parameters, rates, losses at every tenth step) of models of the law: shapes differ by rate, width and luck."""
    rng = np.random.default_rng(seed)
    at = np.arange(10, T + 1, 10, dtype=np.float64)
    found = []
    for _ in range(count):
        rate, width = float(10 ** rng.uniform(-3, -1.5)), float(rng.choice([32, 64]))
        schedule = SCHEDULES[rng.integers(3)]
        rates = rate * planned_rates(schedule, T)
        # a higher rate goes down faster and gains more from its decay; much too high a rate ends higher
        off = math.log(rate / 10**-2.2)
        theta = np.array([
            1.0 + 0.03 * off**2 - 0.1 * (width == 64), math.log(0.25 + 0.05 * max(off, -1.5)),
            math.log(0.4 + 0.03 * off),
            0.2 * off + rng.normal(0, 0.1), math.log(20.0) + rng.normal(0, 0.2), math.log(0.3), 0.75, 0.1, 0.0,
        ])  # fmt: skip
        clean = losses(theta, Plan.of(rates), at, 10.0)
        found.append(
            ({"lr": rate, "width": width, "schedule": schedule}, rates, clean * np.exp(rng.normal(0, noise, at.shape)))
        )
    return found


def curve(key: int, one: tuple[dict[str, object], np.ndarray, np.ndarray], share: float = 1.0) -> TrialCurve:
    params, rates, values = one
    rows = int(share * len(values))
    reports = [(10.0 * (k + 1), math.log(values[k])) for k in range(rows)]
    return TrialCurve.of(key, reports, rates, params=params, complete=share == 1.0)


# ---- known answers ---------------------------------------------------------------------------------------


def test_intervals_hold_what_they_say() -> None:
    below, inside, count = 0, 0, 0
    for seed in range(5):
        rng, runs = random.Random(seed), family(seed, count=20)
        whole = set(rng.sample(range(len(runs)), 6))
        shares = [1.0 if i in whole else rng.choice([0.2, 0.3, 0.55]) for i in range(len(runs))]
        ends = ends_of(
            [curve(i, run, s) for i, (run, s) in enumerate(zip(runs, shares, strict=True))],
            rate_names=("lr", "schedule"),
        )
        for i, (run, end) in enumerate(zip(runs, ends, strict=True)):
            if i not in whole:
                final = math.log(run[2][-1])
                inside += optimistic(end, 0.05) <= final <= pessimistic(end, 0.05)
                below += final < optimistic(end, 0.025)
                count += 1
    assert count == 5 * 14
    assert 0.86 <= inside / count <= 1.0, inside / count
    assert below / count <= 0.05, below / count


def one_by_one(runs: list[tuple[dict[str, object], np.ndarray, np.ndarray]], confidence: float) -> list[float]:
    """Share of each run that is trained."""
    error, seen, spent = spent_at_a_look(confidence), [], []
    for i, run in enumerate(runs):
        stop = 1.0
        for share in LOOKS[:-1] if seen else ():
            now = curve(i, run, math.ceil(share * T / 10) * 10 / T)
            curves = [now, *seen]
            ends = ends_of(curves, rate_names=("lr", "schedule"), asked=[0])
            bar = bar_of(curves, ends, error, [False, *[c.complete for c in seen]])
            if cannot_win(now, ends[0], bar, error):
                stop = now.share
                break
        spent.append(stop)
        seen.append(curve(i, run, stop))
    return spent


def test_the_winner_is_pruned_in_at_most_one_of_twenty_searches_and_losers_are() -> None:
    pruned, spent = 0, []
    for seed in range(12):
        runs = family(100 + seed, count=8)
        shares = one_by_one(runs, 0.95)
        winner = min(range(len(runs)), key=lambda i: runs[i][2][-1])
        pruned += shares[winner] < 1
        spent.append(sum(shares) / len(shares))
    assert pruned == 0  # 0.6 are to be expected at most
    assert np.mean(spent) < 0.95, np.mean(spent)


def test_less_confidence_spends_less() -> None:
    runs = family(3, count=8)
    assert sum(one_by_one(runs, 0.6)) < sum(one_by_one(runs, 0.999))


def test_a_curve_that_crosses_is_kept_and_one_that_cannot_is_not() -> None:
    """Constant for three quarters and then decayed: behind until 75 % of the run, and ahead at its end."""
    params = {"lr": 1e-2, "width": 32.0}
    theta = np.array([1.0, math.log(0.3), math.log(0.15), 1.7, math.log(20.0), math.log(0.3), 0.75, 0.1, 0.0])
    at = np.arange(10, T + 1, 10, dtype=np.float64)

    def run(schedule: str, floor: float) -> tuple[dict[str, object], np.ndarray, np.ndarray]:
        rates = 1e-2 * planned_rates(schedule, T)
        values = losses(np.concatenate([[floor], theta[1:]]), Plan.of(rates), at, 10.0)
        return {**params, "schedule": schedule}, rates, values

    early, late, hopeless = run("linear", 1.02), run("wsd:decay=0.25", 1.0), run("wsd:decay=0.25", 2.5)
    half = 19
    assert late[2][half] > early[2][half] + 0.03
    assert late[2][-1] < early[2][-1]
    error, done = (
        spent_at_a_look(0.95),
        [curve(1, early), curve(2, run("cosine", 1.05)), curve(3, run("wsd:decay=0.3", 1.1))],
    )
    for one, gone in ((late, False), (hopeless, True)):
        curves = [curve(0, one, 0.55), *done]
        ends = ends_of(curves, rate_names=("lr", "schedule"), asked=[0])
        assert cannot_win(curves[0], ends[0], bar_of(curves, ends, error, [False, True, True, True]), error) is gone


def test_the_best_so_far_is_never_told_to_stop() -> None:
    runs = family(5)
    curves = [
        curve(0, (runs[0][0], runs[0][1], np.linspace(2.0, 0.5, 40)), 0.3),
        *[curve(i, r) for i, r in enumerate(runs[1:], 1)],
    ]
    low = TrialCurve.of(0, [(10.0 * k, -1.0) for k in range(1, 14)], runs[0][1], params=runs[0][0])
    for own in (curves[0], low):
        ends = ends_of([own, *curves[1:]], asked=[0])
        bar = bar_of([own, *curves[1:]], ends, 0.4, [True] * len(curves))
        if float(own.values[-1]) <= bar.lowest:
            assert not cannot_win(own, ends[0], bar, 0.4)
    assert float(low.values[-1]) < min(float(c.values.min()) for c in curves[1:])


def test_chances_sum_to_one_and_follow_the_ends() -> None:
    runs = family(6)
    ends = ends_of([curve(i, run, 1.0 if i < 4 else 0.3) for i, run in enumerate(runs)])
    found = chances(ends)
    assert sum(found) == pytest.approx(1.0)
    assert found.index(max(found)) in sorted(range(len(ends)), key=lambda i: ends[i].mean)[:3]


def test_freeze_and_thaw_ends_with_the_best_complete() -> None:
    runs = family(7, count=8)
    curves, alive = [curve(i, run, 0.2) for i, run in enumerate(runs)], [True] * len(runs)
    rules, spent = Rules(error=spent_at_a_look(0.95)), 0
    while True:
        step, stop, _ = next_slice(curves, alive, rules)
        for i in stop:
            alive[i] = False
        if step is None:
            break
        before = curves[step.index].share
        curves[step.index] = curve(step.index, runs[step.index], math.ceil(step.until / 10) * 10 / T)
        assert curves[step.index].share > before, "a slice trains"
        spent += 1
        alive[step.index] = not curves[step.index].complete
    complete = [i for i, c in enumerate(curves) if c.complete]
    best = min(runs[i][2][-1] for i in range(len(runs)))
    assert min(runs[i][2][-1] for i in complete) <= best * 1.002
    assert len(complete) < len(runs)


def test_the_nearest_trials_are_those_alike() -> None:
    runs = family(8, count=30)
    curves = [curve(i, run) for i, run in enumerate(runs)]
    kept = nearest(curves, 4, 10)
    assert kept[0] == 4
    assert len(kept) == 11
    gap = [abs(math.log(curves[j].peak / curves[4].peak)) for j in range(30)]
    assert np.mean([gap[j] for j in kept[1:]]) < np.mean(gap)


# ---- what Optuna does ------------------------------------------------------------------------------------


def study_of(pruner: HybridPruner, **kwargs: object) -> optuna.study.Study:
    return optuna.create_study(pruner=pruner, **kwargs)


def search(
    pruner: HybridPruner, runs: list[tuple[dict[str, object], np.ndarray, np.ndarray]], *, sign: float = 1.0,
    report: Callable[[optuna.Trial, float, int], None] | None = None, study: optuna.study.Study | None = None,
) -> list[tuple[str, int]]:  # fmt: skip
    """State and last step of every trial."""
    study = study or study_of(pruner, direction="maximize" if sign < 0 else "minimize")
    report = report or (lambda trial, value, step: trial.report(value, step))
    for params, _, values in runs:
        trial = study.ask()
        trial.set_user_attr("schedule", params["schedule"])
        trial.set_user_attr("total_steps", T)
        for k, value in enumerate(values):
            report(trial, sign * value, 10 * (k + 1))
            if k + 1 < len(values) and trial.should_prune():
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(trial, sign * values[-1])
    return [(t.state.name, t.last_step or 0) for t in study.trials]


def ladder(count: int = 8) -> list[tuple[dict[str, object], np.ndarray, np.ndarray]]:
    """The first is the best, the others are worse from the start on."""
    at = np.arange(10, T + 1, 10)
    rates = planned_rates("linear", T)
    found = []
    for k in range(count):
        found.append(({"schedule": "linear"}, rates, (1.0 + 0.5 * (k > 0) + 0.05 * k) * (1 + 2 * (at / 10) ** -0.7)))
    return found


def test_hopeless_trials_are_pruned_and_the_first_is_not() -> None:
    told = search(HybridPruner(), ladder())
    assert told[0] == ("COMPLETE", T)
    assert [state for state, _ in told[3:]] == ["PRUNED"] * 5
    assert max(step for _, step in told[3:]) <= 0.4 * T


def test_maximizing_is_minimizing_the_negative() -> None:
    pruner = HybridPruner()
    shifted = [(p, r, v - 10.0) for p, r, v in ladder()]  # not positive: no logarithms on either side
    assert search(pruner, shifted) == search(HybridPruner(), shifted, sign=-1.0)


def test_random_study_names_and_repeats_change_nothing() -> None:
    assert search(HybridPruner(), ladder()) == search(HybridPruner(), ladder())


def test_duplicated_reports_change_nothing() -> None:
    def twice(trial: optuna.Trial, value: float, step: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial.report(value, step)
            trial.report(value + 100.0, step)  # Optuna keeps the first

    assert search(HybridPruner(), ladder(), report=twice) == search(HybridPruner(), ladder())


def test_gaps_between_reports_and_a_late_first_one() -> None:
    def seldom(trial: optuna.Trial, value: float, step: int) -> None:
        if step % 40 == 0:
            trial.report(value, step)

    told = search(HybridPruner(), ladder(), report=seldom)
    assert told[0][0] == "COMPLETE"
    assert told[-1][0] == "PRUNED"

    def late(trial: optuna.Trial, value: float, step: int) -> None:
        if step == 0.5 * T or step > 0.9 * T:
            trial.report(value, step)

    alone = search(HybridPruner(), ladder(), report=late)
    assert all(step > 0.5 * T for _, step in alone), "one report says nothing of a slope"

    def hole(trial: optuna.Trial, value: float, step: int) -> None:
        if step <= 0.05 * T or step >= 0.6 * T:
            trial.report(value, step)

    for state, step in search(HybridPruner(), ladder(), report=hole):
        assert state == "COMPLETE" or step > 0.6 * T, "nothing is read off inside of a hole"


def test_a_trial_that_is_no_number_any_more_is_pruned_and_spoils_nothing() -> None:
    runs = ladder()
    broken = runs[1][2].copy()
    broken[5:] = math.nan
    told = search(HybridPruner(), [runs[0], (runs[1][0], runs[1][1], broken), *runs[2:]])
    assert told[1] == ("PRUNED", 60)
    assert told[0][0] == "COMPLETE"
    assert told[-1][0] == "PRUNED"


def test_failed_and_unfinished_trials_are_no_bar() -> None:
    study = study_of(HybridPruner())
    for k in range(2):  # one fails and one is killed, both far below all others
        trial = study.ask()
        trial.set_user_attr("schedule", "linear")
        trial.set_user_attr("total_steps", T)
        for step in range(10, 300, 10):
            trial.report(1e-3, step)
        if k == 0:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
    runs = ladder()
    assert [state for state, _ in search(HybridPruner(), runs[:1], study=study)][2] == "COMPLETE"


def test_a_trial_that_is_tried_again_is_judged_from_its_start() -> None:
    """Optuna copies system attributes to the trial that takes a failed one's place."""
    study, runs = study_of(HybridPruner()), ladder(3)
    search(study.pruner, runs[:1], study=study)
    lost = study.ask()
    for name, value in (("schedule", "linear"), ("total_steps", T)):
        lost.set_user_attr(name, value)
    for k, value in enumerate(runs[0][2][:36]):
        lost.report(value, 10 * (k + 1))
        assert not lost.should_prune()
    study.tell(lost, state=optuna.trial.TrialState.FAIL)
    copied = study.trials[lost.number].system_attrs
    assert copied["hybrid_predict_trainer:look"] == [1, 7]
    study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.WAITING, system_attrs=copied))
    again = search(study.pruner, [(*runs[2][:2], 9 * runs[2][2]), runs[2]], study=study)
    assert again[2][0] == "PRUNED", again


def test_a_resumed_study_decides_as_one_that_went_on() -> None:
    storage = optuna.storages.InMemoryStorage()
    runs = ladder()
    study = study_of(HybridPruner(), storage=storage, study_name="one")
    search(HybridPruner(), runs[:4], study=study)
    again = optuna.load_study(study_name="one", storage=storage, pruner=HybridPruner())
    assert search(HybridPruner(), runs[4:], study=again) == search(HybridPruner(), runs)


def test_several_workers_never_prune_the_winner() -> None:
    """Four trials at a time, whose reports come in turn; a running trial is a bar only where that is asked for."""
    for count_running in (False, True):
        pruner = HybridPruner(count_running=count_running)
        study, runs = study_of(pruner), ladder(8)
        for start in (0, 4):
            trials = [study.ask() for _ in range(4)]
            for trial in trials:
                trial.set_user_attr("schedule", "linear")
                trial.set_user_attr("total_steps", T)
            going = dict(enumerate(trials))
            for k in range(40):
                for i in list(going):
                    going[i].report(float(runs[start + i][2][k]), 10 * (k + 1))
                    if k < 39 and going[i].should_prune():
                        study.tell(going.pop(i), state=optuna.trial.TrialState.PRUNED)
            for i, trial in going.items():
                study.tell(trial, float(runs[start + i][2][-1]))
        assert study.trials[0].state.name == "COMPLETE"
        assert study.trials[7].state.name == "PRUNED"


@pytest.mark.parametrize(
    ("pruner", "attrs", "told"),
    [
        (HybridPruner(), {}, "its learning-rate schedule is not known"),
        (HybridPruner(schedule="linear"), {}, "needs the number of steps of its run, not None"),
        (HybridPruner(schedule="linear", total_steps=True), {}, "not True"),
        (HybridPruner(schedule="liner", total_steps=100), {}, "did you mean 'linear'"),
        (HybridPruner(schedule=[0.0, 0.0]), {}, "one of them above 0"),
        (HybridPruner(schedule=lambda trial: 0.1, total_steps=100), {}, "a rate of at least 0 for every step"),
        (HybridPruner(schedule=[[1.0, 1.0]]), {}, "a rate of at least 0 for every step"),
        (HybridPruner(schedule=["fast", "slow"]), {}, "must be a text, a function of the step, or a rate"),
        (HybridPruner(schedule=lambda step: 1 - step / 100, total_steps=100), {}, "is called with the trial"),
        (HybridPruner(schedule=lambda trial: trial.params["no"], total_steps=100), {}, "it raised KeyError: 'no'"),
        (HybridPruner(schedule="linear", total_steps=99.5), {}, "not 99.5"),
        (HybridPruner(), {"schedule": "wsd:decay=2", "total_steps": 100}, "decay"),
    ],
)
def test_a_schedule_that_is_not_known_is_one_line(pruner: HybridPruner, attrs: dict[str, object], told: str) -> None:
    study = study_of(pruner)
    trial = study.ask()
    for name, value in attrs.items():
        trial.set_user_attr(name, value)
    trial.report(1.0, 10)
    with pytest.raises(ConfigError, match=told) as found:
        trial.should_prune()
    assert "\n" not in str(found.value)


def test_a_schedule_by_function_vector_or_text_is_the_same() -> None:
    def of_trial(trial: optuna.trial.FrozenTrial) -> Callable[[int], float]:
        return lambda step: (T + 1 - step) / T

    by_name = search(HybridPruner(schedule="linear", total_steps=T), ladder())
    assert search(HybridPruner(schedule=of_trial, total_steps=lambda trial: T), ladder()) == by_name
    assert search(HybridPruner(schedule=[(T + 1 - n) / T for n in range(1, T + 1)]), ladder()) == by_name


@pytest.mark.parametrize("total", [np.int64(T), float(T), np.float64(T)])
def test_a_number_of_steps_of_any_type(total: float) -> None:
    assert search(HybridPruner(schedule="linear", total_steps=total), ladder()) == search(HybridPruner(), ladder())


def test_studies_of_one_name_share_nothing_but_the_pruner() -> None:
    """Their trials have the same numbers as well; the second study's losses are all above the first one's."""
    pruner, runs = HybridPruner(), ladder()
    low = [(params, rates, values / 100) for params, rates, values in runs]
    search(pruner, low, study=study_of(pruner, study_name="one"))
    assert search(pruner, runs, study=study_of(pruner, study_name="one")) == search(HybridPruner(), runs)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("size", [1e-300, 1e300])
def test_values_whose_squares_are_no_numbers(sign: float, size: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        runs = [(params, rates, size * (values - 20.0 * (sign < 0))) for params, rates, values in ladder()]
        told = search(HybridPruner(), runs, sign=sign)
    assert told[0] == ("COMPLETE", T)
    assert [state for state, _ in told[3:]] == ["PRUNED"] * 5


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_where_all_are_alike_nobody_is_pruned(value: float) -> None:
    alike = [(params, rates, np.full(40, value)) for params, rates, _ in ladder(5)]
    assert search(HybridPruner(), alike) == [("COMPLETE", T)] * 5


def test_an_infinite_value_at_a_look_loses_and_before_it_says_nothing() -> None:
    runs = ladder()
    first, still = runs[1][2].copy(), runs[2][2].copy()
    first[:1], still[:] = math.inf, math.inf
    told = search(HybridPruner(), [runs[1], (*runs[0][:2], first), (*runs[2][:2], still)])
    assert told[1][0] == "COMPLETE"
    assert told[2] == ("PRUNED", 30), "the first report at or after 6 % of the run"
    assert search(HybridPruner(), [(*runs[2][:2], still)])[0][1] == T, "nothing else has ended"


@pytest.mark.parametrize(("total", "told"), [(25 * T, "was complete at step 400"), (T // 10, "reports at step 50")])
def test_reports_in_other_units_than_the_schedules_are_told_of_once(total: int, told: str) -> None:
    pruner = HybridPruner(schedule="linear", total_steps=total)
    with pytest.warns(UserWarning, match=told) as found:
        search(pruner, ladder())
    assert len(found) == 1


def test_trials_of_an_unknown_schedule_are_a_bar_and_no_neighbours() -> None:
    """Complete ones that were added by hand; without reports, and with reports that nobody can place."""
    space = {"lr": optuna.distributions.FloatDistribution(1e-5, 1.0)}

    def added(value: float) -> optuna.study.Study:
        study = study_of(HybridPruner())
        study.add_trial(optuna.trial.create_trial(value=value, params={"lr": 0.5}, distributions=space))
        study.add_trial(optuna.trial.create_trial(value=9.0, intermediate_values={1: 9.5, 70000: 9.0}))
        return study

    plain = search(HybridPruner(), ladder())
    assert search(HybridPruner(), ladder(), study=added(50.0))[2:] == plain
    assert [state for state, _ in search(HybridPruner(), ladder(), study=added(0.5))[2:]].count("COMPLETE") <= 1


def test_parameters_that_only_some_trials_have() -> None:
    momentum = [0.5, 0.9, None, None, 0.55]
    far = _column(momentum)
    assert far[0, 2] == far[1, 3] == 1.0
    assert far[2, 3] == 0.0
    assert far[0, 4] < far[0, 1] == 1.0
    assert (far == far.T).all()
    assert (_column(momentum, 2) == far[2]).all()
    assert _column(["a", None, "a"]).tolist() == [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
    assert _column([10**400, 1.0])[0, 1] == 1.0


def test_a_pruner_may_go_to_another_process() -> None:
    pruner = HybridPruner(schedule="linear", total_steps=T)
    search(pruner, ladder())
    assert search(pickle.loads(pickle.dumps(pruner)), ladder()) == search(HybridPruner(), ladder())


@pytest.mark.parametrize("confidence", [0.4, 1.0, math.nan])
def test_confidence_out_of_range(confidence: float) -> None:
    with pytest.raises(ConfigError, match="confidence"):
        HybridPruner(confidence=confidence)


def test_scales() -> None:
    assert Scale.of([0.1, math.nan, 2.0], maximize=False).logarithmic
    for values, maximize in (([0.0, 1.0], False), ([0.5], True), ([], False), ([-1.0], False)):
        assert not Scale.of(values, maximize=maximize).logarithmic
    for scale in (Scale(True), Scale(False), Scale(False, -1.0)):
        assert scale.back(scale.into(0.7)) == pytest.approx(0.7)
        assert math.isnan(scale.into(math.inf))
