"""``hpt doctor``: what is wrong with a run, and what to change."""

from __future__ import annotations

import argparse

from ..doctor import diagnose, read_record
from ..safe_files import write_named
from .arguments import OK, show


def run(args: argparse.Namespace) -> int:
    """Read the records of a run and name its illnesses.

    Raises:
        ConfigError: there are no records.
    """
    found = diagnose(read_record(args.run))
    if args.patch is not None:
        write_named(args.patch, found.as_toml() + "\n")
    show(args, found.as_dict(), found.as_text)
    return OK
