"""``python -m tests.golden --against PATH``: one line per run, exit 1 if any differs."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from .builds import PRESENT, build
from .drive import play, unmet
from .runs import RUNS
from .trace import Trace, added, first_difference, how_far


def traces(root: Path, names: Sequence[str], shared: Path) -> dict[str, Trace]:
    """What the runs of these names come to with the build at ``root``."""
    with build(root) as hpt:
        return {name: play(RUNS[name], hpt, shared / name) for name in names}


def told(name: str, old: Trace, new: Trace) -> tuple[bool, str]:
    """Whether a run is the same with both builds and shows what it should, and a line that says so."""
    difference = first_difference(old, new)
    if difference is not None:
        return False, f"{name:18} DIFFERS  {difference}; {how_far(old, new)}"
    missing = unmet(RUNS[name], new)
    if missing is not None:
        return False, f"{name:18} VACUOUS  {missing}"
    beside = sorted(added(old, new))
    more = f"; only in this build: {', '.join(beside[:4])}{' ...' if beside[4:] else ''}" if beside else ""
    jumps = f"{new.figure('num_jumps_accepted')} of {new.figure('num_jumps_proposed')} jumps"
    return (
        True,
        f"{name:18} same     {len(new.steps)} steps, {jumps}, {old.seconds:.2f} s and {new.seconds:.2f} s{more}",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("--against", type=Path, metavar="PATH", help="a checkout of an earlier build")
    parser.add_argument("--only", metavar="A,B", help="these runs alone")
    parser.add_argument("--list", action="store_true", help="say what the runs are, and run nothing")
    chosen = parser.parse_args(arguments)
    if chosen.list:
        print("\n".join(f"{name:18} {run.about}" for name, run in RUNS.items()))
        return 0
    names = chosen.only.split(",") if chosen.only else list(RUNS)
    unknown = [name for name in names if name not in RUNS]
    if unknown:
        parser.error(f"there is no run {unknown[0]!r}: --list names them")
    if chosen.against is None:
        parser.error("--against PATH is missing: a checkout of an earlier build, say one of git worktree add")
    if chosen.against.resolve() == PRESENT:
        print("this checkout against itself: that shows only whether the runs repeat")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder)
        for name in names:
            (shared / name).mkdir()
        old, new = traces(chosen.against, names, shared), traces(PRESENT, names, shared)
    same = 0
    for name in names:
        good, line = told(name, old[name], new[name])
        same += good
        print(line)
    print(f"{same} of {len(names)} runs are the same to the last bit")
    return 0 if same == len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
