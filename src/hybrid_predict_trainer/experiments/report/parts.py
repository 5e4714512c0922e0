"""Pieces a report is put together from: style, glossary, numbers, tables, legends, bars."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from .charts import escape
from .data import list_of, number

T = TypeVar("T")

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
    ("Confidence", "The stated probability that a jump will be kept and pay for its test. On the diagonal of the "
     "reliability curve what was stated came true as often as it was stated. The calibration error (ECE) is the mean "
     "distance from it; a few hundred outcomes show some of it by chance, which is given beside it. Epistemic is the "
     "disagreement between a predictor's members, aleatoric the spread within one."),
    ("Persistence", "The share of the gain seen at the gate that is still there after further real steps. "
     "Ordinary training would have made part of that progress anyway, so it is below 1 as a rule."),
)  # fmt: skip


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
    ends = [number(v) for v in list_of(value)]
    if len(ends) != 2 or ends == [None, None]:
        return ""
    low, high = ends
    words = f"{shown(low)} to {shown(high)}" if low is not None and high is not None else f"up to {shown(high)}"
    return f"95&nbsp;% confidence interval {f'from {shown(low)} on' if high is None else words}{unit}"


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
