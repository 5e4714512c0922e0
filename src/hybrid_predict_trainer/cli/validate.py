"""``hpt validate``: experiments with criteria and controls."""

from __future__ import annotations

import argparse
import sys

from ..experiments.arms.options import as_input_error
from ..experiments.extras import require
from ..experiments.run_folder import locked
from ..experiments.validation import program
from ..safe_files import write_named
from .arguments import INTERRUPTED, OK, complain, show


def run(args: argparse.Namespace) -> int:
    """Run what is missing, and judge.

    Raises:
        InputError: a stored result is damaged or of another version, or there is one seed only.
    """
    with as_input_error():
        require("filelock", "scipy")
    experiments = tuple(args.experiment or program.EXPERIMENTS)
    with locked(args.out):
        try:
            with as_input_error():
                found = program.validate(
                    experiments, args.scale, args.seeds, args.out,
                    lambda line: print(line, file=sys.stderr, flush=True),
                )  # fmt: skip
                if args.markdown is not None:
                    write_named(args.markdown, program.markdown(found))
        except KeyboardInterrupt:
            return complain(f"interrupted; finished seeds are kept: the same command goes on ({args.out})", INTERRUPTED)
    show(args, found, lambda: program.text(found))
    return OK
