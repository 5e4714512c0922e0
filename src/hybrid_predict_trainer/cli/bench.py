"""``hpt bench``: the measurements behind the figures in the documents."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..experiments.arms.options import InputError, as_input_error
from ..experiments.arms.recording import Recording
from ..experiments.bench import memory, overhead, profile, step_price
from ..experiments.bench import predictors as predictor_bench
from ..experiments.bench.workloads import WORKLOADS as SMALL_MODELS
from ..experiments.extras import require
from ..experiments.harm import program as harm
from ..experiments.harm import table as harm_table
from ..experiments.regimes import report as regime_report
from ..experiments.regimes import runs as regime_runs
from ..experiments.regimes.cases import Request
from ..experiments.report.text import aligned
from ..experiments.rollouts import program as rollouts
from ..predictors import PREDICTORS
from ..records import ConfigError
from ..safe_files import write_between, write_named
from . import names
from .arguments import NOT_MET, OK, show

#: What a measurement returns: the object for ``--json`` and the text for a person.
Shown = tuple[Any, Callable[[], str]]

#: Arguments of ``stack.rows`` that are flags of the same name.
STACK_OPTIONS = (
    "preset", "steps", "device", "rounds", "budgets", "batch_size", "context", "data", "data_bytes", "lr", "without",
)  # fmt: skip

#: Options of the tasks that override those of every case.
TASK_OPTIONS = ("preset", "data_bytes", "batch_size", "context", "device", "bf16", "compile", "fused")


def run(args: argparse.Namespace) -> int:
    """Measure, and say whether a bar was met where there is one.

    Raises:
        InputError: a name or folder is wrong.
    """
    value, text = MEASUREMENTS[args.what](args)
    show(args, value, text)
    return NOT_MET if isinstance(value, Mapping) and value.get("passed") is False else OK


def note(line: str) -> None:
    """A line for a person who waits."""
    print(line, file=sys.stderr, flush=True)


def run_regimes(args: argparse.Namespace) -> Shown:
    """All arms of a regime."""
    if args.regime == names.ROLLOUTS:
        return run_rollouts(args)
    request = Request(
        regime=args.regime, out=args.out, quick=args.quick, seeds=args.seeds, first_seed=args.seed,
        sweep_seeds=args.sweep_seeds, jobs=args.jobs, fresh=args.fresh, cases=tuple(args.case), arms=args.arms,
        predictors=args.predictors, steps=args.steps, budgets=args.budgets, lr_grid=args.lr_grid,
        tune_budgets=args.tune_budgets, set=tuple(args.set),
        options={name: v for name in TASK_OPTIONS if (v := getattr(args, name)) is not None},
    )  # fmt: skip
    with as_input_error():
        require("scipy")  # for the tables at the end
    result = regime_runs.run_regime(request, tell=note)
    return result, lambda: regime_report.format_text(result)


def run_rollouts(args: argparse.Namespace) -> Shown:
    """Jumps in policy optimization: a task of its own, which has no loss to compare by."""
    names_of = ("sweep_seeds", "jobs", "case", "predictors", "budgets", "lr_grid", "tune_budgets", "set", *TASK_OPTIONS)
    unused = [f"--{name.replace('_', '-')}" for name in names_of if getattr(args, name)]
    if unused:
        raise InputError(f"{unused[0]} does not apply to --regime rl, whose task, rate and lengths are given")
    request = rollouts.RolloutRequest(
        out=args.out, quick=args.quick, seeds=args.seeds, first_seed=args.seed, steps=args.steps, fresh=args.fresh,
        arms=tuple(args.arms),
    )  # fmt: skip
    with as_input_error():
        require("scipy")  # for the intervals at the end
    result = rollouts.measure(request, note)
    return result, lambda: rollouts.format_text(result)


def run_harm(args: argparse.Namespace) -> Shown:
    """Ordinary training with and without the trainer."""
    request = harm.Request(
        out=args.report or args.out, settings=args.settings, seeds=args.seeds, quick=args.quick, arms=args.arms,
        tag=args.tag, jobs=args.jobs, report=args.report is not None, set=tuple(args.set),
    )  # fmt: skip
    with as_input_error():
        require("scipy")
    found = harm.run_table(request, tell=note)
    if args.markdown is not None:
        with as_input_error():
            write_named(args.markdown, harm_table.markdown(found))
    return found, lambda: harm_table.format_text(found)


def run_faults(args: argparse.Namespace) -> Shown:
    """Faults, and what becomes of them."""
    from ..experiments.faults import program, table

    with as_input_error():
        require("filelock")  # for the runs in processes of their own
        found = program.run(quick=args.quick, times=args.times, seed=args.seed, only=args.case, note=note)
        if args.markdown is not None:
            table.write_markdown(args.markdown, found)
    return found, lambda: table.format_text(found)


def run_checkpoint(args: argparse.Namespace) -> Shown:
    """What checkpoints cost a run."""
    from ..experiments.bench import checkpoint_cost

    workload = overhead.Workload(
        preset=args.preset or "10M", batch_size=args.batch_size, context=args.context, device=args.device
    )
    with as_input_error():
        found = checkpoint_cost.measure(
            workload, num_steps=args.steps, num_saves=args.saves, interval=args.interval, note=note
        )
    return found, lambda: checkpoint_cost.format_text(found)


def run_scale(args: argparse.Namespace) -> Shown:
    """What several processes cost."""
    from ..experiments.bench import scale

    with as_input_error():
        found = scale.measure(preset=args.preset or "0.3M", num_steps=args.steps, note=note, sharded=args.sharded)
        if args.markdown is not None:
            write_between(args.markdown, "scale-sharded" if args.sharded else "scale", scale.markdown(found) + "\n")
    return found, lambda: scale.format_text(found)


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
        rows = costs.measure(
            args.preset or "10M", tuple(args.predictor or PREDICTORS), num_repeats=args.repeats, note=note
        )
    return rows, lambda: costs.format_text(rows)


def run_stack(args: argparse.Namespace) -> Shown:
    """The whole stack, factor by factor."""
    from ..experiments.bench import stack

    with as_input_error():
        result = stack.measure(
            seeds=range(args.seeds), note=note, **{name: getattr(args, name) for name in STACK_OPTIONS}
        )
    return result, lambda: str(stack.format_text(result))


def run_forecast(args: argparse.Namespace) -> Shown:
    """Forecasts of final losses."""
    from ..experiments.forecasts import program

    with as_input_error():
        require("scipy")
        found = program.measure(args.curves, args.out, note)
        if args.write_priors is not None:
            write_named(args.write_priors, program.priors_text(found))
        if args.markdown is not None:
            write_named(args.markdown, program.markdown(found))
    return found, lambda: program.format_text(found)


def run_probe(args: argparse.Namespace) -> Shown:
    """Whether probes say what long comparisons have measured."""
    from ..experiments.probe import of_task

    with as_input_error():
        found = of_task.check(args.minutes, tuple(args.regime), args.quick, note)
        if args.markdown is not None:
            write_named(args.markdown, of_task.markdown(found))
    return found, lambda: of_task.format_text(found)


def run_sweep(args: argparse.Namespace) -> Shown:
    """Searches over recorded runs, or the recording of a grid."""
    from ..experiments.sweep import grids, program

    with as_input_error():
        if args.record is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            path = grids.record(args.record, note, args.out)
            return {"recorded": str(path)}, lambda: f"{path}: written"
        found = program.measure(args.grid, args.shuffles, note)
        if args.markdown is not None:
            write_named(args.markdown, program.markdown(found))
    return found, lambda: program.format_text(found)


def run_overhead(args: argparse.Namespace) -> Shown:
    """A full step of the trainer against the bare loop."""
    if args.model != "gpt":
        with as_input_error():
            found = step_price.measure(
                args.model, num_steps=args.steps or 1000, rounds=args.rounds, against=args.against, note=note
            )
        return found, lambda: step_price.format_text(found)
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
    return result, lambda: overhead.format_text(result)


def run_profile(args: argparse.Namespace) -> Shown:
    """Where the CPU time of a step goes."""
    with as_input_error():
        found = profile.measure(args.model, num_steps=args.steps, skip=args.skip)
    return found, lambda: profile.format_text(found)


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
            return rows, lambda: format_table(rows)
        recordings = [(folder.parent.name or folder.name, Recording.load(folder)) for folder in args.recording]
    if recordings:
        replayed = tuple(n for n in names if n not in predictor_bench.REFERENCES)
        rows = [row for name, recording in recordings for row in predictor_bench.replay(recording, replayed, name)]
    else:
        rows = predictor_bench.measure(names, seeds=range(args.seeds), quick=args.quick)
    return rows, lambda: format_table(rows)


def run_memory(args: argparse.Namespace) -> Shown:
    """Bytes of predictor, basis and snapshot."""
    with as_input_error():
        if args.held:
            rows = memory.held(preset=args.preset or "10M", device=args.device, num_steps=args.steps)
            return rows, lambda: format_table(rows)
        rows = memory.measure(tuple(args.predictor or PREDICTORS), preset=args.preset or "0.3M")
    return rows, lambda: format_table(rows)


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as aligned columns."""
    if not rows:
        return "nothing was measured"

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return "\n".join(aligned(tuple(rows[0]), [[cell(v) for v in row.values()] for row in rows]))


#: Benchmark -> what it calls.
MEASUREMENTS: dict[str, Callable[[argparse.Namespace], Shown]] = {
    "overhead": run_overhead,
    "profile": run_profile,
    "predictors": run_predictors,
    "memory": run_memory,
    "costs": run_costs,
    "stack": run_stack,
    "regimes": run_regimes,
    "harm": run_harm,
    "forecast": run_forecast,
    "faults": run_faults,
    "checkpoint": run_checkpoint,
    "scale": run_scale,
    "sweep": run_sweep,
    "report": run_report,
    "probe": run_probe,
}
