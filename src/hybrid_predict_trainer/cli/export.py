"""``hpt export``: a run's record as a table."""

from __future__ import annotations

import argparse

from ..experiments.arms.options import as_input_error
from ..experiments.export import export, told
from .arguments import OK, show


def run(args: argparse.Namespace) -> int:
    """Write the table.

    Raises:
        InputError: there is no record, pyarrow is not installed, or the table cannot be written.
    """
    with as_input_error():
        found = told(*export(args.run, args.out))
    show(args, dict(found), lambda: "\n".join([f"{found['table']}: {found['rows']} rows", *found["notices"]]))
    return OK
