"""The bar for "never worse" and its verdicts.  All figures are final validation losses of ours over plain ones.

Of every setting: the mean over seeds (geometric) is at most 1.01, or not above 1 beyond the noise of paired seeds
(one-sided t test of the logarithms, 95 %); no seed is above 1.05 and above what another order of the data alone does to
a plain run (95 % quantile over both directions of every pair, made where a seed is above 1.05); no run is lost that the
bare loop brings to its end; the cost is that of the plain run within 1 %.  Over settings: the mean of the ratios is at
most 0.99.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..report.text import aligned
from ..statistics import paired_interval
from .runs import Result
from .settings import Setting

MEAN_BAR, SEED_BAR, OVERALL_BAR, COST_BAR = 1.01, 1.05, 0.99, 0.01
#: Two-sided level of the paired interval, and the quantile of the data's order.
LEVEL, QUANTILE = 0.90, 0.95

HEAD = (
    "setting", "plain", "ours", "ratio", "at least", "worst seed", "allowed", "cost", "time", "verdict"
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Trio:
    """The runs of one seed; None where a run is not there yet, or there is none to be had."""

    seed: int
    plain: Result | None
    ours: Result | None
    other: Result | None = None


def order_quantile(pairs: Sequence[tuple[float, float]]) -> float | None:
    """95 % quantile of the ratio of two plain runs that differ in the order of the data only, both directions of each.

    None without pairs.
    """
    ratios = [r for a, b in pairs for r in (a / b, b / a)]
    return float(np.quantile(ratios, QUANTILE)) if ratios else None


def needs_other_orders(setting: Setting, trios: Sequence[Trio]) -> bool:
    """Whether a seed stands above the fixed bar, so that it matters what another order of the data does."""
    judged = [t for t in trios if not _lost(t.plain) and not _lost(t.ours)]
    over = any(t.ours.loss > SEED_BAR * t.plain.loss for t in judged if t.ours and t.plain)
    return over and not setting.full_batch


def judge(setting: Setting, trios: Sequence[Trio]) -> dict[str, Any]:
    """Figures and verdict of a setting, JSON-able.

    ``failed`` names what fails: "mean", "seed", "lost", "cost"; "plain lost" where the bare loop itself does not end
    well: then the setting says nothing.  ``passed`` is None until every run is there.
    """
    complete = [t for t in trios if t.plain is not None and t.ours is not None]
    missing = len(trios) - len(complete)
    if needs_other_orders(setting, trios):
        missing += sum(t.other is None for t in trios)
    plain_lost = [t.seed for t in complete if _lost(t.plain)]
    lost = [t.seed for t in complete if _lost(t.ours) and not _lost(t.plain)]
    judged = [t for t in complete if not _lost(t.plain) and not _lost(t.ours)]
    ratios = {t.seed: t.ours.loss / t.plain.loss for t in judged if t.ours and t.plain}
    orders = [(t.other.loss, t.plain.loss) for t in judged if t.plain and t.other and not _lost(t.other)]
    # one-sided 95 % is the lower end of the two-sided interval at 90 %; None below two seeds
    paired = paired_interval([t.ours.loss for t in judged if t.ours], [t.plain.loss for t in judged if t.plain], LEVEL)
    mean, least = (paired.mean, paired.low) if ratios else (None, None)
    quantile = order_quantile(orders)
    allowed = max(SEED_BAR, quantile or 0.0)
    costs = [t.ours.cost / setting.steps for t in judged if t.ours]
    failed = []
    if mean is not None and mean > MEAN_BAR and (least is None or least > 1.0):
        failed.append("mean")
    if any(r > allowed for r in ratios.values()):
        failed.append("seed")
    failed += ["lost"] if lost else []
    failed += ["cost"] if any(abs(c - 1) > COST_BAR for c in costs) else []
    failed += ["plain lost"] if plain_lost else []
    return {
        "setting": setting.name, "about": setting.about, "source": _source(trios), "steps": setting.steps,
        "full_batch": setting.full_batch, "num_seeds": len(trios), "num_missing": missing,
        "plain": _geometric([t.plain.loss for t in trios if t.plain and not _lost(t.plain)]),
        "ours": _geometric([t.ours.loss for t in judged if t.ours]),
        "ratio": mean, "ratio_at_least": least, "ratios": {str(s): r for s, r in ratios.items()},
        "worst": max(ratios.values(), default=None), "allowed": allowed, "order_quantile": quantile,
        "cost": max(costs, key=lambda c: abs(c - 1), default=None),
        "time_ratio": _geometric([t.ours.time_ratio for t in judged if t.ours and t.ours.time_ratio]),
        "plain_seconds": _geometric([t.plain.seconds for t in judged if t.plain]),
        "ours_seconds": _geometric([t.ours.seconds for t in judged if t.ours]),
        "lost": {str(t.seed): t.ours.error for t in complete if t.ours and t.seed in lost},
        "plain_lost": plain_lost, "failed": failed, "passed": False if failed else None if missing else True,
        "notes": {str(t.seed): t.ours.notes for t in complete if t.ours},
    }  # fmt: skip


def overall(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The bar over all settings: the arithmetic mean of ratios, in which a bad setting weighs more than a good one.

    A setting without a ratio because every run of ours was lost makes it fail by itself.
    """
    ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
    noisy = [row["ratio"] for row in rows if row["ratio"] is not None and not row["full_batch"]]
    mean = sum(ratios) / len(ratios) if ratios else None
    failed = [row["setting"] for row in rows if row["failed"]]
    unfinished = any(row["num_missing"] for row in rows) or not rows
    mean_met = mean is not None and mean <= OVERALL_BAR
    passed = False if failed or (not unfinished and not mean_met) else None if unfinished else True
    return {
        "mean": mean, "mean_geometric": _geometric(ratios),
        "mean_without_full_batch": sum(noisy) / len(noisy) if noisy else None,
        "mean_met": mean_met, "num_settings": len(rows), "num_judged": len(ratios), "failed": failed, "passed": passed,
    }  # fmt: skip


def _lost(result: Result | None) -> bool:
    return result is None or result.error is not None or not math.isfinite(result.loss)


def _geometric(values: Sequence[float | None]) -> float | None:
    found = [v for v in values if v is not None and v > 0]
    return math.exp(sum(math.log(v) for v in found) / len(found)) if found else None


def _source(trios: Sequence[Trio]) -> str:
    return next((t.plain.source for t in trios if t.plain), "")


# ---- for a person -------------------------------------------------------------------------------------------


def format_text(found: Mapping[str, Any]) -> str:
    """The table for a terminal."""
    rows = [_cells(row) for row in found["settings"]]
    return "\n".join([*aligned(HEAD, rows), "", *_closing(found)])


def markdown(found: Mapping[str, Any]) -> str:
    """The table for docs/benchmarks.md, with the data of every setting and what was lost."""
    head = (*HEAD, "data")
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    lines += ["| " + " | ".join((*_cells(row), row["source"])) + " |" for row in found["settings"]]
    return "\n".join([*lines, "", *_closing(found)]) + "\n"


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["setting"], _number(row["plain"], ".4g"), _number(row["ours"], ".4g"), _number(row["ratio"], ".3f"),
        _number(row["ratio_at_least"], ".3f"), _number(row["worst"], ".3f"), _number(row["allowed"], ".3f"),
        _number(row["cost"], ".3f"), _number(row["time_ratio"], ".2f"), _verdict(row),
    )  # fmt: skip


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _verdict(row: Mapping[str, Any]) -> str:
    if row["failed"]:
        lost = f" {len(row['lost'])} of {row['num_seeds']}" if row["lost"] else ""
        return f"FAIL: {', '.join(row['failed'])}{lost}"
    return f"{row['num_missing']} runs missing" if row["num_missing"] else "PASS"


def _closing(found: Mapping[str, Any]) -> list[str]:
    all_ = found["overall"]
    words = {True: "PASS", False: "FAIL", None: "unfinished"}
    lines = [
        f"mean over {all_['num_judged']} of {all_['num_settings']} settings {_number(all_['mean'], '.3f')} "
        f"(at most {OVERALL_BAR}); geometric {_number(all_['mean_geometric'], '.3f')}; without full-batch settings "
        f"{_number(all_['mean_without_full_batch'], '.3f')}",
        f"{words[all_['passed']]}" + (f": {', '.join(all_['failed'])}" if all_["failed"] else ""),
    ]
    lost = [(row["setting"], seed, error) for row in found["settings"] for seed, error in row["lost"].items()]
    return lines + [f"lost: {name}, seed {seed}: {error}" for name, seed, error in lost]
