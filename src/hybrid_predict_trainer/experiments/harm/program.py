"""All runs of the table: in one process or several, each run stored as it ends."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...config.settings import HybridTrainerConfig
from ...config.toml import with_values
from ...tasks.base import unknown_name
from ..arms.environment import environment
from ..arms.options import as_input_error, assignments
from ..regimes.cache import code_of
from .runs import ARMS, Arm, Result, run
from .settings import Setting, select
from .store import Store
from .table import Trio, judge, needs_other_orders, overall

#: What a step of ours is taken to last, in plain ones, for the estimate of the time left.
OURS_SLOWER = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked for.

    Attributes:
        out: folder of the runs.
        settings: names; empty: all.
        seeds: how many of each setting; None: its own number.
        quick: the settings and lengths of the quick set.
        arms: that are run; those that are left out count where they are stored.
        tag: name of our build; None: a fingerprint of its source.
        jobs: processes.
        report: run nothing.
        set: changes of our default configuration, KEY=VALUE, to see what a part of it does; they are part of the tag.
    """

    out: Path
    settings: tuple[str, ...] = ()
    seeds: int | None = None
    quick: bool = False
    arms: tuple[Arm, ...] = ARMS
    tag: str | None = None
    jobs: int = 1
    report: bool = False
    set: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run that is not stored yet."""

    setting: Setting
    seed: int
    arm: Arm
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def weight(self) -> float:
        """Seconds it is taken to last on an idle core; a companion takes a tenth beside a run of ours."""
        slower = OURS_SLOWER + 0.1 if self.arm == "ours" else 1.0
        return self.setting.steps * self.setting.ms / 1000 * slower


def run_table(request: Request, tell: Callable[[str], None]) -> dict[str, Any]:
    """Run what is missing and judge.

    Args:
        request: What.
        tell: Takes a line about every run.

    Raises:
        InputError: a name is unknown, data or a package are not there, or a file cannot be written.
    """
    with as_input_error():
        for arm in request.arms:
            if arm not in ARMS:
                raise unknown_name("arm of 'hpt bench harm'", arm, ARMS)
        chosen = select(request.settings, quick=request.quick)
        with_values(HybridTrainerConfig(), assignments(request.set))  # wrong ones are said before anything runs
        store = Store(request.out, _tag(request))
        if request.report and not request.out.is_dir():
            raise ValueError(f"{request.out}: no such folder; run 'hpt bench harm --out {request.out}' first")
        if not request.report:
            first = tuple(arm for arm in request.arms if arm != "other-order")
            _run_missing(request, chosen, first, store, tell)
            close = [s for s in chosen if needs_other_orders(s, _trios(s, request.seeds, store))]
            if close and "other-order" in request.arms:
                _run_missing(request, close, ("other-order",), store, tell)
        rows = [judge(s, _trios(s, request.seeds, store)) for s in chosen]
        found = overall(rows)
    return {
        "settings": rows, "overall": found, "passed": found["passed"], "quick": request.quick, "tag": request.tag,
        "environment": environment(),
    }  # fmt: skip


def _tag(request: Request) -> str | None:
    """Of our runs; changed settings are other runs."""
    return request.tag if not request.set else "+".join((request.tag or code_of("hybrid"), *sorted(request.set)))


def _seeds(setting: Setting, seeds: int | None) -> range:
    return range(setting.num_seeds if seeds is None else min(seeds, setting.num_seeds))


def _arms(setting: Setting) -> tuple[Arm, ...]:
    return tuple(arm for arm in ARMS if arm != "other-order" or not setting.full_batch)


def _trios(setting: Setting, seeds: int | None, store: Store) -> list[Trio]:
    def stored(seed: int, arm: Arm) -> Result | None:
        return store.get(setting, seed, arm) if arm in _arms(setting) else None

    return [
        Trio(seed=seed, plain=stored(seed, "plain"), ours=stored(seed, "ours"), other=stored(seed, "other-order"))
        for seed in _seeds(setting, seeds)
    ]


def _run_missing(
    request: Request, chosen: Sequence[Setting], arms: Sequence[Arm], store: Store, tell: Callable[[str], None]
) -> None:  # fmt: skip
    wanted = [
        Job(setting=s, seed=seed, arm=arm, changes=tuple(assignments(request.set).items()))
        for seed in range(max(len(_seeds(s, request.seeds)) for s in chosen))  # a table that is cut off has every row
        for s in chosen
        if seed in _seeds(s, request.seeds)
        for arm in _arms(s)
        if arm in arms
    ]
    jobs = [job for job in wanted if store.get(job.setting, job.seed, job.arm) is None]
    if len(jobs) < len(wanted):
        tell(f"{len(wanted) - len(jobs)} of {len(wanted)} runs are there already")
    began, done, total = time.perf_counter(), 0.0, sum(job.weight for job in jobs)
    with _results(jobs, request.jobs) as results:
        for number, (job, result) in enumerate(results, start=1):
            store.put(job.setting, job.seed, job.arm, result)
            done += job.weight
            left = (time.perf_counter() - began) / done * (total - done)
            told = result.error or f"{result.loss:.4g}"
            tell(
                f"[{number}/{len(jobs)}] {job.setting.name}, seed {job.seed}, {job.arm}: {told} "
                f"in {result.seconds:.1f} s; about {left / 60:.1f} min left"
            )


@contextmanager
def _results(jobs: Sequence[Job], processes: int) -> Iterator[Iterator[tuple[Job, Result]]]:
    """(job, its result) as they end."""
    if processes == 1:
        threads = torch.get_num_threads()
        try:
            yield ((job, _do(job)) for job in jobs)
        finally:
            torch.set_num_threads(threads)
        return
    # spawned, because a fork of a process in which torch has run can hang
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    try:
        waiting = {pool.submit(_do, job): job for job in jobs}
        yield ((waiting[future], future.result()) for future in as_completed(waiting))
    finally:
        pool.shutdown(cancel_futures=True)


def _do(job: Job) -> Result:
    return run(job.setting, job.seed, job.arm, dict(job.changes))
