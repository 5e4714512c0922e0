"""Figures of `hpt bench regimes` as words: bounds, intervals, and a dash for what is not known."""

from __future__ import annotations

from typing import cast

from ..report.data import Record, list_of, number, table_of
from ..statistics import METHOD, Bound, bounded_interval, ends_words

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
BOUNDS = {"at least": "\N{GREATER-THAN OR EQUAL TO} ", "at most": "\N{LESS-THAN OR EQUAL TO} "}


def s_cell(row: Record, name: str = "S") -> str:
    """S with its bound and interval: ``≥ 3.03 [2.55, 3.99]``."""
    value, kind = number(row.get(name)), row.get("kind" if name == "S" else f"{name}_kind")
    if value is None:
        return DASH
    interval = ends_words(ends_of(row, name))
    return f"{BOUNDS.get(str(kind), '')}{value:.3g}{interval and f' {interval}'}"


def ends_of(row: Record, name: str = "S") -> list[float | None]:
    """Ends of a figure's interval, None for an open one; empty where there is none.

    Results of versions that took a percentile bootstrap have theirs computed again from the seeds where those are told.
    """
    if row.get("interval") == METHOD:
        return [number(v) for v in list_of(row.get("ci95" if name == "S" else f"{name}_ci95"))]
    seeds = [table_of(v) for v in list_of(row.get("per_seed"))] if name == "S" else []
    values, kinds = [number(s.get("value")) for s in seeds], [s.get("kind") for s in seeds]
    known = [v for v in values if v is not None]
    if len(known) < max(len(values), 1) or not set(kinds) <= {"exact", "at least", "at most"}:
        return []
    return list(bounded_interval(known, cast(list[Bound], kinds)).ends or ())


def loss_cell(row: Record) -> str:
    """Final loss, mean and standard deviation over seeds."""
    loss = table_of(row.get("final_loss"))
    mean, std = number(loss.get("mean")), number(loss.get("std"))
    if mean is None:
        return "diverged" if row.get("errors") else DASH
    return f"{mean:.4g}" + ("" if std is None else f" ± {std:.2g}")


def percent_cell(value: object, scale: float = 1.0) -> str:
    """A percentage with its sign."""
    found = number(value)
    if found is None:
        return DASH
    percent = scale * found
    if abs(percent) < 0.005:
        return "0 %"
    return f"{percent:+{'.0f' if abs(percent) >= 10 else '.2g'}} %".replace("-", MINUS)


def plain_cell(value: object, form: str = ".3g") -> str:
    """A number."""
    found = number(value)
    return DASH if found is None else format(found, form).replace("-", MINUS)


def share_cell(row: Record) -> str:
    """Shares of cost and of time spent on prediction."""
    share = table_of(row.get("prediction_share"))
    cost, time = number(share.get("cost")), number(share.get("time"))
    if cost is None:
        return DASH
    return f"{100 * cost:.2g} / {DASH if time is None else f'{100 * time:.2g}'} %"


def jumps_cell(row: Record) -> str:
    """Accepted of proposed."""
    found = table_of(row.get("jumps"))
    return DASH if not found else f"{plain_cell(found.get('accepted'))} of {plain_cell(found.get('proposed'))}"
