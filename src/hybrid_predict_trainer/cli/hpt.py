"""The command ``hpt``: all flags, and which module runs a command.

The parser imports neither torch nor numpy: help, ``--version`` and a wrong option answer at once.  What a command
needs is imported when it runs.  With ``--json`` standard output is one JSON object; progress goes to standard error.
Exit statuses: `arguments.STATUSES`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from ..version import __version__
from . import bench_arguments
from .arguments import (
    BAD_INPUT,
    CHECKPOINT,
    DIVERGED,
    INTERRUPTED,
    OK,
    STATUSES,
    Parser,
    add_task_flags,
    budgets,
    complain,
    examples,
    name_of,
    number,
    take_preset,
    what_is_missing,
    whole,
)
from .names import ABLATIONS, PRIORS, SAMPLERS, TASKS

#: Flags that name a file which is written when all else is done.
FILES = ("markdown", "patch", "toml", "write_priors")
#: Command -> the module beside this one whose ``run`` it calls.
COMMANDS = {
    "train": ".train", "compare": ".compare", "inspect": ".inspect", "report": ".report", "forecast": ".forecast",
    "recipe": ".recipe", "validate": ".validate", "doctor": ".doctor", "watch": ".watch", "probe": ".probe",
    "plan": ".plan", "sweep": ".sweep", "export": ".export", "bench": ".bench",
}  # fmt: skip

DESCRIPTION = """\
Trains models by gradient steps, and takes part of the way by predicted jumps
where measured losses say that this pays.
"""

EPILOG = f"""\
{
    examples(
        "hpt train --task pinn-poisson --steps 2000 --out results/first",
        "hpt compare --task pinn-poisson --seeds 3 --tune --out results/compared",
        "hpt report results/compared",
    )
}

{STATUSES}
'hpt COMMAND --help' explains a command.  With --json, standard output is one JSON
object; progress and warnings go to standard error.
"""


# ---- the parser --------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """All commands and flags."""
    parser = Parser(prog="hpt", usage="hpt COMMAND [OPTIONS]", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"hpt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands", prog="hpt")

    def command(
        name: str, help_: str, description: str, *lines: str, usage: str = "%(prog)s [OPTIONS]"
    ) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=help_, description=description, epilog=examples(*lines), usage=usage)
        found.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        return found

    _add_train(command(
        "train", "train a model once",
        "Trains a model once and keeps weights, metrics and settings in a folder, from which\n"
        "a run that was stopped goes on bit for bit.",
        "hpt train --task pinn-poisson --steps 2000 --out results/first",
        "hpt train --resume --out results/first",
        "hpt train --preset debug",
        "hpt train --task gpt --preset 0.3M --data corpus.txt --set training.full_steps=30",
    ))  # fmt: skip
    _add_compare(command(
        "compare", "train with and without prediction, and compare",
        "Trains plainly and with prediction from the same seeds, and says how much a plain\n"
        "run would have had to spend for the same loss, with its interval.",
        "hpt compare --task pinn-poisson --steps 2000 --seeds 3 --tune --out results/compared",
    ))  # fmt: skip
    inspect = command(
        "inspect", "verify and describe a checkpoint",
        "Checks every byte of a checkpoint against its manifest and says what it holds.",
        "hpt inspect results/first", usage="%(prog)s PATH [OPTIONS]",
    )  # fmt: skip
    inspect.add_argument("checkpoint", type=Path, metavar="PATH", help="a checkpoint, or a run's folder: its latest")
    report = command(
        "report", "write the page about a folder of results",
        "Writes one HTML page with the figures and tables of a run, a comparison, the validation\n"
        "protocol or a search.  The page loads nothing and runs no script.",
        "hpt report results/compared --out page.html", usage="%(prog)s DIR [OPTIONS]",
    )  # fmt: skip
    report.add_argument("folder", type=Path, metavar="DIR", help="of 'hpt train', 'compare', 'validate' or 'sweep'")
    report.add_argument("--out", type=Path, metavar="FILE", help="the page (default DIR/report.html)")
    doctor = command(
        "doctor", "what is wrong with a run, and what to change",
        "Reads the records of a run, finished or not, and names what is wrong with it: what was\n"
        "seen, what is healthy, what it means, what to do, and the settings to change as TOML.",
        "hpt doctor results/first --patch patch.toml", usage="%(prog)s RUN [OPTIONS]",
    )  # fmt: skip
    doctor.add_argument("run", type=Path, metavar="RUN", help="a folder of 'hpt train', or a metrics file (JSON lines)")
    doctor.add_argument("--patch", type=Path, metavar="FILE", help="write the settings to change (TOML)")
    export = command(
        "export", "a run's record as a table (Parquet)",
        "Writes the records of a run, finished or not, as a Parquet file: one row per record, one\n"
        "column per name.  The record itself, metrics.jsonl, stays what counts.",
        "hpt export results/first", usage="%(prog)s RUN [OPTIONS]",
    )  # fmt: skip
    export.add_argument("run", type=Path, metavar="RUN", help="a folder of 'hpt train', or a metrics file (JSON lines)")
    export.add_argument(
        "--out", type=Path, metavar="FILE", help="the table (default metrics_history.parquet beside the record)"
    )
    recipe = command(
        "recipe", "the step sizes of a run, to take home into a plain script",
        "Prints the rates per role of parameters that a run was trained with, times the multiplier\n"
        "that it has learned, and the lines that make parameter groups of them.",
        "hpt recipe results/first", usage="%(prog)s PATH [OPTIONS]",
    )  # fmt: skip
    recipe.add_argument("path", type=Path, metavar="PATH", help="a run's folder, or a recipe's file")
    watch = command(
        "watch", "a run in progress, in the terminal",
        "Shows a run while it goes on: step, phase, losses, jumps, the curve, and what 'hpt doctor'\n"
        "says of it.  Ctrl-C ends the watching, not the run.",
        "hpt watch results/first", usage="%(prog)s DIR [OPTIONS]",
    )  # fmt: skip
    watch.add_argument("run", type=Path, metavar="DIR", help="folder of 'hpt train'")
    watch.add_argument("--once", action="store_true", help="show it once")
    watch.add_argument(
        "--every", type=number(float, 0.1, 3600), default=2.0, metavar="S", help="seconds between two looks (default 2)"
    )
    _add_forecast(command(
        "forecast", "the final loss of a run in progress, from its log",
        "Forecasts the final loss of a run from its loss curve and its learning rates, with an\n"
        "interval.  The run may be anybody's: a table (CSV), JSON lines, trainer_state.json,\n"
        "TensorBoard event files, an export of Weights & Biases, or a folder of 'hpt train'.",
        "hpt forecast results/first",
        "hpt forecast log.csv --schedule cosine:warmup=2000,final=0.1 --steps 24000",
        usage="%(prog)s RUN [OPTIONS]",
    ))  # fmt: skip
    _add_validate(command(
        "validate", "experiments on whether training can be predicted at all",
        "Runs the experiments of the validation protocol and holds every criterion against its bar\n"
        "and against a control in which there is nothing to find.  Finished seeds are kept in --out.",
        "hpt validate --scale tiny --seeds 2", "hpt validate --experiment 2 --seeds 5",
        "hpt validate --acceptance --markdown tables.md", "hpt validate --ablation horizon",
    ))  # fmt: skip
    _add_probe(command(
        "probe", "what prediction would bring on a task, from minutes of pilots",
        "Trains short pilots with and without prediction and says what jumps and step sizes are worth\n"
        "there, with an interval, what kind of training it is, and which settings suit it.",
        "hpt probe --task gpt --preset 0.3M --steps 2000", "hpt probe --task regression --minutes 1 --toml probe.toml",
    ))  # fmt: skip
    _add_plan(command(
        "plan", "which settings a model fits a card's memory with",
        "Estimates what a training step holds at its peak, by a step with tensors that have no contents,\n"
        "and switches on what needs less memory until it fits.  --check holds the estimates against the\n"
        "allocations of real runs of small models on the CPU.",
        "hpt plan --params 1B --gpu 16GB", "hpt plan --task gpt --preset 10M --gpu 12GB", "hpt plan --check",
    ))  # fmt: skip
    _add_sweep(command(
        "sweep", "a hyper-parameter search whose trials are paused and go on",
        "Searches a space of parameters.  Trials are trained in slices: the one that is forecast to end\n"
        "best goes on, those that cannot win stop, and a paused one costs nothing.  The same command\n"
        "goes on with a search that was interrupted, and joins one that is under way.",
        "hpt sweep --task gpt --steps 500 --space space.toml --budget 10 --out results/search",
        "hpt sweep settings.toml --task cifar --space space.toml --budget 20 --workers 4 --out results/search",
        "hpt sweep --task gpt --space space.toml --budget 50 --storage postgresql://db/search --out search",
        usage="%(prog)s [CONFIG] --space FILE --budget RUNS [OPTIONS]",
    ))  # fmt: skip
    bench_arguments.add_commands(command(
        "bench", "the measurements behind the figures in the documents",
        "Runs one of the measurements that the figures in docs/benchmarks.md come from.",
        "hpt bench overhead --preset 0.9M", "hpt bench regimes --regime pinn --quick",
        usage="%(prog)s BENCHMARK [OPTIONS]",
    ))  # fmt: skip
    return parser


def _add_plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("--params", metavar="N", help="weights of a GPT, such as 350M or 1B")
    plan.add_argument("--task", type=name_of("task", TASKS), metavar="NAME", help="the model of a task instead")
    plan.add_argument("--preset", metavar="NAME", help="size or variant of the task's model")
    plan.add_argument("--ternary", action="store_true", help="with ternary weights in hidden linear layers")
    plan.add_argument("--gpu", default="16GB", metavar="SIZE", help="memory of the card (default 16GB)")
    plan.add_argument("--batch-size", type=whole, default=8, metavar="N", help="sequences per step (default 8)")
    plan.add_argument("--context", type=whole, metavar="N", help="tokens of each (default 1024, or the task's)")
    plan.add_argument("--check", action="store_true", help="estimates beside measured peaks; exits 1 beyond 10 percent")
    plan.add_argument("--table", action="store_true", help="the largest model per card, as a table in Markdown")


def _add_train(train: argparse.ArgumentParser) -> None:
    add_task_flags(train)
    train.add_argument("--resume", action="store_true", help="continue the run in --out, bit for bit")
    train.add_argument(
        "--log", choices=["bar", "phases"], default="bar", help="a bar (default), or one block of lines per phase"
    )
    train.add_argument("--plain", action="store_true", help="without prediction")
    train.add_argument(
        "--record", action="store_true", help="keep every window, for 'hpt bench predictors --recording'"
    )


def _add_compare(compare: argparse.ArgumentParser) -> None:
    add_task_flags(compare)
    compare.add_argument("--seeds", type=number(int, 1, 1000), metavar="N", help="runs per arm (default 1)")
    compare.add_argument(
        "--tune", action="store_true", help="choose both arms' learning rate on the task's grid, by equally many trials"
    )
    compare.add_argument(
        "--budgets", type=budgets, metavar="B,B", help="lengths of plain runs, times --steps (default 0.5,1,2,4)"
    )
    again = compare.add_mutually_exclusive_group()
    again.add_argument("--overwrite", action="store_true", help="replace the comparison in --out")
    again.add_argument("--resume", action="store_true", help="go on with the comparison in --out: finished runs stay")


def _add_sweep(sweep: argparse.ArgumentParser) -> None:
    sweep.add_argument(
        "settings", nargs="?", metavar="CONFIG", help="settings as TOML, or the name of some, as --config-preset"
    )
    sweep.add_argument("--space", type=Path, required=True, metavar="FILE", help="what varies (TOML, docs/sweeps.md)")
    sweep.add_argument(
        "--budget", type=number(float, 0, 1_000_000, above=True), required=True, metavar="RUNS",
        help="compute of all trials, in whole runs",
    )  # fmt: skip
    sweep.add_argument("--trials", type=whole, metavar="N", help="number of trials (default as the budget allows)")
    sweep.add_argument(
        "--first", type=number(int, 1, 10_000), default=8, metavar="N",
        help="trials that are begun before any is preferred (default 8)",
    )  # fmt: skip
    sweep.add_argument(
        "--sampler",
        choices=SAMPLERS,
        default=SAMPLERS[0],
        help="how new trials are chosen (joint: the best of a random pool, by forecast)",
    )
    sweep.add_argument("--workers", type=number(int, 1, 256), default=1, metavar="N", help="processes (default 1)")
    sweep.add_argument("--storage", metavar="URL", help="of Optuna (default: a journal in --out)")
    sweep.add_argument("--study", metavar="NAME", help="name in the storage (default: that of the folder)")
    sweep.add_argument(
        "--patience", type=number(float, 0, 86_400), default=60.0, metavar="S",
        help="seconds that a storage may not answer (default 60)",
    )  # fmt: skip
    sweep.add_argument(
        "--confidence", type=number(float, 0.5, 0.9999), default=0.95, metavar="P",
        help="that the winner is not stopped (default 0.95)",
    )  # fmt: skip
    sweep.add_argument(
        "--min-gain", type=number(float, 0, 0.5), default=0.002, metavar="G",
        help="share of the loss by which the best has to be beaten (default 0.002)",
    )  # fmt: skip
    sweep.add_argument("--plain", action="store_true", help="train without prediction")
    add_task_flags(sweep)


def _add_forecast(forecast: argparse.ArgumentParser) -> None:
    forecast.add_argument("run", type=Path, metavar="RUN", help="a log, or a folder that holds one")
    forecast.add_argument(
        "--schedule", metavar="SCHEDULE",
        help="NAME:KEY=VALUE,...; constant, cosine, linear, stages or wsd; keys warmup, final, decay, shape, peak or, "
        "of stages, STEP=SHARE (default: that of a run of 'hpt train')",
    )  # fmt: skip
    forecast.add_argument("--steps", type=whole, metavar="N", help="of the whole run (default as the log says)")
    forecast.add_argument("--until", type=whole, metavar="N", help="leave out what came after step N")
    forecast.add_argument(
        "--level", type=number(float, 0.01, 0.999), default=0.9, metavar="L", help="of the interval (default 0.9)"
    )
    forecast.add_argument(
        "--prior", type=name_of("prior", PRIORS), metavar="NAME",
        help=f"what such models are known to do: {', '.join(PRIORS)} (default all, weighed)",
    )  # fmt: skip
    forecast.add_argument(
        "--like", type=Path, metavar="RUN", action="append",
        help="a run that has ended, to learn from; at least three, each with its own --like",
    )  # fmt: skip
    for kind in ("loss", "rate", "step"):
        forecast.add_argument(f"--{kind}-column", metavar="NAME", help=f"column of the {kind} (default by its name)")


def _add_validate(validate: argparse.ArgumentParser) -> None:
    validate.add_argument(
        "--experiment", type=number(int, 1, 5), action="append", metavar="N",
        help="1: structure of gradients, 2: prediction of the loss, 3: of weight changes, 4: runs with predicted "
        "steps, 5: corrections; may be repeated (default all, in the order 2, 1, 3, 5, 4)",
    )  # fmt: skip
    validate.add_argument(
        "--scale", choices=["tiny", "small", "100m"], default="tiny", help="size of model and run (default tiny)"
    )
    validate.add_argument("--seeds", type=number(int, 1, 1000), default=2, metavar="N", help="runs (default 2)")
    validate.add_argument(
        "--out", type=Path, default=Path("results") / "validation", metavar="DIR",
        help="folder of the results (default results/validation)",
    )  # fmt: skip
    more = validate.add_mutually_exclusive_group()
    more.add_argument(
        "--acceptance", action="store_true",
        help="the seeds' acceptance tables and decision points from all five experiments, with costs, energy and CO2",
    )  # fmt: skip
    more.add_argument(
        "--kept",
        action="store_true",
        help="judge the results that --out holds, however many seeds each has; run nothing",
    )
    more.add_argument(
        "--ablation", type=name_of("ablation", ABLATIONS), metavar="NAME",
        help=f"change one thing in a run with half of its steps predicted: {', '.join(ABLATIONS)}",
    )  # fmt: skip
    more.add_argument(
        "--harness", type=Path, metavar="DIR",
        help="MMLU, HellaSwag and ARC of an exported Hugging Face checkpoint (extra harness, needs the hub)",
    )  # fmt: skip
    validate.add_argument(
        "--grid-factor", type=number(float, 0, 10), default=0.48, metavar="KG",
        help="kg of CO2 equivalent per kWh (default 0.48, the world's mean of 2023)",
    )  # fmt: skip
    validate.add_argument(
        "--collect", action="store_true", help="keep metrics, gradients, weights, predictions below --out"
    )
    validate.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables for a document")
    validate.add_argument("--threads", type=whole, metavar="N", help="of the processor (default all)")


def _add_probe(probe: argparse.ArgumentParser) -> None:
    add_task_flags(probe)
    probe.add_argument(
        "--minutes", type=number(float, 0, 1000, above=True), default=5.0, metavar="M", help="wall-clock (default 5)"
    )
    probe.add_argument(
        "--pilot-steps", type=number(int, 10, 1_000_000), metavar="N", help="of a pilot (default as the time allows)"
    )
    probe.add_argument("--toml", type=Path, metavar="FILE", help="write the recommended settings")
    probe.add_argument(
        "--rewards", action="store_true", help="training by rewards of rollouts: what was measured there, no pilots"
    )


# ---- entry point ------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Args:
        argv: Without the program's name; None: those of the process.
    """
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else BAD_INPUT
    args.argv = list(sys.argv[1:] if argv is None else argv)
    missing = take_preset(args) or what_is_missing(args)
    if missing is not None:
        return complain(missing, BAD_INPUT)
    try:
        return _run(args)
    except KeyboardInterrupt:
        return complain("interrupted", INTERRUPTED)


def _run(args: argparse.Namespace) -> int:
    """Import what the command needs and call it; what it raises for a person becomes a line and a status."""
    import torch

    from ..experiments.arms.options import InputError
    from ..records import CheckpointError, ConfigError, DivergenceError

    if getattr(args, "threads", None):
        torch.set_num_threads(args.threads)
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = one_line_warning
        try:
            check_texts(args)
            check_places(args)
            status: int = importlib.import_module(COMMANDS[args.command], __package__).run(args)
        except (InputError, ConfigError) as error:
            return complain(error, BAD_INPUT)
        except CheckpointError as error:
            return complain(error, CHECKPOINT)
        except DivergenceError as error:
            return complain(error, DIVERGED)
        except BrokenPipeError:  # whoever read standard output has gone; the results are on disk
            sys.stdout = None
            return OK
        except OSError as error:  # a disk, a name, a right: nothing that a traceback explains better
            where = f"{error.filename}: " if error.filename is not None else ""
            return complain(f"{where}{error.strerror or error}", BAD_INPUT)
        return status


def check_texts(args: argparse.Namespace) -> None:
    """Refuse names that cannot be written down or looked up.

    Raises:
        InputError: a text holds half a surrogate pair (bytes that are no UTF-8), or is longer than any path.
    """
    from ..experiments.arms.options import InputError
    from ..experiments.report.text import short_value
    from ..experiments.run_folder import MAX_TEXT, encodable

    for name, value in vars(args).items():
        for text in value if isinstance(value, list | tuple) else [value]:
            told = str(text) if isinstance(text, str | Path) else ""
            if not encodable(told):
                raise InputError(f"{name.replace('_', '-')}: {told!r} is not valid UTF-8")
            if "\0" in told or len(told) > MAX_TEXT:
                raise InputError(
                    f"{name.replace('_', '-')}: {short_value(told)} is no name or value (too long, or a NUL)"
                )


def check_places(args: argparse.Namespace) -> None:
    """Refuse places where nothing can be written before anything is computed for them.

    Raises:
        InputError: a file of :data:`FILES` cannot be written.
    """
    from ..experiments.arms.options import as_input_error
    from ..safe_files import refuse_unwritable

    with as_input_error():
        for name in FILES:
            if getattr(args, name, None) is not None:
                refuse_unwritable(getattr(args, name))


def one_line_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    file: TextIO | None = None, line: str | None = None,
) -> None:  # fmt: skip
    """A warning as one line on standard error, without our source code in it."""
    with contextlib.suppress(OSError):
        print(f"hpt: warning: {' '.join(str(message).split())}", file=file or sys.stderr)
