"""``hpt forecast``: the final loss of a run in progress."""

from __future__ import annotations

import argparse

from ..experiments.arms.options import as_input_error
from ..experiments.forecasts.ask import Question, answer, format_text
from ..forecast.logs import Columns
from .arguments import OK, show


def run(args: argparse.Namespace) -> int:
    """Forecast from a log.

    Raises:
        InputError: the log cannot be read, holds too little, or the schedule is not known.
    """
    with as_input_error():
        found = answer(Question(
            run=args.run, schedule=args.schedule, steps=args.steps, level=args.level, prior=args.prior,
            columns=Columns(args.loss_column, args.rate_column, args.step_column), until=args.until,
            like=tuple(args.like or ()),
        ))  # fmt: skip
    show(args, found, lambda: format_text(found))
    return OK
