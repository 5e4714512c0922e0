"""`hpt bench regimes`: what the regimes are, S and verdicts on known answers, stored runs, plans."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybrid_predict_trainer.cost import PASS_UNITS, STEP_UNITS, UPDATE_UNITS, CostMeter
from hybrid_predict_trainer.experiments.arms import countdown
from hybrid_predict_trainer.experiments.arms.options import InputError, Options
from hybrid_predict_trainer.experiments.baselines import BASELINES
from hybrid_predict_trainer.experiments.regimes import cache as regime_cache
from hybrid_predict_trainer.experiments.regimes import cases as regime_cases
from hybrid_predict_trainer.experiments.regimes import catalogue as regimes
from hybrid_predict_trainer.experiments.regimes import report as regime_report
from hybrid_predict_trainer.experiments.regimes import runs as regime_runs
from hybrid_predict_trainer.experiments.regimes import summary as regime_summary
from hybrid_predict_trainer.experiments.regimes.cache import RunStore, TimedRun, digest, identity
from hybrid_predict_trainer.experiments.regimes.cases import Request, arms_of, prepare
from hybrid_predict_trainer.experiments.regimes.summary import ArmRuns
from hybrid_predict_trainer.experiments.run_arm import COUNTS, Arm, ArmRun, Experiment
from hybrid_predict_trainer.experiments.statistics import paired_p
from hybrid_predict_trainer.keep.migration import with_later
from hybrid_predict_trainer.predictors import PREDICTORS
from hybrid_predict_trainer.tasks import TASKS
from hybrid_predict_trainer.tell.sinks import jsonable

# ---- what the regimes are ------------------------------------------------------------------------

CASES = [(r, c) for r in regimes.REGIMES.values() for c in r.cases]


@pytest.mark.parametrize(("regime", "case"), CASES, ids=[f"{r.name}/{c.name}" for r, c in CASES])
def test_a_case_names_what_exists(regime: regimes.Regime, case: regimes.Case) -> None:
    assert case.task in TASKS
    assert set(case.peers) <= set(BASELINES)
    assert [c.name for c in regime.cases].count(case.name) == 1
    Options(task=case.task, **case.options)
    if case.fallback is not None:
        assert "data" not in case.fallback


def test_every_regime_of_the_issue_is_there_and_has_a_quick_case() -> None:
    assert regimes.names() == ("pinn", "epochs", "finetune", "lm", "lm-lowlr", "lm-muon")
    for name in regimes.names():
        quick = regimes.select(regimes.regime_of(name), (), quick=True)
        assert 1 <= len(quick) <= 2, name
        assert not any(c.options.get("data") for c in quick), "a quick case needs no data set"


def test_a_named_case_is_run_whatever_quick_says() -> None:
    pinn = regimes.regime_of("pinn")
    assert [c.name for c in regimes.select(pinn, ("pinn-burgers",), quick=True)] == ["pinn-burgers"]
    with pytest.raises(ValueError, match="did you mean 'pinn-burgers'"):
        regimes.select(pinn, ("pin-burgers",), quick=True)


def test_lengths_in_epochs_are_whole_passes() -> None:
    case = next(c for c in regimes.regime_of("epochs").cases if c.name == "digits-mlp")
    length = regimes.LENGTHS[case.length]
    assert regimes.num_steps(case, 23, quick=False) == 23 * length.full
    assert length.full >= 12
    lm = regimes.regime_of("lm").cases[0]
    assert regimes.num_steps(lm, None, quick=True) == regimes.LENGTHS["lm"].quick


@pytest.mark.parametrize(
    ("chosen", "wanted"), [(3.0, (1.0, 3.0)), (1.0, (0.3, 1.0, 3.0)), (0.3, (0.3, 1.0))]
)  # fmt: skip
def test_other_lengths_choose_among_the_rate_and_its_neighbours(chosen: float, wanted: tuple[float, ...]) -> None:
    assert regime_runs.neighbours((3.0, 0.3, 1.0), chosen) == wanted


def test_a_quick_grid_is_the_middle_of_the_full_one() -> None:
    assert regimes.trimmed((1e-3, 1e-2, 3e-3, 3e-2, 1e-1), 3e-3, 3) == (1e-3, 1e-2, 3e-3)
    assert regimes.trimmed((1.0,), 7.0, 3) == (1.0,)


# ---- known answers -------------------------------------------------------------------------------


def planted(
    name: str, seed: int, cost: float, loss: float, *, kind: Any = "plain", lr: float = 0.1, **more: Any
) -> TimedRun:
    """A run of so many steps' cost that came to that loss; fifty steps take a second."""
    counts = dict.fromkeys(COUNTS, 0.0)
    units = cost * STEP_UNITS
    counts |= {"cost_units": units, "fair_cost_units": units, "num_backward": cost, "num_real_steps": cost, **more}
    arm = Arm(name=name, kind=kind, lr=lr, budget=cost / 100)
    curve = ((cost * STEP_UNITS / 2, 2 * loss), (cost * STEP_UNITS, loss))
    return TimedRun(
        run=ArmRun(
            arm=arm,
            seed=seed,
            steps=100,
            final_val_loss=loss,
            wall_s=cost / 50,
            cpu_s=cost / 40,
            counts=counts,
            curve=curve,
        )
    )


def entry(
    name: str, cost: float, losses: list[float], *, kind: str = "plain", weights_only: bool = False, **more: Any
) -> ArmRuns:
    """One run per loss, from seeds 0, 1, ..."""
    run_kind = "plain" if kind == "tuned" else kind
    runs = tuple(planted(name, seed, cost, loss, kind=run_kind, **more) for seed, loss in enumerate(losses))
    return ArmRuns(name=name, kind=kind, weights_only=weights_only, runs=runs, trials=4)


def baseline(seeds: int = 3, scale: float = 1.0, kind: str = "plain") -> list[ArmRuns]:
    """Plain runs on L = scale / cost at budgets 0.5, 1, 2, 4."""
    names = {50: "0.5", 100: "1", 200: "2", 400: "4"}
    return [
        entry("plain" if cost == 100 and kind == "plain" else f"{kind}@{b}", cost, [scale / cost] * seeds, kind=kind)
        for cost, b in names.items()
    ]


def row_of(found: list[dict[str, Any]], arm: str) -> dict[str, Any]:
    return next(r for r in found if r["arm"] == arm)


def test_s_comes_out_as_planted() -> None:
    hybrid = entry("hybrid", 100, [1 / 150, 1 / 300, 1 / 150], kind="hybrid", num_jumps_accepted=4.0)
    found = regime_summary.summarize("made-up", [*baseline(), hybrid])
    row = row_of(found, "hybrid")
    assert row["S"] == row["mean"] == pytest.approx((1.5 * 3.0 * 1.5) ** (1 / 3))
    assert row["S_wall"] == pytest.approx(row["S"])
    assert (row["kind"], row["n"]) == ("exact", 3)
    assert row["std"] == pytest.approx(math.sqrt(0.75))
    assert row["ci95"] == pytest.approx((0.6993, 5.1071), rel=1e-3)  # log S +- 4.303 std / sqrt(3)
    assert row["ci95_bootstrap_t"] is None  # three seeds have none
    assert row["interval"].startswith("t interval")
    assert row["gap_pct"] == pytest.approx(100 * ((2 / 3 + 1 / 3 + 2 / 3) / 3 - 1))
    assert row["backward_reduction"] == pytest.approx(1 - 1 / row["S"])
    assert row["final_loss"]["per_seed"] == [1 / 150, 1 / 300, 1 / 150]
    assert row["trials"] == 4
    assert "cost_vs_tuned" not in row
    json.dumps(regime_runs.jsonable(row), allow_nan=False)


def test_wall_clock_is_judged_by_seconds_not_by_cost() -> None:
    hybrid = entry("hybrid", 100, [1 / 200] * 3, kind="hybrid")
    slow = tuple(TimedRun(run=replace(m.run, wall_s=2 * m.run.wall_s)) for m in hybrid.runs)
    row = row_of(regime_summary.summarize("made-up", [*baseline(), replace(hybrid, runs=slow)]), "hybrid")
    assert row["S"] == pytest.approx(2.0)
    assert row["S_wall"] == pytest.approx(1.0)


def test_baselines_have_no_s_of_their_own() -> None:
    found = regime_summary.summarize("made-up", baseline())
    assert {r["S"] for r in found} == {None}
    assert row_of(found, "plain")["gap_pct"] is None
    assert row_of(found, "plain@2")["gap_pct"] == pytest.approx(-50)
    assert row_of(found, "plain")["verdict"] == "the baseline"


@pytest.mark.parametrize(
    ("losses", "kind", "value"),
    [([1 / 900] * 3, "at least", 4.0), ([1.0] * 3, "at most", 0.5), ([math.nan, 0.01, 0.01], "unknown", None)],
)
def test_what_is_only_a_bound_says_so(losses: list[float], kind: str, value: float | None) -> None:
    row = row_of(regime_summary.summarize("made-up", [*baseline(), entry("snoo", 100, losses, kind="peer")]), "snoo")
    assert row["kind"] == kind
    assert row["S"] == (None if value is None else pytest.approx(value))


def test_s_over_a_stronger_recipe_is_read_off_that_recipe_s_own_budgets() -> None:
    """The base needs two thirds of plain's cost, the hybrid three quarters: nine eighths of the base's."""
    base = [replace(e, name=e.name.replace("plain", "two-rates"), kind="peer") for e in baseline(scale=2 / 3)]
    hybrid = entry("hybrid", 100, [1 / 120, 1 / 160, (3 / 400) ** 3 * 120 * 160], kind="hybrid")
    found = regime_summary.summarize("made-up", [*baseline(), *base, hybrid])
    row = row_of(found, "hybrid")
    assert row["S"] == pytest.approx(4 / 3)
    assert row["S_over"]["two-rates"]["S"] == pytest.approx(8 / 9)
    assert row["S_over"]["two-rates"]["n"] == 3
    assert row_of(found, "two-rates")["S_over"] == {}
    assert "S_over" not in row_of(found, "plain")
    head = regime_report.head_of(found)
    assert head[-1] == "S over two-rates"
    assert regime_report.line_of(jsonable(row), head)[-1] == "0.889 [0.6, 1.32]"


def test_a_base_is_run_at_every_budget_at_its_own_rate(tmp_path: Path) -> None:
    case = replace(case_of("tuned"), peers=("ema",), quick_peers=("ema",), bases=("ema",))
    p = prepare(asked(tmp_path), case)
    rates = {
        arm.name: (arm.lr, arm.budget) for arm, _, kind in arms_of(p, {"plain": 0.1, "ema": 0.3}) if kind == "peer"
    }
    assert rates == {"ema": (0.3, 1.0), "ema@0.5": (0.3, 0.5), "ema@2": (0.3, 2.0)}


def test_passes_are_judged_at_the_price_of_the_optimizers_own() -> None:
    meter = CostMeter()
    meter.real_step()
    meter.add_passes(14)
    meter.add_priced(0.5)
    assert meter.cost_units == pytest.approx(STEP_UNITS + 14 * PASS_UNITS + 0.5)
    assert meter.fair_cost_units == pytest.approx(STEP_UNITS + 2 * UPDATE_UNITS + 0.5)
    other = CostMeter()
    other.load_state_dict(meter.state_dict())
    assert other.fair_cost_units == meter.fair_cost_units
    old = {k: v for k, v in meter.state_dict().items() if k != "num_priced_passes"}
    other.load_state_dict(with_later({"meter": old}, {"optimizer_step": {"lookahead": {}}})["meter"])
    assert other.cost_units == meter.cost_units


def test_rows_divide_by_the_fair_cost() -> None:
    """Three tenths of a step dearer than what the run counted, on a curve of 1 / cost: S falls by as much."""
    hybrid = entry("hybrid", 100, [1 / 150] * 3, kind="hybrid", fair_cost_units=130 * STEP_UNITS)
    row = row_of(regime_summary.summarize("x", [*baseline(), hybrid]), "hybrid")
    assert row["S"] == pytest.approx(1.5 / 1.3)
    assert row["cost_units"] == pytest.approx(130 * STEP_UNITS)
    assert row["cost_units_counted"] == pytest.approx(100 * STEP_UNITS)
    assert row["S_cpu"] == pytest.approx(1.5)


def test_a_fixed_rate_is_judged_at_that_rate_and_against_the_tuned_one() -> None:
    """At the low rate plain needs three times the cost of the tuned one; the hybrid reaches it at twice its own."""
    slow, tuned = baseline(scale=3.0), baseline(kind="tuned")
    hybrid = entry("hybrid", 100, [3 / 200] * 3, kind="hybrid", num_jumps_accepted=1.0)
    row = row_of(regime_summary.summarize("made-up", [*slow, hybrid, *tuned]), "hybrid")
    assert row["S"] == pytest.approx(2.0)
    assert row["cost_vs_tuned"] == pytest.approx(1.5)
    assert row["cost_vs_tuned_kind"] == "exact"
    assert row["cost_vs_tuned_ci95"] == pytest.approx((1.5, 1.5))


def test_a_run_worse_than_any_tuned_one_costs_at_least_so_much_more() -> None:
    found = regime_summary.summarize(
        "x", [*baseline(), entry("hybrid", 100, [9.0] * 3, kind="hybrid"), *baseline(kind="tuned")]
    )
    row = row_of(found, "hybrid")
    assert (row["cost_vs_tuned"], row["cost_vs_tuned_kind"]) == (pytest.approx(2.0), "at least")


@pytest.mark.parametrize(
    ("losses", "jumps", "words"),
    [
        ([1 / 150] * 3, 2.0, "pays (S 1.5, loss 33.3 % lower"),
        ([1 / 70] * 3, 2.0, "loses (S 0.7, loss 42.9 % higher"),
        ([1 / 150, 1 / 70, 1 / 100], 2.0, "no difference shown"),
        ([1 / 150] * 2, 2.0, "ahead on all 2 seeds, too few to be sure"),
        ([1 / 70] * 2, 2.0, "behind on all 2 seeds, too few to be sure"),
        ([1 / 150], 2.0, "one seed only"),
        ([1 / 100] * 3, 0.0, "no jump was accepted: learned scale, lookahead and the price of asking"),
        ([1 / 900] * 3, 2.0, "ahead on all 3 seeds, no interval is known (S at least 4"),
        ([9.0] * 3, 2.0, "behind on all 3 seeds, no interval is known (S at most 0.5"),
        ([1 / 900, 1 / 390, 1 / 300], 2.0, "pays (S at least 3.6,"),
        ([math.nan] * 3, 2.0, "no verdict: this arm's loss is not finite"),
    ],
)
def test_verdicts(losses: list[float], jumps: float, words: str) -> None:
    hybrid = entry("hybrid", 100, losses, kind="hybrid", num_jumps_accepted=jumps)
    row = row_of(regime_summary.summarize("x", [*baseline(len(losses)), hybrid]), "hybrid")
    assert row["verdict"].startswith(words), row["verdict"]
    assert "\n" not in row["verdict"]


def test_a_jump_of_zero_says_nothing_of_what_is_off_there() -> None:
    zero = entry("jump-of-zero", 100, [1 / 99] * 3, kind="jump-of-zero", num_jumps_accepted=0.0)
    row = row_of(regime_summary.summarize("x", [*baseline(3), zero]), "jump-of-zero")
    assert row["verdict"].startswith("no jump was accepted: the price of asking (")


def test_the_paired_test_is_that_of_logarithms() -> None:
    stats = pytest.importorskip("scipy.stats")
    pairs = [(1.0, 0.8), (10.0, 9.5), (0.1, 0.07), (2.0, 1.9)]
    expected = stats.ttest_rel([math.log(b) for _, b in pairs], [math.log(a) for a, _ in pairs]).pvalue
    assert paired_p(pairs) == pytest.approx(expected)
    assert paired_p(pairs[:2]) is None
    assert paired_p([(1.0, 1.0)] * 3) == 1.0
    assert paired_p([(1.0, math.nan)] * 3) is None
    signed = [(-1.0, -2.0), (1.0, 0.5), (3.0, 1.0)]
    assert paired_p(signed) == pytest.approx(stats.ttest_rel([-2, 0.5, 1.0], [-1, 1, 3.0]).pvalue)


def test_what_predicting_cost_is_all_that_no_step_explains() -> None:
    hybrid = entry("hybrid", 100, [0.01] * 2, kind="hybrid")
    dearer = [
        replace(m, run=replace(m.run, counts={**m.run.counts, "num_backward": 80.0}), time_share=0.3)
        for m in hybrid.runs
    ]
    share = regime_summary.prediction_share(replace(hybrid, runs=tuple(dearer)))
    assert share == {"cost": pytest.approx(0.2), "time": pytest.approx(0.3)}
    assert regime_summary.prediction_share(entry("snoo", 100, [0.01], kind="peer")) is None


def test_the_best_peer_is_among_those_that_change_weights_only() -> None:
    arms = [
        entry("snoo", 100, [1 / 120] * 3, kind="peer", weights_only=True),
        entry("ema", 100, [1 / 130] * 3, kind="peer", weights_only=True),
        entry("soap", 100, [1 / 300] * 3, kind="peer"),
    ]
    found = regime_summary.summarize("x", [*baseline(), *arms])
    best = regime_summary.best_weights_only(found)
    assert best == {"arm": "ema", "S": pytest.approx(1.3)}
    assert regime_summary.best_weights_only(found[:4]) is None


# ---- stored runs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup() -> Experiment:
    return regime_cases.build(regime_cases.ExperimentSpec(Options(task="regression", batch_size=16, steps=10), ()))


def changed(setup: Experiment, **config: Any) -> Experiment:
    return replace(setup, config=replace(setup.config, **config))


def test_whatever_determines_a_run_changes_its_name(setup: Experiment) -> None:
    arm = Arm(name="hybrid", kind="hybrid", lr=0.1)
    keys = [
        identity(setup, arm, 0),
        identity(setup, arm, 1),
        identity(setup, replace(arm, lr=0.2), 0),
        identity(setup, replace(arm, budget=2.0), 0),
        identity(setup, replace(arm, kind="plain"), 0),
        identity(setup, replace(arm, kind="peer", name="snoo"), 0),
        identity(setup, replace(arm, kind="peer", name="lookahead"), 0),
        identity(replace(setup, steps=11), arm, 0),
        identity(replace(setup, recipe=replace(setup.recipe, schedule="cosine")), arm, 0),
        identity(changed(setup, full_steps=21), arm, 0),
        identity(setup, arm, 0, timed_threads=1),
        identity(setup, arm, 0, timed_threads=2),
    ]
    assert len({digest(k) for k in keys}) == len(keys)


def test_what_does_not_determine_a_run_does_not(setup: Experiment) -> None:
    plain = Arm(name="plain@2", kind="plain", lr=0.1, budget=2.0)
    key = identity(setup, plain, 0)
    assert identity(setup, replace(plain, name="tuned@2"), 0) == key, "one run under two names"
    assert identity(changed(setup, full_steps=21), plain, 0) == key, "plain training does not read that"
    assert identity(changed(setup, gradient_clip_norm=1.0), plain, 0) != key, "that it does"
    other_grid = replace(setup, recipe=replace(setup.recipe, lr=9.0, lr_grid=(1.0,), predictor="hold"))
    assert identity(other_grid, plain, 0) == key


def test_the_method_s_source_counts_for_the_arms_that_use_it(
    setup: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = [Arm(name=kind, kind=kind, lr=0.1) for kind in ("plain", "hybrid", "jump-of-zero")]
    before = [identity(setup, arm, 0) for arm in arms]
    monkeypatch.setattr(regime_cache, "fingerprint", lambda *patterns: "edited")
    assert [identity(setup, arm, 0) == key for arm, key in zip(arms, before, strict=True)] == [True, False, False]


def test_the_fingerprint_sees_the_method_and_not_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regime_cache, "PACKAGE", tmp_path)
    (tmp_path / "gate.py").write_text("a = 1")
    (tmp_path / "version.py").write_text("a = 1")

    def now() -> str:
        return regime_cache.fingerprint.__wrapped__("*.py")

    first = now()
    (tmp_path / "version.py").write_text("a = 2")
    assert now() == first
    (tmp_path / "gate.py").write_text("a = 2")
    assert now() != first


def test_a_stored_run_comes_back_as_it_was(setup: Experiment, tmp_path: Path) -> None:
    store, key = RunStore(tmp_path / "runs"), identity(setup, Arm(name="plain", kind="plain", lr=0.1), 0)
    assert store.get(key) is None
    kept = planted("plain", 0, 100, 0.5)
    store.put(key, replace(kept, time_share=0.25))
    assert RunStore(tmp_path / "runs").get(key) == replace(kept, time_share=0.25)
    assert store.get(identity(setup, Arm(name="plain", kind="plain", lr=0.1), 1)) is None
    assert [p.suffix for p in (tmp_path / "runs").iterdir()] == [".json"]


def test_a_diverged_run_is_stored_as_one(setup: Experiment, tmp_path: Path) -> None:
    store, key = RunStore(tmp_path), identity(setup, Arm(name="plain", kind="plain", lr=0.1), 0)
    run = replace(
        planted("plain", 0, 100, 0.5).run, final_val_loss=math.nan, error="too many", curve=((1.0, math.nan),)
    )
    store.put(key, TimedRun(run=run))
    found = store.get(key)
    assert found is not None
    assert math.isnan(found.run.final_val_loss)
    assert math.isnan(found.run.curve[0][1])
    assert found.run.error == "too many"


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": 1}', "null"])
def test_a_damaged_file_is_a_run_to_be_made_again(setup: Experiment, tmp_path: Path, damage: str) -> None:
    store, key = RunStore(tmp_path), identity(setup, Arm(name="plain", kind="plain", lr=0.1), 0)
    store.put(key, planted("plain", 0, 100, 0.5))
    store.path(key).write_text(damage)
    assert store.get(key) is None


def test_a_fresh_store_takes_what_it_wrote_itself(setup: Experiment, tmp_path: Path) -> None:
    key = identity(setup, Arm(name="plain", kind="plain", lr=0.1), 0)
    RunStore(tmp_path).put(key, planted("plain", 0, 100, 0.5))
    store = RunStore(tmp_path, fresh=True)
    assert store.get(key) is None
    store.put(key, planted("plain", 0, 100, 0.4))
    found = store.get(key)
    assert found is not None
    assert found.run.final_val_loss == 0.4


# ---- plans ---------------------------------------------------------------------------------------


def asked(tmp_path: Path, **changes: Any) -> Request:
    return Request(**{"regime": "self-test", "out": tmp_path, "quick": True, "steps": 12, **changes})


def case_of(name: str) -> regimes.Case:
    return next(c for c in regimes.regime_of("self-test").cases if c.name == name)


def test_tuned_arms_have_sweeps_of_one_size_and_plain_budgets_share_one(tmp_path: Path) -> None:
    p = prepare(asked(tmp_path, arms=("hybrid", "jump-of-zero", "snoo", "soap", "lbfgs-20")), case_of("tuned"))
    sizes = {c.name: len(c.grid) for c in p.contestants}
    assert sizes.pop("jump-of-zero") == 0
    assert set(sizes.values()) == {3}
    chosen = {"plain": 1.0, "hybrid": 2.0, "snoo": 3.0, "soap": 4.0, "lbfgs-20": 5.0}
    rates = {arm.name: arm.lr for arm, _, _ in arms_of(p, chosen)}
    assert rates == {**chosen, "jump-of-zero": 2.0, "plain@0.5": 1.0, "plain@2": 1.0}


def test_other_lengths_have_trials_of_their_own_where_that_is_asked_for(tmp_path: Path) -> None:
    request = asked(tmp_path, arms=("hybrid",), tune_budgets=True, lr_grid=(0.01, 0.02, 0.04, 0.08))
    p = prepare(request, case_of("tuned"))
    sweep = regime_runs.Bench(request, [p], lambda line: None).sweep(p)
    chosen = sweep["chosen"]
    assert set(chosen) == {"plain", "hybrid", "plain@0.5", "plain@2"}
    for name in ("plain@0.5", "plain@2"):
        trials = sweep["trials"][name]
        assert {t["lr"] for t in trials} == set(regime_runs.neighbours((0.01, 0.02, 0.04, 0.08), chosen["plain"]))
        cost = {t["cost_units"] for t in trials}
        assert cost == {float(name.partition("@")[2]) * t["cost_units"] for t in sweep["trials"]["plain"]}
    rates = {arm.name: arm.lr for arm, _, _ in arms_of(p, {**chosen, "plain@2": 0.5})}
    assert rates["plain@2"] == 0.5
    assert not prepare(request, case_of("slow")).tune_budgets, "a rate that is fixed is fixed at every length"


@pytest.mark.parametrize("tune_budgets", [False, True])
def test_one_rate_is_taken_without_a_trial(tmp_path: Path, tune_budgets: bool) -> None:
    request = asked(tmp_path, arms=("hybrid",), tune_budgets=tune_budgets, lr_grid=(0.02,))
    bench = regime_runs.Bench(request, [p := prepare(request, case_of("tuned"))], lambda line: None)
    assert bench.sweep(p) == {
        "seeds": list(p.sweep_seeds), "chosen": {"plain": 0.02, "hybrid": 0.02}, "at_edge_of_grid": [], "trials": {},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("quick", "asked_for", "rates"),
    [(True, (), (1e-3, 4e-3)), (False, (), (1e-3, 2e-3, 4e-3, 8e-3)), (True, (5e-3,), (5e-3,))],
)
def test_a_case_may_name_the_rates_of_its_quick_sweeps(
    tmp_path: Path, quick: bool, asked_for: tuple[float, ...], rates: tuple[float, ...]
) -> None:
    """Where the nearest to the recipe's own are not those that count; what the user asks for goes first."""
    case = replace(case_of("tuned"), recipe={"lr_grid": (1e-3, 2e-3, 4e-3, 8e-3)}, quick_grid=(1e-3, 4e-3))
    p = prepare(asked(tmp_path, quick=quick, lr_grid=asked_for), case)
    assert {c.name: c.grid for c in p.contestants if c.grid} == {"plain": rates, "hybrid": rates}
    with pytest.raises(AssertionError, match="not of its grid"):
        replace(case, quick_grid=(3e-3,))


def test_a_fixed_rate_serves_all_but_the_arms_that_need_none(tmp_path: Path) -> None:
    p = prepare(asked(tmp_path, arms=("hybrid", "jump-of-zero", "snoo", "prodigy")), case_of("slow"))
    assert {c.name for c in p.contestants if c.grid} == {"plain", "prodigy"}
    found = arms_of(p, {"plain": 1.0, "prodigy": 7.0})
    rates = {arm.name: arm.lr for arm, _, kind in found if kind != "tuned"}
    low = pytest.approx(0.1)
    assert rates == {"plain": low, "hybrid": low, "jump-of-zero": low, "snoo": low, "prodigy": 7.0,
                     "plain@0.5": low, "plain@2": low}  # fmt: skip
    tuned = {arm.budget: arm.lr for arm, _, kind in found if kind == "tuned"}
    assert tuned == dict.fromkeys(regimes.TUNED_BUDGETS, 1.0)


def test_each_predictor_is_an_arm(tmp_path: Path) -> None:
    p = prepare(asked(tmp_path, predictors=("all",)), case_of("tuned"))
    default = p.setup.recipe.predictor
    arms = [c.name for c in p.contestants if c.kind == "hybrid"]
    assert sorted(arms) == sorted(["hybrid", *(f"hybrid-{n}" for n in PREDICTORS if n != default)])
    for c in p.contestants:
        if c.name.startswith("hybrid-"):
            assert regime_cases.build(c.blueprint).config.predictor_type == c.name.removeprefix("hybrid-")


def test_a_peer_that_does_not_fit_is_left_out_with_a_word(tmp_path: Path) -> None:
    case = regimes.Case(
        name="x", task="gpt", length="self-test", peers=("lbfgs-20",), quick_peers=("lbfgs-20",),
        options={"preset": "0.3M", "batch_size": 2, "context": 8, "data_bytes": 100_000},
    )  # fmt: skip
    p = prepare(asked(tmp_path), case)
    assert "lbfgs-20" not in {c.name for c in p.contestants}
    assert any("lbfgs-20 left out" in note for note in p.notes)


def test_missing_data_fall_back_or_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HPT_DATA_DIR", raising=False)
    small = {"preset": "0.3M", "batch_size": 2, "context": 8, "data_bytes": 100_000}
    case = replace(case_of("missing"), options={**small, "data": "tinystories"})
    with pytest.raises(InputError, match="HPT_DATA_DIR"):
        prepare(asked(tmp_path), case)
    p = prepare(asked(tmp_path), replace(case, fallback=small))
    assert "run on the embedded data instead" in p.notes[0]
    assert "standard library" in p.setup.task.describe()["data"]["name"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": ("hybird",)}, "unknown arm 'hybird'; did you mean 'hybrid'"),
        ({"predictors": ("sekant",)}, "unknown predictor 'sekant'; did you mean 'secant'"),
        ({"set": ("training.ful_steps=3",)}, "unknown key 'training.ful_steps'"),
        ({"options": {"context": 8}}, "has no use for the setting 'context'"),
    ],
)
def test_wrong_names_are_said_in_one_line(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        prepare(asked(tmp_path, **changes), case_of("tuned"))
    assert "\n" not in str(caught.value)


def test_a_case_may_need_more_sweep_seeds_and_the_command_line_has_the_last_word(tmp_path: Path) -> None:
    case = replace(case_of("tuned"), sweep_seeds=5)
    for quick in (False, True):
        assert len(regime_cases.sweep_seeds_of(asked(tmp_path, sweep_seeds=None, quick=quick), case)) == 5
    assert regime_cases.sweep_seeds_of(asked(tmp_path, sweep_seeds=1), case) == (1000,)


def test_judged_seeds_are_none_of_the_sweep_s(tmp_path: Path) -> None:
    case = case_of("tuned")
    assert regime_cases.seeds_of(asked(tmp_path, seeds=3, first_seed=5), case) == (5, 6, 7)
    assert regime_cases.sweep_seeds_of(asked(tmp_path, sweep_seeds=2, first_seed=5), case) == (1000, 1001)
    with pytest.raises(InputError, match="must be below 1000"):
        regime_cases.seeds_of(asked(tmp_path, seeds=3, first_seed=998), case)
    later = replace(case, first_seed=100)
    assert regime_cases.seeds_of(asked(tmp_path, seeds=2), later) == (100, 101)
    assert regime_cases.seeds_of(asked(tmp_path, seeds=2, first_seed=0), later) == (0, 1)


# ---- what is left --------------------------------------------------------------------------------


def test_the_time_left_follows_from_the_pace_of_each_case() -> None:
    told: list[str] = []
    clock = countdown.Countdown({"fast": 200.0, "slow": 100.0}, 4, told.append)
    assert clock.seconds_left() is None
    run = planted("plain", 0, 100, 0.5).run
    clock.done("fast", "fast, plain", 100.0, run, seconds=10.0)
    assert clock.seconds_left() == pytest.approx(100 * 0.1 + 100 * 0.1), "an unknown case is as slow as the known ones"
    clock.done("slow", "slow, plain", 50.0, run, seconds=50.0)
    assert clock.seconds_left() == pytest.approx(100 * 0.1 + 50 * 1.0)
    clock.done("slow", "slow, plain", 50.0, run, seconds=None)
    assert clock.seconds_left() == pytest.approx(10.0), "a stored run takes no time"
    assert told == [
        "[1/4] fast, plain: validation loss 0.5, 2.0 s; about 20 s left",
        "[2/4] slow, plain: validation loss 0.5, 2.0 s; about 60 s left",
    ]


@pytest.mark.parametrize(("seconds", "words"), [(40, "about 40 s"), (600, "about 10 min"), (9000, "about 2.5 h")])
def test_times_are_readable(seconds: float, words: str) -> None:
    assert countdown.readable(seconds) == words
