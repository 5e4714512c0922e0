"""What every command's flags are made of: the parser, converters that name the legal range, exit statuses.

Nothing here imports torch or numpy before a command runs, so that help and a wrong option answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import math
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import names

if TYPE_CHECKING:
    from ..experiments.arms.options import Options

#: Documented exit statuses.
OK, NOT_MET, BAD_INPUT, CHECKPOINT, DIVERGED, INTERRUPTED = 0, 1, 2, 3, 4, 130

STATUSES = """\
exit status:
  0    done
  1    a benchmark measured something that its bar does not allow
  2    bad input: one line on standard error says what to change
  3    a checkpoint cannot be used or written
  4    training diverged
  129, 130, 143
       stopped by SIGHUP, SIGINT (Ctrl-C) or SIGTERM; what is finished is kept
"""


class Help(argparse.RawDescriptionHelpFormatter):
    """Options in one column, descriptions and examples as they are written."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        """Args: prog: name of the command.  kwargs: those of argparse."""
        super().__init__(prog, max_help_position=30, **kwargs)

    def add_argument(self, action: argparse.Action) -> None:
        """As argparse does, and the names of commands, which are indented further, count with their indent."""
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            longest = max(map(len, action.choices), default=0)
            self._action_max_length = max(self._action_max_length, longest + self._current_indent + 2)

    def _split_lines(self, text: str, width: int) -> list[str]:
        """Break between words only: ``pinn-poisson`` is one."""
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def __init__(self, **kwargs: Any) -> None:
        """Args: kwargs: those of argparse."""
        super().__init__(**{"formatter_class": Help, **kwargs})

    def error(self, message: str) -> NoReturn:
        """Print the line and leave with status 2."""
        self.exit(BAD_INPUT, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def examples(*lines: str) -> str:
    """The end of a help text."""
    head = "example:" if len(lines) == 1 else "examples:"
    return "\n".join([head, *(f"  {line}" for line in lines)])


# ---- converters ----------------------------------------------------------------------------------------


def number(
    kind: type[int] | type[float], low: float, high: float = math.inf, *, above: bool = False
) -> Callable[[str], Any]:
    """A converter for argparse that names the legal range.

    Args:
        kind: ``int`` or ``float``.
        low: Least legal value.
        high: Largest legal value.
        above: ``low`` itself is not legal.
    """

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
positive = number(float, 0, above=True)


def numbers(one: Callable[[str], Any]) -> Callable[[str], tuple[float, ...]]:
    """A converter of ``0.5,1,2``."""
    return lambda text: tuple(one(piece.strip()) for piece in text.split(","))


#: Lengths of plain runs in multiples of the run's own: above 0, at most 1000.
budgets = numbers(number(float, 0, 1000, above=True))


def words(text: str) -> tuple[str, ...]:
    """A converter of ``a,b,c``."""
    return tuple(piece.strip() for piece in text.split(",") if piece.strip())


def name_of(kind: str, valid: Sequence[str]) -> Callable[[str], str]:
    """A converter that refuses an unknown name and says which one is near.

    Args:
        kind: What is named.
        valid: All names.
    """

    def convert(text: str) -> str:
        if text in valid:
            return text
        near = difflib.get_close_matches(text, valid, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise argparse.ArgumentTypeError(f"unknown {kind} {text!r}{hint} (valid: {', '.join(valid)})")

    return convert


def known_tasks() -> list[str]:
    """Names of tasks: the package's, and those that a program has put into ``tasks.TASKS`` before it calls us."""
    added = getattr(sys.modules.get("hybrid_predict_trainer.tasks"), "TASKS", ())
    return [*names.TASKS, *(name for name in added if name not in names.TASKS)]


# ---- flags that commands share ---------------------------------------------------------------------------


def add_task_flags(parser: argparse.ArgumentParser) -> None:
    """What ``train`` and ``compare`` share."""
    task = parser.add_argument_group("task")
    tasks = known_tasks()
    task.add_argument("--task", type=name_of("task", tasks), metavar="NAME", help=", ".join(tasks))
    task.add_argument(
        "--preset",
        metavar="NAME",
        help="size or variant of the task's model (default the task's); or as --config-preset",
    )
    task.add_argument("--data", metavar="PATH", help="text file or folder, .npz, a named set or hf:OWNER/NAME")
    task.add_argument("--data-bytes", type=whole, metavar="N", help="read at most N bytes of text (default all)")
    task.add_argument("--batch-size", type=whole, metavar="N", help="examples per step (default the task's)")
    task.add_argument("--context", type=whole, metavar="N", help="tokens per example (default the model's)")
    task.add_argument("--dtype", choices=["float32", "float64"], help="of the weights (default the task's)")
    task.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:0, mps, ... (default cpu)")
    task.add_argument("--bf16", action="store_true", default=None, help="compute in bfloat16 (autocast)")
    task.add_argument("--compile", action="store_true", default=None, help="compile the model (torch.compile)")
    task.add_argument(
        "--gradient-checkpointing", action="store_true", default=None, help="less memory, one forward more per step"
    )
    task.add_argument(
        "--ternary", action="store_true", default=None,
        help="ternary weights in hidden linear layers (BitNet b1.58; extra torchao)",
    )  # fmt: skip
    task.add_argument("--fused", action="store_true", default=None, help="fused optimizer, where there is one")
    task.add_argument(
        "--threads",
        type=number(int, 1, 1024),
        metavar="N",
        help="of the processor (default all; one for models below 100,000 weights)",
    )
    recipe = parser.add_argument_group("recipe (default: the task's)")
    recipe.add_argument("--steps", type=whole, metavar="N", help="length of the run, in optimizer steps")
    recipe.add_argument("--lr", type=positive, metavar="RATE", help="peak learning rate")
    recipe.add_argument(
        "--weight-decay", type=number(float, 0, 1e6), metavar="W", help="of matrices (default the task's)"
    )
    recipe.add_argument(
        "--optimizer", type=name_of("optimizer", names.OPTIMIZERS), metavar="NAME", help=", ".join(names.OPTIMIZERS)
    )
    recipe.add_argument(
        "--schedule", type=name_of("schedule", names.SCHEDULES), metavar="NAME", help=", ".join(names.SCHEDULES)
    )
    recipe.add_argument("--seed", type=number(int, 0, 2**31), metavar="S", help="first seed (default 0)")
    trainer = parser.add_argument_group("trainer")
    trainer.add_argument("--config", metavar="FILE", help="settings as TOML (docs/configuration.md)")
    trainer.add_argument(
        "--config-preset", metavar="NAME",
        help=f"settings to begin with: {', '.join(names.CONFIG_PRESETS)}; {names.AUTO}: by trained weights",
    )  # fmt: skip
    trainer.add_argument(
        "--predictor",
        type=name_of("predictor", (*names.PREDICTORS, *names.SOURCES)),
        metavar="NAME",
        help=f"{', '.join(names.PREDICTORS)}; {', '.join(names.SOURCES)}: closed form, for equations and classifiers; "
        "portfolio chooses between it and quasi-Newton steps by the clock",
    )
    trainer.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting; may be repeated")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the results (default results/COMMAND-TASK-TIME)"
    )


def take_preset(args: argparse.Namespace) -> str | None:
    """Take ``--preset`` for settings where it names some, and the task they are tried with; an error, or None."""
    if args.command == "sweep" and args.settings is not None:
        if args.config is not None:
            return "CONFIG and --config name settings twice; leave one of them out"
        if args.settings in (*names.CONFIG_PRESETS, names.AUTO):
            args.preset = args.settings
        else:
            args.config = args.settings
    if args.command not in ("train", "compare", "sweep"):
        return None
    if args.preset in (*names.CONFIG_PRESETS, names.AUTO):
        if args.config_preset not in (None, args.preset):
            return f"--preset {args.preset} and --config-preset {args.config_preset} name different settings"
        args.preset, args.config_preset = None, args.preset
    if args.config_preset in names.CONFIG_PRESETS and args.task is None and not getattr(args, "resume", False):
        from ..config.presets import about

        run = about(args.config_preset).get("run", {})
        args.task, args.steps = run.get("task"), args.steps or run.get("steps")
    return None


def what_is_missing(args: argparse.Namespace) -> str | None:
    """What ``train`` and ``compare`` need and argparse cannot know: one line, or None."""
    if args.command not in ("train", "compare", "probe", "sweep"):
        return None
    if getattr(args, "rewards", False):  # of probe: what was measured, on no task of one's own
        return None
    if args.command in ("probe", "sweep"):
        return None if args.task is not None else f"--task is needed: one of {', '.join(names.TASKS)}"
    if args.task is None and not args.resume:
        return f"--task is needed: one of {', '.join(names.TASKS)}"
    if args.resume and args.out is None:
        run = "run" if args.command == "train" else "comparison"
        return f"--resume needs --out: the folder of the {run} to continue"
    return None


# ---- what a command does with them -------------------------------------------------------------------------


def options_of(args: argparse.Namespace) -> Options:
    """The flags that tasks, recipes and trainers are built from."""
    from dataclasses import fields

    from ..experiments.arms.options import Options

    known = {f.name: getattr(args, f.name) for f in fields(Options)}
    return Options(**{**known, "task": args.task or "", "set": tuple(args.set)})


def folder_of(args: argparse.Namespace) -> Path:
    """``--out``, or a new name below ``results``."""
    chosen: Path | None = args.out
    return chosen or Path("results") / f"{args.command}-{args.task}-{time.strftime('%Y%m%d-%H%M%S')}"


def show(args: argparse.Namespace, value: Any, text: Callable[[], str]) -> None:
    """Print the object, or what a person reads; where nobody reads any more, the results are on disk."""
    from ..tell.sinks import jsonable

    try:
        print(json.dumps(jsonable(value), allow_nan=False) if args.json else text(), flush=True)
    except OSError:  # a pipe or a terminal that has been closed
        sys.stdout = None


def complain(error: Exception | str, status: int) -> int:
    """One line on standard error, and the status."""
    with contextlib.suppress(OSError):  # the terminal has been closed
        print(f"hpt: error: {' '.join(str(error).split())}", file=sys.stderr)
    return status
