"""``hpt bench``: the measurements behind the figures in the documents."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .experiments import memory, overhead, predictor_bench
from .experiments.recording import Recording
from .experiments.setup import as_input_error
from .experiments.table import aligned
from .predictors import PREDICTORS
from .records import ConfigError

WHAT = ("overhead", "predictors", "memory")

#: What a command returns: the object for ``--json`` and the text for a person.
Shown = tuple[Any, Callable[[], str]]


def add_flags(
    bench: argparse.ArgumentParser, whole: Callable[[str], int | float], pairs: Callable[[str], int | float]
) -> None:
    """Flags of all benchmarks."""
    bench.add_argument("what", choices=WHAT)
    bench.add_argument("--threads", type=whole, metavar="N")
    bench.add_argument("--preset", help="size of the gpt task's model (overhead: 10M, memory: 0.3M)")
    bench.add_argument("--predictor", action="append", metavar="NAME", help=f"may be repeated; {', '.join(PREDICTORS)}")
    cost = bench.add_argument_group("overhead")
    cost.add_argument("--steps", type=pairs, default=40, metavar="K", help="pairs (default 40)")
    cost.add_argument("--batch-size", type=whole, default=8, metavar="N")
    cost.add_argument("--context", type=whole, default=128, metavar="N")
    cost.add_argument("--device", default="cpu")
    learnt = bench.add_argument_group("predictors")
    learnt.add_argument("--seeds", type=whole, default=3, metavar="N")
    learnt.add_argument("--quick", action="store_true", help="half as many windows")
    learnt.add_argument(
        "--recording", type=Path, action="append", default=[], metavar="DIR",
        help="replay windows of a run made with 'hpt train --record' instead (may be repeated)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> Shown:
    """Measure.

    Raises:
        InputError: a name or folder is wrong.
    """
    return {"overhead": run_overhead, "predictors": run_predictors, "memory": run_memory}[args.what](args)


def run_overhead(args: argparse.Namespace) -> Shown:
    """A full step of the trainer against the bare loop."""
    names = args.predictor or ["secant"]
    workload = overhead.Workload(
        preset=args.preset or "10M", batch_size=args.batch_size, context=args.context, device=args.device,
        predictor=names[0], num_pairs=args.steps,
    )  # fmt: skip
    with as_input_error():
        prepared = overhead.prepare(workload)
    result = overhead.measure(prepared, note=lambda line: print(line, file=sys.stderr))
    return result, lambda: overhead.text(result)


def run_predictors(args: argparse.Namespace) -> Shown:
    """Each predictor on trajectories with a known answer, or on recorded runs."""
    with as_input_error():
        names = tuple(args.predictor or predictor_bench.DEFAULT_PREDICTORS)
        for name in names:
            if name not in PREDICTORS and name not in predictor_bench.REFERENCES:
                raise ConfigError(f"unknown predictor {name!r}: must be one of {', '.join(PREDICTORS)}")
        recordings = [(folder.parent.name or folder.name, Recording.load(folder)) for folder in args.recording]
    if recordings:
        replayed = tuple(n for n in names if n not in predictor_bench.REFERENCES)
        rows = [row for name, recording in recordings for row in predictor_bench.replay(recording, replayed, name)]
    else:
        rows = predictor_bench.rows(names, seeds=range(args.seeds), quick=args.quick)
    return rows, lambda: table(rows)


def run_memory(args: argparse.Namespace) -> Shown:
    """Bytes of predictor, basis and snapshot."""
    with as_input_error():
        rows = memory.rows(tuple(args.predictor or PREDICTORS), preset=args.preset or "0.3M")
    return rows, lambda: table(rows)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as aligned columns."""
    if not rows:
        return "nothing was measured"

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return "\n".join(aligned(tuple(rows[0]), [[cell(v) for v in row.values()] for row in rows]))
