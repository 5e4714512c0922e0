"""The page about the validation protocol: hypotheses, criteria beside their controls, and what they were seen from."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...forecast.final_loss import forecast
from ...numerics.calibration import calibration_error, reliability_curve
from ...records import ConfigError
from ..validation import program
from ..validation.stored import read_from
from . import charts as svg
from .charts import escape
from .confidence import Point, reliability_chart
from .parts import bar_list, figure, format_value, html_table, legend
from .templates import whole_page

#: Shares of a run from which its rest is foretold.
KNOWN = (0.25, 0.5, 0.75)
#: Points of a loss curve that are drawn.
MAX_POINTS = 400
STYLES = tuple(f"c{k}" for k in range(8))
Found = Mapping[str, Any]


def holds(folder: Path) -> bool:
    """Whether a folder has results of ``hpt validate``."""
    return folder.is_dir() and any(folder.glob("experiment[1-5]-*-seed*.json"))


def page(folder: Path) -> str:
    """The page as HTML text.

    Raises:
        ConfigError: a result is damaged, or of another version or size.
    """
    found = program.kept(folder)
    if not found:
        raise ConfigError(f"{folder}: its results are of no scale that this version knows")
    sections = ["<h1>Can training be predicted?</h1>"]
    for one in found:
        with read_from(folder):
            sections += [
                _hypotheses(one), _criteria(one), _horizons(one), _spectra(one), _reliability(one), _hybrid(one),
                _cones(folder, one),
            ]  # fmt: skip
    return whole_page("Validation", [s for s in sections if s])


def _hypotheses(found: Found) -> str:
    rows = [[f"text:{escape(h['name'])}: {escape(h['statement'])}", f"text:<b>{escape(h['verdict'])}</b>",
             f"text:{escape(h['why'], 600)}"] for h in found["hypotheses"]]  # fmt: skip
    told = f"Scale {escape(found['scale'])}, {found['seeds']} seeds. What its control passes too shows nothing."
    return f"<h2>Hypotheses</h2><p>{told}</p>{html_table(['Hypothesis', 'Verdict', 'Why'], rows)}"


def _criteria(found: Found) -> str:
    out = ""
    for number, result in found["experiments"].items():
        rows = []
        for bar in result["criteria"]:
            ends = bar["interval"]
            interval = "" if ends is None else f"{format_value(ends[0], 3)} to {format_value(ends[1], 3)}"
            rows.append([
                f"text:{escape(bar['name'])}", format_value(bar["value"], 3), interval,
                f"{bar['sense']} {format_value(bar['bar'], 3)}", f"text:{escape(program.control_words(bar))}",
                f"text:{escape(bar['verdict'])}",
            ])  # fmt: skip
        head = ["Criterion", "Measured", "95&nbsp;% interval", "Bar", "Control", "Verdict"]
        decided = escape(", ".join(result["decisions"]))
        out += f"<h2>Experiment {number}: {escape(result['name'])}</h2>{html_table(head, rows)}"
        out += f"<p>Stop rule: {decided}.</p>"
    return out


def _chart(title: str, caption: str, curves: Sequence[svg.Curve], x: str, y: str) -> str:
    curves = [c for c in curves if c.points]
    if not curves:
        return f"<h2>{title}</h2><p>Not recorded.</p>"
    keys = legend((c.name, "line", c.style) for c in curves)
    drawn = figure("", caption, lambda width: svg.line_chart(curves, width, x, y))
    return f"<h2>{title}</h2>{keys}{drawn}"


def _horizons(found: Found) -> str:
    """Experiment 3: cosine by horizon, and experiment 2: error by horizon."""
    out = ""
    if "3" in found["experiments"]:
        cells: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for result in found["experiments"]["3"]["results"]:
            for row in result["rows"]:
                if row["weights"] == "averaged":
                    cells[row["predictor"]][row["horizon"]].append(row["cosine"])
            for horizon, ceiling in result["ceilings"]["averaged"].items():
                cells["ceiling"][int(horizon)].append(ceiling["cosine"])
        out += _chart(
            "Told and actual displacement, by horizon", "Cosine, averaged weights, mean over seeds; the ceiling is "
            "that of the expected displacement, from runs that go on with other data.", _lines(cells), "steps ahead",
            "cosine",
        )  # fmt: skip
    if "2" in found["experiments"]:
        errors: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for result in found["experiments"]["2"]["results"]:
            for name, who in result["predictors"].items():
                for horizon, error in who["mae_by_horizon"].items():
                    errors[name][int(horizon)].append(error)
        out += _chart("Error of the told loss, by horizon", "Mean absolute error, mean over seeds.", _lines(errors),
                      "steps ahead", "error of the loss")  # fmt: skip
    return out


def _lines(cells: Mapping[str, Mapping[int, Sequence[float]]]) -> list[svg.Curve]:
    return [
        svg.Curve(name, f"{STYLES[k % 8]}{' d1' if name == 'ceiling' else ''}",
                  tuple((float(h), sum(v) / len(v)) for h, v in sorted(by.items())))
        for k, (name, by) in enumerate(cells.items())
    ]  # fmt: skip


def _spectra(found: Found) -> str:
    if "1" not in found["experiments"]:
        return ""
    cells: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in found["experiments"]["1"]["results"]:
        for name, shares in result["spectra"].items():
            for k, share in enumerate(shares, 1):
                cells[name][k].append(share)
    return _chart("Principal components against noise", "Share of the variance in each component, mean over seeds. "
                  "Positions of a random walk have 6 / (pi k)^2.", _lines(cells), "component", "share")  # fmt: skip


def _reliability(found: Found) -> str:
    """Stated confidence of forecasts, and how often they were nearer than no change."""
    results = found["experiments"].get("3", {}).get("results", [])
    points = [p for r in results for p in r["points"] if p["weights"] == "averaged" and p.get("confidence") is not None]
    title = "<h2>Confidence of forecasts</h2>"
    if not points:
        return f"{title}<p>Not recorded.</p>" if results else ""
    curves, errors = [], []
    for k, name in enumerate(dict.fromkeys(p["predictor"] for p in points)):
        own = [p for p in points if p["predictor"] == name]
        curve = reliability_curve([p["confidence"] for p in own], [float(p["error"] < 1) for p in own])
        bins = [Point(b.confidence, b.accuracy, b.count) for b in curve if b.count]
        curves.append((name, STYLES[k % 8], bins))
        errors.append((name, calibration_error(curve), STYLES[k % 8]))
    keys = legend((name, "dot", style) for name, style, _ in curves)
    drawn = figure("", "Share of forecasts nearer to the actual displacement than no change.",
                   lambda width: reliability_chart(curves, width, "share nearer than no change"), 420)  # fmt: skip
    return f"{title}{keys}{drawn}{bar_list('Calibration error', errors)}"


def _hybrid(found: Found) -> str:
    results = found["experiments"].get("4", {}).get("results", [])
    if not results:
        return ""
    bars = []
    for name in results[0]["runs"]:
        losses = [r["runs"][name]["loss"] for r in results]
        known = [v for v in losses if v is not None and math.isfinite(v)]
        style = "c1" if "predicted" in name else "c2" if "zero" in name else "c0"
        if known:
            bars.append((name, sum(known) / len(known), style))
    return f"<h2>Final loss by share of predicted steps</h2>{bar_list('Final validation loss', bars)}"


def _cones(folder: Path, found: Found) -> str:
    """The rest of a collected run, foretold from a quarter, a half and three quarters of it."""
    path = folder / "collected" / f"{found['scale']}-seed0" / "metrics.jsonl"
    if not path.is_file():
        return ""
    steps, losses, rates = _metrics(path)
    smooth = np.convolve(losses, np.ones(20) / 20, mode="valid")
    at = steps[19:]
    every = max(1, len(at) // MAX_POINTS)
    curves = [
        svg.Curve("mean of 20 steps", "c0", tuple(zip(at[::every].tolist(), smooth[::every].tolist(), strict=True)))
    ]
    for k, share in enumerate(KNOWN):
        count = round(share * len(steps))
        try:
            told = forecast(steps[:count], losses[:count], rates)
        except ConfigError:
            continue
        middle, low, high = (tuple((p[0], p[j]) for p in told.points) for j in (1, 2, 3))
        curves.append(svg.Curve(f"from {100 * share:.0f} %", STYLES[k + 1], middle, low, high))
    return _chart("Forecasts of the final loss", "Bands: intervals of 90 %.", curves, "step", "loss")


def _metrics(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from ...forecast.logs import read_log

    log = read_log(path)
    return log.steps, log.losses, log.rates
