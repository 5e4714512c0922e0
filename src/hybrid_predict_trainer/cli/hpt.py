"""The command ``hpt``: parses, calls, prints.

Exit status: 0 success, 1 the bar of a benchmark is not met, 2 bad input (one line on standard error),
3 a checkpoint cannot be used or written, 4 training diverged, 129, 130 and 143 after SIGHUP, SIGINT and SIGTERM.
With ``--json`` standard output is one JSON object; progress goes to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch

from .. import __version__
from ..config.presets import PRESETS
from ..experiments import train as single
from ..experiments.arms.options import InputError, Options, as_input_error, one_line
from ..experiments.compare import run as comparing
from ..experiments.compare.plan import Said, planned
from ..experiments.report import text as table
from ..experiments.report.page import write_report
from ..experiments.report.text import short_value
from ..experiments.run_arm import Run, in_steps, write_json
from ..experiments.run_folder import MAX_TEXT, encodable, locked, refuse_used
from ..keep import checkpoint, housekeeping
from ..predictors import PREDICTORS
from ..records import CheckpointError, ConfigError, DivergenceError
from ..tasks import TASKS
from ..tell.sinks import jsonable
from . import bench
from .progress import Progress

#: What to do where a comparison is in the way.
COMPARED = "add --resume to continue it, --overwrite to replace it, or choose another --out"

#: Documented exit statuses.
OK, NOT_MET, BAD_INPUT, CHECKPOINT, DIVERGED, INTERRUPTED = 0, 1, 2, 3, 4, 130


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the line and leave with status 2."""
        self.exit(BAD_INPUT, f"{self.prog}: error: {one_line(message)} (see {self.prog} --help)\n")


def number(
    kind: type[int] | type[float], low: float, high: float = math.inf, *, above: bool = False
) -> Callable[[str], Any]:
    """A converter for argparse that names the legal range."""

    def convert(text: str) -> int | float:
        legal = f"a {'whole ' if kind is int else ''}number {'>' if above else '>='} {low:g}"
        legal += f" and <= {high:g}" if math.isfinite(high) else ""
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} must be {legal}") from None
        inside = (value > low if above else value >= low) and value <= high and math.isfinite(value)
        if not inside:
            raise argparse.ArgumentTypeError(f"{text} is out of range: must be {legal}")
        return value

    return convert


whole = number(int, 1, 1_000_000_000)


def budgets(text: str) -> tuple[float, ...]:
    """``0.5,1,2`` -> numbers above 0."""
    one = number(float, 0, 1000, above=True)
    return tuple(one(piece.strip()) for piece in text.split(","))


# ---- the parser --------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """All commands and flags."""
    parser = Parser(prog="hpt", description="Train models, predicting part of the training where that pays.")
    parser.add_argument("--version", action="version", version=f"hpt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], help_: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=help_, description=help_)
        found.set_defaults(run=run)
        found.add_argument("--json", action="store_true", help="print one JSON object")
        return found

    train = command("train", run_train, "train once")
    add_task_flags(train, needed=False)
    train.add_argument("--resume", action="store_true", help="continue the run in --out, bit for bit")
    train.add_argument("--plain", action="store_true", help="without prediction")
    train.add_argument("--record", action="store_true", help="keep every window for 'hpt bench predictors --recording'")

    compare = command("compare", run_compare, "train plainly and with prediction, and compare")
    add_task_flags(compare, needed=False)
    compare.add_argument("--seeds", type=number(int, 1, 1000), metavar="N", help="how many (default 1)")
    compare.add_argument("--tune", action="store_true", help="choose the learning rate of both arms on the task's grid")
    compare.add_argument("--budgets", type=budgets, metavar="B,B", help="plain budgets (default 0.5,1,2,4)")
    again = compare.add_mutually_exclusive_group()
    again.add_argument("--overwrite", action="store_true", help="replace the comparison in --out")
    again.add_argument("--resume", action="store_true", help="go on with the comparison in --out: finished runs stay")

    inspect = command("inspect", run_inspect, "verify and describe a checkpoint")
    inspect.add_argument("checkpoint", type=Path, help="a checkpoint, or the folder of a run: then its latest")

    report = command("report", run_report, "write the page about a folder of results")
    report.add_argument("folder", type=Path, metavar="DIR")
    report.add_argument("--out", type=Path, metavar="FILE", help="default: DIR/report.html")

    found = command("bench", run_bench, "the measurements behind the figures in the documents")
    bench.add_commands(found, number)
    return parser


def add_task_flags(parser: argparse.ArgumentParser, *, needed: bool) -> None:
    """What ``train`` and ``compare`` share."""
    task = parser.add_argument_group("task")
    task.add_argument("--task", required=needed, help=", ".join(TASKS))
    task.add_argument("--preset", help="size or variant of the task's model")
    task.add_argument("--data", metavar="PATH", help="text file or folder, .npz, a named set or hf:OWNER/NAME")
    task.add_argument("--data-bytes", type=whole, metavar="N", help="read at most N bytes of text")
    task.add_argument("--batch-size", type=whole, metavar="N")
    task.add_argument("--context", type=whole, metavar="N", help="tokens per example")
    task.add_argument("--dtype", choices=["float32", "float64"])
    task.add_argument("--device", help="cpu, cuda, ... (default cpu)")
    for flag in ("bf16", "compile", "gradient-checkpointing", "fused"):
        task.add_argument(f"--{flag}", action="store_true", default=None)
    task.add_argument(
        "--threads",
        type=number(int, 1, 1024),
        metavar="N",
        help="of the processor (default: all; one for models below 100,000 weights)",
    )
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--steps", type=whole, metavar="N", help="length of the run in full steps")
    recipe.add_argument("--lr", type=number(float, 0, above=True), help="peak learning rate")
    recipe.add_argument("--optimizer", help="adamw, adam, sgd, muon")
    recipe.add_argument("--schedule", help="wsd, linear, cosine, constant")
    recipe.add_argument("--seed", type=number(int, 0, 2**31), metavar="S", help="first seed (default 0)")
    trainer = parser.add_argument_group("trainer")
    trainer.add_argument("--config", metavar="FILE", help="TOML")
    trainer.add_argument("--config-preset", metavar="NAME", help=", ".join(PRESETS))
    trainer.add_argument("--predictor", metavar="NAME", help=", ".join(PREDICTORS))
    trainer.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="training.full_steps=30 etc.")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results")


def options_of(args: argparse.Namespace) -> Options:
    """The flags that tasks, recipes and trainers are built from."""
    known = {f.name: getattr(args, f.name) for f in fields(Options)}
    return Options(**{**known, "task": args.task or "", "set": tuple(args.set)})


def folder_of(args: argparse.Namespace) -> Path:
    """``--out``, or a new name below ``results``."""
    chosen: Path | None = args.out
    return chosen or Path("results") / f"{args.command}-{args.task}-{time.strftime('%Y%m%d-%H%M%S')}"


# ---- the commands --------------------------------------------------------------------------------------


def run_train(args: argparse.Namespace) -> int:
    """``hpt train``."""
    if args.task is None and not args.resume:
        raise InputError(f"--task is needed: one of {', '.join(TASKS)}")
    if args.resume and args.out is None:
        raise InputError("--resume needs --out: the folder of the run to continue")
    request = single.Request(options=options_of(args), seed=args.seed, plain=args.plain, record=args.record)
    bars: list[Progress] = []

    def watch(label: str, trainer: Any, total: int) -> Progress:
        bars.append(Progress(trainer, total, name=label))
        return bars[-1]

    result, status = single.train(request, folder_of(args), resume=args.resume, watch=watch)
    for bar in bars:
        bar.close()
    show(args, result, lambda: trained(result, status))
    return status


def trained(result: dict[str, Any], status: int) -> str:
    """What a person wants to know of a run."""
    counts, loss = result["statistics"], result["final_val_loss"]
    back = counts["num_guard_restores"]
    withdrawn = "the guard withdrew prediction, multiplier and lookahead: the loss stood above its best for good"
    head = f"validation loss {loss:.5g}" if loss is not None else "stopped before the end; add --resume to continue"
    return "\n".join([
        f"{result['task']}, {result['arm']}, seed {result['seed']}: {head}",
        f"cost {in_steps(counts['cost_units']):.1f} of {result['steps']} steps, {result['wall_s']:.1f} s, "
        f"jumps accepted {counts['num_jumps_accepted']} of {counts['num_jumps_proposed']}",
        *([withdrawn + (", and its best state came back" if back else "")] if counts["withdrawn"] else []),
        f"results in {result['out']}",
    ])  # fmt: skip


def run_compare(args: argparse.Namespace) -> int:
    """``hpt compare``."""
    if args.task is None and not args.resume:
        raise InputError(f"--task is needed: one of {', '.join(TASKS)}")
    if args.resume and args.out is None:
        raise InputError("--resume needs --out: the folder of the comparison to continue")
    out = folder_of(args)
    if not args.overwrite and not args.resume:
        refuse_used(out, COMPARED)
    plan, said = planned(Said(
        options=options_of(args), seed=args.seed, seeds=args.seeds, budgets=args.budgets, tune=args.tune,
    ), out, resume=args.resume)  # fmt: skip
    bar = sys.stderr.isatty()

    def watch(label: str, trainer: Any, total: int) -> Callable[[Any], None]:
        return Progress(trainer, total, name=label) if bar else lambda result: None

    def done(label: str, run: Run) -> None:
        loss = f"validation loss {run.final_val_loss:.5g}" if not run.error else f"diverged: {run.error}"
        start = "\r\x1b[2K" if bar else ""
        note = f"{start}{label}: {loss}, cost {in_steps(run.cost_units):.1f} steps, {run.wall_s:.2f} s"
        with contextlib.suppress(OSError):  # the terminal has been closed
            print(note, file=sys.stderr)

    with locked(out):
        if not args.resume:
            if not args.overwrite:
                refuse_used(out, COMPARED)  # somebody else may have been quicker
            comparing.clear(out)
            with as_input_error():
                write_json(out / "plan.json", said)
        try:
            result = comparing.compare(plan, watch, done)
        except KeyboardInterrupt:
            return complain(f"interrupted; finished runs are kept: add --resume to go on ({out})", INTERRUPTED)
    show(args, result, lambda: f"{table.comparison(result)}\n\nresults in {out}, page {out / 'report.html'}")
    return OK


def run_inspect(args: argparse.Namespace) -> int:
    """``hpt inspect``."""
    path: Path = args.checkpoint
    if not path.is_dir():
        raise InputError(f"{path}: no such folder")
    inner = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if housekeeping.checkpoints(inner):
        path = housekeeping.latest(inner)
    elif not any(path.glob("*.safetensors")) and not any(path.glob("*.json")):
        raise InputError(f"{path}: is no checkpoint and holds none")
    found = checkpoint.describe(path)

    def text() -> str:
        rows = [(k, f"{v:,}" if isinstance(v, int) and not isinstance(v, bool) else v) for k, v in found.items()]
        flat = [(k, v) for k, v in rows if not isinstance(v, dict)]
        sizes = found["file_bytes"]
        assert isinstance(sizes, Mapping)
        files = [(f"  {k}", f"{v:,} bytes") for k, v in sizes.items()]
        return "\n".join(f"{k:<32} {v}" for k, v in [*flat, ("files", ""), *files]).rstrip()

    show(args, found, text)
    return OK


def run_report(args: argparse.Namespace) -> int:
    """``hpt report``."""
    with as_input_error():
        page = write_report(args.folder, args.out)
    show(args, {"report": str(page), "bytes": page.stat().st_size}, lambda: str(page))
    return OK


def run_bench(args: argparse.Namespace) -> int:
    """``hpt bench regimes | harm | report | overhead | predictors | memory | costs | stack``."""
    value, text = bench.run(args)
    show(args, value, text)
    return NOT_MET if isinstance(value, Mapping) and value.get("passed") is False else OK


def show(args: argparse.Namespace, value: Any, text: Callable[[], str]) -> None:
    """Print the object, or what a person reads; where nobody reads any more, the results are on disk."""
    try:
        print(json.dumps(jsonable(value), allow_nan=False) if args.json else text(), flush=True)
    except OSError:  # a pipe or a terminal that has been closed
        sys.stdout = None


def check_texts(args: argparse.Namespace) -> None:
    """Refuse names that cannot be written down or looked up.

    Raises:
        InputError: a text holds half a surrogate pair (bytes that are no UTF-8), or is longer than any path.
    """
    for name, value in vars(args).items():
        for text in value if isinstance(value, list | tuple) else [value]:
            told = str(text) if isinstance(text, str | Path) else ""
            if not encodable(told):
                raise InputError(f"{name.replace('_', '-')}: {told!r} is not valid UTF-8")
            if "\0" in told or len(told) > MAX_TEXT:
                raise InputError(
                    f"{name.replace('_', '-')}: {short_value(told)} is no name or value (too long, or a NUL)"
                )


# ---- entry point ------------------------------------------------------------------------------------------


def one_line_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    file: TextIO | None = None, line: str | None = None,
) -> None:  # fmt: skip
    """A warning as one line on standard error, without our source code in it."""
    with contextlib.suppress(OSError):
        print(f"hpt: warning: {one_line(str(message))}", file=file or sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else BAD_INPUT
    if getattr(args, "threads", None):
        torch.set_num_threads(args.threads)
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = one_line_warning
        try:
            check_texts(args)
            status: int = args.run(args)
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
        except KeyboardInterrupt:
            return complain("interrupted", INTERRUPTED)
        return status


def complain(error: Exception | str, status: int) -> int:
    """One line on standard error."""
    with contextlib.suppress(OSError):  # the terminal has been closed
        print(f"hpt: error: {one_line(str(error))}", file=sys.stderr)
    return status
