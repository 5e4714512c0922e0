"""``hpt bench``: the measurements behind the figures in the documents."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..experiments.arms.options import as_input_error
from ..experiments.arms.recording import Recording
from ..experiments.bench import memory, overhead, profile, step_price
from ..experiments.bench import predictors as predictor_bench
from ..experiments.bench.workloads import WORKLOADS as SMALL_MODELS
from ..experiments.harm import program as harm
from ..experiments.harm import table as harm_table
from ..experiments.harm.runs import ARMS as HARM_ARMS
from ..experiments.regimes import catalogue as regimes
from ..experiments.regimes import report as regime_report
from ..experiments.regimes import runs as regime_runs
from ..experiments.regimes.cases import Request
from ..experiments.report.text import aligned
from ..predictors import PREDICTORS
from ..records import ConfigError
from ..safe_files import write_named

#: What a command returns: the object for ``--json`` and the text for a person.
Shown = tuple[Any, Callable[[], str]]

#: Where results of the regimes go, and are looked for again when a benchmark is resumed.
RESULTS = Path("results") / "regimes"
HARM_RESULTS = Path("results") / "harm"


class Converter(Protocol):
    """Makes converters for argparse that name the legal range."""

    def __call__(
        self, kind: type[int] | type[float], low: float, high: float = ..., *, above: bool = ...
    ) -> Callable[[str], Any]:
        """A converter."""


def add_commands(bench: argparse.ArgumentParser, number: Converter) -> None:
    """One sub-command per benchmark, each with flags of its own.

    Args:
        bench: The parser of ``hpt bench``; ``--json`` and ``--threads`` stand before the name or behind it.
        number: Of the command line.
    """
    whole = number(int, 1, 1_000_000_000)
    bench.add_argument("--threads", type=whole, metavar="N")
    benchmarks = bench.add_subparsers(dest="what", required=True, metavar="BENCHMARK")

    def benchmark(name: str, run: Callable[[argparse.Namespace], Shown], about: str) -> argparse.ArgumentParser:
        found = benchmarks.add_parser(name, help=about, description=about)
        found.set_defaults(measure=run)
        # no default: one would hide a flag given before the name
        found.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object")
        found.add_argument("--threads", type=whole, metavar="N", default=argparse.SUPPRESS)
        return found

    def preset(parser: argparse.ArgumentParser, default: str) -> None:
        parser.add_argument("--preset", help=f"size of the gpt task's model (default {default})")

    def predictor(parser: argparse.ArgumentParser) -> None:
        names = ", ".join(PREDICTORS)
        parser.add_argument("--predictor", action="append", metavar="NAME", help=f"may be repeated; {names}")

    cost = benchmark("overhead", run_overhead, "a full step of the trainer against the bare loop")
    cost.add_argument("--model", default="gpt", metavar="NAME", help=f"gpt (default), {', '.join(SMALL_MODELS)}")
    cost.add_argument(
        "--against", type=Path, metavar="PATH",
        help="a checkout of an earlier build to take turns with (small models)",
    )  # fmt: skip
    cost.add_argument("--rounds", type=whole, default=3, metavar="N", help="small models: all anew so often (3)")
    preset(cost, "10M")
    predictor(cost)
    cost.add_argument(
        "--steps", type=number(int, 30, 100_000), metavar="K", help="pairs (default 40); small models: steps (1000)"
    )
    cost.add_argument("--batch-size", type=whole, default=8, metavar="N")
    cost.add_argument("--context", type=whole, default=128, metavar="N")
    cost.add_argument("--device", default="cpu")

    where = benchmark("profile", run_profile, "where the CPU time of a step goes, and the tensors it makes")
    where.add_argument("--model", default="tiny", metavar="NAME", help=f"{', '.join(SMALL_MODELS)} (default tiny)")
    where.add_argument("--steps", type=whole, default=300, metavar="K", help="that count (default 300)")
    where.add_argument("--skip", type=number(int, 0, 100_000), default=100, metavar="K", help="before (default 100)")

    learnt = benchmark("predictors", run_predictors, "predictors on trajectories with a known answer")
    predictor(learnt)
    learnt.add_argument("--seeds", type=whole, default=3, metavar="N")
    learnt.add_argument("--quick", action="store_true", help="half as many windows")
    learnt.add_argument(
        "--record-real", type=Path, metavar="OUT",
        help="record a language model, a PINN and a CNN below OUT (what is there is not trained again) and replay them",
    )  # fmt: skip
    learnt.add_argument(
        "--recording", type=Path, action="append", default=[], metavar="DIR",
        help="replay windows of a run made with 'hpt train --record' instead (may be repeated)",
    )  # fmt: skip

    held = benchmark("memory", run_memory, "bytes of predictor, basis and snapshot")
    preset(held, "0.3M")
    predictor(held)

    parts = benchmark("costs", run_costs, "time of every part of a prediction")
    preset(parts, "10M")
    predictor(parts)
    parts.add_argument("--repeats", type=whole, default=20, metavar="N", help="windows that count (default 20)")
    add_stack_flags(
        benchmark("stack", run_stack, "each factor of the whole stack against conventional training"), number
    )
    add_regime_flags(benchmark("regimes", run_regimes, "speed against tuned baselines and peers"), number)
    add_harm_flags(benchmark("harm", run_harm, "ordinary training with and without the trainer: never worse?"), number)

    told = benchmark("report", run_report, "tables and plots of the results of 'hpt bench regimes'")
    told.add_argument("folder", type=Path, metavar="DIR", help=f"searched with its subfolders (see {RESULTS})")
    told.add_argument("--out", type=Path, metavar="FILE", help="the page (default DIR/regimes.html)")
    told.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here instead of printing them")


def numbers(one: Callable[[str], Any]) -> Callable[[str], tuple[float, ...]]:
    """A converter of ``0.5,1,2``."""
    return lambda text: tuple(one(piece.strip()) for piece in text.split(","))


def words(text: str) -> tuple[str, ...]:
    """A converter of ``a,b,c``."""
    return tuple(piece.strip() for piece in text.split(",") if piece.strip())


#: Arguments of ``stack.rows`` that are flags of the same name.
STACK_OPTIONS = (
    "preset", "steps", "device", "rounds", "budgets", "batch_size", "context", "data", "data_bytes", "lr", "without",
)  # fmt: skip


def add_stack_flags(parser: argparse.ArgumentParser, number: Converter) -> None:
    """Flags of ``hpt bench stack``."""
    whole = number(int, 1, 1_000_000_000)
    parser.add_argument("--preset", default="0.9M", help="size of the gpt task's model (default 0.9M)")
    parser.add_argument("--steps", type=whole, default=200, metavar="N")
    parser.add_argument("--seeds", type=number(int, 1, 1000), default=1, metavar="N")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=whole, default=10, metavar="N", help="turns of every row (default 10)")
    parser.add_argument(
        "--budgets", type=numbers(number(float, 0, 1000, above=True)), default=(0.5, 2.0), metavar="B,B"
    )
    parser.add_argument("--batch-size", type=whole, metavar="N")
    parser.add_argument("--context", type=whole, metavar="N")
    parser.add_argument("--data", metavar="PATH")
    parser.add_argument("--data-bytes", type=whole, metavar="N")
    parser.add_argument("--lr", type=number(float, 0, above=True))
    parser.add_argument("--without", type=words, default=(), metavar="A,B", help="factors to leave out")


#: Options of the tasks that override those of every case.
TASK_OPTIONS = ("preset", "data_bytes", "batch_size", "context", "device", "bf16", "compile", "fused")


def add_regime_flags(parser: argparse.ArgumentParser, number: Converter) -> None:
    """Flags of ``hpt bench regimes``."""
    whole, positive = number(int, 1, 1_000_000_000), number(float, 0, above=True)
    parser.add_argument("--regime", required=True, metavar="ID", help=", ".join(regimes.names()))
    parser.add_argument("--quick", action="store_true", help="at most ten minutes on two cores")
    parser.add_argument("--seeds", type=number(int, 1, 1000), metavar="N", help="judged runs per arm (3; quick: 2)")
    parser.add_argument("--seed", type=number(int, 0, 999), default=0, metavar="S", help="first seed (default 0)")
    parser.add_argument("--sweep-seeds", type=number(int, 1, 100), metavar="N", help="trials per rate (2)")
    parser.add_argument("--case", action="append", default=[], metavar="NAME", help="only this one; may be repeated")
    parser.add_argument("--arms", type=words, default=(), metavar="A,B", help="only these, beside plain; peers by name")
    parser.add_argument("--predictors", type=words, default=(), metavar="A,B", help="a hybrid arm for each, or 'all'")
    parser.add_argument("--budgets", type=numbers(number(float, 0, 1000, above=True)), default=(), metavar="B,B")
    parser.add_argument("--steps", type=whole, metavar="N", help="length of every case at budget 1")
    parser.add_argument("--lr-grid", type=numbers(positive), default=(), metavar="R,R", help="rates of the sweeps")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the hybrid's settings")
    parser.add_argument("--jobs", type=number(int, 1, 256), metavar="N", help="processes of a sweep (1; quick: 2)")
    parser.add_argument("--fresh", action="store_true", help="take no stored run")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="DIR", help=f"runs and results (default {RESULTS})"
    )
    task = parser.add_argument_group("task, instead of what the cases say")
    task.add_argument("--preset")
    for flag in ("data-bytes", "batch-size", "context"):
        task.add_argument(f"--{flag}", type=whole, metavar="N")
    task.add_argument("--device")
    for flag in ("bf16", "compile", "fused"):
        task.add_argument(f"--{flag}", action="store_true", default=None)


def add_harm_flags(parser: argparse.ArgumentParser, number: Converter) -> None:
    """Flags of ``hpt bench harm``."""
    parser.add_argument("--settings", type=words, default=(), metavar="A,B", help="only these (default: all)")
    parser.add_argument("--seeds", type=number(int, 1, 1000), metavar="N", help="at most so many per setting")
    parser.add_argument("--quick", action="store_true", help="a few telling settings, at most two minutes on one core")
    parser.add_argument("--arms", type=words, default=HARM_ARMS, metavar="A,B", help=", ".join(HARM_ARMS))
    parser.add_argument("--tag", metavar="NAME", help="of our build, for its runs (default: a hash of its source)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of our default configuration")
    parser.add_argument("--jobs", type=number(int, 1, 256), default=1, metavar="N", help="processes (default 1)")
    parser.add_argument("--out", type=Path, default=HARM_RESULTS, metavar="DIR", help=f"runs (default {HARM_RESULTS})")
    parser.add_argument("--report", type=Path, metavar="DIR", help="run nothing: the table of the runs in DIR")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table here as well")


def run(args: argparse.Namespace) -> Shown:
    """Measure.

    Raises:
        InputError: a name or folder is wrong.
    """
    found: Shown = args.measure(args)
    return found


def note(line: str) -> None:
    """A line for a person who waits."""
    print(line, file=sys.stderr, flush=True)


def run_regimes(args: argparse.Namespace) -> Shown:
    """All arms of a regime."""
    request = Request(
        regime=args.regime, out=args.out, quick=args.quick, seeds=args.seeds, first_seed=args.seed,
        sweep_seeds=args.sweep_seeds, jobs=args.jobs, fresh=args.fresh, cases=tuple(args.case), arms=args.arms,
        predictors=args.predictors, steps=args.steps, budgets=args.budgets, lr_grid=args.lr_grid, set=tuple(args.set),
        options={name: v for name in TASK_OPTIONS if (v := getattr(args, name)) is not None},
    )  # fmt: skip
    result = regime_runs.run_regime(request, tell=note)
    return result, lambda: regime_report.text(result)


def run_harm(args: argparse.Namespace) -> Shown:
    """Ordinary training with and without the trainer."""
    request = harm.Request(
        out=args.report or args.out, settings=args.settings, seeds=args.seeds, quick=args.quick, arms=args.arms,
        tag=args.tag, jobs=args.jobs, report=args.report is not None, set=tuple(args.set),
    )  # fmt: skip
    found = harm.run_table(request, tell=note)
    if args.markdown is not None:
        with as_input_error():
            write_named(args.markdown, harm_table.markdown(found))
    return found, lambda: harm_table.text(found)


def run_report(args: argparse.Namespace) -> Shown:
    """Tables and a page of results."""
    with as_input_error():
        written = regime_report.write(args.folder, args.out, args.markdown)
    note(f"page: {written['page']}")
    return written, lambda: str(args.markdown or written["markdown"])


def run_costs(args: argparse.Namespace) -> Shown:
    """Time of every part of a prediction."""
    from ..experiments.bench import costs

    with as_input_error():
        rows = costs.rows(
            args.preset or "10M", tuple(args.predictor or PREDICTORS), num_repeats=args.repeats, note=note
        )
    return rows, lambda: costs.text(rows)


def run_stack(args: argparse.Namespace) -> Shown:
    """The whole stack, factor by factor."""
    from ..experiments.bench import stack

    with as_input_error():
        result = stack.rows(seeds=range(args.seeds), note=note, **{name: getattr(args, name) for name in STACK_OPTIONS})
    return result, lambda: str(stack.text(result))


def run_overhead(args: argparse.Namespace) -> Shown:
    """A full step of the trainer against the bare loop."""
    if args.model != "gpt":
        with as_input_error():
            found = step_price.measure(
                args.model, num_steps=args.steps or 1000, rounds=args.rounds, against=args.against, note=note
            )
        return found, lambda: step_price.text(found)
    if args.against is not None:
        raise ConfigError(f"--against goes with a small model: --model {' or '.join(SMALL_MODELS)}")
    names = args.predictor or ["secant"]
    workload = overhead.Workload(
        preset=args.preset or "10M", batch_size=args.batch_size, context=args.context, device=args.device,
        predictor=names[0], num_pairs=args.steps or 40,
    )  # fmt: skip
    with as_input_error():
        prepared = overhead.prepare(workload)
    result = overhead.measure(prepared, note=note)
    return result, lambda: overhead.text(result)


def run_profile(args: argparse.Namespace) -> Shown:
    """Where the CPU time of a step goes."""
    with as_input_error():
        found = profile.measure(args.model, num_steps=args.steps, skip=args.skip)
    return found, lambda: profile.text(found)


def run_predictors(args: argparse.Namespace) -> Shown:
    """Each predictor on trajectories with a known answer, or on recorded runs."""
    with as_input_error():
        names = tuple(args.predictor or predictor_bench.DEFAULT_PREDICTORS)
        for name in names:
            if name not in PREDICTORS and name not in predictor_bench.REFERENCES:
                raise ConfigError(f"unknown predictor {name!r}: must be one of {', '.join(PREDICTORS)}")
        if args.record_real is not None:
            chosen = tuple(n for n in args.predictor or predictor_bench.RECORDED_PREDICTORS if n in PREDICTORS)
            rows = predictor_bench.recorded_rows(
                args.record_real, chosen, note=lambda line: print(line, file=sys.stderr)
            )
            return rows, lambda: table(rows)
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
