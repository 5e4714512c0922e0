"""``hpt sweep``: a search in slices, by one process or several, with a table that lives."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..experiments.arms.options import InputError, as_input_error
from ..experiments.extras import require
from ..experiments.report import sweep as page
from ..experiments.sweep import plan as plans
from ..experiments.sweep.space import read_space
from ..experiments.sweep.storage import StorageError, without_secrets
from ..experiments.sweep.worker import Worker
from ..safe_files import write_text
from .arguments import DIVERGED, OK, complain, folder_of, options_of, show

#: Says to a process that it is one of several workers: it shows nothing.
WORKER = "HPT_SWEEP_WORKER"
#: Rows of the table on a terminal.
MOST_ROWS = 15
POLL_S = 1.0


def run(args: argparse.Namespace) -> int:
    """Search, or go on, or join.

    Raises:
        InputError: the search cannot be carried out, is not that of the folder, or its storage does not answer.
        CheckpointError: the disk refuses.
    """
    with as_input_error():
        require("optuna", "scipy", "filelock")
        space = read_space(args.space)
    plan = plans.Plan(
        options=options_of(args), space=space, sampler=args.sampler, seed=args.seed or 0, plain=args.plain,
        first=args.first, confidence=args.confidence, min_gain=args.min_gain,
    )  # fmt: skip
    setup = plans.checked(plan)
    out = folder_of(args)
    plans.agreed(out, plan)
    allowance = plans.Allowance(budget=args.budget, trials=args.trials, patience=args.patience)
    worker = _opened(
        lambda: Worker(plan, setup, allowance, out, url=args.storage, name=args.study), args.patience, args.storage, out
    )
    if os.environ.get(WORKER):
        return worker.work(lambda w: None)
    with _table(args) as tell:
        status = worker.work(tell) if args.workers == 1 else _together(args, out, worker, tell)
    found = page.account(worker.standing(), setup.steps)
    with as_input_error():
        write_text(out / "report.html", page.page(out.name, found))
    show(args, {"out": str(out), "study": worker.study.study_name, **found.to_json()}, lambda: told(found, out))
    if status == OK and found.best is None and found.failed and not found.alive:
        return complain("every trial has failed, the report says why: mend the space, take another --out", DIVERGED)
    return status


def _opened(make: Callable[[], Worker], patience: float, url: str | None, out: Path) -> Worker:
    """Open the study; wait for a storage that is away for a while."""
    began = time.monotonic()
    while True:
        try:
            return make()
        except StorageError as error:
            if time.monotonic() - began > min(patience, 10.0):
                where = without_secrets(url) if url else str(out)
                raise InputError(f"the storage {where} does not answer: {error}") from None
            time.sleep(POLL_S)


def _together(args: argparse.Namespace, out: Path, watcher: Worker, tell: Callable[[Worker], None]) -> int:
    """Several processes of this command; one that dies is told of, and the others take its trial."""
    command = [sys.executable, "-m", "hybrid_predict_trainer.cli", *args.argv, "--workers", "1", "--out", str(out)]
    environment = {**os.environ, WORKER: "1"}
    if "--threads" not in args.argv:  # workers share the processor
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.workers)))
    children = [
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for _ in range(args.workers)
    ]
    left = dict(enumerate(children, 1))
    statuses = []
    try:
        while left:
            time.sleep(POLL_S)
            for k in [k for k, child in left.items() if child.poll() is not None]:
                child = left.pop(k)
                statuses.append(child.returncode)
                if child.returncode:
                    complain(f"worker {k} has ended with {_ending(child)}; the others go on", child.returncode)
            with contextlib.suppress(StorageError):
                tell(watcher)
    except KeyboardInterrupt:
        for child in left.values():
            child.wait()  # the terminal has told them, too: they pause between two steps
        return 130
    finally:
        for child in left.values():
            child.terminate()
    if 0 in statuses:
        return OK
    if any(status == 2 for status in statuses):
        raise InputError("no worker is left; what was trained is kept, and the same command goes on")
    return max((abs(status) for status in statuses), default=OK)


def _ending(child: subprocess.Popen[bytes]) -> str:
    said = child.stderr.read().decode(errors="replace").strip().splitlines() if child.stderr else []
    how = f"signal {-child.returncode}" if child.returncode < 0 else f"status {child.returncode}"
    return f"{how}: {said[-1].removeprefix('hpt: error: ')}" if said else how


# ---- what is shown -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _table(args: argparse.Namespace) -> Iterator[Callable[[Worker], None]]:
    """What is called after every turn: a live table on a terminal, a line for every turn elsewhere."""
    live = sys.stderr.isatty()
    if live:
        try:
            require("rich")
        except ModuleNotFoundError:
            live = False
    if not live:
        last = [""]

        def line(worker: Worker) -> None:
            said = summary(page.account(worker.standing(), worker.steps))
            if said != last[0]:
                last[0] = said
                print(said, file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(file=sys.stderr), auto_refresh=False) as shown:
        yield lambda worker: shown.update(table(page.account(worker.standing(), worker.steps)), refresh=True)


def summary(found: page.Account) -> str:
    """A line."""
    best = "none yet" if found.best is None else f"{found.best.value:.5g} (trial {found.best.number})"
    return (
        f"{len(found.rows)} trials: {found.complete} complete, {found.alive} waiting or in training, {found.stopped} "
        f"stopped, {found.failed} failed; {found.spent:.2f} runs spent; best {best}"
    )


def table(found: page.Account) -> Any:
    """The ranking as a rich renderable."""
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=Text(summary(found)), title_justify="left")
    for name in ("trial", "state", "trained", "shown last", "forecast", "best of all", "parameters"):
        drawn.add_column(name)
    for row in itertools.islice(found.rows, MOST_ROWS):
        drawn.add_row(*(Text(cell) for cell in page.cells(row)))
    return drawn


def told(found: page.Account, out: Path) -> str:
    """What a person wants to know at the end."""
    lines = [summary(found)]
    if found.best is not None:
        lines.append(f"best: {page.params_text(found.best.params)}: {found.best.value:.5g}")
        lines.append(f"probability that no other trial would end below: {100 * found.best.chance:.0f} %")
        lines.append(
            f"saved: {100 * found.saved:.0f} % of what all of these trials would have cost, trained to their ends"
        )
    elif found.alive:
        lines.append("no trial is complete yet: the same command with a larger --budget goes on")
    return "\n".join([*lines, f"page: {out / 'report.html'}"])
