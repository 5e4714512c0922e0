"""`hpt compare`: the same task trained plainly and with predicted phases, in one process, from the same seeds."""

from __future__ import annotations

import itertools
import math
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ...tell.sinks import jsonable
from ..arms.environment import environment
from ..regimes.cache import RunStore, TimedRun, identity
from ..report.page import write_report
from ..run_arm import COUNTS, Arm, ArmRun, Experiment, Kind, Watch, run_arm, steps_of, write_json
from ..statistics import METHOD, ends_words, gap_interval
from .equal_loss import Point, SeedSpeedup, Speedup, over_seeds, seed_speedup
from .plan import Comparison

#: Steps of a run thrown away before anything is timed: allocators, thread pools and kernels warm up.
NUM_DISCARDED_STEPS = 5

#: Folder of runs that are done, for an interrupted comparison to go on from.
FINISHED = "finished"

#: What exp(log(1)) may be off.
ROUNDING = 1e-9

#: How far the seed of the learning-rate sweep lies from those of the comparison: tuning on the
#: evaluation seeds would favour whoever has more trials.
SWEEP_SEED_OFFSET = 1000
#: Seeds per rate: with one the choice is luck where seeds differ more than rates.
NUM_SWEEP_SEEDS = 2

#: (label, run) when a run has ended.
Done = Callable[[str, ArmRun], None]


def arms_of(plan: Comparison, plain_lr: float, hybrid_lr: float) -> list[Arm]:
    """All arms, plain budgets last: they share the plain arm's rate."""
    others = sorted(set(plan.budgets) - {1.0})
    return [
        Arm(name="plain", kind="plain", lr=plain_lr),
        Arm(name="hybrid", kind="hybrid", lr=hybrid_lr),
        Arm(name="jump-of-zero", kind="jump-of-zero", lr=hybrid_lr),
        *(Arm(name=f"plain@{budget:g}", kind="plain", lr=plain_lr, budget=budget) for budget in others),
    ]


def compare(plan: Comparison, watch: Watch | None = None, done: Done | None = None) -> dict[str, Any]:
    """Run everything, write ``compare.json``, ``runs/`` and ``report.html``, and return the object.

    Args:
        plan: What to run.
        watch: Watches the steps of each run.
        done: Called after each run.
    """
    setup = plan.setup

    store = RunStore(plan.out / FINISHED, fresh=not plan.resume)

    def run(arm: Arm, seed: int, folder: Path, label: str) -> ArmRun:
        key = identity(setup, arm, seed, timed_threads=torch.get_num_threads())
        found = store.get(key)
        if found is not None and (folder / "summary.json").exists():
            ended = replace(found.run, arm=arm)
        else:
            if folder.is_dir():
                shutil.rmtree(folder)  # what an interrupted run has left
            ended = run_arm(setup, arm, seed, folder, watch, label)
            store.put(key, TimedRun(run=ended))
        if done is not None:
            done(label, ended)
        return ended

    _discard(setup)
    sweep = _sweep(plan, run) if plan.tune else None
    rate = setup.recipe.lr
    plain_lr, hybrid_lr = (sweep["chosen"]["plain"], sweep["chosen"]["hybrid"]) if sweep else (rate, rate)
    arms = arms_of(plan, plain_lr, hybrid_lr)
    runs: list[ArmRun] = []
    for number, seed in enumerate(plan.seeds):
        # the order turns round with every seed, so that a machine that slows down slows all arms
        for arm in arms if number % 2 == 0 else reversed(arms):
            runs.append(run(arm, seed, plan.out / "runs" / f"{arm.name}-s{seed}", f"{arm.name}, seed {seed}"))
    result: dict[str, Any] = jsonable(summarize(setup.task.name, plan.seeds, arms, runs))
    result["environment"] = environment(setup.settings.device)
    result["settings"] = jsonable(settings_of(plan))
    result["sweep"] = jsonable(sweep)
    write_json(plan.out / "compare.json", result)
    write_report(plan.out)
    return result


def _discard(setup: Experiment) -> None:
    """A short run that nobody looks at; also finds what is wrong with the settings before hours have passed."""
    short = replace(setup, steps=NUM_DISCARDED_STEPS)
    run_arm(short, Arm(name="discarded", kind="plain", lr=setup.recipe.lr), seed=0)


def _sweep(plan: Comparison, run_one: Callable[[Arm, int, Path, str], ArmRun]) -> dict[str, Any]:
    """A trial per rate of the grid, arm and sweep seed; the comparison does not use those seeds."""
    setup = plan.setup
    seeds = [plan.seeds[0] + SWEEP_SEED_OFFSET + i for i in range(NUM_SWEEP_SEEDS)]
    grid = setup.recipe.lr_grid or (setup.recipe.lr,)
    kinds: tuple[Kind, ...] = ("plain", "hybrid")
    trials: list[dict[str, Any]] = []
    for lr in grid:
        for kind, seed in itertools.product(kinds, seeds):
            arm = Arm(name=kind, kind=kind, lr=lr)
            folder = plan.out / "sweep" / f"{kind}-lr{lr:g}-s{seed}"
            run = run_one(arm, seed, folder, f"sweep, {kind}, lr {lr:g}, seed {seed}")
            trial = {"arm": kind, "lr": lr, "seed": seed}
            trials.append({**trial, "final_val_loss": run.final_val_loss, "cost_units": run.cost_units})
    chosen = {kind: best_rate([t for t in trials if t["arm"] == kind], setup.recipe.lr) for kind in kinds}
    at_edge = [kind for kind in kinds if len(grid) > 1 and chosen[kind] in (min(grid), max(grid))]
    return {
        "grid": list(grid), "seeds": seeds, "trials_per_arm": len(grid) * len(seeds), "trials": trials,
        "chosen": chosen,
        "at_edge_of_grid": at_edge,
    }  # fmt: skip


def best_rate(trials: Sequence[Mapping[str, Any]], otherwise: float) -> float:
    """Rate of the lowest mean validation loss over seeds; ``otherwise`` if every rate diverged on some seed.

    The mean is geometric where losses are positive: a PINN's differ by a factor of ten between seeds.
    """
    means: dict[float, float] = {}
    for lr in {t["lr"] for t in trials}:
        losses = [float(t["final_val_loss"]) for t in trials if t["lr"] == lr]
        if all(math.isfinite(v) for v in losses):
            logs = [math.log(v) for v in losses] if min(losses) > 0 else losses
            means[lr] = sum(logs) / len(logs)
    return min(means, key=lambda lr: means[lr]) if means else otherwise


# ---- from runs to the object that is printed --------------------------------------------------------


def summarize(task: str, seeds: Sequence[int], arms: Sequence[Arm], runs: Sequence[ArmRun]) -> dict[str, Any]:
    """Means over seeds, the equal-loss figure, and the controls beside it."""
    by_arm = {arm.name: [r for r in runs if r.arm.name == arm.name] for arm in arms}
    rows = [arm_row(by_arm[arm.name]) for arm in arms]
    cost = _speedup(seeds, runs, lambda r: r.cost_units)
    wall = _speedup(seeds, runs, lambda r: r.wall_s)
    pairs = list(_pairs(by_arm["plain"], by_arm["hybrid"]))
    gaps = [100 * (h - p) / abs(p) if p else math.nan for p, h in pairs]
    gap = gap_interval(pairs)
    zero_gap = gap_interval(list(_pairs(by_arm["plain"], by_arm["jump-of-zero"])))
    hybrid, plain = by_arm["hybrid"], by_arm["plain"]
    result: dict[str, Any] = {
        "schema": 1,
        "task": task,
        "seeds": list(seeds),
        "arms": rows,
        "speedup_at_equal_loss": cost.value,
        "ci95": cost.ci95,
        "speedup_ci95": cost.ci95,
        "speedup_ci95_bootstrap_t": cost.ci95_bootstrap_t,
        "interval": METHOD,
        "speedup_reason": cost.reason,
        "speedup_per_seed": [s.value if s.kind == "exact" else None for s in cost.per_seed],
        "speedup_lower_bound": cost.value if cost.kind == "at least" else None,
        "speedup_kind": cost.kind,
        "speedup_bounds": [_told(s) for s in cost.per_seed],
        "speedup_wall": wall.value,
        "speedup_wall_ci95": wall.ci95,
        "speedup_wall_reason": wall.reason,
        "loss_gap_at_equal_cost_pct": gap.mean,
        "loss_gap_ci95": gap.ends,
        "loss_gap_ci95_bootstrap_t": gap.bootstrap_t,
        "loss_gap_per_seed": gaps,
        "jump_of_zero_gap_pct": zero_gap.mean,
        "backward_reduction_pct": _backward_reduction(cost, hybrid, plain),
        "backward_reduction_at_equal_cost_pct": 100
        * (1 - _count(hybrid, "num_backward") / _count(plain, "num_backward")),
        "backward_reduction_claimed_pct": _count(hybrid, "backward_reduction_pct"),
    }
    result["verdict"] = verdict(cost, gap.mean, hybrid, by_arm["jump-of-zero"], wall)
    return result


def arm_row(runs: Sequence[ArmRun]) -> dict[str, Any]:
    """One arm: means over its seeds."""
    arm, losses = runs[0].arm, [r.final_val_loss for r in runs]
    spread = len(losses) > 1 and all(map(math.isfinite, losses))
    return {
        "name": arm.name,
        "kind": arm.kind,
        "budget": arm.budget,
        "steps": runs[0].steps,
        "lr": arm.lr,
        "n": len(runs),
        "final_val_loss": _mean(losses),
        "final_val_loss_std": statistics.stdev(losses) if spread else None,
        "final_val_loss_per_seed": losses,
        "wall_s": _mean([r.wall_s for r in runs]),
        **{name: _count(runs, name) for name in COUNTS},
        "errors": [r.error for r in runs if r.error],
    }


def _pairs(first: Sequence[ArmRun], second: Sequence[ArmRun]) -> Iterator[tuple[float, float]]:
    """Final losses of two arms, seed by seed."""
    other = {r.seed: r for r in second}
    return ((r.final_val_loss, other[r.seed].final_val_loss) for r in sorted(first, key=lambda r: r.seed))


def _speedup(seeds: Sequence[int], runs: Sequence[ArmRun], cost: Callable[[ArmRun], float]) -> Speedup:
    def of_seed(seed: int) -> SeedSpeedup:
        here = [r for r in runs if r.seed == seed]
        hybrid = next(r for r in here if r.arm.kind == "hybrid")
        plain = [Point(cost(r), r.final_val_loss) for r in here if r.arm.kind == "plain"]
        return seed_speedup(Point(cost(hybrid), hybrid.final_val_loss), plain)

    return over_seeds([of_seed(seed) for seed in seeds])


def _told(s: SeedSpeedup) -> dict[str, Any]:
    return {"value": s.value, "kind": s.kind, "reason": s.reason or None}


def _backward_reduction(cost: Speedup, hybrid: Sequence[ArmRun], plain: Sequence[ArmRun]) -> float | None:
    """Backward passes fewer than those of the plain run that reaches the hybrid run's loss, in percent."""
    if cost.value is None:
        return None
    per_unit = _count(plain, "num_backward") / _count(plain, "cost_units")
    needed = cost.value * _count(hybrid, "cost_units") * per_unit
    return 100 * (1 - _count(hybrid, "num_backward") / needed)


def in_percent(share: float) -> str:
    """The size of a percentage with two or three figures, never as a power of ten."""
    size = abs(share)
    return f"{size:.2g} %" if size < 10 else f"{size:.3g} %" if size < 999 else f"{size:.0f} %"


def _gap_words(gap: float) -> str:
    """A loss against another, from a difference in percent: nearly all of it is told as a factor."""
    if -100 < gap < -90:
        return f"a loss {1 / (1 + gap / 100):.3g} times lower"
    return f"{in_percent(gap)} {'lower' if gap < 0 else 'higher'} loss"


def _in_time(wall: Speedup | None) -> str:
    """The same figure by wall-clock, to stand beside it."""
    if wall is None or wall.value is None:
        return ""
    bound = f"{wall.kind} " if wall.kind in ("at least", "at most") else ""
    return f"; by wall-clock {bound}{wall.value:.2f}x"


def verdict(
    cost: Speedup, gap: float, hybrid: Sequence[ArmRun], zero: Sequence[ArmRun], wall: Speedup | None = None
) -> str:
    """What the figures say, in one line; ``zero`` are the runs whose jumps were put back, ``wall`` is by time."""
    if cost.value is None:
        return f"No verdict: {cost.reason}."
    accepted = sum(r.counts["num_jumps_accepted"] for r in hybrid)
    bound = f"{cost.kind} " if cost.kind in ("at least", "at most") else ""
    figure = f"{bound}{cost.value:.2f}x"
    gap_words = f"{_gap_words(gap)} at equal cost{_in_time(wall)}"
    if not accepted and all(h == z for h, z in _pairs(hybrid, zero)):
        return f"No jump was accepted: hybrid is plain training plus the price of asking ({figure}; {gap_words})."
    if not accepted:  # the weights went elsewhere without a jump
        interval = "" if cost.ci95 is None else f", 95 % interval {ends_words(cost.ci95, '.2f')}"
        causes = "learned scale and lookahead, and the price of asking"
        return f"No jump was accepted: {causes}, are {figure}{interval}; {gap_words}."
    if cost.ci95 is None and len(hybrid) == 1:
        return f"One seed only, which shows little: equal-loss speed-up {figure}; {gap_words}."
    if cost.ci95 is None:
        return f"No interval is known: equal-loss speed-up {figure} over {len(hybrid)} seeds; {gap_words}."
    interval = f"95 % interval {ends_words(cost.ci95, '.2f')} over {len(hybrid)} seeds"
    low, high = cost.ci95
    if low is not None and low > 1 + ROUNDING:
        return f"Prediction pays here: equal-loss speed-up {figure}, {interval}; {gap_words}."
    if high is not None and high < 1 - ROUNDING:
        return f"Prediction loses here: equal-loss speed-up {figure}, {interval}; {gap_words}."
    return f"No speed-up has been shown: {figure}, {interval}, which includes 1; {gap_words}."


def _count(runs: Sequence[ArmRun], name: str) -> float:
    return _mean([r.counts[name] for r in runs])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def settings_of(plan: Comparison) -> dict[str, Any]:
    """Everything that decides the figures, for the record."""
    setup = plan.setup
    recipe = asdict(setup.recipe)
    return {
        "command": dict(plan.about),
        "steps": setup.steps,
        "seeds": list(plan.seeds),
        "budgets": {f"{b:g}": steps_of(setup, b) for b in sorted({*plan.budgets, 1.0})},
        "tuned": plan.tune,
        "recipe": recipe,
        "task": setup.task.describe(),
        "trainer": asdict(setup.config),
    }


def clear(out: Path) -> None:
    """Remove what an earlier comparison wrote there, and nothing else."""
    for name in ("runs", "sweep", FINISHED):
        if (out / name).is_dir():
            shutil.rmtree(out / name)
    for name in ("compare.json", "report.html", "plan.json"):
        (out / name).unlink(missing_ok=True)
