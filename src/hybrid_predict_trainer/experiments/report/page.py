"""One self-contained page about a comparison or a run: files -> :class:`Report` -> HTML sections.

The page loads nothing and runs no script; every text from the data is escaped.  What a file does not
say is shown as "not measured", never as zero.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

from ...cost import STEP_UNITS
from ...safe_files import write_named, write_text
from ..report_withdrawn import withdrawn_table
from . import charts as svg
from . import sweep, validation
from .charts import escape
from .confidence import confidence_figure
from .data import LEVELS, PHASES, Record, Report, Run, list_of, load, number, table_of
from .parts import (
    MAX_SPANS,
    MAX_STRIPS,
    UNKNOWN,
    WORDS,
    bar_list,
    figure,
    format_value,
    html_table,
    interval,
    legend,
    mean_std,
    percent,
    thinned,
    thinning,
)
from .steps import steps_table
from .templates import macro, whole_page


def headline(report: Report) -> str:
    """Title, task, verdict, and the main figure with its interval or the reason why it is unknown."""
    c = report.compare
    if c is None:
        facts = [_gained(run) for run in report.runs if run.summary.get("ledger")][:4]
        facts += [_seconds(run) for run in report.runs][:4]
        told = "No comparison was made here, so no speed-up is claimed."
        return macro("headline", report.title, None, "", told, facts)
    seeds = ", ".join(escape(s) for s in list_of(c.get("seeds")))
    gap, saved = percent(c.get("loss_gap_at_equal_cost_pct")), percent(c.get("backward_reduction_pct"))
    facts = [
        _speedup(c),
        _by_wall_clock(c),
        ("Loss gap at equal cost", gap, "Below 0: hybrid ends lower."),
        ("Backward passes saved", saved, ""),
    ]
    verdict = c.get("verdict", "No verdict was recorded.")
    return macro("headline", report.title, c.get("task", "not named"), seeds or UNKNOWN, verdict, facts)


def _speedup(c: Record) -> tuple[str, str, str]:
    """The main figure as (name, value, conditions)."""
    speed, reason = number(c.get("speedup_at_equal_loss")), escape(c.get("speedup_reason") or "")
    if speed is None:
        why = reason or "No reason was recorded."
        return "Equal-loss speed-up", "unknown", f"{why[:1].upper()}{why[1:]}"
    ends = list_of(c.get("speedup_ci95"))
    told = "no confidence interval" in reason  # it says why, then
    parts = [] if told else [interval(ends) or "no confidence interval: too few seeds, or not computed"]
    low, high = (number(v) for v in ends) if len(ends) == 2 else (None, None)
    if interval(ends) and (low is None or low <= 1) and (high is None or high >= 1):
        parts.append("the interval includes 1, so no speed-up has been shown")
    per_seed = ", ".join(_one_seed(s) for s in list_of(c.get("speedup_bounds") or c.get("speedup_per_seed")))
    parts += [f"per seed {per_seed}"] if per_seed else []
    parts += [reason.removeprefix("at least: ")] if reason else []
    text = "; ".join(parts)
    return "Equal-loss speed-up", _times(speed, c.get("speedup_reason")), f"{text[:1].upper()}{text[1:]}."


def _by_wall_clock(c: Record) -> tuple[str, str, str]:
    """The same by time: equal cost is not equal time."""
    speed = number(c.get("speedup_wall"))
    told = interval(c.get("speedup_wall_ci95")) or escape(c.get("speedup_wall_reason") or "").removeprefix("at least: ")
    figure = UNKNOWN if speed is None else _times(speed, c.get("speedup_wall_reason"))
    return "The same by wall-clock", figure, f"{told[:1].upper()}{told[1:]}{'.' if told else ''}"


def _times(speed: float, reason: object) -> str:
    """A factor, with the sign of a bound where seeds stand at one."""
    text = str(reason or "")
    sign = next(
        (s for kind, s in (("at least", "&ge;&thinsp;"), ("at most", "&le;&thinsp;")) if text.startswith(kind)), ""
    )
    return f"{sign}{speed:.2f}&times;"


def _one_seed(found: object) -> str:
    """One seed's speed-up: a number, or a bound with its kind."""
    if not isinstance(found, Mapping):
        return format_value(found, 3)
    kind, value = escape(found.get("kind") or ""), format_value(found.get("value"), 3)
    return value if kind == "exact" else f"{kind} {value}"


def _gained(run: Run) -> tuple[str, str, str]:
    """A run's own estimate of the steps it gained."""
    ledger = table_of(run.summary.get("ledger"))
    steps = format_value(ledger.get("steps_gained"), 3)
    return f"Steps gained, {escape(run.name, 40)}", steps, interval(ledger.get("steps_gained_ci95"), " steps")


def _seconds(run: Run) -> tuple[str, str, str]:
    """Cost and time of a run, side by side."""
    counts, seconds = table_of(run.summary.get("statistics")), number(run.summary.get("wall_s"))
    cost = number(counts.get("cost_units"))
    told = "" if cost is None else f"at the cost of {cost / STEP_UNITS:.1f} plain steps"
    return f"Wall time, {escape(run.name, 40)}", UNKNOWN if seconds is None else f"{seconds:.1f} s", told


def arms_table(report: Report) -> str:
    """The table of arms."""
    head = ["Arm", "Runs", "Final validation loss", "Cost units", "Wall time,&nbsp;s", "Real steps",
            "Credited", "Claimed", "Forward", "Backward", "Jumps accepted"]  # fmt: skip
    keys = ("cost_units", "wall_s", "num_real_steps", "num_credited_steps", "num_claimed_steps",
            "num_forward", "num_backward")  # fmt: skip
    rows = [
        [
            escape(a.get("name", "unnamed"), 60),
            format_value(a.get("n")),
            mean_std(a.get("final_val_loss"), a.get("final_val_loss_std")),
            *(format_value(a.get(k)) for k in keys),
            f"{format_value(a.get('num_jumps_accepted'))} of {format_value(a.get('num_jumps_proposed'))}",
        ]
        for a in report.arms
    ]
    if not rows:
        return "<h2>Arms</h2><p>No arms were recorded.</p>"
    return (
        f"<h2>Arms</h2>{html_table(head, rows)}<p><small>Losses: mean &plusmn; standard deviation over seeds; "
        "the other columns: mean over seeds.</small></p>"
    )


def loss_figure(report: Report) -> str:
    """Figure 1: validation loss against cost, and its later part enlarged."""
    curves = []
    for arm, style in report.styles.items():
        rows = [
            [
                (x, y)
                for r in run.of("validation")
                if (x := number(r.get("cost_units"))) is not None and (y := number(r.get("val_loss"))) is not None
            ]
            for run in report.runs
            if run.arm == arm
        ]
        mean, low, high = svg.over_seeds(rows)
        curves.append(svg.Curve(arm, style, svg.envelope(mean), svg.envelope(low), svg.envelope(high)))
    curves = [c for c in curves if c.points]
    title = "<h2>1. Loss against cost</h2>"
    if not curves:
        return f"{title}<p>No validation losses were recorded.</p>"
    keys = legend((c.name, "line", c.style) for c in curves)
    x_title, y_title = "cost units", "validation loss"
    caption = "Mean over seeds; the band reaches from the lowest to the highest seed." if any(
        c.low for c in curves
    ) else "One run per arm."  # fmt: skip
    # from the middle of the hybrid run on: longer plain budgets would leave nothing of it
    half = min((c.points[-1][0] for c in curves if c.name == "hybrid"), default=curves[-1].points[-1][0]) / 2

    late = [
        svg.Curve(c.name, c.style, *(svg.since(points, half) for points in (c.points, c.low, c.high))) for c in curves
    ]
    late = [c for c in late if len(c.points) > 1]
    out = title + keys + figure("", caption, lambda w: svg.line_chart(curves, w, x_title, y_title))
    if late:
        out += figure("From the middle of the hybrid run on", "", lambda w: svg.line_chart(late, w, x_title, y_title))
    return out


def timeline_figure(report: Report) -> str:
    """Figure 2: the phases of each hybrid run."""
    title, runs = "<h2>2. Phases</h2>", [r for r in report.runs if r.is_hybrid]
    if not runs:
        return (
            f"{title}<p>No run predicted or proposed a jump, so there is no figure of jumps, of the ledger and of "
            "confidence. What was done instead is under &ldquo;Steps of the optimizer&rdquo;.</p>"
        )
    strips = []
    for run in runs[:MAX_STRIPS]:
        known = [(s.step, f"p-{s.phase}" if s.phase in PHASES else "p-other") for s in run.steps]
        curve = tuple((s.step, s.loss) for s in run.steps if s.loss is not None)
        hits: dict[bool, list[float]] = {True: [], False: []}
        for j in run.of("jump"):
            if (at := number(j.get("step"))) is not None:
                hits[j.get("accepted") is True].append(at)
        note = f"{len(hits[True])} of {len(hits[True]) + len(hits[False])} jumps accepted"
        marks = (thinned(hits[True]), thinned(hits[False]))
        strips.append(svg.Strip(run.name, note, svg.spans(known, MAX_SPANS), curve, *marks))
    caption = "Above each strip the training loss, scaled to itself. Where phases are too short to draw, "
    caption += "a column shows the commonest."
    if len(runs) > MAX_STRIPS:
        caption += f" The first {MAX_STRIPS} of {len(runs)} runs."
    jumps = [("jump accepted", "up", "c1"), ("jump refused", "cross", "c0")]
    keys = legend([*((p, "box", f"p-{p}") for p in PHASES), *jumps])
    return title + keys + figure("", caption, lambda w: svg.strip_chart(strips, w, "step"))


def jumps_figure(report: Report) -> str:
    """Figure 3: predicted against measured loss of jumps, and why jumps were refused."""
    title = "<h2>3. Jumps</h2>"
    told = [(r, j) for r in report.runs for j in r.of("jump") if r.arm != "jump-of-zero"]
    told = told or [(r, j) for r in report.runs for j in r.of("jump")]
    if not told:
        return ""  # the section before says so
    points: dict[bool, list[tuple[float, float, str]]] = {True: [], False: []}
    reasons: Counter[str] = Counter()
    for run, jump in told:
        accepted = jump.get("accepted") is True
        x, y = number(jump.get("predicted_loss")), number(jump.get("loss_after"))
        if not accepted:
            reasons[str(jump.get("reason") or "no reason recorded")] += 1
        if x is not None and y is not None:
            tip = f"{run.name}, step {jump.get('step')}: predicted {x:.5g}, measured {y:.5g}"
            points[accepted].append((x, y, tip))
    drawn = [p for cloud in points.values() for p in cloud]
    positive = [p for p in drawn if min(p[:2]) > 0]
    if len(positive) > 0.8 * len(drawn):  # a loss that falls over decades needs a log scale, which has no room below 0
        points = {accepted: [p for p in cloud if min(p[:2]) > 0] for accepted, cloud in points.items()}
    clouds = (
        svg.Cloud("refused", "c0", thinned(points[False]), filled=False),
        svg.Cloud("accepted", "c1", thinned(points[True])),
    )
    num_drawn = len(points[True]) + len(points[False])
    verdicts = [c for r in report.runs for c in r.of("correction") if r.arm != "jump-of-zero"]
    num_kept = sum(c.get("kept") is True for c in verdicts)
    caption = f"{len(told)} jumps proposed; {len(told) - num_drawn} without two losses to draw. "
    if verdicts:
        caption += f"Of {len(verdicts)} jumps on probation {num_kept} were kept, the others taken back."
    kinds = (("accepted", "dot", "c1"), ("refused", "ring", "c0"), ("measured = predicted", "guide", ""))
    caption, keys = caption + thinning(*points.values()), legend(kinds)
    chart = figure(
        "Loss after the jump", caption,
        lambda w: svg.scatter_chart(clouds, w, "predicted loss", "measured loss", same=True), 470,
    )  # fmt: skip
    rows = [(name, float(k), "c0") for name, k in reasons.most_common(8)]
    rest = sum(reasons.values()) - sum(int(v) for _, v, _ in rows)
    rows += [("other reasons", float(rest), "c0")] if rest else []
    side = bar_list("Why jumps were refused", rows) if rows else "<p>No jump was refused.</p>"
    return f'{title}{keys}<div class="pair">{chart if num_drawn else f"<p>{caption}</p>"}{side}</div>'


def ledger_figure(report: Report) -> str:
    """Figure 4: what was gained at the gate, what was left of it, and what it cost."""
    title = "<h2>4. The ledger</h2>"
    kept = [(r, table_of(r.summary.get("ledger"))) for r in report.runs if r.is_hybrid]
    kept = [(r, ledger) for r, ledger in kept if ledger and r.of("jump")]
    marks: dict[bool, list[tuple[float, float, str]]] = {True: [], False: []}
    for run in report.runs:
        for o in run.of("outcome"):
            x, y = number(o.get("gate_gain")), number(o.get("gain_left"))
            if x is not None and y is not None and run.arm != "jump-of-zero":
                tip = f"{run.name}, step {o.get('step')}: {x:.4g} at the gate, {y:.4g} left"
                marks[o.get("skipped") is True].append((x, y, tip))
    if not kept and not any(marks.values()):
        return ""
    clouds = (
        svg.Cloud("treated", "c1", thinned(marks[False])),
        svg.Cloud("control", "c2", thinned(marks[True]), filled=False),
    )
    keys = legend([("treated", "dot", "c1"), ("control (approved, skipped)", "ring", "c2"),
                   ("all of the gain is left", "guide", "")])  # fmt: skip
    chart = figure(
        "Gain left after further real steps", "Both in units of the loss. Controls show "
        "what ordinary steps alone change over the same stretch." + thinning(*marks.values()),
        lambda w: svg.scatter_chart(clouds, w, "gain at the gate", "gain left", same=False), 470,
    )  # fmt: skip
    bars, arms = [], list(dict.fromkeys(r.arm for r, _ in kept))
    for arm in arms[:MAX_STRIPS]:
        for word, key, colour in (("spent", "spent_units", "c0"), ("returned", "returned_units", "c1")):
            units = [v for r, g in kept if r.arm == arm and (v := number(g.get(key))) is not None]
            bars += [(f"{arm}, {word}", statistics.fmean(units), colour)] if units else []
    which = f", the first {MAX_STRIPS} of {len(arms)} arms" if len(arms) > MAX_STRIPS else ""
    side = bar_list(f"Spent and returned, cost units per run{which}", bars) if bars else ""
    head = ["Run", "Steps gained", "text:95&nbsp;% interval", "Loss a jump takes off", "text:95&nbsp;% interval",
            "Persistence", "Treated", "Controls", "text:State"]  # fmt: skip
    rows = [
        [escape(r.name, 60), format_value(g.get("steps_gained")),
         f"text:{_ends(g.get('steps_gained_ci95')) or escape(g.get('reason') or '') or UNKNOWN}",
         _share(g.get("effect_per_jump")), f"text:{_share_ends(g.get('effect_per_jump_ci95')) or UNKNOWN}",
         format_value(g.get("persistence"), 3), format_value(g.get("num_treated")), format_value(g.get("num_controls")),
         f"text:{escape(g['state']) if g.get('state') is not None else UNKNOWN}"]
        for r, g in kept
    ]  # fmt: skip
    plot = f'<div class="pair">{chart}{side}</div>' if any(marks.values()) else side
    return title + (keys if any(marks.values()) else "") + plot + (html_table(head, rows) if rows else "")


def _ends(found: object) -> str:
    """The ends of an interval on one line."""
    return interval(found).partition("interval ")[2].replace(" ", "&nbsp;")


def _share(value: object) -> str:
    """A share of the loss in percent."""
    found = number(value)
    return percent(None if found is None else 100 * found)


def _share_ends(found: object) -> str:
    """The ends of an interval of shares, in percent."""
    return _ends([None if (v := number(end)) is None else round(100 * v, 2) for end in list_of(found)])


def divergence_table(report: Report) -> str:
    """Divergence events, one row per run, signal and level."""
    groups: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for run in report.runs:
        told = run.of("divergence") or [
            e for e in list_of(run.summary.get("divergence_events")) if isinstance(e, Mapping)
        ]
        for e in told:
            level = e.get("level", "")
            name = LEVELS[level] if isinstance(level, int) and 0 <= level < len(LEVELS) else str(level)
            groups[run.name, str(e.get("signal", "")), name, str(e.get("action", ""))].append(e)
    if not groups:
        return "<h2>Divergence</h2><p>None.</p>"
    head = ["Run", "text:Signal", "text:Level", "text:Action", "Times", "First step", "Last step",
            "Largest value", "Threshold"]  # fmt: skip
    rows = []
    for key, events in groups.items():
        at = [v for e in events if (v := number(e.get("step"))) is not None]
        top = max((v for e in events if (v := number(e.get("value"))) is not None), default=None)
        names = [escape(key[0], 60), *(f"text:{escape(k, 60)}" for k in key[1:])]
        ends = [format_value(min(at, default=None)), format_value(max(at, default=None))]
        rows.append(
            [*names, format_value(len(events)), *ends, format_value(top), format_value(events[0].get("threshold"))]
        )
    more = f"<p>{len(rows) - 60} more rows are not shown.</p>" if len(rows) > 60 else ""
    return f"<h2>Divergence</h2>{html_table(head, rows[:60])}{more}"


def words(_: Report) -> str:
    """How to read the page."""
    return macro("glossary", WORDS)


def flat(value: object, name: str = "", depth: int = 0) -> list[tuple[str, str]]:
    """Nested settings as (dotted name, text) rows."""
    if depth > 8:
        return [(name, "nested too deeply to show")]
    if isinstance(value, Mapping) and value:
        inner = ((f"{name}.{k}" if name else str(k), v) for k, v in value.items())
        return [row for key, v in inner for row in flat(v, key, depth + 1)]
    if isinstance(value, list):
        return [(name, ", ".join(str(v) for v in value[:20]) + (" and more" if len(value) > 20 else ""))]
    return [(name, "not measured" if value is None else str(value))] if name else []


def environment(report: Report) -> str:
    """Environment, settings, and each run's summary folded away."""

    def keys(value: object) -> str:
        rows = [[escape(name, 80), escape(text)] for name, text in flat(value)[:120]]
        return html_table([], rows, "keys") if rows else "<p>Not recorded.</p>"

    c = report.compare or {}
    out = f"<h2>Environment</h2>{keys(c.get('environment'))}<h2>Settings</h2>{keys(c.get('settings'))}"
    for run in report.runs:
        rest = {k: v for k, v in run.summary.items() if k not in ("ledger", "divergence_events")}
        if rest:
            out += f"<details><summary>Summary of {escape(run.name, 60)}</summary>{keys(rest)}</details>"
    return out + "".join(f'<p class="notice">Note: {escape(n)}.</p>' for n in report.notices)


SECTIONS = (headline, arms_table, loss_figure, steps_table, timeline_figure, jumps_figure, ledger_figure,
            confidence_figure, divergence_table, withdrawn_table, words, environment)  # fmt: skip


def build_report(run_dir: Path) -> str:
    """The page about a directory of results, as HTML text."""
    report = load(run_dir)
    return whole_page(report.title, [html for section in SECTIONS if (html := section(report))])


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the page (default: ``report.html`` beside the data) and return where it is."""
    if validation.holds(run_dir):
        page = validation.page(run_dir)
    elif sweep.holds(run_dir):
        page = sweep.page_of(run_dir)
    else:
        page = build_report(run_dir)
    if out is not None:
        write_named(out, page)
        return out
    write_text(run_dir / "report.html", page)
    return run_dir / "report.html"
