"""Charts as strings: scales, ticks, paths and three small chart forms, without any library.

Every function is pure and returns SVG text.  Colour is never written here: shapes carry classes
(``c0`` to ``c7`` for series, ``p-full`` and so on for phases) that :data:`CSS` resolves, so that one
drawing serves light and dark pages and paper.  Text from data passes through :func:`escape`.
"""

from __future__ import annotations

import bisect
import html
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Point = tuple[float, float]

#: Width of one character of the 12-pixel labels, for margins.  Arbitrary, errs on the wide side.
CHARACTER_PX = 6.7

#: Okabe and Ito's colour-blind-safe palette (2008), lightened for dark pages where it would sink.
CSS = """
.c0{--c:#4b5563}.c1{--c:#d55e00}.c2{--c:#0072b2}.c3{--c:#009e73}
.c4{--c:#b5578f}.c5{--c:#c98a00}.c6{--c:#3a9bd4}.c7{--c:#7a6a00}
:root{--p-warmup:#c9ced4;--p-full:#7fabcf;--p-predict:#d55e00;--p-correct:#e5b100;--p-other:#999}
@media screen and (prefers-color-scheme:dark){
.c0{--c:#b8c0ca}.c1{--c:#ff8b47}.c2{--c:#58b0ec}.c3{--c:#3cc79c}
.c4{--c:#e08fc0}.c5{--c:#f0b429}.c6{--c:#8fd0f5}.c7{--c:#d6c75a}
:root{--p-warmup:#565d66;--p-full:#3d6f98;--p-predict:#ff8b47;--p-correct:#e5b100;--p-other:#777}}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-size:12px;fill:var(--muted);font-variant-numeric:tabular-nums}
svg .name{fill:var(--ink)}svg .direct{fill:var(--c);font-weight:600;paint-order:stroke;
stroke:var(--page);stroke-width:3px;stroke-linejoin:round}
.end{text-anchor:end}.mid{text-anchor:middle}
.grid{stroke:var(--rule);stroke-width:1}.axis{stroke:var(--muted);stroke-width:1}
.guide{stroke:var(--muted);stroke-width:1;stroke-dasharray:3 4;fill:none}
.line{stroke:var(--c);stroke-width:2;fill:none;stroke-linejoin:round;stroke-linecap:round}
.thin{stroke:var(--muted);stroke-width:1;fill:none;stroke-linejoin:round}
.band{fill:var(--c);opacity:.16}.dot{fill:var(--c);stroke:var(--page);stroke-width:1}
.ring{fill:none;stroke:var(--c);stroke-width:1.4}.solid{fill:var(--c)}
.d1{stroke-dasharray:7 4}.d2{stroke-dasharray:2 4}.d3{stroke-dasharray:9 4 2 4}
.p-warmup{fill:var(--p-warmup)}.p-full{fill:var(--p-full)}.p-predict{fill:var(--p-predict)}
.p-correct{fill:var(--p-correct)}.p-other{fill:var(--p-other)}
"""


def escape(value: object, limit: int = 400) -> str:
    """Text of any value, safe in HTML and SVG: escaped, printable characters only, cut at ``limit``."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    return html.escape(text if len(text) <= limit else f"{text[: limit - 1]}\N{HORIZONTAL ELLIPSIS}")


def element(tag: str, content: str = "", **attributes: object) -> str:
    """One SVG element; ``class_`` becomes ``class``, underscores hyphens, floats two decimals."""
    parts = [tag]
    for name, value in attributes.items():
        number = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else None
        shown = html.escape(str(value)) if number is None else number
        parts.append(f'{name.rstrip("_").replace("_", "-")}="{shown}"')
    return f"<{' '.join(parts)}>{content}</{tag}>"


def label(x: float, y: float, text: str, class_: str = "") -> str:
    """A text element; ``text`` is escaped here."""
    return element("text", escape(text), x=float(x), y=float(y), class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    """A straight line."""
    return element("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def canvas(width: float, height: float, title: str, content: Iterable[str]) -> str:
    """The outer element; ``title`` is what a screen reader says."""
    body = "".join(content)
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}" preserveAspectRatio="xMinYMin meet">{body}</svg>'
    )


def nice_ticks(lo: float, hi: float, count: int = 5) -> tuple[float, ...]:
    """Multiples of 1, 2 or 5 times a power of ten inside [lo, hi], about ``count`` of them."""
    if not (math.isfinite(lo) and math.isfinite(hi)) or hi < lo:
        raise ValueError(f"ticks need finite lo <= hi, got {lo} and {hi}")
    raw = (hi - lo) / max(count, 1)
    if raw < 1e-300 or raw < 1e-14 * max(abs(lo), abs(hi)):  # below what a float can tell apart
        return (lo,)
    exponent = math.floor(math.log10(raw))
    factor = next(f for f in (1, 2, 5, 10) if f * 10.0**exponent >= 0.75 * raw)
    step = factor * 10.0**exponent
    first, last = math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9)
    return tuple(round(k * step, max(0, -exponent)) for k in range(first, last + 1))


def log_ticks(lo: float, hi: float, count: int = 6) -> tuple[float, ...]:
    """Powers of ten inside [lo, hi]; 2 and 5 times those too where there are few."""
    if not 0 < lo <= hi < math.inf:
        raise ValueError(f"logarithmic ticks need 0 < lo <= hi, got {lo} and {hi}")
    first, last = math.floor(math.log10(lo) + 1e-9), math.floor(math.log10(hi) + 1e-9)
    stride = max(1, math.ceil((last - first) / count))
    factors = (1.0, 2.0, 5.0) if last - first <= 2 else (1.0,)
    ticks = (f * 10.0**e for e in range(last, first - 1, -stride) for f in factors)
    inside = (t for t in ticks if lo * (1 - 1e-9) <= t <= hi * (1 + 1e-9))
    return tuple(sorted(float(f"{t:.6g}") for t in inside))


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


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values in [lo, hi] to pixels [start, end], linearly or by logarithm."""

    lo: float
    hi: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def fit(
        cls, values: Iterable[float], start: float, end: float, *, pad: float = 0.05, may_log: bool = True
    ) -> Scale:
        """The scale that shows all values; logarithmic where they are positive and span over a decade."""
        seen = list(values) or [0.0, 1.0]
        lo, hi = min(seen), max(seen)
        if may_log and lo > 0 and hi > 10 * lo:
            margin = (hi / lo) ** pad
            return cls(lo / margin, hi * margin, start, end, log=True)
        if hi - lo <= 1e-12 * max(abs(lo), abs(hi)):  # one value only: give it room
            lo, hi = lo - (abs(lo) * 0.1 or 1.0), hi + (abs(hi) * 0.1 or 1.0)
            return cls(lo, hi, start, end)
        return cls(lo - pad * (hi - lo), hi + pad * (hi - lo), start, end)

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        if self.log:
            share = math.log(value / self.lo) / math.log(self.hi / self.lo)
        else:
            share = (value - self.lo) / (self.hi - self.lo)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 5) -> tuple[float, ...]:
        """Round values inside the scale."""
        return log_ticks(self.lo, self.hi) if self.log else nice_ticks(self.lo, self.hi, count)


def path(points: Iterable[Point]) -> str:
    """The ``d`` of an open polyline, one decimal per coordinate."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


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


def axes(x: Scale, y: Scale, x_title: str, y_title: str, num_x: int = 6) -> str:
    """Horizontal grid, tick labels and titles; the vertical title stands above its axis."""
    left, right, bottom, top = x.start, x.end, y.start, y.end
    out = [label(left, top - 12, y_title + (", log scale" if y.log else ""))]
    y_ticks, x_ticks = y.ticks(), x.ticks(num_x)
    for t, text in zip(y_ticks, tick_labels(y_ticks), strict=True):
        out += [line(left, y(t), right, y(t), "grid"), label(left - 8, y(t) + 4, text, "end")]
    for t, text in zip(x_ticks, tick_labels(x_ticks), strict=True):
        out += [line(x(t), bottom, x(t), bottom + 4, "axis"), label(x(t), bottom + 18, text, "mid")]
    out += [line(left, bottom, right, bottom, "axis")]
    return "".join([*out, label(right, bottom + 36, x_title + (", log scale" if x.log else ""), "end")])


def left_margin(values: Iterable[float]) -> float:
    """Room for the vertical axis' labels."""
    texts = tick_labels(Scale.fit(values, 1, 0).ticks())
    return 14 + CHARACTER_PX * max((len(t) for t in texts), default=1)


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
    costs, left = [p[0] for c in curves for p in c.points], left_margin(values)
    near_zero = bool(costs) and 0 < min(costs) < 0.1 * max(costs)
    x = Scale.fit([*costs, 0.0] if near_zero else costs, left, right, pad=0.0, may_log=False)
    y = Scale.fit(values, height - 42, top, pad=0.08)
    out = [axes(x, y, x_title, y_title, 6 if width > 500 else 4)]
    at_end: list[tuple[float, Curve]] = []
    for c in curves:
        mean, fate = [(x(a), y(b)) for a, b in c.points], (x(c.points[-1][0]), y(c.points[-1][1]))
        if c.low and c.high:
            edge = [(x(a), y(b)) for a, b in (*c.high, *reversed(c.low))]
            out.append(element("path", d=path(edge) + "Z", class_=f"band {c.style}"))
        out.append(element("path", d=path(mean), class_=f"line {c.style}"))
        if len(mean) <= 50 and width > 500:
            for (a, b), (px, py) in zip(c.points, mean, strict=True):
                tip = element("title", escape(f"{c.name}: {b:.5g} at {a:,.0f}"))
                out.append(element("circle", tip, cx=px, cy=py, r=2.5, class_=f"dot {c.style}"))
        if fate[0] > right - 0.06 * (right - x.start):
            at_end.append((fate[1], c))
        else:  # it ends early: curves fall, so the room is below, if there is any
            shift = 18 if fate[1] + 22 < y.start else -9
            out.append(label(fate[0], fate[1] + shift, names[c.name], f"direct mid {c.style}"))
    heights = spread([h for h, _ in at_end], 15, top, y.start - 5)
    for (_, c), h in zip(at_end, heights, strict=True):
        out.append(label(right + 8, h + 4, names[c.name], f"direct {c.style}"))
    return canvas(width, height, f"{y_title} against {x_title}: {', '.join(c.name for c in curves)}", out)


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
    height, top, left = (380 if width > 400 else 320), 28, left_margin(xs + ys)
    x = Scale.fit(xs + ys if same else [*xs, 0.0], left, width - 10, may_log=same)
    y = Scale.fit(xs + ys if same else [*ys, *xs, 0.0], height - 42, top, may_log=same)
    ends = (max(x.lo, y.lo), min(x.hi, y.hi))
    out = [axes(x, y, x_title, y_title, 4)]
    if ends[0] < ends[1]:
        out.append(line(x(ends[0]), y(ends[0]), x(ends[1]), y(ends[1]), "guide"))
    if not same:
        out.append(line(x.start, y(0.0), x.end, y(0.0), "axis"))
    for c in clouds:
        kind = "solid" if c.filled else "ring"
        for a, b, text in c.points:
            tip = element("title", escape(text)) if width > 400 else ""  # phones have no pointer
            out.append(element("circle", tip, cx=x(a), cy=y(b), r=3.4, class_=f"{kind} {c.style}"))
    return canvas(width, height, f"{y_title} against {x_title}", out)


@dataclass(frozen=True, slots=True)
class Strip:
    """One run's timeline: (start, stop, class) spans, a loss curve and marks at steps."""

    name: str
    note: str
    spans: tuple[tuple[float, float, str], ...]
    curve: tuple[Point, ...]
    accepted: tuple[float, ...]
    refused: tuple[float, ...]


def strip_chart(strips: Sequence[Strip], width: int, x_title: str) -> str:
    """Timelines under one another: loss, marks of accepted jumps, the strip, marks of refused jumps."""
    row, top, left, right = 92, 4, 2.0, width - 6.0
    stops = [t for s in strips for t in (*(end for _, end, _ in s.spans), *s.accepted, *s.refused)]
    x, out = Scale(0.0, max([*stops, 1.0]), left, right), []
    for k, s in enumerate(strips):
        base = top + k * row + 62
        out += [label(left, base - 48, s.name, "name"), label(right, base - 48, s.note, "end")]
        if s.curve:
            y = Scale.fit((v for _, v in s.curve), base - 13, base - 40, pad=0.02)
            drawn = [(x(a), y(b)) for a, b in envelope(s.curve, min(1000, width))]
            out.append(element("path", d=path(drawn), class_="thin"))
        boxes: dict[str, str] = {}
        for start, end, phase in s.spans:
            thick = max(x(end) - x(start), 0.8)
            boxes[phase] = boxes.get(phase, "") + f"M{x(start):.1f} {base}h{thick:.1f}v11h{-thick:.1f}z"
        out += [element("path", d=d, class_=phase) for phase, d in boxes.items()]
        up = "".join(f"M{x(t):.1f} {base - 1}l-3 -7h6z" for t in s.accepted)
        down = "".join(f"M{x(t) - 2.5:.1f} {base + 14}l5 5m0 -5l-5 5" for t in s.refused)
        out += [element("path", d=up, class_="solid c1")] if up else []
        out += [element("path", d=down, class_="ring c0")] if down else []
    bottom, ticks = top + len(strips) * row, x.ticks(6 if width > 500 else 4)
    out.append(line(left, bottom, right, bottom, "axis"))
    for t, text in zip(ticks, tick_labels(ticks), strict=True):
        anchor = "end" if t == ticks[-1] and x(t) > right - 20 else "mid" if t > 0 else ""
        out += [line(x(t), bottom, x(t), bottom + 4, "axis"), label(x(t), bottom + 18, text, anchor)]
    out.append(label(right, bottom + 36, x_title, "end"))
    return canvas(width, bottom + 42, f"phases against {x_title}", out)


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
