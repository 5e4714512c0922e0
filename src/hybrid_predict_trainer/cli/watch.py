"""``hpt watch``: a run in progress, in a terminal."""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..doctor import RunRecord, diagnose, read_record
from ..experiments.arms.options import InputError
from ..experiments.extras import require
from ..tell.sinks import jsonable
from .arguments import OK, show

#: Heights of a curve drawn with characters.
BARS = "▁▂▃▄▅▆▇█"
WIDTH = 60


def run(args: argparse.Namespace) -> int:
    """Draw the run again and again, until it has ended or Ctrl-C; once with ``--once`` or ``--json``.

    Raises:
        ConfigError: there are no records of steps.
        InputError: rich is not installed.
    """
    if args.json:
        show(args, jsonable(view(args.run)), str)
        return OK
    try:
        require("rich")
    except ModuleNotFoundError as error:
        raise InputError(str(error)) from None
    from rich.console import Console
    from rich.live import Live

    console = Console(file=sys.stdout)
    if args.once:
        console.print(panel(view(args.run), args.run.name))
        return OK
    with Live(panel(view(args.run), args.run.name), console=console, auto_refresh=False) as live:
        while not (args.run / "summary.json").exists():
            time.sleep(args.every)
            live.update(panel(view(args.run), args.run.name), refresh=True)
    return OK


def view(folder: Path) -> dict[str, Any]:
    """What is shown of a run: counts, newest numbers, both curves, and what a doctor says."""
    record = read_record(folder)
    jumps = record.jumps
    return {
        "num_steps": len(record.phases), "num_real_steps": len(record.losses), "phase": record.phases[-1],
        "reason": record.reasons[-1], "loss": _newest(record.losses), "gradient_norm": _newest(record.norms),
        "lr": _newest(record.rates), "val_loss": _newest([loss for _, loss in record.validation]),
        "jumps_accepted": sum(bool(j.get("accepted")) for j in jumps), "jumps_proposed": len(jumps),
        "phases": {phase: record.phases.count(phase) for phase in dict.fromkeys(record.phases)},
        "curve": _curve(record), "findings": [f"{f.severity.value}: {f.name}" for f in diagnose(record).findings],
    }  # fmt: skip


def panel(found: dict[str, Any], name: str) -> Any:
    """The view as a rich renderable."""
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    shares = ", ".join(f"{phase} {count}" for phase, count in found["phases"].items())
    rows = (
        ("step", f"{found['num_steps']}, {found['num_real_steps']} real   ({shares})"),
        ("phase", f"{found['phase']}: {found['reason']}"),
        ("loss", f"{_told(found['loss'])}   validation {_told(found['val_loss'])}"),
        ("gradient", f"{_told(found['gradient_norm'])}   learning rate {_told(found['lr'])}"),
        ("jumps", f"{found['jumps_accepted']} of {found['jumps_proposed']} accepted"),
        ("curve", found["curve"]),
        ("health", "; ".join(found["findings"]) or "nothing is wrong, as far as the records tell"),
    )
    for label, value in rows:
        table.add_row(Text(label, style="dim"), Text(value))
    return Panel(table, title=Text(name), title_align="left")


def _newest(values: Sequence[float]) -> float | None:
    return next((x for x in reversed(values) if math.isfinite(x)), None)


def _told(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.5g}"


def _curve(record: RunRecord) -> str:
    """Training loss in columns of equal length, by the logarithm where it falls over a decade."""
    losses = [x for x in record.losses if math.isfinite(x)]
    if not losses:
        return ""
    width = min(WIDTH, len(losses))
    cut = [len(losses) * i // width for i in range(width + 1)]
    means = [sum(losses[a:b]) / (b - a) for a, b in itertools.pairwise(cut)]
    if min(means) > 0 and max(means) > 10 * min(means):
        means = [math.log(x) for x in means]
    low, high = min(means), max(means)
    return "".join(BARS[int((x - low) / (high - low) * (len(BARS) - 1)) if high > low else 0] for x in means)
