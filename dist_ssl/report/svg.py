"""Charts as inline SVG, drawn for a phone's width and coloured by the page's CSS: light and dark both read well.

Every chart has a viewBox 360 units wide: the page lays charts out in columns of at least that width, so text keeps its
size. Colours are the classes s0 to s7 of style.css; `<title>` elements give exact values on hover. All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 10, 34
NUM_COLOURS = 8
MAX_NAME = 20  # letters of a dot's name as drawn: more would leave its axis no room
MAX_POINTS = 240  # of a curve as drawn: more than a point a pixel only fattens the page


@dataclass(frozen=True)
class Series:
    """A curve: x and y of equal length, optionally an interval around each y; `colour` is its class number."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Dot:
    """A value with its interval in `dot_chart`."""

    name: str
    value: float
    low: float
    high: float
    colour: int = 0


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that span [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A short number: 0.012, 1.5, 12.3k, 4.1M, 2e-05."""
    size = abs(value)
    if size != 0 and (size < 1e-3 or size >= 1e9):
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for limit, unit in ((1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e6 if unit == 'M' else 1e3):.4g}{unit}"
    return f"{value:.4g}"


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str = "",
    categories: Sequence[str] | None = None,
    y_min: float | None = None,
    reference: float | None = None,
) -> str:
    """Curves over x, or over the named `categories` (x = 0, 1, ...) with a mark and a whisker at each point.

    A curve that lies on others is dashed, so that they show through. Values that are not finite are left out.
    `reference` draws a dashed level. Empty where there is nothing to draw.
    """
    drawn = [one for one in map(_finite if categories else _thin, series) if len(one.x)]
    if not drawn:
        return ""
    if categories:  # side by side within a category, so that equal values don't hide one another
        drawn = [
            replace(one, x=[x + apart for x in one.x]) for one, apart in zip(drawn, _spread(len(drawn)), strict=True)
        ]
    all_y = [v for one in drawn for part in (one.y, one.low or (), one.high or ()) for v in part]
    low, high = min(all_y), max(all_y)
    if reference is not None:
        low, high = min(low, reference), max(high, reference)
    low = low if y_min is None else min(y_min, low)
    low, high = _padded(low, high, keep_low=y_min is not None)
    x_low, x_high = min(min(one.x) for one in drawn), max(max(one.x) for one in drawn)
    if categories:
        x_low, x_high = -0.3, len(categories) - 0.7
    frame = _Frame(x_low, max(x_high, x_low + 1e-9), low, high)
    parts = [_y_axis(frame)]
    if categories:
        parts += [_text(frame.x(i), HEIGHT - 18, name, "middle") for i, name in enumerate(categories)]
    else:
        parts += [_text(frame.x(t), HEIGHT - 18, number(t), "middle") for t in ticks(x_low, x_high, 4)]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x_label, "middle"))
    if reference is not None:
        y = frame.y(reference)
        parts.append(f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for position, one in enumerate(drawn):
        below = sum(_lies_on(frame, one, other) for other in drawn[:position])
        parts.append(_curve(frame, one, marks=categories is not None, below=below))
    return _svg(parts, HEIGHT, label)


def dot_chart(
    dots: Sequence[Dot],
    *,
    label: str,
    reference: float | None = None,
    percent: bool = True,
    beside: Sequence[Dot] = (),
) -> str:
    """A row a value: its name, a dot with its interval as a whisker, the number. `reference` is a dashed line.

    Of a long name both ends are drawn, and the whole is told on hover.

    The axis spans the dots of charts `beside` it too, so that they can be compared by eye.
    """
    if not dots:
        return ""
    names = [_shortened(dot.name) for dot in dots]
    row, left, right = 30, max(96, 18 + 8 * max(map(len, names))), 62
    height = 30 + row * len(dots)
    edges = [edge for dot in (*dots, *beside) for edge in (dot.low, dot.high)] + (
        [] if reference is None else [reference]
    )
    low, high = _padded(min(edges), max(edges))
    if percent:
        low, high = max(low, min(0.0, *edges)), min(high, max(1.0, *edges))
    scale = (WIDTH - left - right) / max(high - low, 1e-9)

    def place(value: float) -> float:
        return left + (value - low) * scale

    shown = (lambda v: f"{100 * v:.1f}%") if percent else number
    parts = []
    for tick in ticks(low, high, 4):
        x = place(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 22}"/>')
        parts.append(_text(x, height - 8, f"{100 * tick:.4g}%" if percent else number(tick), "middle"))
    if reference is not None:
        x = place(reference)
        parts.append(f'<line class="reference" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 22}"/>')
    for position, dot in enumerate(dots):
        y = 20 + row * position
        title = f"{dot.name}: {shown(dot.value)} [{shown(dot.low)}, {shown(dot.high)}]"
        parts.append(
            f'<g class="s{dot.colour % NUM_COLOURS}"><title>{escape(title)}</title>'
            f'<line class="whisker" x1="{place(dot.low):.1f}" x2="{place(dot.high):.1f}" y1="{y}" y2="{y}"/>'
            f'<circle cx="{place(dot.value):.1f}" cy="{y}" r="5"/>'
            f"{_text(left - 10, y + 4, names[position], 'end', 'name')}</g>"
        )
        parts.append(_text(WIDTH - 2, y + 4, shown(dot.value), "end", "name"))
    return _svg(parts, height, label)


def scatter(x: Sequence[float], y: Sequence[float], groups: Sequence[int], names: Sequence[str], *, label: str) -> str:
    """Points coloured by group; groups past the palette repeat its colours with another mark."""
    if not len(x):
        return ""
    side = 340
    low_x, high_x, low_y, high_y = min(x), max(x), min(y), max(y)
    wide, tall = max(high_x - low_x, 1e-9), max(high_y - low_y, 1e-9)
    marks: dict[int, list[str]] = {}
    for a, b, group in zip(x, y, groups, strict=True):
        px, py = 10 + (a - low_x) / wide * (WIDTH - 20), 10 + (high_y - b) / tall * (side - 20)
        # A zero-length round-capped stroke is a dot: one path a group instead of an element a point.
        marks.setdefault(group, []).append(f"M{px:.1f} {py:.1f}h0" if group < NUM_COLOURS else f"M{px:.1f} {py:.1f}h4")
    parts = [
        f'<path class="points s{group % NUM_COLOURS}" d="{"".join(moves)}"><title>{escape(names[group])}</title></path>'
        for group, moves in sorted(marks.items())
    ]
    return _svg(parts, side, label)


def legend(entries: Sequence[tuple[str, int]]) -> str:
    """An HTML legend: (name, colour) each."""
    items = "".join(f'<li><i class="{colour_class(colour)}"></i>{escape(name)}</li>' for name, colour in entries)
    return f'<ul class="legend">{items}</ul>'


@dataclass(frozen=True)
class _Frame:
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)


def colour_class(colour: int) -> str:
    """The class of style.css; past the palette its colours come again, dashed."""
    return f"s{colour % NUM_COLOURS}" + (" dashed" if colour >= NUM_COLOURS else "")


def _padded(low: float, high: float, keep_low: bool = False) -> tuple[float, float]:
    if high - low < 1e-12 * max(abs(low), abs(high), 1.0):
        pad = 0.05 * max(abs(low), 1e-3)
        return (low if keep_low else low - pad), high + pad
    pad = 0.06 * (high - low)
    return (low if keep_low else low - pad), high + pad


def _finite(series: Series) -> Series:
    keep = [i for i, v in enumerate(series.y) if math.isfinite(v)]

    def pick(values: Sequence[float] | None) -> list[float] | None:
        return None if values is None else [values[i] for i in keep]

    return Series(
        series.name, pick(series.x) or [], pick(series.y) or [], series.colour, pick(series.low), pick(series.high)
    )


def _thin(series: Series) -> Series:
    """At most MAX_POINTS points: the mean of each bucket, its smallest and largest as the band."""
    series = _finite(series)
    size = -(-len(series.x) // MAX_POINTS)
    if size <= 1:
        return series
    xs, ys, lows, highs = [], [], [], []
    for start in range(0, len(series.x), size):
        y = series.y[start : start + size]
        xs.append(sum(series.x[start : start + size]) / len(y))
        ys.append(sum(y) / len(y))
        lows.append(min(y))
        highs.append(max(y))
    return Series(series.name, xs, ys, series.colour, lows, highs)


def _spread(count: int) -> list[float]:
    """How far each of so many series is moved sideways, in categories."""
    step = min(0.06, 0.5 / count)
    return [(position - (count - 1) / 2) * step for position in range(count)]


def _lies_on(frame: _Frame, one: Series, other: Series) -> bool:
    """Whether two curves are within a line's width of each other all along."""
    there = dict(zip(other.x, other.y, strict=True))
    return len(one.x) > 1 and all(
        x in there and abs(frame.y(y) - frame.y(there[x])) < 2 for x, y in zip(one.x, one.y, strict=True)
    )


def _curve(frame: _Frame, one: Series, marks: bool, below: int) -> str:
    """`below`: how many curves it lies on; the more, the longer the gaps between its dashes."""
    points = [(frame.x(a), frame.y(b)) for a, b in zip(one.x, one.y, strict=True)]
    parts = [f'<g class="{colour_class(one.colour)}"><title>{escape(one.name)}</title>']
    if one.low is not None and one.high is not None:
        lows = [(frame.x(a), frame.y(b)) for a, b in zip(one.x, one.low, strict=True)]
        highs = [(frame.x(a), frame.y(b)) for a, b in zip(one.x, one.high, strict=True)]
        if marks:
            parts += [
                f'<line class="thin" x1="{a:.1f}" x2="{a:.1f}" y1="{b:.1f}" y2="{c:.1f}"/>'
                for (a, b), (_, c) in zip(lows, highs, strict=True)
            ]
        else:
            parts.append(f'<polygon class="band" points="{_points(highs + lows[::-1])}"/>')
    if len(points) > 1:
        dashes = f' style="stroke-dasharray: 9 {9 * below}"' if below else ""
        parts.append(f'<polyline points="{_points(points)}"{dashes}/>')
    if marks or len(points) == 1:
        for (a, b), value in zip(points, one.y, strict=True):
            parts.append(
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5"><title>{escape(one.name)}: {number(value)}</title></circle>'
            )
    return "".join(parts) + "</g>"


def _shortened(name: str) -> str:
    half = MAX_NAME // 2
    return name if len(name) <= MAX_NAME else f"{name[:half]}…{name[1 - half :]}"


def _y_axis(frame: _Frame) -> str:
    parts = []
    for tick in ticks(frame.y_low, frame.y_high):
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 6, y + 4, number(tick), "end"))
    return "".join(parts)


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in points)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "axis") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>' if text else ""


def _svg(parts: Sequence[str], height: int, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
