"""``hpt validate``: experiments with criteria and controls."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..experiments.arms.options import as_input_error
from ..experiments.downstream import harness
from ..experiments.extras import require
from ..experiments.run_folder import locked
from ..experiments.validation import ablations, acceptance, accounting, program
from ..experiments.validation.stored import read_from
from ..records import ConfigError
from ..safe_files import write_named
from .arguments import INTERRUPTED, OK, complain, show


def run(args: argparse.Namespace) -> int:
    """Run what is missing, and judge.

    Raises:
        InputError: a stored result is damaged or of another version, or there is one seed only.
    """
    with as_input_error():
        require("filelock", "scipy")
    with locked(args.out):
        try:
            with as_input_error():
                found, text, markdown = _measured(args)
                if args.markdown is not None:
                    write_named(args.markdown, markdown)
        except KeyboardInterrupt:
            return complain(f"interrupted; finished seeds are kept: the same command goes on ({args.out})", INTERRUPTED)
    show(args, found, lambda: text)
    return OK


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _measured(args: argparse.Namespace) -> tuple[dict[str, Any], str, str]:
    """What was asked for: the object, the text and the document's tables."""
    if args.ablation is not None:
        changed = ablations.measure(args.ablation, args.scale, args.seeds, args.out, _tell)
        return changed, ablations.format_text(changed), ablations.markdown(changed)
    if args.harness is not None:
        scores = harness.evaluate(args.harness, args.out / "harness")
        lines = [f"{task}: {name} {value:.4g}" for task, own in scores.items() for name, value in own.items()]
        return {"harness": scores}, "\n".join(lines), "\n".join(f"- {line}" for line in lines) + "\n"
    if args.kept:
        found = program.kept_of(args.out, args.scale)
        return found, program.format_text(found), program.markdown(found)
    wanted = tuple(args.experiment or program.EXPERIMENTS)
    if args.acceptance and set(wanted) != set(program.EXPERIMENTS):
        raise ConfigError("--acceptance needs all five experiments: leave out --experiment")
    found = program.validate(wanted, args.scale, args.seeds, args.out, _tell, collect=args.collect)
    if not args.acceptance:
        return found, program.format_text(found), program.markdown(found)
    account = accounting.kept(args.out, args.scale, _tell, args.grid_factor)
    with read_from(args.out):
        tables = acceptance.tables(found, account)
        text, markdown = acceptance.format_text(tables), acceptance.markdown(tables)
    shown = {"scale": args.scale, "seeds": args.seeds, "tables": tables, "account": account,
             "hypotheses": found["hypotheses"]}  # fmt: skip
    return shown, text, markdown
