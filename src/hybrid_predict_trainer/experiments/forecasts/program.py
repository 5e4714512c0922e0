"""``hpt bench forecast``: all scores in one object, their tables, and the priors that the package ships."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...forecast.curve import Curve
from ...forecast.law import NAMES
from ...forecast.prior import learnt, shipped
from ..report.text import aligned
from . import published, recorded, scores

#: Bars: largest median error by share, and mean error after three whole curves.
BARS = {"published": {0.25: 0.005}, "own": {0.25: 0.02, 0.5: 0.01}}
#: Name of the prior that is learnt from each.
PRIOR_OF = {"published": "language-models", "own": "small-models"}
#: Published runs with their steps counted otherwise, as a log of micro-batches or of larger batches has them: counts a
#: step.
COUNTED = {"published, four counts a step": 4.0, "published, a count in four steps": 0.25}
#: Shown beside the law, which the bars are about.
WITHOUT_BARS = ("published, among finished runs", *COUNTED)
WHOLE_CURVES_BAR = 0.0010
#: The published law's own mean errors after a fit on the same three curves (arXiv 2503.12811, table of its fits).
PUBLISHED_LAW = {"25M": 0.0011, "100M": 0.0014}
COVERAGE = (0.85, 0.95)


def measure(curves: Literal["published", "own", "all"], out: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """All that is asked for.

    Args:
        curves: Which runs.
        out: Of the own runs; what is missing is trained.
        tell: Takes a line about every run.

    Returns:
        JSON-able; ``passed`` is whether every bar is met.
    """
    sets: dict[str, list[published.Run]] = {}
    if curves in ("own", "all"):
        sets["own"] = own_runs(out, tell)
        sets["own, published shape"] = sets["own"]
        for name in AMONG:
            sets[name] = sets["own"]
    if curves in ("published", "all"):
        sets["published"] = published.runs()
        for name in WITHOUT_BARS:
            sets[name] = sets["published"]
    found: dict[str, Any] = {"sets": {name: _scored(name, runs) for name, runs in sets.items()}}
    if "published" in sets:
        found["whole_curves"] = scores.whole_curves(sets["published"])
    found["passed"] = all(_verdicts(found).values())
    found["verdicts"] = _verdicts(found)
    return found


def own_runs(out: Path, tell: Callable[[str], None]) -> list[published.Run]:
    """The recorded runs; those of one width are one group."""
    files = recorded.record(out, tell)
    found = []
    for recipe, path in zip(recorded.recipes(), files, strict=True):
        steps, _, losses = published.columns(path)
        found.append(
            published.Run(
                recipe.name,
                f"w{recipe.width}-lr{recipe.lr:g}",
                f"w{recipe.width}",
                Curve.of(steps, losses),
                recorded.rates(recipe) * recipe.lr,
                float(recipe.width),
            )
        )
    return found


def _alike(part: int) -> Callable[[published.Run, published.Run], bool]:
    """Whether two recorded runs have a part of their names in common: -1 the length, -2 the schedule."""
    return lambda run, other: run.name.split("-")[part] == other.name.split("-")[part]


#: Sets that are foretold from finished runs of other widths, and which of those are left out.
AMONG: dict[str, Callable[[published.Run, published.Run], bool]] = {
    "own, among finished runs": lambda run, other: False,
    "own, among others of other schedules": _alike(-2),
    "own, among others of other lengths": _alike(-1),
}


def _among(runs: list[published.Run], without: Callable[[published.Run, published.Run], bool]) -> dict[str, Any]:
    told = scores.among_others(runs, without=without)
    families = sorted({run.family for run in runs})
    return {
        "runs": len(runs), "families": families, "summary": scores.summary(told),
        "by_family": {f: scores.summary([s for s in told if s.family == f]) for f in families},
        "covered": float(np.mean([s.covered for s in told])), "noise_floor": scores.noise_floor(runs),
        "scores": [asdict(s) for s in told],
    }  # fmt: skip


def _counted(runs: list[published.Run], counts: float) -> dict[str, Any]:
    """With the intervals as they are stated: nobody tells the prior how steps were counted."""
    told = scores.leave_family_out(runs, widening=shipped(PRIOR_OF["published"]).widening, counts=counts)
    return {
        "runs": len(runs), "families": [], "summary": scores.summary(told), "by_family": {},
        "covered": float(np.mean([s.covered for s in told])), "noise_floor": scores.noise_floor(runs),
        "scores": [asdict(s) for s in told],
    }  # fmt: skip


def _scored(name: str, runs: list[published.Run]) -> dict[str, Any]:
    if "among" in name:
        return _among(runs, AMONG.get(name, lambda run, other: False))
    if name in COUNTED:
        return _counted(runs, COUNTED[name])
    if name == "own, published shape":
        raw = scores.with_prior(runs, replace(shipped(PRIOR_OF["published"]), widening=1.0))
    else:
        raw = scores.leave_family_out(runs)
    told = scores.calibrated(raw)
    shapes = scores.shapes_of(runs)
    prior = learnt(PRIOR_OF[name.partition(",")[0]], list(shapes.values()), widening=scores.widening_of(raw))
    families = sorted({run.family for run in runs})
    return {
        "runs": len(runs), "families": families, "summary": scores.summary(told),
        "by_family": {f: scores.summary([s for s in told if s.family == f]) for f in families},
        "covered": float(np.mean([s.covered for s in told])), "noise_floor": scores.noise_floor(runs),
        "covered_as_stated": float(np.mean([s.covered for s in raw])),
        "shapes": {g: dict(zip(NAMES, theta.tolist(), strict=True)) for (_, g), theta in shapes.items()},
        "prior": prior.to_json(), "scores": [asdict(s) for s in told],
    }  # fmt: skip


def _verdicts(found: Mapping[str, Any]) -> dict[str, bool]:
    """Bar -> whether it is met."""
    verdicts = {}
    for name, result in found["sets"].items():
        if name in WITHOUT_BARS:
            continue
        for row in result["summary"]:
            bar = BARS[name.partition(",")[0]].get(row["share"])
            if bar is not None:
                percent = f"{100 * row['share']:.0f} %"
                verdicts[f"{name}, {percent} known: median error at most {100 * bar:g} %"] = row["median"] <= bar
                verdicts[f"{name}, {percent} known: ahead of the last value"] = row["median"] < row["last_value"]
                for other, words in (("power_law", "the power law"), ("log_line", "the line in the logarithm")):
                    verdicts[f"{name}, {percent} known: ahead of {words}"] = row["median"] < row[other]
        inside = COVERAGE[0] <= result["covered"] <= COVERAGE[1]
        verdicts[f"{name}: 90 % intervals hold 85 to 95 %"] = inside
    for row in found.get("whole_curves", ()):
        what = f"{row['group']}, {row['prior']}: mean error after three whole curves"
        verdicts[f"{what} at most {WHOLE_CURVES_BAR:.4f}"] = row["mean"] <= WHOLE_CURVES_BAR
        verdicts[f"{what} ahead of the published law's"] = row["mean"] < PUBLISHED_LAW[row["group"]]
    return verdicts


def priors_text(found: Mapping[str, Any]) -> str:
    """The priors as ``forecast/priors.json`` has them."""
    priors = [result["prior"] for result in found["sets"].values() if "prior" in result]
    return json.dumps({p["name"]: p for p in sorted(priors, key=lambda p: str(p["name"]))}, indent=1) + "\n"


HEAD = ("runs", "known", "n", "median error", "largest", "90 % interval holds", "last value", "power law",
        "line in ln n")  # fmt: skip


def _rows(found: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name, result in found["sets"].items():
        parts = [(name, result["summary"]), *((f"{name} {g}", rs) for g, rs in result["by_family"].items())]
        for label, summary in parts:
            for row in summary:
                power, line = ("-" if row[k] is None else f"{100 * row[k]:.2f} %" for k in ("power_law", "log_line"))
                rows.append([
                    label, f"{100 * row['share']:.0f} %", str(row["n"]), f"{100 * row['median']:.2f} %",
                    f"{100 * row['largest']:.2f} %", f"{100 * row['covered']:.0f} %",
                    f"{100 * row['last_value']:.2f} %", power, line,
                ])  # fmt: skip
    return rows


def format_text(found: Mapping[str, Any]) -> str:
    """What a person reads."""
    lines = aligned(HEAD, _rows(found))
    for name, result in found["sets"].items():
        lines.append(f"{name}: all intervals together hold {100 * result['covered']:.0f} %; of an error of "
                     f"{100 * result['noise_floor']:.2f} % the final losses' own scatter is the cause")  # fmt: skip
    for row in found.get("whole_curves", ()):
        lines.append(
            f"{row['group']}: fitted to three whole curves ({row['prior']}), mean error on the other "
            f"{len(row['runs'])}: {row['mean']:.5f}; published law {PUBLISHED_LAW[row['group']]:.4f}"
        )
    lines += [f"{'PASS' if met else 'FAIL'}  {what}" for what, met in found["verdicts"].items()]
    return "\n".join(lines)


def markdown(found: Mapping[str, Any]) -> str:
    """The tables of docs/forecast.md."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in _rows(found)]
    lines += ["", "| bar | met |", "|---|---|"]
    lines += [f"| {what} | {'yes' if met else '**no**'} |" for what, met in found["verdicts"].items()]
    return "\n".join(lines) + "\n"
