"""``python -m tests.ranks --steps 1000``: every rank's decisions, generator and weights, compared at every step."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .drive import alone, apart, rank_run, with_ranks
from .material import CASES

#: Weights of two ranks and of one process with the whole batch: rounding, carried through the steps.
TOLERANCE = 1e-6


def _play(name: str, driver: str, steps: int, sharded: bool, rank: int, size: int) -> object:
    found, run = rank_run(name, driver, steps, rank, size, sharded=sharded)
    exchanged, number = run.subject.ranks.exchanged, run.subject.ranks.num_brought_together
    return found, exchanged, number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.ranks", description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="steps of each run (default 1000)")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes (default 2)")
    parser.add_argument("--only", metavar="A,B", help="these cases alone: " + ", ".join(CASES))
    parser.add_argument("--sharded", action="store_true", help="weights spread by fully_shard, instead of DDP")
    parser.add_argument("--lr", type=float, metavar="X", help="learning rate, instead of the case's own")
    chosen = parser.parse_args(arguments)
    if chosen.lr is not None:
        CASES.update({name: replace(case, lr=chosen.lr) for name, case in CASES.items()})
    failed = False
    for name in chosen.only.split(",") if chosen.only else CASES:
        for driver in ("trainer", "attach"):
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                try:
                    ranks = with_ranks(chosen.ranks, Path(folder), _play, name, driver, chosen.steps, chosen.sharded)
                except AssertionError as error:
                    print(f"{name:8} {driver:8} PARTED  {str(error).strip().splitlines()[-1]}")
                    failed = True
                    continue
            found, exchanged, together = ranks[0]
            single = "not compared"
            if name != "network":  # what a clock decides is another run every time
                differs = apart(found, alone(name, driver, chosen.steps), TOLERANCE)
                single, failed = differs or "the same", failed or bool(differs)
            phases = Counter(step["phase"] for step in found)
            jumps = sum(step["kept"] for step in found)
            print(
                f"{name:8} {driver:8} {len(found)} steps the same on {chosen.ranks} ranks, {jumps} jumps of "
                f"{phases['predict']}, multiplier {found[-1]['multiplier']:g}, {exchanged[0] / len(found):.1f} "
                f"exchanges of {exchanged[1] / exchanged[0]:.0f} bytes per step, brought together "
                f"{together} times; one process with the whole batch: {single}; {time.perf_counter() - began:.0f} s",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
