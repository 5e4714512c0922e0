"""The report's figure on confidence: what was promised of jumps, and how often it came true."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from . import charts as svg
from .charts import escape
from .data import Record, Report, Run, list_of, number, table_of
from .parts import bar_list, figure, format_value, html_table, legend

#: Radius of a point that stands for all outcomes of a figure, in pixels; its area is the share.
WHOLE_PX = 16.0
#: What jumps say of the predictor's uncertainty.
SPREAD = ("epistemic", "aleatoric")


@dataclass(frozen=True, slots=True)
class Point:
    """One bin of a reliability curve, pooled over runs."""

    stated: float
    kept: float
    count: int


def pooled(curves: Iterable[Sequence[object]]) -> tuple[Point, ...]:
    """Bins of several runs' curves with the same centre made one, by their counts; what is no bin is left out."""
    sums: dict[float, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for curve in curves:
        for found in curve:
            values = [number(table_of(found).get(key)) for key in ("center", "confidence", "accuracy", "count")]
            center, stated, kept, count = values
            if center is None or stated is None or kept is None or not count or count < 1:
                continue
            if not (0 <= stated <= 1 and 0 <= kept <= 1):
                continue
            for i, value in enumerate((count * stated, count * kept, count)):
                sums[round(center, 6)][i] += value
    return tuple(Point(p / n, k / n, round(n)) for _, (p, k, n) in sorted(sums.items()))


def pooled_error(points: Sequence[Point]) -> float:
    """ECE of the pooled curve; NaN without outcomes."""
    total = sum(p.count for p in points)
    return sum(p.count * abs(p.kept - p.stated) for p in points) / total if total else math.nan


def reliability_chart(
    curves: Sequence[tuple[str, str, Sequence[Point]]], width: int, came_true: str = "share that was kept and paid"
) -> str:
    """What came true against what was stated, on the unit square with its diagonal.

    Args:
        curves: (name, style, points).
        width: In pixels.
        came_true: Name of the vertical scale.
    """
    height = 380 if width > 400 else 320
    with svg.drawing(width, height, svg.left_margin([0.0, 1.0]), 28, width - 10, height - 42) as drawn:
        square, room = (0.0, 1.0), (-0.06, 1.06)  # marks on the edge are drawn whole
        svg.scale_axes(drawn, room, room, ("stated probability", came_true))
        drawn.mark(drawn.axes.plot(square, square)[0], "guide")
        for name, style, points in curves:
            total = sum(p.count for p in points)
            if len(points) > 1:
                line = drawn.axes.plot([p.stated for p in points], [p.kept for p in points])[0]
                drawn.mark(line, f"line {style}")
            tips = [f"{name}: stated {p.stated:.2f}, came true {p.kept:.2f}, {p.count} outcomes" for p in points]
            radii = [max(WHOLE_PX * math.sqrt(p.count / total), 2.0) for p in points]
            drawn.circles([(p.stated, p.kept) for p in points], radii, f"dot {style}", tips)
        return drawn.svg(f"{came_true} against stated probability")


def confidence_figure(report: Report) -> str:
    """Figure 5: reliability curve per arm, and the calibration of every run."""
    title = "<h2>5. Confidence</h2>"
    known = [(run, table_of(run.summary.get("calibration"))) for run in report.runs if run.arm != "jump-of-zero"]
    known = [(run, found) for run, found in known if (number(found.get("num_outcomes")) or 0) > 0]
    if not known and not any(run.is_hybrid for run in report.runs):
        return ""  # the section on phases says so
    if not known:
        return f"{title}<p>No outcome of a proposal was recorded, so no probability can be held against one.</p>"
    curves = []
    for arm in dict.fromkeys(run.arm for run, _ in known):
        points = pooled(list_of(found.get("reliability")) for run, found in known if run.arm == arm)
        if points:
            curves.append((arm, report.styles.get(arm, "c1").split()[0], points))
    errors = "; ".join(
        f"{escape(arm, 60)}: calibration error {pooled_error(p):.3f} over {sum(q.count for q in p)} outcomes"
        for arm, _, p in curves
    )
    caption = (
        f"Probabilities as stated before the outcome was known, pooled over seeds; the area of a point is its share of "
        f"the outcomes. {errors}."
    )
    keys = legend([*((arm, "line", style) for arm, style, _ in curves), ("stated = came true", "guide", "")])
    chart = figure("Reliability", caption, lambda w: reliability_chart(curves, w), 470) if curves else ""
    bars = [
        (f"{arm}, stated {p.stated:.2f}, came true {p.kept:.2f}", float(p.count), style)
        for arm, style, points in curves
        for p in points
    ]
    pair = f'<div class="pair">{chart}{bar_list("Outcomes", bars)}</div>' if curves else ""
    head = ["Run", "Accepted jumps", "Outcomes", "ECE", "by chance", "monotone bins", "Temperature", "Log&nbsp;loss",
            "raw"]  # fmt: skip
    spread = any(_mean(run, key) is not None for run, _ in known for key in SPREAD)
    rows = [_row(run, found, spread=spread) for run, found in known]
    head = [*head, *(("Epistemic", "Aleatoric") if spread else ())]
    return f"{title}{keys if curves else ''}{pair}{html_table(head, rows)}"


def _row(run: Run, found: Record, *, spread: bool) -> list[str]:
    """One run's calibration, with the spread of its predictor if any run has one."""
    jumps = run.of("jump")
    keys = ("ece", "ece_by_chance", "ece_sweep", "temperature", "log_loss", "log_loss_raw")
    accepted = sum(j.get("accepted") is True for j in jumps)
    return [
        escape(run.name, 60), f"{format_value(accepted)} of {format_value(len(jumps))}",
        format_value(found.get("num_outcomes")), *(format_value(found.get(key), 3) for key in keys),
        *(format_value(_mean(run, key), 3) for key in SPREAD if spread),
    ]  # fmt: skip


def _mean(run: Run, key: str) -> float | None:
    """Mean of a number over jumps that have one above 0: predictors without members say 0."""
    values = [v for j in run.of("jump") if (v := number(j.get(key)))]
    return statistics.fmean(values) if values else None
