"""``hpt probe``: what prediction would bring on a task."""

from __future__ import annotations

import argparse
import sys

from ..experiments.arms.options import InputError, as_input_error
from ..experiments.probe.of_task import probe_task
from ..experiments.probe.rewards import format_verdicts, verdicts
from ..experiments.probe.run import format_text
from ..safe_files import write_named
from .arguments import OK, options_of, show


def run(args: argparse.Namespace) -> int:
    """Train pilots and report.

    Raises:
        InputError: the task cannot be made, there is time for too few steps, or settings are wanted where none are
            recommended.
    """
    if args.rewards:
        if args.toml is not None:
            raise InputError("--toml: the defaults are what was measured with --rewards, there are no other settings")
        if args.task is not None:
            raise InputError(f"--task {args.task}: --rewards trains nothing; leave one of the two out")
        show(args, verdicts(), format_verdicts)
        return OK
    with as_input_error():
        report = probe_task(
            options_of(args), minutes=args.minutes, seed=args.seed or 0, pilot_steps=args.pilot_steps,
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )  # fmt: skip
        if args.toml is not None:
            write_named(args.toml, report.to_toml())
    show(args, report.to_json(), lambda: format_text(report))
    return OK
