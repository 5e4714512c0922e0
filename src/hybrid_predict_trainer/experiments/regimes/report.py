"""`hpt bench report`: results of `hpt bench regimes` as Markdown tables and as one page with plots.

Nothing is computed here that the results do not say; what they do not say is shown as a dash.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...safe_files import read_json, write_named, write_text
from ..report import charts as svg
from ..report.charts import escape
from ..report.data import Record, list_of, number, table_of
from ..report.parts import figure, html_table, legend
from ..report.templates import whole_page
from ..report.text import aligned
from ..statistics import METHOD
from . import readme_rows
from .cells import DASH, ends_of, jumps_cell, loss_cell, percent_cell, plain_cell, s_cell, share_cell

SCHEMA = "regimes-1"

#: Curves one can tell apart in one plot.
MAX_CURVES = 8

#: Width of one bar of S with its room, pixels.
BAR_PX = 26


def load_results(folder: Path) -> list[Record]:
    """The results below a folder, in the order of their names.

    Raises:
        ValueError: there are none, or the folder does not exist.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such directory")
    found = []
    for path in sorted(folder.rglob("*.json")):
        if path.parent.name == "runs":  # single runs: thousands, and none of them is a result
            continue
        try:
            value = read_json(path)
        except ValueError:
            continue
        if isinstance(value, Mapping) and value.get("schema") == SCHEMA:
            found.append(value)
    if not found:
        raise ValueError(f"{folder}: nothing to report: no result of 'hpt bench regimes' is below it")
    return found


# ---- rows ------------------------------------------------------------------------------------------------


HEAD = ("arm", "S by cost", "S by wall-clock", "S by CPU time", "final loss", "at equal cost", "p", "backward saved",
        "prediction, cost / time", "jumps", "lr")  # fmt: skip

#: Columns of tasks whose true solution is known.
ERROR, CPU = "relative L2 error", "CPU s"
#: Of the columns of S against another base than plain.
OVER = "S over "


def cells(row: Record) -> tuple[str, ...]:
    """A row of the table of a case."""
    return (
        str(row.get("arm")), s_cell(row), s_cell(row, "S_wall"), s_cell(row, "S_cpu"),
        loss_cell(row), percent_cell(row.get("gap_pct")),
        plain_cell(row.get("paired_p"), ".2g"), percent_cell(row.get("backward_reduction"), 100.0), share_cell(row),
        jumps_cell(row), plain_cell(row.get("lr")),
    )  # fmt: skip


def rows_of(result: Record, case: str) -> list[Record]:
    """The rows of a case, plain budgets in the order of their length, others as they are."""
    found = [r for r in list_of(result.get("arms")) if isinstance(r, Mapping) and r.get("case") == case]
    baselines = [r for r in found if r.get("kind_of_arm") in ("plain", "tuned")]
    others = [r for r in found if r.get("kind_of_arm") not in ("plain", "tuned")]
    return [*sorted(baselines, key=lambda r: (str(r.get("kind_of_arm")), number(r.get("budget")) or 0.0)), *others]


def verdicts(found: Sequence[Record]) -> list[str]:
    """Arm and verdict, a line each; verdicts that were drawn from percentile bootstraps are left out."""
    told = [r for r in found if r.get("S") is not None]
    return [f"{r.get('arm')}: {r.get('verdict')}" for r in told if r.get("interval") == METHOD]


def head_of(found: Sequence[Record]) -> tuple[str, ...]:
    """Column names; more where the rate is not the tuned one, and where stronger recipes were run at all budgets."""
    tuned = ("cost / tuned run's",) if any("cost_vs_tuned" in r for r in found) else ()
    bases = dict.fromkeys(name for r in found for name in table_of(r.get("S_over")))
    solved = (ERROR, CPU) if any("solution_error" in r for r in found) else ()
    return (*HEAD, *tuned, *(f"{OVER}{name}" for name in bases), *solved)


def line_of(row: Record, head: Sequence[str]) -> tuple[str, ...]:
    """Cells for the columns of :func:`head_of`."""
    more = [
        plain_cell(row.get("solution_error" if name == ERROR else "cpu_s"), ".2g")
        if name in (ERROR, CPU)
        else s_cell(table_of(table_of(row.get("S_over")).get(name.removeprefix(OVER))))
        if name.startswith(OVER)
        else s_cell(row, "cost_vs_tuned")
        for name in head[len(HEAD) :]
    ]
    return (*cells(row), *more)


def conditions(result: Record) -> str:
    """Where, when and how many: what a table must carry to be worth anything."""
    where = table_of(result.get("environment"))
    seeds = next((c["seeds"] for c in list_of(result.get("cases")) if table_of(c).get("seeds")), result.get("seeds"))
    told = [
        f"{len(list_of(seeds))} seeds", str(where.get("cpu", "unknown processor")),
        f"{where.get('num_threads', '?')} threads", f"torch {where.get('torch', '?')}",
        f"commit {result.get('commit') or 'unknown'}",
    ]  # fmt: skip
    if table_of(result.get("environment")).get("gpu"):
        told.insert(1, str(where["gpu"]))
    if result.get("quick"):
        told.append("quick: short runs, a small sweep")
    if any("interval" not in table_of(r) for r in list_of(result.get("arms"))):
        told.append("from a version of too narrow intervals: run the command again for verdicts (its runs are kept)")
    if not result.get("complete"):
        told.append("incomplete: the benchmark has not ended")
    return ", ".join(told)


def rate_words(case: Record) -> str:
    """What the learning rate of a case is."""
    rate, lr = number(case.get("rate")), plain_cell(case.get("lr"))
    if rate is None:
        return f"every arm at its tuned rate (plain: {lr})"
    return f"{rate:.3g} times the tuned rate, {lr} (tuned: {plain_cell(case.get('lr_tuned'))})"


def case_words(case: Record) -> str:
    """One line about a case."""
    task = table_of(case.get("task"))
    size = number(task.get("num_parameters"))
    told = [f"task {task.get('task', '?')}"]
    told += [f"{size:,.0f} weights"] if size is not None else []
    told += [f"{plain_cell(case.get('steps'), ',.0f')} steps at budget 1", rate_words(case)]
    edge = [str(name) for name in list_of(table_of(case.get("sweep")).get("at_edge_of_grid"))]
    told += [f"at the edge of its grid: {', '.join(edge)}"] if edge else []
    return "; ".join(told)


# ---- Markdown and text ----------------------------------------------------------------------------------


def markdown(results: Sequence[Record]) -> str:
    """Tables for README and documents: an overview of all arms, then every case."""
    out = [*overview(results), ""]
    for result in results:
        out += [f"## {result.get('regime')}: {result.get('about', '')}", "", f"{conditions(result)}.", ""]
        out += [f"* {line}" for line in list_of(result.get("skipped"))]
        for case in list_of(result.get("cases")):
            name = str(case.get("case"))
            found = rows_of(result, name)
            head = head_of(found)
            out += [
                f"### {name}",
                "",
                f"{case_words(case)}.",
                "",
                _markdown_row(head),
                _markdown_row(["---"] * len(head)),
            ]
            out += [_markdown_row(line_of(row, head)) for row in found]
            out += ["", *(f"* {line}" for line in verdicts(found))]
            out += [*(f"* {note}" for note in list_of(case.get("notes"))), ""]
    out += ["## Rows of docs/benchmarks.md", "", *readme_rows.lines(results), ""]
    out += ["## Rows of the README", "", *readme_rows.short_lines(results)]
    return "\n".join(out).rstrip() + "\n"


def overview(results: Sequence[Record]) -> list[str]:
    """S by cost of all arms (rows) in all cases (columns), as Markdown lines: a table per regime."""
    out: list[str] = []
    for regime in dict.fromkeys(str(r.get("regime")) for r in results):
        columns = [
            (r, str(c.get("case"))) for r in results if str(r.get("regime")) == regime for c in list_of(r.get("cases"))
        ]
        by_column = [{str(row.get("arm")): row for row in rows_of(r, name)} for r, name in columns]
        names = dict.fromkeys(
            arm for rows in by_column for arm, row in rows.items() if row.get("kind_of_arm") not in ("plain", "tuned")
        )
        head = [f"S by cost, {regime}", *(name for _, name in columns)]
        out += [*([""] if out else []), _markdown_row(head), _markdown_row(["---"] * len(head))]
        for arm in names:
            out.append(_markdown_row([arm, *(s_cell(rows[arm]) if arm in rows else DASH for rows in by_column)]))
    return out


def _markdown_row(items: Sequence[str]) -> str:
    return f"| {' | '.join(item.replace('|', '/') for item in items)} |"


def format_text(result: Record) -> str:
    """A result for a terminal."""
    out = [f"{result.get('regime')}: {result.get('about', '')}; {conditions(result)}"]
    out += [str(line) for line in list_of(result.get("skipped"))]
    for case in list_of(result.get("cases")):
        found = rows_of(result, str(case.get("case")))
        head = head_of(found)
        out += [
            "",
            f"{case.get('case')}: {case_words(case)}",
            "",
            *aligned(head, [line_of(r, head) for r in found]),
            "",
        ]
        out += verdicts(found)
        out += [str(note) for note in list_of(case.get("notes"))]
    return "\n".join(out)


# ---- the page ----------------------------------------------------------------------------------------------


def styles(found: Sequence[Record]) -> dict[str, str]:
    """Arm -> classes of colour and dash; plain grey, hybrid the signal colour, as in all reports."""
    named = {"plain": "c0", "hybrid": "c1", "jump-of-zero": "c2"}
    spare = [f"c{k}{dash}" for dash in ("", " d1", " d2", " d3") for k in range(3, 8)]
    for row in found:
        if row.get("kind_of_arm") not in ("plain", "tuned"):
            arm = str(row.get("arm"))
            named.setdefault(arm, spare[(len(named) - 3) % len(spare)])
    return named


def speed_chart(found: Sequence[Record], colours: Mapping[str, str], width: int) -> str:
    """S per arm as bars from 1, with their intervals; an arrow's end marks a bound."""
    rows = [(r, s) for r in found if (s := number(r.get("S"))) is not None]
    ends = [v for r, _ in rows for v in ends_of(r)]
    values = [v for v in (*(s for _, s in rows), *ends, 1.0) if v is not None and v > 0]
    left = 14 + svg.CHARACTER_PX * max(len(str(r.get("arm"))[:18]) for r, _ in rows)
    right, top = width - 128.0, 8.0
    bottom, log = top + BAR_PX * len(rows), svg.logarithmic(values)
    x = svg.limits(values, 0.06, log=log)
    with svg.drawing(width, bottom + 42, left, top, right, bottom) as drawn:
        svg.scale_axes(drawn, x, (len(rows), 0.0), ("S by cost", ""), log_x=log)
        drawn.axes.yaxis.set_ticks([])
        for k, (row, s) in enumerate(rows):
            arm = str(row.get("arm"))
            bar = drawn.axes.barh(k + 0.5, s - 1.0, left=1.0, height=12 / BAR_PX)[0]
            tip = f"{arm}: {row.get('verdict')}"
            drawn.mark(bar, f"solid {colours.get(arm, 'c0').split()[0]}", [tip])
            for line in _whisker(drawn.axes, ends_of(row), s, k + 0.5):
                drawn.mark(line, "axis")
            middle = top + BAR_PX * (k + 0.5) + 4
            drawn.text(left - 8, middle, arm if len(arm) <= 18 else f"{arm[:17]}…", "name", anchor="right")
            drawn.text(right + 8, middle, s_cell(row))
        drawn.mark(drawn.axes.plot([1.0, 1.0], [0.0, len(rows)])[0], "guide")
        return drawn.svg("equal-loss speed-up per arm")


def _whisker(axes: Any, span: Sequence[float | None], s: float, y: float) -> list[Any]:
    """An interval around ``s``; an open end is drawn as far as the figure, without a stop."""
    if not span:
        return []
    low, high = (s if v is None else v for v in span)
    stops = [v for v in span if v is not None]
    reach = 4 / BAR_PX
    return [
        axes.plot([low, high], [y, y])[0],
        *(axes.plot([v, v], [y - reach, y + reach])[0] for v in stops),
    ]


def loss_chart(found: Sequence[Record], colours: Mapping[str, str], width: int) -> str:
    """Ends of the plain budgets as one curve, the course of the other arms beside it."""
    return svg.line_chart(curves_of(found, colours), width, "cost units", "validation loss")


def curves_of(found: Sequence[Record], colours: Mapping[str, str]) -> list[svg.Curve]:
    """Budget curves first, then at most :data:`MAX_CURVES` arms, those of the highest S."""
    out = []
    for kind, name, style in (("plain", "plain budgets", "c0 d1"), ("tuned", "tuned budgets", "c0 d2")):
        ends = [
            (cost, loss)
            for row in found
            if row.get("kind_of_arm") == kind
            and (cost := number(row.get("cost_units"))) is not None
            and (loss := _middle(row)) is not None
        ]
        if ends:
            out.append(svg.Curve(name, style, tuple(sorted(ends))))
    others = [r for r in found if r.get("kind_of_arm") not in ("plain", "tuned")]
    others.sort(key=lambda r: (r.get("arm") not in ("hybrid",), -(number(r.get("S")) or 0.0)))
    for row in others[:MAX_CURVES]:
        points = [(a, b) for p in list_of(row.get("curve")) if (a := number(p[0])) is not None
                  and (b := number(p[1])) is not None]  # fmt: skip
        if points:
            out.append(svg.Curve(str(row.get("arm")), colours[str(row.get("arm"))], tuple(points)))
    return out


def _middle(row: Record) -> float | None:
    """Mean loss over seeds, geometric where losses are positive: a PINN's differ by a factor of ten."""
    losses = [number(v) for v in list_of(table_of(row.get("final_loss")).get("per_seed"))]
    known = [v for v in losses if v is not None]
    if not known or len(known) < len(losses):
        return None
    return statistics.geometric_mean(known) if min(known) > 0 else statistics.fmean(known)


def case_section(result: Record, case: Record) -> str:
    """Plots and table of a case."""
    found, name = rows_of(result, str(case.get("case"))), str(case.get("case"))
    colours, head = styles(found), head_of(found)
    out = [f"<h2>{escape(result.get('regime'))}: {escape(name)}</h2>", f"<p>{escape(case_words(case))}.</p>"]
    if any(number(r.get("S")) is not None for r in found):
        caption = "Bars from 1; whiskers: 95 % t interval of the logarithms over seeds."
        out.append(figure("Speed-up at equal final loss", caption, lambda w: speed_chart(found, colours, w)))
    curves = curves_of(found, colours)
    if curves:
        keys = legend((c.name, "line", c.style) for c in curves)
        caption = (
            "Budget curves join the ends of whole runs, each with its own schedule; the others are courses of runs."
        )
        out.append(keys + figure("Loss against cost", caption, lambda w: loss_chart(found, colours, w)))
    body = [[escape(c) for c in line_of(r, head)] for r in found]
    out.append(html_table([escape(h) for h in head], body))
    out += [f'<p class="notice">{escape(line)}.</p>' for line in verdicts(found)]
    out += [f'<p class="notice">Note: {escape(note)}.</p>' for note in list_of(case.get("notes"))]
    return "".join(out)


def page(results: Sequence[Record]) -> str:
    """One self-contained page: loads nothing, runs no script."""
    sections = ["<h1>Regimes</h1>"]
    for result in results:
        name, about = escape(result.get("regime")), escape(result.get("about", ""))
        sections.append(f"<p><b>{name}</b>: {about}. {escape(conditions(result))}.</p>")
        sections += [f'<p class="notice">{escape(s)}</p>' for s in list_of(result.get("skipped"))]
    sections += [case_section(r, case) for r in results for case in list_of(r.get("cases"))]
    return whole_page("Regimes", sections)


def write(folder: Path, out: Path | None = None, markdown_file: Path | None = None) -> dict[str, Any]:
    """Write the page, and the Markdown where a file is named; return what was written and the tables.

    Args:
        folder: Searched for results, with its subfolders.
        out: The page; None: ``regimes.html`` in the folder.
        markdown_file: The tables; None: not written.

    Raises:
        ValueError: there are no results.
    """
    results = load_results(folder)
    target, tables = out or folder / "regimes.html", markdown(results)
    write_page = write_text if out is None else write_named
    write_page(target, page(results))
    if markdown_file is not None:
        write_named(markdown_file, tables)
    return {
        "page": str(target), "markdown_file": None if markdown_file is None else str(markdown_file),
        "regimes": [r.get("regime") for r in results], "markdown": tables,
    }  # fmt: skip
