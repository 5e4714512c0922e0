"""The page about a search: ranking and its certainty, curves, forecasts against outcomes, compute saved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...records import ConfigError
from ...safe_files import read_json_object
from ...sweeps.curves import Scale
from ...sweeps.decide import chances
from ...sweeps.ends import UNKNOWN, End, ends_of
from ...sweeps.looks import optimistic, pessimistic
from ..extras import require
from ..sweep import storage
from ..sweep.plan import PLAN
from ..sweep.space import RATE_NAMES
from ..sweep.worker import FORECASTS, HOST, SECONDS, WHY, curve_of
from . import charts as svg
from .charts import escape
from .parts import figure, format_value, html_table, legend
from .templates import whole_page

#: Curves that are drawn, and of those the ones with a colour and a name.
MOST_CURVES, MOST_NAMED = 60, 6
#: Trials that a forecast on the page takes into account: forecasts of more take too long to draw a page.
MOST_KNOWN = 150
#: What is shown of an interval: its ends are passed with this probability each.
TAIL = 0.05
WORDS = {"COMPLETE": "complete", "PRUNED": "stopped", "FAIL": "failed", "RUNNING": "under way", "WAITING": "waiting"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A trial: its rank is its place in the list.

    Attributes:
        share: of its run that is trained.
        value: final loss; NaN before the end.
        last: loss that it has shown last.
        low, expected, high: of the forecast, 90 % between the outer ones; NaN where nothing can be said.
        chance: probability that no other trial would end below it.
        curve: (step, loss).
        forecasts: (share, low, expected, high) of those that it was chosen by.
    """

    number: int
    state: str
    params: Mapping[str, Any]
    share: float
    value: float
    last: float
    low: float
    expected: float
    high: float
    chance: float
    seconds: float
    why: str
    curve: Sequence[tuple[int, float]]
    forecasts: Sequence[tuple[float, float, float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Of a search.

    Attributes:
        rows: trials, best first.
        spent: in runs of the plan's length.
        saved: share of the compute that all trials would have taken if trained to their ends.
    """

    rows: Sequence[Row]
    spent: float
    saved: float

    def _count(self, state: str) -> int:
        return sum(row.state == state for row in self.rows)

    @property
    def complete(self) -> int:
        """Number of complete trials."""
        return self._count("complete")

    @property
    def stopped(self) -> int:
        """Number of those that could not win."""
        return self._count("stopped")

    @property
    def failed(self) -> int:
        """Number of those that diverged or could not be trained."""
        return self._count("failed")

    @property
    def alive(self) -> int:
        """Number of those that may go on."""
        return self._count("under way")

    @property
    def best(self) -> Row | None:
        """The complete trial with the lowest loss."""
        return min((r for r in self.rows if r.state == "complete"), key=lambda r: r.value, default=None)

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        best = self.best
        rows = [{k: v for k, v in asdict(row).items() if k not in ("curve", "forecasts")} for row in self.rows]
        return {
            "best": None if best is None else {"trial": best.number, "value": best.value, "params": dict(best.params),
                                               "chance": best.chance},
            "complete": self.complete, "stopped": self.stopped, "failed": self.failed, "alive": self.alive,
            "spent": self.spent, "saved": self.saved, "trials": rows,
        }  # fmt: skip


def account(trials: Sequence[Any], steps: int) -> Account:
    """From the trials of a study of ``hpt sweep``.

    Args:
        trials: Frozen.
        steps: Of a run of the plan.
    """
    known = [t for t in trials if HOST in t.user_attrs]
    scale = Scale.of([v for t in known for v in t.intermediate_values.values()], maximize=False)
    ranked = sorted(known, key=lambda t: (t.state.name != "COMPLETE", _shown_last(t)))
    asked = ranked[:MOST_KNOWN]
    ends = ends_of([curve_of(t, scale) for t in asked], rate_names=RATE_NAMES)
    failed = [t.state.name == "FAIL" for t in asked]
    chance = chances([UNKNOWN if gone else end for end, gone in zip(ends, failed, strict=True)])
    rows = [
        _row(t, scale, ends[i] if i < len(ends) else UNKNOWN, chance[i] if i < len(ends) else 0.0)
        for i, t in enumerate(ranked)
    ]
    rows.sort(key=_rank)
    spent = sum(t.last_step or 0 for t in known)
    whole = sum(t.user_attrs["total_steps"] for t in known)
    return Account(rows=rows, spent=spent / steps, saved=1 - spent / whole if whole else 0.0)


def _shown_last(trial: Any) -> float:
    values = trial.intermediate_values
    return float(values[max(values)]) if values else math.inf


def _rank(row: Row) -> tuple[bool, float]:
    """By what a trial ended at, or is expected to; failed ones last."""
    value = next((v for v in (row.value, row.expected, row.last) if math.isfinite(v)), math.inf)
    return row.state == "failed", value


def _row(trial: Any, scale: Scale, end: End, chance: float) -> Row:
    known = math.isfinite(end.scale) and trial.state.name != "FAIL"
    low, high = (optimistic(end, TAIL), pessimistic(end, TAIL)) if known else (math.nan, math.nan)
    said = trial.user_attrs
    return Row(
        number=trial.number, state=WORDS[trial.state.name], params=trial.params,
        share=min((trial.last_step or 0) / said["total_steps"], 1.0),
        value=float(trial.value) if trial.state.name == "COMPLETE" else math.nan, last=_shown_last(trial),
        low=scale.back(low), expected=scale.back(end.mean) if known else math.nan, high=scale.back(high),
        chance=chance, seconds=float(said.get(SECONDS, math.nan)), why=str(said.get(WHY, "")),
        curve=tuple(sorted(trial.intermediate_values.items())),
        forecasts=tuple((f[0], *(scale.back(v) for v in f[1:])) for f in said.get(FORECASTS, [])),
    )  # fmt: skip


def params_text(params: Mapping[str, Any]) -> str:
    """``lr 0.01, schedule wsd``."""
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in params.items())


def cells(row: Row) -> list[str]:
    """Of a table of text: trial, state, trained, shown last, forecast, chance, parameters."""
    forecast = f"{row.expected:.5g} ({row.low:.5g} to {row.high:.5g})" if math.isfinite(row.expected) else ""
    return [
        str(row.number), row.state, f"{100 * row.share:.0f} %", f"{row.last:.5g}" if math.isfinite(row.last) else "",
        f"{row.value:.5g}" if row.state == "complete" else forecast, f"{100 * row.chance:.0f} %",
        params_text(row.params),
    ]  # fmt: skip


# ---- the page ------------------------------------------------------------------------------------------------


def holds(folder: Path) -> bool:
    """Whether a folder is that of ``hpt sweep``."""
    return (folder / PLAN).is_file()


def page_of(folder: Path) -> str:
    """The page about a folder of ``hpt sweep`` as it stands, which may still be at work; nothing is trained.

    Raises:
        ConfigError: its trials are kept elsewhere, or none has begun.
    """
    require("optuna", "scipy", "filelock")
    import optuna

    plan = read_json_object(folder / PLAN)
    again = "the same 'hpt sweep' command goes on with the search and writes its page"
    if not (folder / storage.JOURNAL).is_file():
        raise ConfigError(f"{folder}: has no {storage.JOURNAL}, its trials are in another storage; {again}")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with storage.storage_errors():
            kept = storage.opened(None, folder)
            studies = [optuna.load_study(study_name=n, storage=kept) for n in optuna.get_all_study_names(kept)]
            trials = [trial for study in studies for trial in study.get_trials(deepcopy=False)]
    except storage.StorageError as error:
        raise ConfigError(f"{folder / storage.JOURNAL}: cannot be read: {error}") from None
    lengths = [t.user_attrs["total_steps"] for t in trials if HOST in t.user_attrs]
    if not lengths:
        raise ConfigError(f"{folder}: no trial has begun yet")
    options = plan.get("options")
    steps = options.get("steps") if isinstance(options, dict) else None
    return page(folder.resolve().name, account(trials, steps or max(lengths)))


def page(name: str, found: Account) -> str:
    """The page as HTML text.

    Args:
        name: Of the search.
        found: What it came to.
    """
    sections = [_headline(name, found), _ranking(found), _curves(found), _forecasts(found), _failed(found)]
    return whole_page(f"Search {name}", [s for s in sections if s])


def _headline(name: str, found: Account) -> str:
    best = found.best
    told = "No trial is complete yet."
    if best is not None:
        told = (
            f"Best: trial {best.number} ({escape(params_text(best.params))}), loss {format_value(best.value, 5)}. "
            f"The probability that no other trial would end below it is {100 * best.chance:.0f}&nbsp;%."
        )
    return (
        f"<h1>Search {escape(name)}</h1><p>{told}</p><p>{len(found.rows)} trials: {found.complete} complete, "
        f"{found.alive} waiting or in training, {found.stopped} stopped, {found.failed} failed. Compute: "
        f"{format_value(found.spent, 4)} whole runs; {100 * found.saved:.0f}&nbsp;% of what these trials would have "
        "cost together was not spent.</p>"
    )


def _ranking(found: Account) -> str:
    head = ["Rank", "Trial", "State", "Trained", "Shown last", "End, or forecast of it (90&nbsp;%)", "Best of all",
            "Parameters"]  # fmt: skip
    rows = []
    for rank, row in enumerate(found.rows, 1):
        told = cells(row)
        number, state, *figures, params = (escape(cell) for cell in told)
        rows.append([str(rank), number, f"text:{state}", *figures, f"text:{params}"])
    note = (
        "“Best of all” is the probability that a trial has the lowest end, errors of the forecasts taken as "
        "independent; that of stopped trials counts."
    )
    return f"<h2>Ranking</h2>{html_table(head, rows)}<p>{note}</p>"


def _curves(found: Account) -> str:
    rows = [row for row in found.rows if len(row.curve) > 1][:MOST_CURVES]
    if not rows:
        return ""
    curves = [
        svg.Curve(f"trial {row.number}" if k < MOST_NAMED else "", f"c{k % 8}" if k < MOST_NAMED else "c7",
                  tuple((float(step), loss) for step, loss in row.curve))
        for k, row in enumerate(rows)
    ]  # fmt: skip
    keys = legend((c.name, "line", c.style) for c in curves[:MOST_NAMED])
    drawn = figure("", "Validation loss; the names are those of the first in the ranking.",
                   lambda width: svg.line_chart(curves, width, "step", "validation loss"))  # fmt: skip
    return f"<h2>Curves</h2>{keys}{drawn}"


def _forecasts(found: Account) -> str:
    """What complete trials were expected to end at when they were chosen, against what they did."""
    points = [
        (told, row.value, f"trial {row.number} at {100 * share:.0f} %: {told:.5g}, ended at {row.value:.5g}")
        for row in found.rows if row.state == "complete" for share, _, told, _ in row.forecasts
    ]  # fmt: skip
    inside = [
        low <= row.value <= high
        for row in found.rows if row.state == "complete" for _, low, _, high in row.forecasts
    ]  # fmt: skip
    if not points:
        return ""
    clouds = [svg.Cloud("forecast", "c0", tuple(points))]
    drawn = figure("", "Each mark is a forecast by which a trial was chosen to go on.",
                   lambda width: svg.scatter_chart(clouds, width, "forecast", "loss", same=True), 420)  # fmt: skip
    told = (
        f"{sum(inside)} of {len(inside)} outcomes lay within the interval of 90&nbsp;%. Trials that were stopped have "
        "no outcome, so that what is shown leans to those that looked well."
    )
    return f"<h2>Forecasts against outcomes</h2>{drawn}<p>{told}</p>"


def _failed(found: Account) -> str:
    rows = [[str(r.number), f"text:{escape(params_text(r.params))}", f"text:{escape(r.why)}"]
            for r in found.rows if r.state == "failed"]  # fmt: skip
    return f"<h2>Failed</h2>{html_table(['Trial', 'Parameters', 'Why'], rows)}" if rows else ""


__all__ = ["Account", "Row", "account", "cells", "holds", "page", "page_of", "params_text"]
