"""``hpt compare``: plain arms and a hybrid one, side by side."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from typing import Any

from ..experiments.arms.options import as_input_error
from ..experiments.compare import run as comparing
from ..experiments.compare.plan import Said, planned
from ..experiments.extras import require
from ..experiments.report import text as table
from ..experiments.run_arm import ArmRun, in_steps, write_json
from ..experiments.run_folder import locked, refuse_used
from .arguments import INTERRUPTED, OK, complain, folder_of, options_of, show
from .progress import Progress

#: What to do where a comparison is in the way.
COMPARED = "add --resume to continue it, --overwrite to replace it, or choose another --out"


def run(args: argparse.Namespace) -> int:
    """Compare, or go on with a comparison that was stopped.

    Raises:
        InputError: the plan cannot be carried out, or is not that of the comparison to be resumed.
    """
    with as_input_error():
        require("filelock", "jinja2", "matplotlib", "scipy")  # what the end needs, asked for at the beginning
    out = folder_of(args)
    if not args.overwrite and not args.resume:
        refuse_used(out, COMPARED)
    plan, said = planned(Said(
        options=options_of(args), seed=args.seed, seeds=args.seeds, budgets=args.budgets, tune=args.tune,
    ), out, resume=args.resume)  # fmt: skip
    bar = sys.stderr.isatty()

    def watch(label: str, trainer: Any, total: int) -> Callable[[Any], None]:
        return Progress(trainer, total, name=label) if bar else lambda result: None

    def done(label: str, run: ArmRun) -> None:
        loss = f"validation loss {run.final_val_loss:.5g}" if not run.error else f"diverged: {run.error}"
        start = "\r\x1b[2K" if bar else ""
        note = f"{start}{label}: {loss}, cost {in_steps(run.cost_units):.1f} steps, {run.wall_s:.2f} s"
        with contextlib.suppress(OSError):  # the terminal has been closed
            print(note, file=sys.stderr)

    with locked(out):
        if not args.resume:
            if not args.overwrite:
                refuse_used(out, COMPARED)  # somebody else may have been quicker
            comparing.clear(out)
            with as_input_error():
                write_json(out / "plan.json", said)
        try:
            result = comparing.compare(plan, watch, done)
        except KeyboardInterrupt:
            return complain(f"interrupted; finished runs are kept: add --resume to go on ({out})", INTERRUPTED)
    show(args, result, lambda: f"{table.comparison(result)}\n\nresults in {out}, page {out / 'report.html'}")
    return OK
