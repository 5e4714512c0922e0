"""One self-contained page about a comparison or a run: files -> :class:`Report` -> HTML sections.

The page loads nothing and runs no script; every text from the data is escaped.  What a file does not
say is shown as "not measured", never as zero.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from . import svg
from .svg import escape

Record = Mapping[str, Any]
T = TypeVar("T")

PHASES = ("warmup", "full", "predict", "correct")
LEVELS = ("normal", "caution", "warning", "critical")
#: Timelines and spans beyond which a strip is drawn as a majority vote per column.  Arbitrary.
MAX_STRIPS, MAX_SPANS, MAX_MARKS = 12, 400, 600
WIDE, SLIM = 860, 380
UNKNOWN = '<span class="none">not measured</span>'

CSS = """
:root{color-scheme:light dark;--page:#fdfdfb;--ink:#1b1e22;--muted:#626973;--rule:#e2e3df;--soft:#f3f4f0}
@media screen and (prefers-color-scheme:dark){
:root{--page:#14171a;--ink:#e6e8ea;--muted:#9aa2ac;--rule:#2b3036;--soft:#1c2024}}
*{box-sizing:border-box}html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);overflow-wrap:anywhere;
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
main{max-width:56rem;margin:0 auto;padding:3rem 1.25rem 4rem}
h1{font-size:1.75rem;line-height:1.2;margin:0;letter-spacing:-.015em}
h2{font-size:1.15rem;margin:3.25rem 0 .5rem;letter-spacing:-.005em}
p{margin:.5rem 0;max-width:42rem}.task,figcaption,.notice,.none,dd,small{color:var(--muted)}
.task{margin:.35rem 0 0}.verdict{font-size:1.15rem;margin:1.5rem 0 0}
.headline{border-block:1px solid var(--rule);padding:1.1rem 0;margin:1.5rem 0 2rem;
display:flex;flex-wrap:wrap;gap:.75rem 3rem}
.headline dl{margin:0;min-width:8rem;max-width:24rem}.headline dt,th,.reasons span{color:var(--muted)}
.headline dt{font-size:.85rem}.headline dd{margin:0;font-size:.85rem}
.headline dd.big{color:var(--ink);font-size:1.5rem;line-height:1.45}
.headline dl:first-child dd.big{font-size:2.1rem;line-height:1.25;font-weight:650}
.scroll{overflow-x:auto;margin:.75rem 0}
table{border-collapse:collapse;width:100%;font-size:.85rem;font-variant-numeric:tabular-nums;line-height:1.35}
th,td{padding:.42rem .48rem;text-align:right;border-bottom:1px solid var(--rule);vertical-align:top}
th{font-weight:500;vertical-align:bottom;overflow-wrap:normal}
td{white-space:nowrap;overflow-wrap:break-word}
td.text,td .none{white-space:normal}
th:first-child,td:first-child,.text{text-align:left}
tbody tr:last-child td{border-bottom:0}th:first-child,td:first-child{padding-left:0}
figure{margin:1rem 0 0}figcaption{font-size:.85rem;max-width:44rem;margin-top:.75rem}
.slim{display:none}.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.25rem;list-style:none;
padding:0;margin:.25rem 0 .9rem;font-size:.85rem}
.legend svg{display:inline-block;width:26px;height:12px;vertical-align:-1px;margin-right:.4rem}
.pair figure{margin:0}
.pair{display:grid;grid-template-columns:minmax(0,1.3fr) minmax(0,1fr);gap:2.5rem;align-items:start}

.reasons{list-style:none;padding:0;margin:0;font-size:.85rem;font-variant-numeric:tabular-nums}
.reasons li{margin:0 0 .6rem}.reasons b{font-weight:600}
.reasons i{display:block;height:6px;background:var(--c);border-radius:1px;margin-top:.2rem;min-width:2px}
h3{font-size:.85rem;font-weight:500;margin:0 0 .75rem}.words dt{font-weight:600;margin-top:.8rem}
.words dd{margin:0;max-width:42rem;color:var(--ink)}details{margin:.4rem 0;font-size:.85rem}
summary{cursor:pointer}.keys td{
white-space:normal;text-align:left;overflow-wrap:anywhere}.keys td:first-child{width:16rem}
.notice{font-size:.85rem}
@media (max-width:600px){main{padding:1.75rem 1rem 3rem}.wide{display:none}.slim{display:block}
.pair{grid-template-columns:minmax(0,1fr);gap:1.5rem}.keys td:first-child{width:42%}h2{margin-top:2.5rem}}
@media print{:root{--page:#fff}body{font-size:10.5pt}
main{padding:0;max-width:none}.wide{display:block}.slim{display:none}
figure,tr,.headline dl,.pair{break-inside:avoid}
h2,.legend{break-after:avoid}details{display:none}.scroll{overflow:visible}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""

WORDS = (
    ("Cost units", "What a run has spent, counted in forward and backward passes, with everything that "
     "belongs to the method in it: the forwards of the gate, snapshots, the predictor's own training, and "
     "jumps that were refused. Arms are compared at equal cost, not at equal numbers of steps."),
    ("Claimed and credited steps", "A jump claims the number of steps it was meant to skip. It is credited "
     "only with the real steps it saved: its gain at the gate, times the share of such gains that is still "
     "there some steps later, divided by how fast the loss falls by ordinary steps."),
    ("Equal-loss speed-up", "The cost of the cheapest tuned plain run that reaches the hybrid run's final "
     "validation loss, divided by the cost of the hybrid run. 1 means nothing was gained. An interval that "
     "includes 1 means that no gain has been shown."),
    ("Jump of zero", "A control arm that proposes, tests and pays for jumps like the hybrid arm, but moves "
     "the weights nowhere. What it differs by from the plain arm is the price of the machinery; what the "
     "hybrid arm differs by from it is the effect of the jumps."),
    ("Gate, treated and control", "The gate measures the loss before and after a proposed jump and accepts "
     "it if the gain pays for the test. A random share of the approved jumps is skipped: these are the "
     "controls. The difference between treated and controls some steps later is the true effect."),
    ("Persistence", "The share of the gain seen at the gate that is still there after further real steps. "
     "Ordinary training would have made part of that progress anyway, so it is below 1 as a rule."),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Step:
    """What the figures need of one training step."""

    step: float
    phase: str
    loss: float | None


@dataclass(frozen=True, slots=True)
class Run:
    """One run's records: steps, the rarer events by name, and the summary."""

    name: str
    arm: str
    steps: tuple[Step, ...]
    events: Mapping[str, tuple[Record, ...]]
    summary: Record

    def of(self, event: str) -> tuple[Record, ...]:
        """All records of one kind, in order."""
        return self.events.get(event, ())

    @property
    def is_hybrid(self) -> bool:
        """Whether it ever proposed or took a predicted step."""
        return bool(self.of("jump")) or any(s.phase in ("predict", "correct") for s in self.steps)


@dataclass(frozen=True, slots=True)
class Report:
    """Everything the page shows."""

    title: str
    compare: Record | None
    arms: tuple[Record, ...]
    runs: tuple[Run, ...]
    styles: Mapping[str, str]  # arm -> classes of colour and dash
    notices: tuple[str, ...]


def number(value: object) -> float | None:
    """The value as a float; None if it is not a number a chart could show."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    if not abs(found) < 1e100:
        return None
    return 0.0 if abs(found) < 1e-100 else found


def _table(value: object) -> Record:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> list[Any]:
    """The value if it is a JSON list, else an empty one."""
    return value if isinstance(value, list) else []


# ---------------------------------------------------------------------------------------------- loading


def read_json(path: Path) -> Record:
    """A JSON object from a file; a ValueError with the file's name if it holds none."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def read_metrics(path: Path) -> tuple[tuple[Step, ...], dict[str, tuple[Record, ...]], tuple[str, ...]]:
    """Steps, other events by name, and notices of a metrics file.

    A torn last line is left out with a notice, a torn line before it is a ValueError.  Where the step
    count goes back the run was resumed: records of the abandoned attempt are left out with a notice.
    """
    steps: list[Step] = []
    events: dict[str, list[Record]] = defaultdict(list)
    torn, num_superseded = 0, 0
    with path.open("rb") as file:
        for at, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            if torn:
                raise ValueError(f"{path}:{torn}: not a JSON object")
            try:
                record = json.loads(raw)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                torn = at
                continue
            event, step = str(record.get("event", "")), number(record.get("step"))
            if event == "step":
                step = (steps[-1].step + 1 if steps else 0.0) if step is None else step
                if steps and step <= steps[-1].step:
                    before = len(steps) + sum(map(len, events.values()))
                    steps = [s for s in steps if s.step < step]
                    events = defaultdict(list, {k: _until(rows, step) for k, rows in events.items()})
                    num_superseded += before - len(steps) - sum(map(len, events.values()))
                steps.append(Step(step, str(record.get("phase")), number(record.get("loss"))))
            else:
                events[event].append(record)
    notices = [f"the last line of {path.name} was torn and has been left out"] if torn else []
    if num_superseded:
        notices.append(f"resumed: {num_superseded} records of an abandoned attempt have been left out")
    return tuple(steps), {k: tuple(rows) for k, rows in events.items()}, tuple(notices)


def _until(rows: Iterable[Record], step: float) -> list[Record]:
    """Records not later than a step (those without one stay)."""
    return [r for r in rows if (number(r.get("step")) or 0.0) <= step]


def load(run_dir: Path) -> Report:
    """Read a directory of ``compare.json`` and ``runs/``, or of one run's ``metrics.jsonl``."""
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir}: no such directory")
    compare = read_json(run_dir / "compare.json") if (run_dir / "compare.json").exists() else None
    runs, notices = [], []
    for file in sorted([*run_dir.glob("runs/*/metrics.jsonl"), *run_dir.glob("metrics.jsonl")]):
        steps, events, remarks = read_metrics(file)
        folder = file.parent
        summary = read_json(folder / "summary.json") if (folder / "summary.json").exists() else {}
        name = folder.resolve().name
        named = re.fullmatch(r"(.+)-s\d+", name)
        runs.append(Run(name, named[1] if named else name, steps, events, summary))
        notices += [f"{name}: {remark}" for remark in remarks]
    if compare is None and not runs:
        raise FileNotFoundError(f"{run_dir}: nothing to report: no compare.json, no runs/*/metrics.jsonl")
    by_arm: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_arm[run.arm].append(run)
    told = [a for a in _list((compare or {}).get("arms")) if isinstance(a, Mapping)]
    arms = tuple(told) or tuple(arm_of(name, members) for name, members in by_arm.items())
    names = dict.fromkeys([*(str(a.get("name", "unnamed")) for a in arms), *by_arm])
    title = "Comparison" if compare is not None else "Run" if len(runs) == 1 else "Runs"
    return Report(
        f"{title}: {run_dir.resolve().name}", compare, arms, tuple(runs), arm_styles(names), tuple(notices)
    )


def arm_of(name: str, runs: Sequence[Run]) -> Record:
    """A row of the table of arms from its runs alone, where no comparison was written."""

    def mean(values: Iterable[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return statistics.fmean(known) if known else None

    ends = [run.of("validation")[-1] if run.of("validation") else {} for run in runs]
    finals = [v for end in ends if (v := number(end.get("val_loss"))) is not None]
    row: dict[str, Any] = {"name": name, "n": len(runs), "final_val_loss": mean(finals)}
    row["final_val_loss_std"] = statistics.stdev(finals) if len(finals) > 1 else None
    row |= {key: mean(number(end.get(key)) for end in ends) for key in ("cost_units", "wall_s")}
    counts = [_table(run.summary.get("statistics")) for run in runs]
    for key in ("real_steps", "claimed_steps", "credited_steps", "forward", "backward"):
        row[f"num_{key}"] = mean(number(c.get(f"num_{key}")) for c in counts)
    row["num_jumps_proposed"] = mean(float(len(run.of("jump"))) for run in runs)
    row["num_jumps_accepted"] = mean(
        float(sum(j.get("accepted") is True for j in run.of("jump"))) for run in runs
    )
    return row


def arm_styles(names: Iterable[str]) -> dict[str, str]:
    """Colours by role: plain arms share one and differ by dash, the rest take turns."""
    styles: dict[str, str] = {}
    fixed, num_plain, num_other = {"plain": "c0", "hybrid": "c1", "jump-of-zero": "c2"}, 0, 0
    for name in names:
        if name in fixed:
            styles[name] = fixed[name]
        elif name.startswith("plain"):
            styles[name], num_plain = f"c0 d{1 + num_plain % 3}", num_plain + 1
        else:
            styles[name], num_other = f"c{3 + num_other % 5}", num_other + 1
    return styles


# ------------------------------------------------------------------------------------- numbers and parts


def shown(value: object, digits: int = 4) -> str:
    """A number as HTML, thousands set apart; "not measured" if there is none."""
    found = number(value)
    if found is None:
        return UNKNOWN
    whole = found == round(found) or abs(found) >= 1000
    text = f"{found:,.0f}" if whole and abs(found) < 1e9 else f"{found:.{digits}g}"
    return text.replace(",", "&#8239;").replace("-", "&minus;")


def mean_std(mean: object, std: object) -> str:
    """Mean and standard deviation to the deviation's second digit."""
    middle, spread = number(mean), number(std)
    if middle is None or not spread or spread < 0:
        return shown(middle, 5)
    decimals = min(max(1 - math.floor(math.log10(spread)), 0), 6)
    return f"{middle:.{decimals}f} &plusmn; {spread:.{decimals}f}".replace("-", "&minus;")


def percent(value: object) -> str:
    """A percentage as HTML."""
    found = number(value)
    return UNKNOWN if found is None else f"{found:.2f}&nbsp;%".replace("-", "&minus;")


def interval(value: object, unit: str = "") -> str:
    """The words for a 95 % confidence interval; empty if there is none."""
    ends = [number(v) for v in _list(value)]
    if len(ends) != 2 or None in ends:
        return ""
    return f"95&nbsp;% confidence interval {shown(ends[0])} to {shown(ends[1])}{unit}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], class_: str = "") -> str:
    """A table of ready HTML cells; a cell that starts with ``text:`` is set flush left."""

    def cell(tag: str, content: str) -> str:
        flush = content.startswith("text:")
        return f'<{tag} class="text">{content[5:]}</{tag}>' if flush else f"<{tag}>{content}</{tag}>"

    top = f"<thead><tr>{''.join(cell('th', h) for h in head)}</tr></thead>" if head else ""
    body = "".join(f"<tr>{''.join(cell('td', c) for c in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{class_}">{top}<tbody>{body}</tbody></table></div>'


def figure(title: str, caption: str, draw: Callable[[int], str], wide: int = WIDE) -> str:
    """A drawing in two widths, for pages and for phones; the style sheet shows one of them."""
    heading = f"<h3>{title}</h3>" if title else ""
    return (
        f'<figure>{heading}<div class="wide">{draw(wide)}</div><div class="slim">{draw(SLIM)}</div>'
        f"{f'<figcaption>{caption}</figcaption>' if caption else ''}</figure>"
    )


def legend(entries: Iterable[tuple[str, str, str]]) -> str:
    """Names beside swatches; an entry is (name, kind of mark, classes)."""
    marks = {
        "line": '<line x1="1" y1="6" x2="25" y2="6" class="line {}"/>',
        "box": '<rect x="7" y="1" width="12" height="10" class="{}"/>',
        "dot": '<circle cx="13" cy="6" r="4" class="solid {}"/>',
        "ring": '<circle cx="13" cy="6" r="3.6" class="ring {}"/>',
        "cross": '<path d="M9 2l8 8m0 -8l-8 8" class="ring {}"/>',
        "up": '<path d="M13 11l-4 -9h8z" class="solid {}"/>',
        "guide": '<line x1="1" y1="6" x2="25" y2="6" class="guide{}"/>',
    }
    swatch = '<li><svg viewBox="0 0 26 12" aria-hidden="true">{}</svg>{}</li>'
    items = (swatch.format(marks[kind].format(style), escape(name)) for name, kind, style in entries)
    return f'<ul class="legend">{"".join(items)}</ul>'


def bar_list(title: str, items: Sequence[tuple[str, float, str]]) -> str:
    """Labelled bars on one scale; an item is (label, value >= 0, colour class)."""
    top = max((v for _, v, _ in items), default=0.0) or 1.0
    rows = (
        f'<li class="{c}"><span>{escape(name, 90)}</span> <b>{shown(v)}</b>'
        f'<i style="width:{100 * max(v, 0.0) / top:.1f}%"></i></li>'
        for name, v, c in items
    )
    return f'<div><h3>{title}</h3><ul class="reasons">{"".join(rows)}</ul></div>'


def thinned(items: Sequence[T], limit: int = MAX_MARKS) -> tuple[T, ...]:
    """At most ``limit`` of the items, evenly spaced."""
    count = min(limit, len(items))
    return tuple(items[k * len(items) // count] for k in range(count))


def thinning(*groups: Sequence[object]) -> str:
    """What a caption says where :func:`thinned` left points out."""
    return f" Evenly thinned to {MAX_MARKS} of a kind." if any(len(g) > MAX_MARKS for g in groups) else ""


# --------------------------------------------------------------------------------------------- sections


def headline(report: Report) -> str:
    """Title, task, verdict, and the main figure with its interval or the reason why it is unknown."""
    c = report.compare
    out = [f"<h1>{escape(report.title)}</h1>"]
    if c is None:
        out.append('<p class="verdict">No comparison was made here, so no speed-up is claimed.</p>')
        facts = [_gained(run) for run in report.runs if run.summary.get("ledger")][:4]
    else:
        task, seeds = c.get("task", "not named"), ", ".join(escape(s) for s in _list(c.get("seeds")))
        out.append(f'<p class="task">Task: {escape(task)}. Seeds: {seeds or UNKNOWN}.</p>')
        out.append(f'<p class="verdict">{escape(c.get("verdict", "No verdict was recorded."))}</p>')
        gap, saved = percent(c.get("loss_gap_at_equal_cost_pct")), percent(c.get("backward_reduction_pct"))
        facts = [
            _speedup(c),
            ("Loss gap at equal cost", gap, "Below 0: hybrid ends lower."),
            ("Backward passes saved", saved, ""),
        ]
    entry = '<dl><dt>{}</dt><dd class="big">{}</dd><dd>{}</dd></dl>'
    cells = "".join(entry.format(*fact) for fact in facts)
    return "".join(out) + (f'<div class="headline">{cells}</div>' if facts else "")


def _speedup(c: Record) -> tuple[str, str, str]:
    """The main figure as (name, value, conditions)."""
    speed, reason = number(c.get("speedup_at_equal_loss")), escape(c.get("speedup_reason") or "")
    if speed is None:
        why = reason or "No reason was recorded."
        return "Equal-loss speed-up", "unknown", f"{why[:1].upper()}{why[1:]}"
    ends = [number(v) for v in _list(c.get("speedup_ci95"))]
    parts = [interval(c.get("speedup_ci95")) or "no confidence interval: too few seeds or not computed"]
    if len(ends) == 2 and ends[0] is not None and ends[1] is not None and ends[0] <= 1 <= ends[1]:
        parts.append("the interval includes 1, so no speed-up has been shown")
    per_seed = ", ".join(shown(s, 3) for s in _list(c.get("speedup_per_seed")))
    parts += [f"per seed {per_seed}"] if per_seed else []
    parts += [reason] if reason else []
    text = "; ".join(parts)
    return "Equal-loss speed-up", f"{speed:.2f}&times;", f"{text[:1].upper()}{text[1:]}."


def _gained(run: Run) -> tuple[str, str, str]:
    """A run's own estimate of the steps it gained."""
    ledger = _table(run.summary.get("ledger"))
    steps = shown(ledger.get("steps_gained"), 3)
    return f"Steps gained, {escape(run.name, 40)}", steps, interval(ledger.get("steps_gained_ci95"), " steps")


def arms_table(report: Report) -> str:
    """The table of arms."""
    head = ["Arm", "Runs", "Final validation loss", "Cost units", "Wall time,&nbsp;s", "Real steps",
            "Credited", "Claimed", "Forward", "Backward", "Jumps accepted"]  # fmt: skip
    keys = ("cost_units", "wall_s", "num_real_steps", "num_credited_steps", "num_claimed_steps",
            "num_forward", "num_backward")  # fmt: skip
    rows = [
        [
            escape(a.get("name", "unnamed"), 60),
            shown(a.get("n")),
            mean_std(a.get("final_val_loss"), a.get("final_val_loss_std")),
            *(shown(a.get(k)) for k in keys),
            f"{shown(a.get('num_jumps_accepted'))} of {shown(a.get('num_jumps_proposed'))}",
        ]
        for a in report.arms
    ]
    if not rows:
        return "<h2>Arms</h2><p>No arms were recorded.</p>"
    return (
        f"<h2>Arms</h2>{table(head, rows)}<p><small>Losses: mean &plusmn; standard deviation over seeds; "
        "the other columns: mean over seeds.</small></p>"
    )


def loss_figure(report: Report) -> str:
    """Figure 1: validation loss against cost, and its second half enlarged."""
    curves = []
    for arm, style in report.styles.items():
        rows = [
            [
                (x, y)
                for r in run.of("validation")
                if (x := number(r.get("cost_units"))) is not None
                and (y := number(r.get("val_loss"))) is not None
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
    half = max(c.points[-1][0] for c in curves) / 2

    late = [
        svg.Curve(c.name, c.style, *(svg.since(points, half) for points in (c.points, c.low, c.high)))
        for c in curves
    ]
    late = [c for c in late if len(c.points) > 1]
    out = title + keys + figure("", caption, lambda w: svg.line_chart(curves, w, x_title, y_title))
    if late:
        out += figure("The second half, enlarged", "", lambda w: svg.line_chart(late, w, x_title, y_title))
    return out


def timeline_figure(report: Report) -> str:
    """Figure 2: the phases of each hybrid run."""
    title, runs = "<h2>2. Phases</h2>", [r for r in report.runs if r.is_hybrid]
    if not runs:
        return f"{title}<p>No run predicted or proposed a jump.</p>"
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
        return f"{title}<p>No jump was proposed.</p>"
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
    clouds = (
        svg.Cloud("refused", "c0", thinned(points[False]), filled=False),
        svg.Cloud("accepted", "c1", thinned(points[True])),
    )
    num_drawn = len(points[True]) + len(points[False])
    verdicts = [c for r in report.runs for c in r.of("correction") if r.arm != "jump-of-zero"]
    num_kept = sum(c.get("kept") is True for c in verdicts)
    caption = f"{len(told)} jumps proposed; {len(told) - num_drawn} without both losses are not drawn. "
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
    kept = [(r, _table(r.summary.get("ledger"))) for r in report.runs if r.is_hybrid]
    kept = [(r, ledger) for r, ledger in kept if ledger]
    marks: dict[bool, list[tuple[float, float, str]]] = {True: [], False: []}
    for run in report.runs:
        for o in run.of("outcome"):
            x, y = number(o.get("gate_gain")), number(o.get("gain_left"))
            if x is not None and y is not None and run.arm != "jump-of-zero":
                tip = f"{run.name}, step {o.get('step')}: {x:.4g} at the gate, {y:.4g} left"
                marks[o.get("skipped") is True].append((x, y, tip))
    if not kept and not any(marks.values()):
        return f"{title}<p>No ledger was kept.</p>"
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
    bars = []
    for arm in dict.fromkeys(r.arm for r, _ in kept):
        for word, key, colour in (("spent", "spent_units", "c0"), ("returned", "returned_units", "c1")):
            units = [v for r, g in kept if r.arm == arm and (v := number(g.get(key))) is not None]
            bars += [(f"{arm}, {word}", statistics.fmean(units), colour)] if units else []
    side = bar_list("Spent and returned, cost units per run", bars) if bars else ""
    head = ["Run", "Steps gained", "text:95&nbsp;% interval", "Persistence", "Treated", "Controls",
            "text:State"]  # fmt: skip
    rows = [
        [escape(r.name, 60), shown(g.get("steps_gained")),
         f"text:{_ends(g) or escape(g.get('reason') or '') or UNKNOWN}",
         shown(g.get("persistence"), 3), shown(g.get("num_treated")), shown(g.get("num_controls")),
         f"text:{escape(g['state']) if g.get('state') is not None else UNKNOWN}"]
        for r, g in kept
    ]  # fmt: skip
    plot = f'<div class="pair">{chart}{side}</div>' if any(marks.values()) else side
    return title + (keys if any(marks.values()) else "") + plot + (table(head, rows) if rows else "")


def _ends(ledger: Record) -> str:
    """The ends of the interval of the steps gained, on one line."""
    words = interval(ledger.get("steps_gained_ci95")).partition("interval ")[2]
    return words.replace(" ", "&nbsp;")


def divergence_table(report: Report) -> str:
    """Divergence events, one row per run, signal and level."""
    groups: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for run in report.runs:
        told = run.of("divergence") or [
            e for e in _list(run.summary.get("divergence_events")) if isinstance(e, Mapping)
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
        ends = [shown(min(at, default=None)), shown(max(at, default=None))]
        rows.append([*names, shown(len(events)), *ends, shown(top), shown(events[0].get("threshold"))])
    more = f"<p>{len(rows) - 60} more rows are not shown.</p>" if len(rows) > 60 else ""
    return f"<h2>Divergence</h2>{table(head, rows[:60])}{more}"


def words(_: Report) -> str:
    """How to read the page."""
    body = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in WORDS)
    return f'<h2>How to read this page</h2><dl class="words">{body}</dl>'


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
        return table([], rows, "keys") if rows else "<p>Not recorded.</p>"

    c = report.compare or {}
    out = f"<h2>Environment</h2>{keys(c.get('environment'))}<h2>Settings</h2>{keys(c.get('settings'))}"
    for run in report.runs:
        rest = {k: v for k, v in run.summary.items() if k not in ("ledger", "divergence_events")}
        if rest:
            out += f"<details><summary>Summary of {escape(run.name, 60)}</summary>{keys(rest)}</details>"
    return out + "".join(f'<p class="notice">Note: {escape(n)}.</p>' for n in report.notices)


SECTIONS = (headline, arms_table, loss_figure, timeline_figure, jumps_figure, ledger_figure, divergence_table,
            words, environment)  # fmt: skip


def build_report(run_dir: Path) -> str:
    """The page about a directory of results, as HTML text."""
    report = load(run_dir)
    body = "\n".join(f"<section>{section(report)}</section>" for section in SECTIONS)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"/>'
        f"<title>{escape(report.title)}</title><style>{CSS}{svg.CSS}</style></head>\n"
        f"<body><main>{body}</main></body></html>\n"
    )


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the page (default: ``report.html`` beside the data) and return where it is."""
    target = run_dir / "report.html" if out is None else out
    page = build_report(run_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target
