"""Pieces a report is put together from: glossary, numbers as HTML, and the macros of ``templates/parts.html``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from .data import list_of, number
from .templates import macro

T = TypeVar("T")

#: Timelines and spans beyond which a strip is drawn as a majority vote per column.  Arbitrary.
MAX_STRIPS, MAX_SPANS, MAX_MARKS = 12, 400, 600
#: Rows of a table, and names in a legend, beyond which the rest is folded up or only counted.  Arbitrary.
MAX_ROWS, MAX_KEYS = 20, 20
WIDE, SLIM = 860, 380
#: Decimals beyond which a figure is told by its exponent.
MAX_DECIMALS = 6
UNKNOWN = '<span class="none">not measured</span>'

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


def format_value(value: object, digits: int = 4) -> str:
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
        return format_value(middle, 5)
    last = math.floor(math.log10(spread)) - 1  # place of the deviation's second digit
    if (
        not -MAX_DECIMALS <= last <= MAX_DECIMALS
    ):  # full-batch training ends at losses that have nothing but zeros there
        digits = max(math.floor(math.log10(abs(middle))) - last, 1) if middle else 1
        text = f"{middle:.{digits}e} &plusmn; {spread:.1e}"
    else:
        text = f"{middle:.{max(-last, 0)}f} &plusmn; {spread:.{max(-last, 0)}f}"
    return text.replace("-", "&minus;")


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
    words = (
        f"{format_value(low)} to {format_value(high)}"
        if low is not None and high is not None
        else f"up to {format_value(high)}"
    )
    return f"95&nbsp;% confidence interval {f'from {format_value(low)} on' if high is None else words}{unit}"


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]], class_: str = "") -> str:
    """A table of ready HTML cells; one that starts with ``text:`` is set flush left, as is the head above such ones.

    Of a table with a head the rows beyond ``MAX_ROWS`` are folded up, unless they are few.
    """

    def cell(content: str) -> tuple[bool, str]:
        return content.startswith("text:"), content.removeprefix("text:")

    def table(part: Sequence[Sequence[str]]) -> str:
        return macro("table", [cell(h) for h in head], [[cell(c) for c in row] for row in part], class_)

    every = list(rows)
    worded = [all(row[i].startswith("text:") for row in every) and bool(every) for i in range(len(head))]
    head = [f"text:{h.removeprefix('text:')}" if flush else h for h, flush in zip(head, worded, strict=True)]
    if not head or len(every) <= 1.25 * MAX_ROWS:
        return table(every)
    rest = every[MAX_ROWS:]
    return f"{table(every[:MAX_ROWS])}<details><summary>{len(rest)} more</summary>{table(rest)}</details>"


def figure(title: str, caption: str, draw: Callable[[int], str], wide: int = WIDE) -> str:
    """A drawing in two widths, for pages and for phones; the style sheet shows one of them."""
    small = "small" if wide < WIDE else ""  # stretched over the page its letters would be those of a poster
    return macro("figure", title, caption, draw(wide), draw(SLIM), small)


def legend(entries: Iterable[tuple[str, str, str]]) -> str:
    """Names beside swatches; an entry is (name, kind of mark, classes).  Beyond ``MAX_KEYS`` they are only counted."""
    every = list(entries)
    more = f"<p><small>and {len(every) - MAX_KEYS} more</small></p>" if len(every) > MAX_KEYS else ""
    return macro("legend", every[:MAX_KEYS]) + more


def bar_list(title: str, items: Sequence[tuple[str, float, str]]) -> str:
    """Labelled bars on one scale; an item is (label, value >= 0, colour class)."""
    top = max((v for _, v, _ in items), default=0.0) or 1.0
    bars = [(name, format_value(v), f"{100 * max(v, 0.0) / top:.1f}", style) for name, v, style in items]
    return macro("bar_list", title, bars)


def thinned(items: Sequence[T], limit: int = MAX_MARKS) -> tuple[T, ...]:
    """At most ``limit`` of the items, evenly spaced."""
    count = min(limit, len(items))
    return tuple(items[k * len(items) // count] for k in range(count))


def thinning(*groups: Sequence[object]) -> str:
    """What a caption says where :func:`thinned` left points out."""
    return f" Evenly thinned to {MAX_MARKS} of a kind." if any(len(g) > MAX_MARKS for g in groups) else ""
