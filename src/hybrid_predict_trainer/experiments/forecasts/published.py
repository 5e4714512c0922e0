"""The published loss curves below ``HPT_DATA_DIR/loss-curves``, with the schedules that their names stand for.

18 runs of Llama-shaped models of 25 M and 100 M weights (published with arXiv 2503.12811, MIT licence).  The files
begin at the end of a linear warm-up of 2,160 steps; their rows are 128 steps apart.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...forecast.curve import Array, Curve
from ...forecast.law import Plan
from ...records import ConfigError
from ...safe_files import read_text
from ...tasks.base import data_dir

WARMUP_STEPS = 2160
#: Where the runs of two stages ("wsdcon") change their rate.
SECOND_STAGE = 8000
SIZES = ("25M", "100M")
#: Whole curves that the published law was fitted to, for each size.
FITTED = ("constant_24000", "cosine_24000", "wsdcon_9")
MAX_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Run:
    """A whole run: its curve, its rates and what it belongs to.

    Attributes:
        name: Of the run within its group.
        group: Runs of one group have one model and one peak rate: one law.
        family: Runs of one family have models of one size; the law's shape is learnt on other families.
        curve: Losses.
        rates: (T,) of each step.
        size: of the model.
    """

    name: str
    group: str
    family: str
    curve: Curve
    rates: Array
    size: float | None = None

    @property
    def plan(self) -> Plan:
        """Of the whole run."""
        return Plan.of(self.rates)

    def ends_at(self) -> float:
        """The final loss: the mean of the last hundredth of the rows."""
        from ...forecast.final_loss import last_value

        return last_value(self.curve)


def runs() -> list[Run]:
    """All 18.

    Raises:
        FileNotFoundError: the folder is not there.
    """
    folder = data_dir("the published loss curves (loss-curves/)") / "loss-curves"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    found = []
    for path in sorted(folder.glob("llama-*.csv")):
        size, _, name = path.stem.removeprefix("llama-").partition("_")
        steps, rates, losses = columns(path)
        found.append(Run(name, size, size, Curve.of(steps, losses), _rates(name, steps, rates),
                         float(size.removesuffix("M"))))  # fmt: skip
    return found


def columns(path: Path) -> tuple[Array, Array, Array]:
    """Step, rate and loss of a file of runs with these columns.

    Raises:
        ConfigError: it has others.
    """
    rows = list(csv.DictReader(io.StringIO(read_text(path, MAX_BYTES))))
    try:
        steps, rates, losses = (np.array([float(row[key]) for row in rows]) for key in ("step", "lr", "loss"))
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"{path}: is no table of step, lr, loss") from None
    return steps, rates, losses


def _rates(name: str, steps: Array, rates: Array) -> Array:
    """Of every step: those of the file between its rows, a step at the change of a run of two stages."""
    at = np.arange(1, int(steps[-1]) + 1)
    if name.startswith("wsdcon"):
        between = np.where(at > SECOND_STAGE, rates[-1], rates[0])
    else:
        between = np.interp(at, steps, rates)
    found: Array = np.where(at < WARMUP_STEPS, between * at / WARMUP_STEPS, between)
    return found
