"""Line charts as inline SVG text: scales, ticks, down-sampling. Pure functions, no library.

Colours are classes (c0 to c5, see CSS), so that one chart serves light and dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

NUM_COLORS = 6
MAX_BUCKETS = 400
HOVER_COLUMNS = 80
Points = Sequence[tuple[float, float]]
Scale = Callable[[float], float]

CSS = """
svg.chart { width: 100%; height: auto; display: block; font: 13px system-ui, sans-serif; }
.chart text { fill: var(--soft); } .chart .axis { stroke: var(--soft); stroke-width: 1; }
.chart .grid { stroke: var(--line); stroke-width: 1; }
.chart .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.chart .dashed { stroke-dasharray: 4 5; }
.chart .level { stroke: var(--text); stroke-width: 1.2; stroke-dasharray: 2 4; }
.chart text.level-name { fill: var(--text); paint-order: stroke; stroke: var(--page);
  stroke-width: 4px; stroke-dasharray: none; }
.chart .band { fill: var(--bad); opacity: .13; } .chart .hover { fill: transparent; }
.chart .hover:hover { fill: var(--soft); fill-opacity: .18; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); }
.c3 { stroke: var(--c3); } .c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); }
.dot { fill: var(--page); stroke-width: 2.2; }
"""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line or set of dots; x rises."""

    name: str
    points: Points
    color: int = 0
    style: str = "line"
    """line, dashed or dots."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What a chart shows; draw() makes it."""

    title: str
    unit: str
    """Of y."""
    series: list[Series]
    x_name: str = "step"
    bands: list[tuple[float, float, str]]
    """x ranges to shade, with what they are."""
    levels: list[tuple[float, str]]
    """Horizontal lines with their names."""
    from_zero: bool = False


def nice_ticks(low: float, high: float, count: int = 5, *, whole: bool = False) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten) within [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, math.ceil(step))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [0.0 if i == 0 else i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], thinned to 7."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    every = max(1, -(-(last - first + 1) // 7))
    return [10.0**i for i in range(first, last + 1, every)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Labels with one unit and as many decimals as tell the ticks apart."""
    largest = max((abs(tick) for tick in ticks), default=0.0)
    if largest == 0:
        return ["0" for _ in ticks]
    if len(ticks) > 2 and min(abs(tick) for tick in ticks) > 0 and ticks[1] / ticks[0] > 9:
        return [number(tick) for tick in ticks]
    if largest < 1e-2:
        return [_exponent(tick) for tick in ticks]
    divisor, suffix = _si(largest) if largest >= 10_000 else (1.0, "")
    gaps = [b - a for a, b in zip(ticks, ticks[1:], strict=False)]
    gap = (min(gaps) if gaps else largest) / divisor
    decimals = 0
    while decimals < 8 and abs(round(gap, decimals) - gap) > gap * 1e-6:
        decimals += 1
    return [f"{tick / divisor:.{decimals}f}{suffix}" if tick else "0" for tick in ticks]


def number(value: float) -> str:
    """A value in about four digits, for people."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        divisor, suffix = _si(abs(value))
        return f"{value / divisor:.4g}{suffix}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-3 else _exponent(value)


def _si(largest: float) -> tuple[float, str]:
    for divisor, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= divisor:
            return divisor, suffix
    return 1.0, ""


def _exponent(value: float) -> str:
    if value == 0:
        return "0"
    digits, _, power = f"{value:.2e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


def downsample(points: Points, buckets: int = MAX_BUCKETS) -> list[tuple[float, float]]:
    """At most 2 * buckets + 2 points: the least and the greatest of each bucket, first and last.

    A spike of one step stays visible, which a mean or every n-th point would hide. A bucket
    with a value that is not finite keeps it, as the gap that it is.
    """
    if len(points) <= 2 * buckets + 2:
        return list(points)
    inner = points[1:-1]
    kept = [points[0]]
    for bucket in range(buckets):
        part = inner[bucket * len(inner) // buckets : (bucket + 1) * len(inner) // buckets]
        finite = [i for i, (_, y) in enumerate(part) if math.isfinite(y)]
        odd = [i for i, (_, y) in enumerate(part) if not math.isfinite(y)][:1]
        if finite:
            least = min(finite, key=lambda i: part[i][1])
            greatest = max(finite, key=lambda i: part[i][1])
            odd = odd and [*odd[: 2 - len({least, greatest})]]
            kept += [part[i] for i in sorted({least, greatest, *odd})]
        else:
            kept += [part[i] for i in odd]
    return [*kept, points[-1]]


def draw(chart: Chart, *, width: int = 460, height: int = 255) -> str:
    """The chart as an <svg> element; says so where there is nothing to draw."""
    finite = [p for one in chart.series for p in one.points if math.isfinite(p[1])]
    if not finite:
        return '<p class="empty">No values.</p>'
    low, high, log = _y_range(chart, [y for _, y in finite])
    y_ticks = log_ticks(low, high) if log else nice_ticks(low, high, 5)
    y_labels = tick_labels(y_ticks)
    left = 18 + 7.6 * max(len(label) for label in y_labels)
    right, top, bottom = width - 12, 12, height - 40
    x_low, x_high = min(x for x, _ in finite), max(x for x, _ in finite)
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5

    def across(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (right - left)

    def up(y: float) -> float:
        share = math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low)
        return bottom - share * (bottom - top)

    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(_description(chart, finite))}">'
    ]
    for tick, label in zip(y_ticks, y_labels, strict=True):
        parts.append(_segment("grid", left, up(tick), right, up(tick)))
        parts.append(_text(label, left - 6, up(tick) + 4.5, "end"))
    x_ticks = nice_ticks(x_low, x_high, max(2, int((right - left) / 70)), whole=True)
    for tick, label in zip(x_ticks, tick_labels(x_ticks), strict=True):
        parts.append(_segment("axis", across(tick), bottom, across(tick), bottom + 4))
        parts.append(_text(label, min(across(tick), right - 3.5 * len(label)), bottom + 18))
    parts.append(_segment("axis", left, bottom, right, bottom))
    parts.append(_text(chart.x_name, (left + right) / 2, height - 5))
    for x0, x1, what in chart.bands:
        start = across(max(x0, x_low))
        wide = max(across(min(x1, x_high)) - start, 2.0)
        parts.append(
            f'<rect class="band" x="{start:.1f}" y="{top}" width="{wide:.1f}" '
            f'height="{bottom - top}"><title>{escape(what)}</title></rect>'
        )
    for value, name in chart.levels:
        if low <= value <= high:
            parts.append(_segment("level", left, up(value), right, up(value)))
            label = f"{name} {number(value)}"
            parts.append(_text(label, right - 4, up(value) - 5, "end", "level-name"))
    # Dashed ones last: a step that was done again exactly would hide what it repeats.
    for one in sorted(chart.series, key=lambda one: one.style == "dashed"):
        if one.style != "dots":
            parts.append(_line(one, across, up))
    parts += _hover(chart, across, left, right, top, bottom)
    for one in chart.series:
        if one.style == "dots":
            parts += [_dot(one, x, y, across(x), up(y)) for x, y in one.points if _fits(y)]
    return "".join([*parts, "</svg>"])


def _fits(y: float) -> bool:
    return math.isfinite(y)


def _y_range(chart: Chart, values: list[float]) -> tuple[float, float, bool]:
    """(low, high, logarithmic) with room above and below; log where one spike would hide all."""
    values = values + [value for value, _ in chart.levels]
    low, high = min(values), max(values)
    middle = sorted(values)[len(values) // 2]
    if low > 0 and high > 100 * middle:
        return low / 1.3, high * 1.3, True
    if low == high:
        room = abs(low) * 0.1 or 1.0
        low, high = low - room, high + room
        return (0.0 if chart.from_zero and low > 0 else low), high, False
    room = 0.06 * (high - low)
    if chart.from_zero and low >= 0:
        return 0.0, high + room, False
    return (low - room if low < 0 or low > room else 0.0), high + room, False


def _description(chart: Chart, finite: list[tuple[float, float]]) -> str:
    ys = [y for _, y in finite]
    name = f"{chart.title} in {chart.unit}" if chart.unit else chart.title
    return (
        f"{name} by {chart.x_name}: {len(finite)} values, {number(finite[0][1])} at "
        f"{chart.x_name} {number(finite[0][0])}, least {number(min(ys))}, greatest "
        f"{number(max(ys))}"
    )


def _line(series: Series, across: Scale, up: Scale) -> str:
    words, pen = [], "M"
    for x, y in downsample(series.points):
        if not _fits(y):
            pen = "M"
            continue
        words.append(f"{pen}{across(x):.1f} {up(y):.1f}")
        pen = "L"
    if len(words) == 1:
        words.append("h0.1")
    dashed = " dashed" if series.style == "dashed" else ""
    color = f"c{series.color % NUM_COLORS}"
    cap = ' stroke-linecap="round"' if len(words) == 2 else ""
    return f'<path class="line {color}{dashed}"{cap} d="{"".join(words)}"/>'


def _dot(series: Series, x: float, y: float, px: float, py: float) -> str:
    said = escape(f"{series.name}, step {number(x)}: {number(y)}")
    return (
        f'<path class="dot c{series.color % NUM_COLORS}" '
        f'd="M{px - 5:.1f} {py:.1f}l5 -5l5 5l-5 5z"><title>{said}</title></path>'
    )


def _hover(
    chart: Chart, across: Scale, left: float, right: float, top: float, bottom: float
) -> list[str]:
    """Invisible columns that tell the values at a step, without any script."""
    found: dict[float, list[str]] = {}
    for one in chart.series:
        points = downsample(one.points, HOVER_COLUMNS // 2)
        for x, y in points:
            found.setdefault(x, []).append(f"{one.name} {number(y)}")
    steps = sorted(found)
    steps = steps[:: max(1, -(-len(steps) // HOVER_COLUMNS))]
    borders = [left, *((across(a) + across(b)) / 2 for a, b in zip(steps, steps[1:], strict=False))]
    borders.append(right)
    return [
        f'<rect class="hover" x="{borders[i]:.1f}" y="{top}" '
        f'width="{max(borders[i + 1] - borders[i], 0):.1f}" height="{bottom - top}"><title>'
        f"{escape(f'{chart.x_name} {x:g}: ' + ', '.join(found[x]))}</title></rect>"
        for i, x in enumerate(steps)
    ]


def _segment(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path class="{kind}" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>'


def _text(text: str, x: float, y: float, anchor: str = "middle", kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text{name} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
