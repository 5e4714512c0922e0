"""Flags of ``hpt bench``: one sub-command per benchmark."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from . import names
from .arguments import budgets, examples, name_of, number, numbers, positive, whole, words

#: Where results of the regimes go, and are looked for again when a benchmark is resumed.
RESULTS = Path("results") / "regimes"
HARM_RESULTS = Path("results") / "harm"
FORECAST_RESULTS = Path("results") / "forecast"


class Benchmarks:
    """Adds benchmarks to the parser of ``hpt bench``; ``--json`` and ``--threads`` stand before the name or behind."""

    def __init__(self, bench: argparse.ArgumentParser) -> None:
        """Args: bench: the parser of ``hpt bench``."""
        bench.add_argument("--threads", type=whole, metavar="N", help="of the processor (default all)")
        self._parsers = bench.add_subparsers(
            dest="what", required=True, metavar="BENCHMARK", title="benchmarks", prog="hpt bench"
        )

    def add(
        self, name: str, help_: str, description: str, *lines: str, usage: str = "%(prog)s [OPTIONS]"
    ) -> argparse.ArgumentParser:
        """A benchmark.

        Args:
            name: Of the sub-command; ``bench.MEASUREMENTS`` has what it calls.
            help_: A few words for the list of benchmarks.
            description: A sentence.
            lines: Examples.
            usage: What stands behind the name.
        """
        found = self._parsers.add_parser(
            name, help=help_, description=description, epilog=examples(*lines),
            usage=usage,
        )  # fmt: skip
        # no default: one would hide a flag given before the name
        found.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object instead of text"
        )
        found.add_argument(
            "--threads", type=whole, metavar="N", default=argparse.SUPPRESS, help="of the processor (default all)"
        )
        return found


def add_commands(bench: argparse.ArgumentParser) -> None:
    """One sub-command per benchmark, each with flags of its own."""
    benchmarks = Benchmarks(bench)
    _add_overhead(benchmarks)
    _add_profile(benchmarks)
    _add_predictors(benchmarks)
    _add_memory(benchmarks)
    _add_costs(benchmarks)
    _add_stack(benchmarks)
    _add_regimes(benchmarks)
    _add_harm(benchmarks)
    _add_forecast(benchmarks)
    _add_probe(benchmarks)
    _add_faults(benchmarks)
    _add_checkpoint(benchmarks)
    _add_scale(benchmarks)
    _add_sweep(benchmarks)
    _add_report(benchmarks)


def _preset(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--preset", metavar="NAME", help=f"size of the gpt task's model, weights (default {default})")


def _predictor(parser: argparse.ArgumentParser, default: str, more: tuple[str, ...] = ()) -> None:
    names_ = ", ".join((*names.PREDICTORS, *more))
    parser.add_argument(
        "--predictor", action="append", metavar="NAME", help=f"may be repeated (default {default}); {names_}"
    )


def _task_flags(parser: argparse._ActionsContainer) -> None:
    """Sizes of a step."""
    parser.add_argument("--batch-size", type=whole, metavar="N", help="examples per step (default the task's)")
    parser.add_argument("--context", type=whole, metavar="N", help="tokens per example (default the model's)")
    parser.add_argument("--data-bytes", type=whole, metavar="N", help="read at most N bytes of text (default all)")


def _device(parser: argparse._ActionsContainer, default: str | None = "cpu") -> None:
    parser.add_argument("--device", default=default, metavar="NAME", help="cpu, cuda, mps, ... (default cpu)")


def _add_overhead(benchmarks: Benchmarks) -> None:
    cost = benchmarks.add(
        "overhead", "a full step of the trainer against the bare loop",
        "Times full steps of the trainer beside steps of the bare loop, in pairs, and counts memory\n"
        "and tensors that the host reads.",
        "hpt bench overhead --preset 0.9M --steps 60",
        "hpt bench overhead --model tiny --against ../earlier-checkout",
    )  # fmt: skip
    models = ", ".join(names.SMALL_MODELS)
    cost.add_argument("--model", default="gpt", metavar="NAME", help=f"gpt (default), or a small one: {models}")
    cost.add_argument(
        "--against", type=Path, metavar="PATH",
        help="a checkout of an earlier build to take turns with (small models)",
    )  # fmt: skip
    cost.add_argument(
        "--rounds", type=whole, default=3, metavar="N", help="small models: all anew so often (default 3)"
    )
    _preset(cost, "10M")
    _predictor(cost, "secant")
    cost.add_argument(
        "--steps", type=number(int, 30, 100_000), metavar="K",
        help="pairs of steps (default 40); small models: steps (default 1000)",
    )  # fmt: skip
    cost.add_argument("--batch-size", type=whole, default=8, metavar="N", help="examples per step (default 8)")
    cost.add_argument("--context", type=whole, default=128, metavar="N", help="tokens per example (default 128)")
    _device(cost)


def _add_profile(benchmarks: Benchmarks) -> None:
    where = benchmarks.add(
        "profile", "where the CPU time of a step goes, and the tensors it makes",
        "Says where the CPU time of a step goes, folder by folder, and how many tensors it makes.",
        "hpt bench profile --model tiny",
    )  # fmt: skip
    models = ", ".join(names.SMALL_MODELS)
    where.add_argument("--model", default="tiny", metavar="NAME", help=f"{models} (default tiny)")
    where.add_argument("--steps", type=whole, default=300, metavar="K", help="steps that count (default 300)")
    where.add_argument(
        "--skip", type=number(int, 0, 100_000), default=100, metavar="K", help="steps before them (default 100)"
    )


def _add_predictors(benchmarks: Benchmarks) -> None:
    learnt = benchmarks.add(
        "predictors", "predictors on trajectories with a known answer",
        "Asks every predictor to continue trajectories whose end is known, made up or recorded, and\n"
        "says how much of the way it got right.",
        "hpt bench predictors --quick",
        "hpt bench predictors --recording results/first/recording --predictor secant",
    )  # fmt: skip
    _predictor(learnt, "a selection", names.REFERENCES)
    learnt.add_argument("--seeds", type=whole, default=3, metavar="N", help="trajectories of a kind (default 3)")
    learnt.add_argument("--quick", action="store_true", help="half as many windows")
    learnt.add_argument(
        "--record-real", type=Path, metavar="OUT",
        help="record a language model, a PINN and a CNN below OUT (what is there is not trained again) and replay them",
    )  # fmt: skip
    learnt.add_argument(
        "--recording", type=Path, action="append", default=[], metavar="DIR",
        help="replay windows of a run made with 'hpt train --record' instead (may be repeated)",
    )  # fmt: skip


def _add_memory(benchmarks: Benchmarks) -> None:
    held = benchmarks.add(
        "memory", "bytes that predictor, basis and snapshot hold",
        "Counts the bytes that are held between steps: predictor, basis and snapshot.",
        "hpt bench memory --preset 0.3M --predictor secant",
        "hpt bench memory --held",
    )  # fmt: skip
    held.add_argument(
        "--held", action="store_true",
        help="instead, the most that default settings hold on the training device, over what the bare loop holds",
    )  # fmt: skip
    held.add_argument("--steps", type=whole, default=60, metavar="K", help="with --held: real steps (default 60)")
    _device(held)
    _preset(held, "0.3M, with --held 10M")
    _predictor(held, "all")


def _add_costs(benchmarks: Benchmarks) -> None:
    parts = benchmarks.add(
        "costs", "time of every part of a prediction",
        "Times every part of a prediction: observing, asking, judging, applying.",
        "hpt bench costs --preset 0.9M --repeats 10",
    )  # fmt: skip
    _preset(parts, "10M")
    _predictor(parts, "all")
    parts.add_argument("--repeats", type=whole, default=20, metavar="N", help="windows that count (default 20)")


def _add_stack(benchmarks: Benchmarks) -> None:
    stack = benchmarks.add(
        "stack", "each factor of the whole stack against conventional training",
        "Adds one factor after the other (compilation, number format, attention, prediction, ...) to\n"
        "conventional training and measures what each is worth.",
        "hpt bench stack --preset 0.9M --steps 200 --without compile",
    )  # fmt: skip
    stack.add_argument(
        "--preset", default="0.9M", metavar="NAME", help="size of the gpt task's model, weights (default 0.9M)"
    )
    stack.add_argument("--steps", type=whole, default=200, metavar="N", help="length of a run (default 200)")
    stack.add_argument("--seeds", type=number(int, 1, 1000), default=1, metavar="N", help="runs per row (default 1)")
    _device(stack)
    stack.add_argument("--rounds", type=whole, default=10, metavar="N", help="turns of every row (default 10)")
    stack.add_argument(
        "--budgets", type=budgets, default=(0.5, 2.0), metavar="B,B",
        help="lengths of plain runs, times --steps (default 0.5,2)",
    )  # fmt: skip
    _task_flags(stack)
    stack.add_argument("--data", metavar="PATH", help="text file or folder (default the task's)")
    stack.add_argument("--lr", type=positive, metavar="RATE", help="peak learning rate (default the task's)")
    stack.add_argument("--without", type=words, default=(), metavar="A,B", help="factors to leave out")


def _add_regimes(benchmarks: Benchmarks) -> None:
    parser = benchmarks.add(
        "regimes", "speed against tuned baselines and published methods",
        "Trains every arm of a regime at its own tuned learning rate and says how much a plain run\n"
        "would have had to spend for the same loss.  Runs that are there are not made again.",
        "hpt bench regimes --regime pinn --quick", "hpt bench regimes --regime lm --arms hybrid,ema --seeds 5",
        "hpt bench regimes --regime rl",
        usage="%(prog)s --regime ID [OPTIONS]",
    )  # fmt: skip
    parser.add_argument("--regime", required=True, metavar="ID", help=", ".join((*names.REGIMES, names.ROLLOUTS)))
    parser.add_argument("--quick", action="store_true", help="at most ten minutes on two cores")
    parser.add_argument(
        "--seeds", type=number(int, 1, 1000), metavar="N", help="judged runs per arm (default 3; quick: 2)"
    )
    parser.add_argument(
        "--seed", type=number(int, 0, 999), metavar="S", help="first seed (default 0, or the case's own)"
    )
    parser.add_argument("--sweep-seeds", type=number(int, 1, 100), metavar="N", help="trials per rate (default 2)")
    parser.add_argument("--case", action="append", default=[], metavar="NAME", help="only this one; may be repeated")
    parser.add_argument(
        "--arms", type=words, default=(), metavar="A,B", help="only these, beside plain; published methods by name"
    )
    parser.add_argument("--predictors", type=words, default=(), metavar="A,B", help="a hybrid arm for each, or 'all'")
    parser.add_argument(
        "--budgets", type=budgets, default=(), metavar="B,B",
        help="lengths of plain runs, times the case's (default the case's)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=whole, metavar="N", help="length of every case at budget 1 (default the case's)"
    )
    parser.add_argument(
        "--lr-grid", type=numbers(positive), default=(), metavar="R,R", help="rates of the sweeps (default the case's)"
    )
    parser.add_argument(
        "--tune-budgets", action="store_true", help="runs of other lengths choose a rate of their own, out of three"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the hybrid's settings")
    parser.add_argument(
        "--jobs", type=number(int, 1, 256), metavar="N", help="processes of a sweep (default 1; quick: 2)"
    )
    parser.add_argument("--fresh", action="store_true", help="take no stored run")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="DIR", help=f"runs and results (default {RESULTS})"
    )
    task = parser.add_argument_group("task, instead of what the cases say")
    task.add_argument("--preset", metavar="NAME", help="size or variant of the task's model")
    _task_flags(task)
    _device(task, None)
    task.add_argument("--bf16", action="store_true", default=None, help="compute in bfloat16 (autocast)")
    task.add_argument("--compile", action="store_true", default=None, help="compile the model (torch.compile)")
    task.add_argument("--fused", action="store_true", default=None, help="fused optimizer, where there is one")


def _add_harm(benchmarks: Benchmarks) -> None:
    parser = benchmarks.add(
        "harm", "ordinary training with and without the trainer: never worse?",
        "Trains some forty ordinary settings with and without the trainer and says whether ours is\n"
        "ever worse than noise allows.  Runs that are there are not made again.",
        "hpt bench harm --quick", "hpt bench harm --settings gru-linear,lstm-text --seeds 3",
    )  # fmt: skip
    listed = textwrap.fill(", ".join(names.HARM_SETTINGS), 86, break_on_hyphens=False)
    parser.epilog = f"settings:\n{textwrap.indent(listed, '  ')}\n\n{parser.epilog}"
    parser.add_argument("--settings", type=words, default=(), metavar="A,B", help="only these (default all)")
    parser.add_argument(
        "--seeds", type=number(int, 1, 1000), metavar="N", help="at most N per setting (default the setting's)"
    )
    parser.add_argument("--quick", action="store_true", help="a few telling settings, at most two minutes on one core")
    parser.add_argument(
        "--arms", type=words, default=names.HARM_ARMS, metavar="A,B",
        help=f"{', '.join(names.HARM_ARMS)} (default all)",
    )  # fmt: skip
    parser.add_argument("--tag", metavar="NAME", help="of our build, for its runs (default a hash of its source)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of our default configuration")
    parser.add_argument("--jobs", type=number(int, 1, 256), default=1, metavar="N", help="processes (default 1)")
    parser.add_argument("--out", type=Path, default=HARM_RESULTS, metavar="DIR", help=f"runs (default {HARM_RESULTS})")
    parser.add_argument("--report", type=Path, metavar="DIR", help="run nothing: the table of the runs in DIR")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table here as well")


def _add_forecast(benchmarks: Benchmarks) -> None:
    ends = benchmarks.add(
        "forecast", "forecasts of final losses, on published curves and on small runs made here",
        "Forecasts the final loss of published runs (HPT_DATA_DIR/loss-curves) and of 48 small runs\n"
        "that it trains itself where they are missing, with the law's shape learnt on other models.",
        "hpt bench forecast", "hpt bench forecast --curves published",
    )  # fmt: skip
    ends.add_argument("--curves", choices=["published", "own", "all"], default="all", help="which runs (default all)")
    ends.add_argument(
        "--out", type=Path, default=FORECAST_RESULTS, metavar="DIR",
        help=f"folder of the own runs (default {FORECAST_RESULTS})",
    )  # fmt: skip
    ends.add_argument("--write-priors", type=Path, metavar="FILE", help="write the priors that come out")
    ends.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables for a document")


def _add_probe(benchmarks: Benchmarks) -> None:
    probes = benchmarks.add(
        "probe", "whether probes expect the gains that were measured",
        "Probes five kinds of training whose speed-up was measured, and says whether the expected\n"
        "gain's interval holds it.",
        "hpt bench probe", "hpt bench probe --quick --regime pinn --regime epochs",
    )  # fmt: skip
    probes.add_argument(
        "--regime", choices=names.PROBED, action="append", default=[], metavar="NAME",
        help=f"{', '.join(names.PROBED)}; may be repeated (default all)",
    )  # fmt: skip
    probes.add_argument("--minutes", type=positive, default=5.0, metavar="M", help="of each probe (default 5)")
    probes.add_argument("--quick", action="store_true", help="pilots of at most 300 steps, and one of each")
    probes.add_argument("--markdown", type=Path, metavar="FILE", help="write the table for a document")


def _add_faults(benchmarks: Benchmarks) -> None:
    parser = benchmarks.add(
        "faults", "crashes, damaged files, bad numbers: what is survived?",
        "Kills and stops runs, damages checkpoints, spoils losses, gradients, predictors, data and\n"
        "clocks, and counts what was survived and what was lost.",
        "hpt bench faults --quick", "hpt bench faults --case 'kill -9' --case checkpoint",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a try or two per case, no processes: half a minute")
    parser.add_argument(
        "--times", type=number(int, 1, 10_000), default=1, metavar="K", help="K times as many tries, with other seeds"
    )
    parser.add_argument("--seed", type=number(int, 0, 10**6), default=0, metavar="S", help="first seed (default 0)")
    parser.add_argument("--case", action="append", default=[], metavar="NAME", help="or a part of it; may be repeated")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the table here as well, between its marks if it has them"
    )


def _add_checkpoint(benchmarks: Benchmarks) -> None:
    parser = benchmarks.add(
        "checkpoint", "what checkpoints cost a run, written at once and in the background",
        "Counts the CPU time of steps and of checkpoints, of the training thread and of all threads.",
        "hpt bench checkpoint --preset 0.9M --interval 100",
    )  # fmt: skip
    _preset(parser, "10M")
    parser.add_argument("--steps", type=whole, default=6, metavar="K", help="steps that are timed (default 6)")
    parser.add_argument("--saves", type=whole, default=3, metavar="N", help="checkpoints of each kind (default 3)")
    parser.add_argument(
        "--interval", type=whole, default=100, metavar="K", help="steps between two checkpoints of a run (default 100)"
    )
    parser.add_argument("--batch-size", type=whole, default=8, metavar="N", help="examples per step (default 8)")
    parser.add_argument("--context", type=whole, default=128, metavar="N", help="tokens per example (default 128)")
    _device(parser)


def _add_scale(benchmarks: Benchmarks) -> None:
    parser = benchmarks.add(
        "scale", "what several processes cost: bytes moved, memory, time per jump",
        "Runs a small model on two processes of this machine, counts what they exchange, and computes\n"
        "from that a table up to 70 B weights and 1,024 ranks.",
        "hpt bench scale --markdown docs/scale.md", "hpt bench scale --sharded --markdown docs/scale.md",
    )  # fmt: skip
    _preset(parser, "0.3M")
    parser.add_argument("--sharded", action="store_true", help="weights spread by fully_shard, instead of copied")
    parser.add_argument("--steps", type=whole, default=60, metavar="K", help="steps that are counted (default 60)")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the table here as well, between its marks if it has them"
    )


def _add_sweep(benchmarks: Benchmarks) -> None:
    parser = benchmarks.add(
        "sweep", "searches over recorded runs: what stopping early saves, and whether the best is found",
        "Replays searches over runs that were trained once and recorded, with our ways of stopping and\n"
        "Optuna's pruners, and the published curves of HPT_DATA_DIR/loss-curves if they are there.",
        "hpt bench sweep --shuffles 50 --json", "hpt bench sweep --grid gpt-source --shuffles 10",
        "hpt bench sweep --record cnn",
    )  # fmt: skip
    grid = name_of("grid", (*names.SWEEP_GRIDS, "published"))
    parser.add_argument(
        "--grid", type=grid, action="append", default=[], metavar="NAME",
        help=f"{', '.join(names.SWEEP_GRIDS)} or published; may be repeated (default all that are there)",
    )  # fmt: skip
    parser.add_argument("--shuffles", type=whole, default=50, metavar="N", help="problems per grid (default 50)")
    parser.add_argument(
        "--record", type=name_of("grid", names.SWEEP_GRIDS), metavar="NAME",
        help="train a grid anew and write its file into --out; replay nothing",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="folder of --record (default here)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables for a document")


def _add_report(benchmarks: Benchmarks) -> None:
    told = benchmarks.add(
        "report", "tables and figures of the results of 'hpt bench regimes'",
        "Writes a page with the figures, and prints the tables, of the results of 'hpt bench regimes'.",
        f"hpt bench report {RESULTS} --markdown tables.md", usage="%(prog)s DIR [OPTIONS]",
    )  # fmt: skip
    told.add_argument("folder", type=Path, metavar="DIR", help=f"searched with its subfolders (see {RESULTS})")
    told.add_argument("--out", type=Path, metavar="FILE", help="the page (default DIR/regimes.html)")
    told.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here instead of printing them")
