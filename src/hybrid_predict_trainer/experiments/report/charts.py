"""Charts for the page: matplotlib draws, the page's style sheet gives colours.

An artist has classes in place of colours (``c0`` to ``c7`` for series, ``p-full`` and so on for phases), which
``templates/charts.css`` resolves, so that one drawing serves light pages, dark ones and paper.  The geometry and the
words are matplotlib's; numbers are rounded, so that the same data give the same text.  Text from data is escaped.
"""

from __future__ import annotations

import bisect
import html
import io
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from ..extras import require
from .templates import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float]

#: Height of one name of a curve.
NAME_PX = 15
#: Width of one character of the 12-pixel labels, for margins.  Arbitrary, errs on the wide side.
CHARACTER_PX = 6.7
#: Most horizontal and vertical ticks, on pages and on phones.
NUM_TICKS, NUM_TICKS_SLIM = 6, 5


def escape(value: object, limit: int = 400) -> str:
    """Text of any value, safe in HTML and SVG: escaped, printable characters only, cut at ``limit``."""
    return html.escape(printable(value, limit))


#: How matplotlib writes SVG here: text as text, no dates, names of definitions that do not change.
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "hpt", "text.parse_math": False, "font.size": 12.0, "path.simplify": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.axisbelow": True,
    "axes.unicode_minus": True,
}  # fmt: skip
#: SVG's word for where a text is anchored -> a class of ``templates/charts.css``.
ANCHORS = {"middle": "mid", "end": "end"}
_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"


@dataclass(slots=True)
class Mark:
    """What the page is told of an artist: its classes, circles that are drawn in its place, what its parts say."""

    style: str
    circles: tuple[tuple[float, float, float], ...] = ()
    tips: tuple[str, ...] = ()


@dataclass(slots=True)
class Drawing:
    """A figure of given pixels with one pair of axes; marks take the place of colours.

    Attributes:
        figure: matplotlib's.
        axes: of the figure; others may be added with :meth:`add_axes`.
        width: pixels, as is the height.
    """

    figure: Figure
    axes: Axes
    width: float
    height: float
    marks: dict[str, Mark] = field(default_factory=dict)

    def add_axes(self, left: float, top: float, right: float, bottom: float) -> Axes:
        """Axes without frame between pixels counted from the top left corner."""
        box = (left, self.height - bottom, right - left, bottom - top)
        found = self.figure.add_axes((box[0] / self.width, box[1] / self.height, box[2] / self.width,
                                      box[3] / self.height))  # fmt: skip
        found.patch.set_visible(False)
        return found

    def mark(self, artist: Any, style: str, tips: Sequence[str] = ()) -> None:
        """Give an artist classes, and its parts something to say where the pointer rests on them."""
        name = f"mark{len(self.marks)}"
        artist.set_gid(name)
        self.marks[name] = Mark(style, tips=tuple(tips))

    def circles(
        self, points: Sequence[Point], radii: Sequence[float], style: str, tips: Sequence[str] = (),
        axes: Axes | None = None,
    ) -> None:  # fmt: skip
        """Circles at points of the data, their radii in pixels; written as such, because a path has no centre."""
        axes = axes or self.axes
        if not points:
            return
        axes.autoscale(False)
        self.mark(axes.scatter([x for x, _ in points], [y for _, y in points], s=1.0), style, tips)
        where = axes.transData.transform(points)
        placed = tuple((x, self.height - y, r) for (x, y), r in zip(where.tolist(), radii, strict=True))
        self.marks[f"mark{len(self.marks) - 1}"].circles = placed

    def text(self, x: float, y: float, words: str, style: str = "", anchor: str = "left") -> None:
        """Words at pixels counted from the top left corner."""
        found = self.figure.text(x / self.width, 1 - y / self.height, words, ha=anchor, va="baseline")
        self.mark(found, style)

    def svg(self, title: str) -> str:
        """The drawing as SVG text without colours, definitions and links; ``title`` is what a screen reader says."""
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        for axes in self.figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                for tick in axis.get_major_ticks():
                    self.mark(tick.gridline, "grid")
                    self.mark(tick.tick1line, "axis")
                    self.mark(tick.label1, "")
            self.mark(axes.spines["bottom"], "axis")
        written = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(self.figure).print_svg(written, metadata=nothing)  # type: ignore[no-untyped-call]
        root = ElementTree.fromstring(written.getvalue().encode())
        paths = {e.get("id"): e.get("d", "") for e in root.iter(f"{_SVG}path") if e.get("id")}
        body = "".join(_shapes(root, paths, self.marks, ""))
        return (
            f'<svg viewBox="0 0 {self.width:.0f} {self.height:.0f}" role="img" '
            f'aria-label="{escape(title)}" preserveAspectRatio="xMinYMin meet">{body}</svg>'
        )


@contextmanager
def drawing(width: float, height: float, left: float, top: float, right: float, bottom: float) -> Iterator[Drawing]:
    """A drawing whose axes lie between pixels counted from the top left corner.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    require("matplotlib")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)  # a point is a pixel then
        figure.patch.set_visible(False)
        box = (left / width, 1 - bottom / height, (right - left) / width, (bottom - top) / height)
        axes = figure.add_axes(box)
        axes.patch.set_visible(False)
        axes.tick_params(axis="y", length=0, pad=8)
        axes.tick_params(axis="x", length=4, pad=3)
        yield Drawing(figure, axes, width, height)


def _shapes(
    parent: ElementTree.Element, paths: dict[str | None, str], marks: dict[str, Mark], group: str
) -> Iterator[str]:
    """The shapes below an element of matplotlib's SVG that carry a mark, with its classes."""
    for child in parent:
        tag = child.tag.removeprefix(_SVG)
        name = child.get("id", "") if child.get("id", "") in marks else group
        if tag == "g" and name != group:
            yield from _marked(child, paths, marks[name])
        elif tag == "g":
            yield from _shapes(child, paths, marks, name)


def _marked(element: ElementTree.Element, paths: dict[str | None, str], mark: Mark) -> Iterator[str]:
    """One artist: circles, words, or paths (markers joined to one path where they say nothing)."""
    tips = [f"<title>{escape(tip)}</title>" for tip in mark.tips]
    if mark.circles:
        for k, (x, y, r) in enumerate(mark.circles):
            tip = tips[k] if k < len(tips) else ""
            yield f'<circle cx="{_short(x)}" cy="{_short(y)}" r="{_short(r)}" class="{mark.style}">{tip}</circle>'
        return
    joined = ""
    for found in element.iter():
        tag = found.tag.removeprefix(_SVG)
        if tag == "text":
            yield _words(found, mark.style)
        elif tag == "use":
            at = (float(found.get("x", 0)), float(found.get("y", 0)))
            joined += _moved(paths[found.get(_LINK, "").removeprefix("#")], at)
        elif tag == "path" and not found.get("id"):
            joined += _moved(found.get("d", ""), (0.0, 0.0))
    if joined:
        yield f'<path d="{joined}" class="{mark.style}">{"".join(tips)}</path>'


def _words(found: ElementTree.Element, style: str) -> str:
    """A text element with its anchor as a class."""
    anchor = re.search(r"text-anchor: (\w+)", found.get("style", ""))
    classes = f"{style} {ANCHORS.get(anchor[1], '') if anchor else ''}".strip()
    x, y = (_short(float(found.get(key, 0))) for key in "xy")
    class_ = f' class="{classes}"' if classes else ""
    return f'<text x="{x}" y="{y}"{class_}>{escape(found.text or "")}</text>'


_PAIR = re.compile(r"(-?[\d.]+(?:e-?\d+)?) (-?[\d.]+(?:e-?\d+)?)")


def _moved(d: str, by: Point) -> str:
    """The ``d`` of a path somewhere else, one decimal per coordinate."""
    put = (f"{_short(float(a) + by[0])} {_short(float(b) + by[1])}" for a, b in _PAIR.findall(d))
    return re.sub(r"\s+", "", _PAIR.sub("#", d)).replace("z", "Z").replace("#", "{}").format(*put)


def _short(value: float) -> str:
    """A coordinate with at most one decimal and no idle zeros."""
    text = f"{value:.1f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


# ---- scales and ticks ------------------------------------------------------------------------------------


def logarithmic(values: Sequence[float]) -> bool:
    """Whether a scale of these values is: they are positive and span over a decade."""
    return bool(values) and min(values) > 0 and max(values) > 10 * min(values)


def limits(values: Iterable[float], pad: float = 0.05, *, log: bool = False) -> tuple[float, float]:
    """Ends of a scale that shows all values, with some room."""
    seen = list(values) or [0.0, 1.0]
    lo, hi = min(seen), max(seen)
    if log:
        margin = (hi / lo) ** pad
        return lo / margin, hi * margin
    if hi - lo <= 1e-12 * max(abs(lo), abs(hi)):  # one value only: give it room
        return lo - (abs(lo) * 0.1 or 1.0), hi + (abs(hi) * 0.1 or 1.0)
    return lo - pad * (hi - lo), hi + pad * (hi - lo)


def ticks_of(lo: float, hi: float, count: int = 5, *, log: bool = False) -> tuple[float, ...]:
    """Round values inside [lo, hi], about ``count``: multiples of 1, 2 or 5, or powers of ten."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    if log:
        decades = math.floor(math.log10(hi) + 1e-9) - math.floor(math.log10(lo) + 1e-9)
        locator: Any = LogLocator(subs=(1.0, 2.0, 5.0) if decades <= 2 else (1.0,), numticks=count + 2)
    else:
        locator = MaxNLocator(count, steps=[1, 2, 5, 10])
    found = (float(f"{t:.12g}") for t in locator.tick_values(lo, hi))
    return tuple(t for t in found if lo - 1e-9 * abs(lo) <= t <= hi + 1e-9 * abs(hi))


def tick_labels(ticks: Sequence[float]) -> tuple[str, ...]:
    """Texts for ticks: one number of decimals for all, k and M for thousands and millions."""
    gaps = [b - a for a, b in itertools.pairwise(ticks) if b > a]
    big, gap = max((abs(t) for t in ticks), default=0.0), min(gaps, default=0.0)
    even = bool(gaps) and max(gaps) < 1.5 * gap

    def text(t: float) -> str:
        if t == 0:
            shown = "0"
        elif big >= 1e9 or big < 1e-3 or not even:
            mantissa, _, exponent = (f"{t:.3e}" if big < 1e-3 else f"{t:.4g}").partition("e")
            shown = f"{float(mantissa):g}" + (f"e{int(exponent)}" if exponent else "")
        elif big >= 1e4:
            shown = f"{t / 1e6:g}M" if gap >= 1e5 else f"{t / 1e3:g}k"
        else:
            shown = f"{t:.{max(0, -math.floor(math.log10(gap) + 1e-9))}f}"
        return shown.replace("-", "\N{MINUS SIGN}")

    return tuple(text(t) for t in ticks)


def left_margin(values: Sequence[float]) -> float:
    """Pixels for the vertical axis' labels."""
    log = logarithmic(values)
    return 14 + CHARACTER_PX * max(
        (len(t) for t in tick_labels(ticks_of(*limits(values, log=log), log=log))), default=1
    )


def scale_axes(
    drawn: Drawing, x: tuple[float, float], y: tuple[float, float], titles: tuple[str, str], *, log_x: bool = False,
    log_y: bool = False,
) -> None:  # fmt: skip
    """Limits, ticks with their words, a horizontal grid, and titles; the vertical one stands above its axis.

    Args:
        drawn: On its axes.
        x: Ends of the horizontal scale.
        y: Ends of the vertical one.
        titles: Of both.
        log_x: By logarithm.
        log_y: By logarithm.
    """
    axes, count = drawn.axes, NUM_TICKS if drawn.width > 500 else NUM_TICKS_SLIM
    axes.set_xscale("log" if log_x else "linear")
    axes.set_yscale("log" if log_y else "linear")
    axes.set_xlim(*x)
    axes.set_ylim(*y)
    for axis, ends, log, most in ((axes.xaxis, x, log_x, count), (axes.yaxis, y, log_y, NUM_TICKS)):
        at = ticks_of(*ends, most, log=log)
        axis.set_ticks(at, labels=tick_labels(at))
        axis.set_ticks([], minor=True)
    axes.grid(axis="y")
    left, top, right = (axes.get_position().x0, axes.get_position().y1, axes.get_position().x1)
    drawn.text(left * drawn.width, (1 - top) * drawn.height - 12, titles[1] + (", log scale" if log_y else ""))
    drawn.text(right * drawn.width, drawn.height - 6, titles[0] + (", log scale" if log_x else ""), anchor="right")


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a chart: mean points and, over seeds, the lowest and highest at the same x."""

    name: str
    style: str  # classes of colour and dash
    points: tuple[Point, ...]
    low: tuple[Point, ...] = ()
    high: tuple[Point, ...] = ()


def line_chart(curves: Sequence[Curve], width: int, x_title: str, y_title: str) -> str:
    """Lines with bands, each named where it ends."""
    curves = [c for c in curves if c.points]
    height, top = (360 if width > 500 else 300), 28
    values = [y for c in curves for _, y in (*c.points, *c.low, *c.high)]
    names = {c.name: c.name if len(c.name) <= 16 else f"{c.name[:15]}\N{HORIZONTAL ELLIPSIS}" for c in curves}
    right = width - 12 - CHARACTER_PX * 1.05 * max((len(n) for n in names.values()), default=0)
    costs, log = [p[0] for c in curves for p in c.points], logarithmic(values)
    near_zero = bool(costs) and 0 < min(costs) < 0.1 * max(costs)
    with drawing(width, height, left_margin(values), top, right, height - 42) as drawn:
        x = limits([*costs, 0.0] if near_zero else costs, 0.0)
        scale_axes(drawn, x, limits(values, 0.08, log=log), (x_title, y_title), log_y=log)
        ends: list[tuple[float, float]] = []
        for c in curves:
            if c.low and c.high:
                edge = [*c.high, *reversed(c.low)]
                drawn.mark(drawn.axes.fill(*zip(*edge, strict=True))[0], f"band {c.style}")
            drawn.mark(drawn.axes.plot(*zip(*c.points, strict=True))[0], f"line {c.style}")
            if len(c.points) <= 50 and width > 500:
                tips = [f"{c.name}: {b:.5g} at {a:,.0f}" for a, b in c.points]
                drawn.circles(c.points, [2.5] * len(tips), f"dot {c.style}", tips)
            px, py = drawn.axes.transData.transform(c.points[-1]).tolist()
            ends.append((px, height - py))
        _name_curves(drawn, [(names[c.name], c.style, end) for c, end in zip(curves, ends, strict=True)], top, right)
        return drawn.svg(f"{y_title} against {x_title}: {', '.join(c.name for c in curves)}")


def _name_curves(drawn: Drawing, ends: Sequence[tuple[str, str, Point]], top: float, right: float) -> None:
    """Names right of the ends of curves, in one column at the margin and in one per group of early ends.

    Ends that are less than a name apart make a group, whose names keep their distance from one another.  Where they
    are more than the chart is high, those that end lowest have theirs.
    """
    left, bottom = drawn.axes.get_position().x0 * drawn.width, drawn.height - 42
    margin = right - 0.06 * (right - left)
    apart = 8 + CHARACTER_PX * 1.05 * max((len(name) for name, _, _ in ends), default=0)
    groups: list[list[tuple[str, str, Point]]] = []
    for end in sorted(ends, key=lambda e: right if e[2][0] > margin else e[2][0]):
        x, before = end[2][0], groups[-1][-1][2][0] if groups else -math.inf
        joins = bool(groups) and x - before < apart and (x > margin) == (before > margin)
        groups[-1].append(end) if joins else groups.append([end])
    room = int((bottom - 5 - top) / NAME_PX) + 1
    for group in groups:
        named = sorted(group, key=lambda e: -e[2][1])[:room]
        wanted = [e[2][1] for e in named]
        for (name, style, (x, _)), y in zip(named, spread(wanted, NAME_PX, top, bottom - 5), strict=True):
            drawn.text((right if x > margin else x) + 8, y + 4, name, f"direct {style}")


@dataclass(frozen=True, slots=True)
class Cloud:
    """One kind of mark of a scatter: points with what is said when the pointer rests on them."""

    name: str
    style: str
    points: tuple[tuple[float, float, str], ...]
    filled: bool = True


def scatter_chart(clouds: Sequence[Cloud], width: int, x_title: str, y_title: str, *, same: bool) -> str:
    """Points with the identity line; ``same`` gives both axes one scale, else zero is drawn as well."""
    xs, ys = [p[0] for c in clouds for p in c.points], [p[1] for c in clouds for p in c.points]
    height, log = (380 if width > 400 else 320), same and logarithmic(xs + ys)
    x = limits(xs + ys if same else [*xs, 0.0], log=log)
    y = limits(xs + ys if same else [*ys, *xs, 0.0], log=log)
    with drawing(width, height, left_margin(xs + ys), 28, width - 10, height - 42) as drawn:
        scale_axes(drawn, x, y, (x_title, y_title), log_x=log, log_y=log)
        guide = (max(x[0], y[0]), min(x[1], y[1]))
        if guide[0] < guide[1]:
            drawn.mark(drawn.axes.plot(guide, guide)[0], "guide")
        if not same:
            drawn.mark(drawn.axes.plot(x, (0.0, 0.0))[0], "axis")
        for c in clouds:
            tips = [p[2] for p in c.points] if width > 400 else ()  # phones have no pointer
            style = f"{'solid' if c.filled else 'ring'} {c.style}"
            drawn.circles([p[:2] for p in c.points], [3.4] * len(c.points), style, tips)
        return drawn.svg(f"{y_title} against {x_title}")


@dataclass(frozen=True, slots=True)
class Strip:
    """One run's timeline: (start, stop, class) spans, a loss curve and marks at steps."""

    name: str
    note: str
    spans: tuple[tuple[float, float, str], ...]
    curve: tuple[Point, ...]
    accepted: tuple[float, ...]
    refused: tuple[float, ...]


#: Pixels of one timeline: of its row, and from the row's top to the name, the curve's ends and the strip's.
ROW, NAME_Y, CURVE_TOP, CURVE_BOTTOM, STRIP_TOP, STRIP_BOTTOM = 92, 14, 22, 49, 62, 73


def strip_chart(strips: Sequence[Strip], width: int, x_title: str) -> str:
    """Timelines under one another: loss, marks of accepted jumps, the strip, marks of refused jumps."""
    top, left, right = 4, 2.0, width - 6.0
    bottom = top + len(strips) * ROW
    stops = [t for s in strips for t in (*(end for _, end, _ in s.spans), *s.accepted, *s.refused)]
    last = max([*stops, 1.0])
    with drawing(width, bottom + 42, left, top, right, bottom) as drawn:
        axes = drawn.axes
        axes.set_xlim(0.0, last)
        axes.set_ylim(bottom - top, 0.0)  # pixels of the rows, from the top
        axes.yaxis.set_ticks([])
        at = ticks_of(0.0, last, NUM_TICKS if width > 500 else NUM_TICKS_SLIM)
        axes.xaxis.set_ticks(at, labels=tick_labels(at))
        for k, label in enumerate(axes.xaxis.get_ticklabels()):  # the outer ones stay inside the drawing
            label.set_horizontalalignment("left" if at[k] == 0 else "right" if at[k] > 0.97 * last else "center")
        drawn.text(right, bottom + 36, x_title, anchor="right")
        for k, s in enumerate(strips):
            _timeline(drawn, s, k * ROW, last)
        return drawn.svg(f"phases against {x_title}")


def _timeline(drawn: Drawing, s: Strip, row: float, last: float) -> None:
    """One run's row, whose top is ``row`` pixels below that of the axes."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    axes, top, right = drawn.axes, 4, drawn.width - 6.0
    drawn.text(2.0, top + row + NAME_Y, s.name, "name")
    drawn.text(right, top + row + NAME_Y, s.note, anchor="right")
    if s.curve:
        values = [v for _, v in s.curve]
        loss = drawn.add_axes(2.0, top + row + CURVE_TOP, right, top + row + CURVE_BOTTOM)
        loss.set_axis_off()
        loss.set_yscale("log" if logarithmic(values) else "linear")
        loss.set_xlim(0.0, last)
        loss.set_ylim(*limits(values, 0.02, log=logarithmic(values)))
        points = envelope(s.curve, min(1000, int(drawn.width)))
        drawn.mark(loss.plot(*zip(*points, strict=True))[0], "thin")
    thinnest = 0.8 * last / (right - 2.0)
    boxes: dict[str, list[Any]] = {}
    for start, end, phase in s.spans:
        stop = max(end, start + thinnest)
        corners = [(start, STRIP_TOP), (stop, STRIP_TOP), (stop, STRIP_BOTTOM), (start, STRIP_BOTTOM)]
        boxes.setdefault(phase, []).append(Path([(x, row + y) for x, y in (*corners, corners[0])], closed=True))
    for phase, found in boxes.items():
        patch = PathPatch(Path.make_compound_path(*found), clip_on=False)
        axes.add_patch(patch)
        drawn.mark(patch, phase)
    for at, y, marker, style in (
        (s.accepted, STRIP_TOP - 5, "v", "solid c1"),
        (s.refused, STRIP_BOTTOM + 6, "x", "ring c0"),
    ):
        if at:
            (line,) = axes.plot(at, [row + y] * len(at), linestyle="none", marker=marker, markersize=6, clip_on=False)
            drawn.mark(line, style)


def envelope(points: Sequence[Point], limit: int = 1000) -> tuple[Point, ...]:
    """At most ``limit`` of the points: per bucket its lowest and its highest, so that spikes stay."""
    if len(points) <= limit:
        return tuple(points)
    num_buckets = max(1, limit // 2)
    kept: list[Point] = []
    for b in range(num_buckets):
        start, stop = b * len(points) // num_buckets, (b + 1) * len(points) // num_buckets
        where = range(start, stop)
        low, high = min(where, key=lambda i: points[i][1]), max(where, key=lambda i: points[i][1])
        kept += [points[i] for i in sorted({low, high})]
    return tuple(kept)


def spread(wanted: Sequence[float], gap: float, lo: float, hi: float) -> tuple[float, ...]:
    """Positions near the wanted ones, ``gap`` apart and inside [lo, hi] where there is room."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    floor = lo
    for i in order:
        placed[i] = max(wanted[i], floor)
        floor = placed[i] + gap
    ceiling = hi
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return tuple(placed)


def over_seeds(series: Sequence[Sequence[Point]]) -> tuple[tuple[Point, ...], ...]:
    """Mean, lowest and highest curve of several runs.

    Runs with equally many points are matched point by point (x is averaged too: the same validation
    costs a little more or less in each seed); others by interpolation where all of them are known.
    """
    series = [sorted(s) for s in series if s]
    if len(series) < 2:
        return (tuple(series[0]) if series else (), (), ())
    if len({len(s) for s in series}) == 1:
        columns = [(sum(x for x, _ in c) / len(c), [y for _, y in c]) for c in zip(*series, strict=True)]
    else:
        lo, hi = max(s[0][0] for s in series), min(s[-1][0] for s in series)
        grid = sorted({x for s in series for x, _ in s if lo <= x <= hi})
        columns = [(x, [_interpolate(s, x) for s in series]) for x in grid]
    mean = tuple((x, sum(ys) / len(ys)) for x, ys in columns)
    return mean, tuple((x, min(ys)) for x, ys in columns), tuple((x, max(ys)) for x, ys in columns)


def since(points: Sequence[Point], x: float) -> tuple[Point, ...]:
    """The part of a sorted curve from x on, its first point interpolated; empty if it ends before."""
    late = tuple(p for p in points if p[0] > x)
    return ((x, _interpolate(points, x)), *late) if late and points[0][0] <= x else late


def _interpolate(points: Sequence[Point], x: float) -> float:
    """The value at x, between the first and the last of sorted points."""
    at = min(max(bisect.bisect_right(points, (x, math.inf)), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[at - 1], points[at]
    return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def spans(steps: Sequence[tuple[float, str]], limit: int = 400) -> tuple[tuple[float, float, str], ...]:
    """Runs of equal classes as (start, stop, class); a majority per column where there are too many."""
    changes = sum(a[1] != b[1] for a, b in itertools.pairwise(steps))
    if changes >= limit:
        cuts = [k * len(steps) // limit for k in range(limit + 1)]
        chunks = [steps[a:b] for a, b in itertools.pairwise(cuts)]
        voted = [(c[0][0], Counter(name for _, name in c).most_common(1)[0][0]) for c in chunks if c]
        return spans([*voted, (steps[-1][0], voted[-1][1])], limit + 1)
    starts = [k for k in range(len(steps)) if k == 0 or steps[k][1] != steps[k - 1][1]]
    ends = [steps[k][0] for k in starts[1:]] + [steps[-1][0] + 1.0 for _ in steps[:1]]
    return tuple((steps[k][0], end, steps[k][1]) for k, end in zip(starts, ends, strict=True))
