"""``hpt report``: the page about a folder of results."""

from __future__ import annotations

import argparse

from ..experiments.arms.options import as_input_error
from ..experiments.report.page import write_report
from .arguments import OK, show


def run(args: argparse.Namespace) -> int:
    """Write the page.

    Raises:
        InputError: there is nothing to report, or the page cannot be written.
    """
    with as_input_error():
        page = write_report(args.folder, args.out)
    show(args, {"report": str(page), "bytes": page.stat().st_size}, lambda: str(page))
    return OK
