"""``hpt bench sweep``: every way of stopping on every recorded grid, as one object and a table."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...records import ConfigError
from ...tasks.base import DATA_DIR_VARIABLE
from ..extras import require
from ..forecasts import published
from ..report.text import aligned
from . import grids, replay
from .grids import Trial
from .replay import Way

#: Share of the grid's compute that ours may spend, of problems in which it must find the best, and how many times less
#: than the best of Optuna's pruners that finds it as often.
BARS = {"compute": 0.25, "regret_met": 0.95, "times_less": 1.5}
PUBLISHED = "published"
#: A search with a quarter of the compute as its budget, as ``hpt sweep --budget`` has one: what the bars are held to.
QUARTER = "freeze and thaw, a quarter"
#: The same where new trials come in random order, as from a sampler that knows nothing of the forecasts, and where
#: forecasts choose them.  Not held against the bars, which are about searches that may begin any trial.
SAMPLED, PROPOSED = "random trials, a quarter", "--sampler joint, a quarter"
OURS = (QUARTER, "freeze and thaw", "HybridPruner")
#: Replayed until the best is found, which no search knows: not held against ours.
ENDLESS = "lowest first"
#: Share of a run and errors of forecasts made there, for what is possible.
KNOWN_AT, ERRORS = 0.13, (0.0, 0.0115, 0.02, 0.04)
#: Rows between two reports to a pruner: that of every second keeps the replay of a study short.
REPORT_EVERY = 2


def names() -> list[str]:
    """Grids that are there: those in the package, and the published curves where ``HPT_DATA_DIR`` has them."""
    found = [name for name in grids.GRIDS if (grids.FOLDER / f"{name}.json.gz").is_file()]
    folder = os.environ.get(DATA_DIR_VARIABLE)
    return found + [PUBLISHED] * bool(folder and (Path(folder) / "loss-curves").is_dir())


def trials_of(name: str) -> list[Trial]:
    """Of a grid.

    Raises:
        ConfigError: unknown.
    """
    if name != PUBLISHED:
        return grids.load(name)
    found = []
    for run in published.runs():
        losses = run.curve.losses.copy()
        losses[-1] = losses[-5:].mean()  # a single row of a training loss is mostly noise
        steps = float(run.curve.steps[-1])
        found.append(
            Trial(
                params={"size": run.family, "schedule": run.name}, at=run.curve.steps, valid=losses, train=losses,
                steps=int(steps), cost=steps * float(run.family.rstrip("M")), rates=run.rates[: int(steps)],
            )
        )  # fmt: skip
    return found


def ways() -> dict[str, Way]:
    """Name -> how a search is done; Optuna's pruners with settings as its documents recommend them."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def of(make: Callable[[int], Any]) -> Way:
        return lambda trials: replay.with_optuna(trials, make(max(t.steps for t in trials)), REPORT_EVERY)

    pruners = optuna.pruners
    return {
        "all": replay.run_all, "random, a quarter": lambda trials: replay.random_search(trials, 0.25),
        QUARTER: lambda trials: replay.freeze_thaw(trials, share=BARS["compute"]),
        SAMPLED: lambda trials: replay.one_at_a_time(trials, share=BARS["compute"]),
        PROPOSED: lambda trials: replay.one_at_a_time(trials, share=BARS["compute"], forecast=True),
        "freeze and thaw": replay.freeze_thaw, "lowest first": replay.lowest_first, "HybridPruner": replay.one_by_one,
        "MedianPruner": of(lambda steps: pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=steps // 10)),
        "SuccessiveHalving": of(
            lambda steps: pruners.SuccessiveHalvingPruner(min_resource=max(1, steps // 16), reduction_factor=4)
        ),
        "Hyperband": of(
            lambda steps: pruners.HyperbandPruner(
                min_resource=max(1, steps // 16), max_resource=steps, reduction_factor=4
            )
        ),
    }  # fmt: skip


def measure(wanted: Sequence[str], shuffles: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Replay.

    Args:
        wanted: Grids; empty: all that are there.
        shuffles: Problems per grid.
        tell: Takes a line about every way.

    Returns:
        JSON-able; ``passed`` is whether every bar is met on every grid.

    Raises:
        ConfigError: an unknown grid.
        ModuleNotFoundError: optuna or scipy is missing.
    """
    require("optuna", "scipy")
    there = names()
    for name in wanted:
        if name not in there:
            raise ConfigError(f"unknown grid {name!r} (there are: {', '.join(there)})")
    found: dict[str, Any] = {"shuffles": shuffles, "grids": {}}
    for name in wanted or there:
        trials = trials_of(name)
        rows = {}
        for way, search in ways().items():
            rows[way] = replay.summary([search(replay.problem(trials, seed)) for seed in range(shuffles)])
            tell(f"{name}, {way}: {100 * rows[way]['compute']:.0f} % of the compute, "
                 f"best found in {100 * rows[way]['regret_met']:.0f} %, "
                 f"after {100 * rows[way]['found_after']:.0f} % (95 %: {100 * rows[way]['found_after_95']:.0f} %), "
                 f"regret at a quarter {100 * rows[way]['quarter']:.1f} %")  # fmt: skip
        found["grids"][name] = {
            "trials": len(trials),
            "crossings": crossings(trials),
            "behind": behind(trials),
            "possible": possible(trials, shuffles),
            "ways": rows,
            **verdicts(rows),
        }
    found["passed"] = all(all(grid["verdicts"].values()) for grid in found["grids"].values())
    return found


def possible(trials: Sequence[Trial], shuffles: int) -> dict[str, float]:
    """Error of forecasts at 13 % of a run -> share of the problems in which a quarter of the compute would do."""
    return {
        f"{error:g}": float(np.mean([
            replay.foretold(replay.problem(trials, seed), KNOWN_AT, error, seed) <= BARS["compute"]
            for seed in range(shuffles)
        ]))
        for error in ERRORS
    }  # fmt: skip


def crossings(trials: Sequence[Trial], share: float = 0.25) -> float:
    """Share of the pairs of trials whose order at a quarter of their runs is not that of their ends."""
    early, ends = [], []
    for trial in trials:
        row = max(int((trial.at <= share * trial.steps).sum()) - 1, 0)
        early.append(float(trial.valid[row]) if len(trial.valid) else math.inf)
        ends.append(trial.final)
    pairs = [(i, j) for i in range(len(ends)) for j in range(i)]
    return sum((early[i] < early[j]) != (ends[i] < ends[j]) for i, j in pairs) / max(len(pairs), 1)


def behind(trials: Sequence[Trial], share: float = 0.13) -> int:
    """Number of trials that show a lower loss than the later winner at a share of their runs."""
    shown = [float(t.valid[max(int((t.at <= share * t.steps).sum()) - 1, 0)]) if len(t.valid) else math.inf
             for t in trials]  # fmt: skip
    winner = min(range(len(trials)), key=lambda i: trials[i].final)
    return sum(value < shown[winner] for value in shown)


def verdicts(rows: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The bars, and by how much ours spends less than the best pruner that finds the best as often."""
    ours = rows[OURS[0]]
    others = {
        w: r for w, r in rows.items() if w not in (*OURS, SAMPLED, PROPOSED, ENDLESS) and not w.startswith("random")
    }
    equal = {w: r for w, r in others.items() if r["regret_met"] >= min(ours["regret_met"], BARS["regret_met"])}
    best = min(equal, key=lambda w: equal[w]["compute"])
    times = equal[best]["compute"] / ours["compute"]
    return {
        "best_other": best, "times_less": times,
        "verdicts": {
            "at most a quarter of the compute": ours["compute"] <= BARS["compute"] + 1e-9,
            "within 0.2 % in 95 % of the problems": ours["regret_met"] >= BARS["regret_met"],
            "the winner stopped in at most 5 %": max(rows[way]["winner_stopped"] for way in OURS[1:]) <= 0.05,
            "1.5 times less than the best pruner": times >= BARS["times_less"],
        },
    }  # fmt: skip


HEAD = (
    "grid", "way", "compute", "95 % of problems", "within 0.2 %", "regret, 95 %", "winner stopped", "found after",
    "found after, 95 %", "regret at a quarter",
)  # fmt: skip


def _rows(found: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name, grid in found["grids"].items():
        for way, row in grid["ways"].items():
            rows.append([
                name, way, *(f"{100 * row[key]:.1f} %" for key in (
                    "compute", "compute_95", "regret_met", "regret_95", "winner_stopped", "found_after",
                    "found_after_95", "quarter",
                )),
            ])  # fmt: skip
    return rows


def _verdict_lines(found: Mapping[str, Any]) -> list[tuple[str, bool]]:
    return [
        (f"{name}: {what}" + (f" ({grid['times_less']:.1f}, {grid['best_other']})" if "1.5" in what else ""), met)
        for name, grid in found["grids"].items()
        for what, met in grid["verdicts"].items()
    ]


def format_text(found: Mapping[str, Any]) -> str:
    """What a person reads."""
    lines = aligned(HEAD, _rows(found))
    lines += [
        f"{n}: {g['trials']} trials, {100 * g['crossings']:.0f} % of pairs cross, at 13 % of their runs "
        f"{g['behind']} show less than the winner; a quarter would do with forecasts there that are off by "
        + ", ".join(f"{100 * float(e):g} %: in {100 * p:.0f} %" for e, p in g["possible"].items())
        for n, g in found["grids"].items()
    ]
    return "\n".join([*lines, *(f"{'PASS' if met else 'FAIL'}  {what}" for what, met in _verdict_lines(found))])


def markdown(found: Mapping[str, Any]) -> str:
    """The tables of docs/sweeps.md."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in _rows(found)]
    lines += ["", "| bar | met |", "|---|---|"]
    lines += [f"| {what} | {'yes' if met else '**no**'} |" for what, met in _verdict_lines(found)]
    return "\n".join(lines) + "\n"
