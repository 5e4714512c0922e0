"""`hpt bench regimes`: all arms of a regime's cases, each with a sweep of its own, judged from the same seeds.

Sweep trials are not timed and may run in worker processes; judged runs follow one another in this process.
Every run is stored as it ends (``regime_cache``), so that an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context
from typing import Any

import torch

from ...records import DivergenceError
from ...tell.sinks import jsonable
from ...trainer import HybridTrainer
from ..arms.countdown import Countdown, Tell
from ..arms.environment import environment
from ..arms.options import InputError, as_input_error
from ..compare.run import NUM_DISCARDED_STEPS, best_rate
from ..run_arm import COUNTS, Arm, ArmRun, Experiment, run_arm, steps_of, write_json
from ..train import locked
from . import catalogue as regimes
from .cache import RunStore, TimedRun, identity
from .cases import ExperimentSpec, PreparedCase, Request, UntunedArm, arms_of, build, prepare, seeds_of, tuned_budgets
from .summary import ArmRuns, best_weights_only, summarize

SCHEMA = "regimes-1"


def train(setup: Experiment, arm: Arm, seed: int) -> TimedRun:
    """One run; a peer that fails on the way has diverged, and says how."""
    seen: list[HybridTrainer] = []

    def watch(label: str, trainer: HybridTrainer, total: int) -> Callable[[object], None]:
        seen.append(trainer)
        return lambda result: None

    try:
        run = run_arm(setup, arm, seed, watch=watch)
    except (ModuleNotFoundError, FileNotFoundError):
        raise
    except (RuntimeError, ArithmeticError, ValueError, DivergenceError) as error:
        if arm.kind != "peer":
            raise
        run = failed(setup, arm, seed, f"{type(error).__name__}: {error}")
    share = None
    if seen and arm.kind in ("hybrid", "jump-of-zero"):
        metrics = seen[0].metrics
        share = metrics.overhead_ms / metrics.total_ms if metrics.total_ms else None
    return TimedRun(run=run, time_share=share)


def to_try(grid: Sequence[float]) -> Sequence[float]:
    """The rates that a sweep tries: none where there is nothing to choose."""
    return grid if len(grid) > 1 else ()


def neighbours(grid: Sequence[float], chosen: float) -> tuple[float, ...]:
    """A rate of a grid and the ones beside it, in the grid's order."""
    rates = sorted(grid)
    at = rates.index(chosen)
    return tuple(rates[max(at - 1, 0) : at + 2])


def failed(setup: Experiment, arm: Arm, seed: int, error: str) -> ArmRun:
    """A run that ended in an exception: nothing is known but that."""
    return ArmRun(
        arm=arm, seed=seed, steps=steps_of(setup, arm.budget), final_val_loss=math.nan, wall_s=math.nan,
        counts=dict.fromkeys(COUNTS, math.nan), curve=(), error=error,
    )  # fmt: skip


def work(blueprint: ExperimentSpec, arm: Arm, seed: int, threads: int) -> TimedRun:
    """A sweep trial in a worker process."""
    torch.set_num_threads(threads)
    return train(build(blueprint), arm, seed)


@dataclass(frozen=True, slots=True)
class Job:
    """A run to be made."""

    case: str
    contestant: UntunedArm
    arm: Arm
    seed: int

    @property
    def label(self) -> str:
        """For progress lines."""
        return f"{self.case}, {self.arm.name}, lr {self.arm.lr:.3g}, seed {self.seed}"


class Bench:
    """Runs the jobs of a regime, from the store where it has them."""

    def __init__(self, request: Request, prepared: Sequence[PreparedCase], tell: Tell) -> None:
        """Args: request: what was asked for.  prepared: its cases.  tell: prints a line of progress."""
        self.request, self.tell = request, tell
        self.seeds = {p.case.name: seeds_of(request, p.case) for p in prepared}
        self.jobs = request.jobs or (min(2, os.cpu_count() or 1) if request.quick else 1)
        self.store = RunStore(request.out / "runs", fresh=request.fresh)
        left, runs = {}, 0
        for p in prepared:
            num_trials = sum(len(to_try(c.grid)) for c in p.contestants) * len(p.sweep_seeds)
            if p.tune_budgets:
                others = [b for b in p.budgets if b != 1.0]
                num_trials += len(p.sweep_seeds) * sum(min(len(to_try(c.grid)), 3) for c in p.curves) * len(others)
            at_one = [c for c in p.contestants if c.kind != "plain" and c.name not in p.case.bases]
            num_curves = 1 + sum(c.name in p.case.bases for c in p.contestants)
            budgets = [*(1.0 for _ in at_one), *num_curves * p.budgets, *tuned_budgets(p)]
            num_seeds = len(self.seeds[p.case.name])
            left[p.case.name] = p.setup.steps * (num_trials / self.jobs + num_seeds * sum(budgets))
            runs += num_trials + num_seeds * len(budgets)
        self.countdown = Countdown(left, runs, tell)

    @property
    def all_seeds(self) -> list[int]:
        """Judged ones, of any case."""
        return sorted({seed for of in self.seeds.values() for seed in of})

    def probe(self, p: PreparedCase) -> None:
        """A few steps of every peer: one that cannot run here is left out now, not after hours."""
        kept = []
        for c in p.contestants:
            if c.kind != "peer" or self._has_run(p, c):
                kept.append(c)
                continue
            short = replace(build(c.blueprint), steps=NUM_DISCARDED_STEPS)
            lr = c.grid[0] if c.grid else p.setup.recipe.lr
            try:
                with as_input_error():
                    run = train(short, Arm(name=c.name, kind=c.kind, lr=lr), 0).run
            except (InputError, ImportError) as error:
                p.notes.append(f"{p.case.name}: {c.name} left out: {error}")
                continue
            if math.isnan(run.counts["cost_units"]):
                p.notes.append(f"{p.case.name}: {c.name} left out: {run.error}")
                continue
            kept.append(c)
        p.contestants[:] = kept

    def _has_run(self, p: PreparedCase, c: UntunedArm) -> bool:
        """Whether its first trial is stored."""
        if not c.grid:
            return False
        first = Arm(name=c.name, kind=c.kind, lr=c.grid[0])
        return self.store.get(identity(build(c.blueprint), first, p.sweep_seeds[0])) is not None

    def sweep(self, p: PreparedCase) -> dict[str, Any]:
        """A trial per rate and sweep seed of every arm that has a choice; which rate each arm is to take."""
        grids = {c.name: c.grid for c in p.contestants if to_try(c.grid)}
        trials = self._trials(p, [(c.name, c, c.grid, 1.0) for c in p.contestants if c.name in grids])
        chosen = {c.name: c.grid[0] for c in p.contestants if len(c.grid) == 1}
        chosen |= {name: best_rate(found, p.setup.recipe.lr) for name, found in trials.items()}
        at_edge = sorted(n for n, grid in grids.items() if chosen[n] in (min(grid), max(grid)))
        if p.tune_budgets:
            others = [
                (f"{c.name}@{budget:g}", c, neighbours(c.grid, chosen[c.name]), budget)
                for c in p.curves if c.name in grids
                for budget in p.budgets if budget != 1.0
            ]  # fmt: skip
            more = self._trials(p, others)
            trials |= more
            chosen |= {name: best_rate(found, p.setup.recipe.lr) for name, found in more.items()}
        return {"seeds": list(p.sweep_seeds), "chosen": chosen, "at_edge_of_grid": at_edge, "trials": trials}

    def _trials(
        self, p: PreparedCase, wanted: Sequence[tuple[str, UntunedArm, Sequence[float], float]]
    ) -> dict[str, list[dict[str, Any]]]:
        """Final losses by name; wanted: (name, arm, rates, budget)."""
        jobs = [
            Job(p.case.name, c, Arm(name=name, kind=c.kind, lr=lr, budget=budget), seed)
            for name, c, rates, budget in wanted
            for lr in rates
            for seed in p.sweep_seeds
        ]
        trials: dict[str, list[dict[str, Any]]] = {}
        for job, measured in self._untimed(p, jobs):
            run = measured.run
            trial = {
                "lr": job.arm.lr,
                "seed": job.seed,
                "final_val_loss": run.final_val_loss,
                "cost_units": run.cost_units,
            }
            trials.setdefault(job.arm.name, []).append(trial)
        return trials

    def _untimed(self, p: PreparedCase, jobs: Sequence[Job]) -> Iterator[tuple[Job, TimedRun]]:
        """Trials from the store, then the others, in worker processes where there are some."""
        steps = p.setup.steps / self.jobs
        missing = []
        for job in jobs:
            key = identity(build(job.contestant.blueprint), job.arm, job.seed)
            stored = self.store.get(key)
            if stored is None:
                missing.append((job, key))
                continue
            self.countdown.done(job.case, job.label, steps, stored.run, None)
            yield job, stored
        if self.jobs == 1 or len(missing) < 2:
            for job, key in missing:
                measured, seconds = self._here(p, job)
                self._keep(key, measured)
                self.countdown.done(job.case, job.label, steps, measured.run, seconds)
                yield job, measured
            return
        threads = max(1, torch.get_num_threads() // self.jobs)
        # spawned, not forked: a fork of a process with running thread pools hangs
        with ProcessPoolExecutor(min(self.jobs, len(missing)), mp_context=get_context("spawn")) as pool:
            started = time.perf_counter()
            futures = {pool.submit(work, j.contestant.blueprint, j.arm, j.seed, threads): (j, k) for j, k in missing}
            try:
                for future in as_completed(futures):
                    (job, key), measured = futures[future], future.result()
                    self._keep(key, measured)
                    now = time.perf_counter()
                    self.countdown.done(job.case, job.label, steps, measured.run, now - started)
                    started = now
                    yield job, measured
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def judge(self, p: PreparedCase, chosen: Mapping[str, float]) -> list[ArmRuns]:
        """All arms from all seeds, one run after the other."""
        arms = arms_of(p, chosen)
        found: dict[str, list[TimedRun]] = {arm.name: [] for arm, _, _ in arms}
        warm = False
        for number, seed in enumerate(self.seeds[p.case.name]):
            # the order turns round with every seed, so that a machine that slows down slows all arms
            for arm, c, _ in arms if number % 2 == 0 else reversed(arms):
                key = identity(build(c.blueprint), arm, seed, timed_threads=p.threads)
                job, measured, seconds = Job(p.case.name, c, arm, seed), self.store.get(key), None
                if measured is None:
                    if not warm:  # allocators, thread pools and kernels
                        short = replace(p.setup, steps=NUM_DISCARDED_STEPS)
                        self._here(p, replace(job, arm=Arm(name="plain", kind="plain", lr=arm.lr)), short)
                        warm = True
                    measured, seconds = self._here(p, job)
                    self._keep(key, measured)
                # stored under another name where two cases share a run
                measured = replace(measured, run=replace(measured.run, arm=arm))
                self.countdown.done(job.case, job.label, p.setup.steps * arm.budget, measured.run, seconds)
                found[arm.name].append(measured)
        return [
            ArmRuns(
                name=arm.name, kind=kind, weights_only=c.weights_only, runs=tuple(found[arm.name]),
                trials=len(to_try(c.grid)) * len(p.sweep_seeds),
            )
            for arm, c, kind in arms
        ]  # fmt: skip

    def _here(self, p: PreparedCase, job: Job, setup: Experiment | None = None) -> tuple[TimedRun, float]:
        """A run in this process, and the seconds it took with its validation."""
        before, started = torch.get_num_threads(), time.perf_counter()
        torch.set_num_threads(p.threads)
        try:
            return train(setup or build(job.contestant.blueprint), job.arm, job.seed), time.perf_counter() - started
        finally:
            torch.set_num_threads(before)

    def _keep(self, key: Mapping[str, Any], measured: TimedRun) -> None:
        """Store a run; one that an exception ended is tried again next time."""
        if not math.isnan(measured.run.counts["cost_units"]):
            self.store.put(key, measured)


def run_regime(request: Request, tell: Tell = lambda line: None) -> dict[str, Any]:
    """Run a regime, write ``<out>/<regime>.json`` after each case, and return the object.

    Args:
        request: What to run.
        tell: Prints a line of progress.

    Raises:
        InputError: a name is wrong, nothing can be run, or another process is writing to the folder.
    """
    with as_input_error():
        regime = regimes.regime_of(request.regime)
        cases = regimes.select(regime, request.cases, quick=request.quick)
    with locked(request.out):
        prepared, skipped = [], []
        for case in cases:
            try:
                prepared.append(prepare(request, case))
            except InputError as error:
                if not isinstance(error.__cause__, FileNotFoundError | ModuleNotFoundError):
                    raise
                skipped.append(f"{case.name}: skipped: {error}")
                tell(skipped[-1])
        if not prepared:
            raise InputError(f"no case of regime {regime.name!r} can be run: {'; '.join(skipped)}")
        bench = Bench(request, prepared, tell)
        result: dict[str, Any] = {
            "schema": SCHEMA, "benchmark": "regimes", "regime": regime.name, "about": regime.about,
            "quick": request.quick, "complete": False, "seeds": bench.all_seeds, "skipped": skipped,
            "settings": settings_of(request, bench),
            "environment": environment(str(request.options.get("device") or "cpu")), "cases": [], "arms": [],
        }  # fmt: skip
        result["commit"] = result["environment"]["commit"]
        path = request.out / f"{regime.name}.json"
        for p in prepared:
            bench.probe(p)
            sweep = bench.sweep(p)
            found = summarize(p.case.name, bench.judge(p, sweep["chosen"]))
            result["arms"] += jsonable(found)
            result["cases"].append(jsonable(about(p, sweep, found, list(bench.seeds[p.case.name]))))
            for note in p.notes:
                tell(note)
            write_json(path, result)
        result["complete"] = True
        write_json(path, result)
    return result


def about(
    p: PreparedCase, sweep: Mapping[str, Any], found: Sequence[Mapping[str, Any]], seeds: list[int]
) -> dict[str, Any]:
    """What the result says of a case beside its rows."""
    tuned = sweep["chosen"]["plain"]
    return {
        "case": p.case.name, "seeds": seeds, "task": p.setup.task.describe(),
        "deterministic": p.setup.task.deterministic,
        "steps": p.setup.steps, "budgets": list(p.budgets), "rate": p.case.rate, "lr_tuned": tuned,
        "lr": tuned * (p.case.rate or 1.0), "threads": p.threads, "recipe": asdict(p.setup.recipe),
        "trainer": asdict(p.setup.config), "sweep": dict(sweep), "best_weights_only_peer": best_weights_only(found),
        "notes": list(p.notes),
    }  # fmt: skip


def settings_of(request: Request, bench: Bench) -> dict[str, Any]:
    """What was asked for, without the names of folders."""
    asked = {f.name: getattr(request, f.name) for f in fields(Request) if f.name != "out"}
    told: dict[str, Any] = jsonable({**asked, "seeds": bench.all_seeds})
    return {**told, "jobs": bench.jobs}
