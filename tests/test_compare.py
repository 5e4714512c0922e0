"""`hpt compare`: the equal-loss figure on known answers, the arms, and what is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_predict_trainer.config.settings import HybridTrainerConfig
from hybrid_predict_trainer.cost import STEP_UNITS
from hybrid_predict_trainer.experiments import run_arm as arms
from hybrid_predict_trainer.experiments.arms.options import Options, build_experiment
from hybrid_predict_trainer.experiments.compare import run as compare
from hybrid_predict_trainer.experiments.compare.equal_loss import (
    Point,
    SeedSpeedup,
    cost_at,
    over_seeds,
    seed_speedup,
)
from hybrid_predict_trainer.experiments.report import text as table
from hybrid_predict_trainer.experiments.run_arm import Arm, ArmRun, Experiment, run_arm
from hybrid_predict_trainer.tasks import build_optimizer, build_scheduler, with_steps
from hybrid_predict_trainer.tell.sinks import jsonable

BUDGETS = (0.5, 1.0, 2.0, 4.0)
EAGER = ("predictor.window=3", "training.full_steps=3", "gate.overhead_budget=1.0", "gate.max_backoff=2")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Other work runs beside the tests."""
    torch.set_num_threads(1)


def power_law(a: float, b: float) -> list[Point]:
    """Plain runs with L = a cost^-b."""
    return [Point(c, a * c**-b) for c in BUDGETS]


# ---- S ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a", [1.0, 7.5])
@pytest.mark.parametrize("b", [0.05, 1.0, 3.0])
@pytest.mark.parametrize("true", [0.5, 0.7, 1.0, 3.0, 4.0])
def test_a_power_law_gives_s_exactly(a: float, b: float, true: float) -> None:
    found = seed_speedup(Point(1.0, a * true**-b * (1 + 1e-15)), power_law(a, b))
    assert found.value == pytest.approx(true, rel=1e-9)
    assert found.kind == ("at most" if true == 0.5 else "exact") or true == 0.5


def test_s_is_per_cost_of_the_hybrid_run() -> None:
    found = seed_speedup(Point(1.25, 3**-0.5), power_law(1.0, 0.5))
    assert found.value == pytest.approx(3 / 1.25)


def test_better_than_every_budget_is_a_lower_bound() -> None:
    found = seed_speedup(Point(1.0, 0.001), power_law(1.0, 0.5))
    assert (found.kind, found.value) == ("at least", 4.0)


def test_worse_than_every_budget_is_an_upper_bound() -> None:
    found = seed_speedup(Point(1.0, 100.0), power_law(1.0, 0.5))
    assert (found.kind, found.value) == ("at most", 0.5)


def test_the_same_loss_at_the_same_cost_is_one() -> None:
    plain = [Point(0.5, 0.9), Point(1.0, 0.7), Point(2.0, 0.7), Point(4.0, 0.6)]
    assert seed_speedup(Point(1.0, 0.7), plain) == SeedSpeedup(1.0, "exact")


def test_the_cheapest_run_that_reaches_the_loss_counts_where_budgets_are_not_monotone() -> None:
    # budget 4 is worse than budget 2 and must not be needed; budget 1 is worse than budget 0.5
    plain = [Point(0.5, 0.8), Point(1.0, 0.9), Point(2.0, 0.4), Point(4.0, 0.5)]
    found = seed_speedup(Point(1.0, 0.8 - 1e-12), plain)
    assert found.value == pytest.approx(0.5, rel=1e-6)
    assert seed_speedup(Point(1.0, 0.4), plain).value == pytest.approx(2.0)


def test_losses_that_are_not_positive_are_interpolated_linearly() -> None:
    cheaper, dearer = Point(1.0, 1.0), Point(4.0, -1.0)
    assert cost_at(0.0, cheaper, dearer) == pytest.approx(2.0)
    assert seed_speedup(Point(1.0, 0.0), [cheaper, dearer]).value == pytest.approx(2.0)


def test_the_order_of_budgets_and_a_diverged_one_do_not_matter() -> None:
    plain = power_law(2.0, 0.3)
    target = Point(1.0, 2 * 3**-0.3)
    shuffled = [plain[2], Point(3.0, math.nan), plain[0], plain[3], plain[1]]
    assert seed_speedup(target, shuffled) == seed_speedup(target, plain)


@pytest.mark.parametrize(
    ("hybrid", "plain"),
    [(Point(1, math.nan), power_law(1, 1)), (Point(1, 0.5), [Point(1, math.nan)]), (Point(1, 1), [])],
)
def test_what_is_not_finite_is_unknown(hybrid: Point, plain: list[Point]) -> None:
    found = seed_speedup(hybrid, plain)
    assert found.kind == "unknown"
    assert found.reason
    assert over_seeds([SeedSpeedup(2.0, "exact"), found]).value is None


def test_seeds_are_joined_by_their_geometric_mean() -> None:
    found = over_seeds([SeedSpeedup(1.0, "exact"), SeedSpeedup(4.0, "exact")])
    assert found.value == pytest.approx(2.0)
    assert found.ci95 == pytest.approx((0.000298, 13402), rel=0.01)  # two seeds say little: t is 12.7
    assert found.ci95_bootstrap_t is None
    assert (found.kind, found.reason) == ("exact", "")


def test_bounded_seeds_count_at_the_bound_and_are_named() -> None:
    found = over_seeds([SeedSpeedup(1.0, "exact"), SeedSpeedup(4.0, "at least", "x")])
    assert found.value == pytest.approx(2.0)
    assert found.kind == "at least"
    assert "1 of 2 seeds" in found.reason
    assert found.ci95 is not None
    assert found.ci95[1] is None


def test_seeds_that_all_stand_at_the_bound_have_no_interval() -> None:
    found = over_seeds([SeedSpeedup(16.0, "at least", "x")] * 3)
    assert (found.value, found.ci95, found.kind) == (pytest.approx(16.0), None, "at least")
    assert "no confidence interval" in found.reason


def test_one_seed_has_no_interval() -> None:
    found = over_seeds([SeedSpeedup(1.5, "exact")])
    assert found.value == pytest.approx(1.5)
    assert found.ci95 is None
    assert "one seed" in found.reason


# ---- arms ---------------------------------------------------------------------------------------------


def tiny(**changes: Any) -> Experiment:
    """A full-batch task with an eager trainer."""
    options: dict[str, Any] = {
        "task": "pinn-poisson",
        "batch_size": 24,
        "steps": 90,
        "schedule": "constant",
        "set": EAGER,
    }
    return build_experiment(Options(**{**options, **changes}))


def last_trainer(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Trainers that ``arms`` builds from now on."""
    built: list[Any] = []
    original = arms.build_trainer

    def build(*args: Any, **kwargs: Any) -> Any:
        built.append(original(*args, **kwargs))
        return built[-1]

    monkeypatch.setattr(arms, "build_trainer", build)
    return built


def plain_weights(setup: Experiment, steps: int, total: int, seed: int) -> list[torch.Tensor]:
    """The loop a user would write."""
    model = setup.task.build_model(seed)
    recipe = with_steps(setup.recipe, total)
    optimizer = build_optimizer(model, recipe)
    schedule = build_scheduler(optimizer, recipe.schedule, total, recipe.warmup_steps, recipe.decay_frac)
    for _, batch in zip(range(steps), setup.task.batches(seed), strict=False):
        optimizer.zero_grad()
        setup.task.loss_fn(model, batch).backward()
        optimizer.step()
        schedule.step()
    return [p.detach() for p in model.parameters()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_plain_arm_is_the_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    built, setup = last_trainer(monkeypatch), tiny(schedule="linear")
    run = run_arm(setup, Arm(name="plain@0.5", kind="plain", lr=setup.recipe.lr, budget=0.5), seed=3)
    assert equal(list(built[0].run.subject.model.parameters()), plain_weights(setup, 45, 45, seed=3))
    assert run.steps == 45
    assert run.cost_units == pytest.approx(45 * STEP_UNITS)
    assert run.counts["num_jumps_proposed"] == 0
    assert run.curve[-1] == (run.cost_units, run.final_val_loss)


def test_a_jump_of_zero_is_paid_for_and_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    built, setup = last_trainer(monkeypatch), tiny()
    run = run_arm(setup, Arm(name="jump-of-zero", kind="jump-of-zero", lr=setup.recipe.lr), seed=0)
    counts = run.counts
    assert counts["num_jumps_accepted"] > 0
    assert counts["num_rollbacks"] == 0
    assert counts["num_forward"] > counts["num_real_steps"] + 3 * counts["num_jumps_accepted"]
    assert run.cost_units > STEP_UNITS * counts["num_real_steps"]
    expected = plain_weights(setup, int(counts["num_real_steps"]), setup.steps, seed=0)
    assert equal(list(built[0].run.subject.model.parameters()), expected)


def test_the_hybrid_arm_does_move(monkeypatch: pytest.MonkeyPatch) -> None:
    built, setup = last_trainer(monkeypatch), tiny()
    run = run_arm(setup, Arm(name="hybrid", kind="hybrid", lr=setup.recipe.lr), seed=0)
    assert run.counts["num_jumps_accepted"] > 0
    expected = plain_weights(setup, int(run.counts["num_real_steps"]), setup.steps, seed=0)
    assert not equal(list(built[0].run.subject.model.parameters()), expected)


def test_a_run_ends_where_its_budget_is_spent() -> None:
    setup = tiny()
    run = run_arm(setup, Arm(name="hybrid", kind="hybrid", lr=setup.recipe.lr), seed=1)
    probation = setup.config.correct_steps + 12  # the last jump may be under way
    assert 90 <= run.cost_units / STEP_UNITS <= 90 + probation


# ---- the comparison -------------------------------------------------------------------------------------


def made_up(name: str, seed: int, cost: float, loss: float, accepted: float = 0.0) -> ArmRun:
    kind: Any = name if name in ("hybrid", "jump-of-zero") else "plain"
    counts = dict.fromkeys(arms.COUNTS, 0.0)
    counts |= {"cost_units": cost * STEP_UNITS, "num_backward": cost, "num_jumps_accepted": accepted}
    arm = Arm(name=name, kind=kind, lr=0.1)
    return ArmRun(arm=arm, seed=seed, steps=100, final_val_loss=loss, wall_s=cost / 50, counts=counts, curve=())


def made_up_runs(hybrid_loss: float, seeds: int = 3, accepted: float = 5.0) -> tuple[list[Arm], list[ArmRun]]:
    """Plain runs on L = 1 / cost, a hybrid run of cost 100."""
    runs = [
        run
        for seed in range(seeds)
        for run in (
            made_up("plain", seed, 100, 0.01),
            made_up("hybrid", seed, 100, hybrid_loss, accepted),
            made_up("jump-of-zero", seed, 100, 0.01),
            made_up("plain@2", seed, 200, 0.005),
            made_up("plain@0.5", seed, 50, 0.02),
        )
    ]
    return [r.arm for r in runs[:5]], runs


def test_the_object_holds_the_known_answers() -> None:
    arm_list, runs = made_up_runs(1 / 150)
    found = compare.summarize("made-up", range(3), arm_list, runs)
    assert found["speedup_at_equal_loss"] == pytest.approx(1.5)
    assert found["ci95"] == pytest.approx((1.5, 1.5))
    assert found["speedup_wall"] == pytest.approx(1.5)
    assert found["loss_gap_at_equal_cost_pct"] == pytest.approx(100 * (1 / 1.5 - 1))
    assert found["jump_of_zero_gap_pct"] == 0
    assert found["backward_reduction_pct"] == pytest.approx(100 * (1 - 1 / 1.5))
    assert "pays here" in found["verdict"]


@pytest.mark.parametrize(
    ("loss", "seeds", "accepted", "words"),
    [
        (0.01, 3, 0, "No jump was accepted: hybrid is plain training plus the price of asking"),
        (1 / 150, 3, 0, "No jump was accepted: learned scale and lookahead"),
        (1 / 150, 1, 0, "No jump was accepted: learned scale and lookahead"),
        (1 / 150, 1, 5, "One seed only"),
        (1 / 70, 3, 5, "loses here"),
        (0.01, 3, 5, "No speed-up has been shown"),
        (math.nan, 3, 5, "No verdict"),
    ],
)
def test_the_verdict_says_what_was_found(loss: float, seeds: int, accepted: float, words: str) -> None:
    arm_list, runs = made_up_runs(loss, seeds, accepted)
    found = compare.summarize("made-up", range(seeds), arm_list, runs)
    assert found["verdict"].startswith(words) or words in found["verdict"]
    assert table.comparison(jsonable(found))


def test_a_diverged_hybrid_run_gives_null_and_the_reason() -> None:
    arm_list, runs = made_up_runs(math.nan)
    found = jsonable(compare.summarize("made-up", range(3), arm_list, runs))
    assert found["speedup_at_equal_loss"] is None
    assert found["ci95"] is None
    assert "not finite" in found["speedup_reason"]
    hybrid = next(a for a in found["arms"] if a["name"] == "hybrid")
    assert hybrid["final_val_loss"] is None


def test_the_best_rate_is_the_lowest_finite_loss() -> None:
    trials = [
        {"lr": 1.0, "final_val_loss": math.nan},
        {"lr": 0.1, "final_val_loss": 2.0},
        {"lr": 0.2, "final_val_loss": 1.0},
    ]
    assert compare.best_rate(trials, 0.5) == 0.2
    assert compare.best_rate(trials[:1], 0.5) == 0.5


def plan_of(tmp_path: Path, **changes: Any) -> compare.Comparison:
    values: dict[str, Any] = {
        "setup": tiny(steps=60),
        "seeds": (0, 1),
        "budgets": (0.5, 2.0),
        "out": tmp_path,
        "about": {},
    }
    return compare.Comparison(**{**values, **changes})


def test_a_comparison_end_to_end(tmp_path: Path) -> None:
    told: list[str] = []
    found = compare.compare(plan_of(tmp_path), done=lambda label, run: told.append(label))
    assert [a["name"] for a in found["arms"]] == ["plain", "hybrid", "jump-of-zero", "plain@0.5", "plain@2"]
    assert told[:2] == ["plain, seed 0", "hybrid, seed 0"]
    assert told[5:7] == ["plain@2, seed 1", "plain@0.5, seed 1"]
    assert json.loads((tmp_path / "compare.json").read_text()) == found
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    for arm in found["arms"]:
        assert arm["n"] == 2
        assert arm["final_val_loss"] > 0
        for seed in (0, 1):
            folder = tmp_path / "runs" / f"{arm['name']}-s{seed}"
            records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            validations = [r for r in records if r["event"] == "validation"]
            assert 12 <= len(validations) <= 22, "20 looks, fewer where a proposal goes past one"
            assert json.loads((folder / "summary.json").read_text())["final_val_loss"] == validations[-1]["val_loss"]
            assert (folder / "config.toml").exists()
    assert found["arms"][0]["cost_units"] == pytest.approx(60 * STEP_UNITS)


def test_seeds_and_arms_do_not_touch_each_other(tmp_path: Path) -> None:
    first = compare.compare(plan_of(tmp_path / "a"))
    second = compare.compare(plan_of(tmp_path / "b", seeds=(1,), budgets=(1.0,)))
    losses = {a["name"]: a["final_val_loss_per_seed"] for a in first["arms"]}
    for arm in second["arms"]:
        assert arm["final_val_loss_per_seed"] == losses[arm["name"]][1:]


def test_tuning_gives_both_arms_the_same_trials_on_a_seed_of_its_own(tmp_path: Path) -> None:
    found = compare.compare(plan_of(tmp_path, setup=tiny(steps=30), seeds=(0,), budgets=(2.0,), tune=True))
    sweep, recipe = found["sweep"], tiny().recipe
    assert len(sweep["seeds"]) == 2
    assert not set(sweep["seeds"]) & set(found["seeds"])
    for arm in ("plain", "hybrid"):
        trials = [t for t in sweep["trials"] if t["arm"] == arm]
        assert [(t["lr"], t["seed"]) for t in trials] == [(lr, s) for lr in recipe.lr_grid for s in sweep["seeds"]]
        best = min(recipe.lr_grid, key=lambda lr: math.prod(t["final_val_loss"] for t in trials if t["lr"] == lr))
        chosen = {a["lr"] for a in found["arms"] if (a["kind"] == "plain") is (arm == "plain")}
        assert chosen == {best}


def test_prediction_off_makes_all_arms_equal(tmp_path: Path) -> None:
    setup = tiny(steps=40)
    setup = arms.replace(setup, config=HybridTrainerConfig(enabled=False))
    found = compare.compare(plan_of(tmp_path, setup=setup, seeds=(0,), budgets=(2.0,)))
    assert found["speedup_at_equal_loss"] == pytest.approx(1.0)
    assert found["loss_gap_at_equal_cost_pct"] == 0
