"""Line plots as SVG text: axes, ticks, lines and a legend.

A run draws about twenty plots at its end. This module takes a tenth of a second for them and a
third of the bytes; matplotlib takes seconds.
"""

import dataclasses
import html
import math
from collections.abc import Iterable, Sequence

_WIDTH, _HEIGHT = 430, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 30, 42
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
_DASHES = ("", ' stroke-dasharray="5 3"', ' stroke-dasharray="2 2"')  # where colors begin again
_LEGEND_ROW = 15


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a plot.

    label: in the legend. x, y: equally many numbers; the line has a gap where y is not finite.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]


def plot(title: str, lines: Iterable[Line], *, x_label: str, log: bool = False) -> str:
    """Return a plot as an <svg> element. It says so if no line has a point.

    log: draw y on a logarithmic axis, where values that are not positive are gaps.
    """
    drawn = [(line.label, _points(line, log)) for line in lines]
    points = [p for _, line in drawn for p in line if p is not None]
    legend = [label for label, _ in drawn] if len(drawn) > 1 else []
    height = _HEIGHT + _LEGEND_ROW * -(-len(legend) // 2)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" role="img">',
        f"<title>{html.escape(title)}</title>",
        _text(_WIDTH / 2, 18, title, "middle", size=13),
    ]
    if points:
        curves = [line for _, line in drawn]
        parts += _frame(points, x_label, log) + _curves(curves, points) + _legend(legend)
    else:
        parts.append(_text(_WIDTH / 2, _HEIGHT / 2, "no values", "middle"))
    return "\n".join([*parts, "</svg>"])


def _points(line: Line, log: bool) -> list[tuple[float, float] | None]:
    """Return the points of a line, y as it is drawn, with None for gaps."""

    def height(y):
        if not math.isfinite(y) or (log and y <= 0):
            return None
        return math.log10(y) if log else y

    heights = [height(y) for y in line.y]
    return [None if y is None else (x, y) for x, y in zip(line.x, heights, strict=True)]


def _range(values):
    low, high = min(values), max(values)
    room = 0.04 * (high - low) or 0.05 * abs(high) or 0.5
    return low - room, high + room


def _places(points):
    """Return (x -> pixel, y -> pixel, range of x, range of y)."""
    (x0, x1), (y0, y1) = _range([x for x, _ in points]), _range([y for _, y in points])
    across = lambda x: _LEFT + (x - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)
    up = lambda y: _HEIGHT - _BOTTOM - (y - y0) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM)
    return across, up, (x0, x1), (y0, y1)


def ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers in [low, high], 1, 2 or 5 times a power of ten apart."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [
        i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def log_ticks(low: float, high: float) -> list[float]:
    """Return values for a logarithmic axis from 10^low to 10^high.

    They are 1, 2 and 5 times each power of ten, or powers alone if there are many.
    """
    powers = range(math.floor(low), math.ceil(high) + 1)
    within = lambda values: [v for v in values if low <= math.log10(v) <= high]
    close = within(m * 10.0**p for p in powers for m in (1, 2, 5))
    if len(close) < 2:  # a range below a factor of two or so: even steps serve as well
        return [v for v in ticks(10**low, 10**high) if v > 0]
    return close if len(close) <= 7 else within(10.0**p for p in powers[:: -(-len(powers) // 7)])


def _frame(points, x_label, log):
    across, up, x_range, y_range = _places(points)
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for value in log_ticks(*y_range) if log else ticks(*y_range):
        y = up(math.log10(value) if log else value)
        parts.append(_line((_LEFT, y), (right, y), 'stroke="#ddd"'))
        parts.append(_text(_LEFT - 5, y + 4, _number(value), "end"))
    for value in ticks(*x_range):
        x = across(value)
        parts.append(_line((x, bottom), (x, bottom + 4), 'stroke="#555"'))
        parts.append(_text(x, bottom + 17, _number(value), "middle"))
    parts.append(f'<path d="M{_LEFT},{_TOP}V{bottom}H{right}" fill="none" stroke="#555"/>')
    return [*parts, _text((_LEFT + right) / 2, _HEIGHT - 8, x_label, "middle")]


def _curves(lines, points):
    across, up, *_ = _places(points)
    parts = []
    for i, line in enumerate(lines):
        path, pen_down = [], False
        for point in line:
            if point is not None:
                x, y = across(point[0]), up(point[1])
                path.append(f"{'L' if pen_down else 'M'}{x:.1f},{y:.1f}")
                if len(line) <= 12:  # a gap may leave a point alone, which a path does not show
                    fill = _COLORS[i % len(_COLORS)]
                    parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="{fill}"/>')
            pen_down = point is not None
        parts.append(
            f'<path class="line" d="{"".join(path)}" fill="none" stroke-width="1.4" {_pen(i)}/>'
        )
    return parts


def _pen(i):
    return f'stroke="{_COLORS[i % len(_COLORS)]}"{_DASHES[i // len(_COLORS) % len(_DASHES)]}'


def _legend(labels):
    parts = []
    for i, label in enumerate(labels):
        x, y = _LEFT + (i % 2) * (_WIDTH - _LEFT) / 2, _HEIGHT + 4 + _LEGEND_ROW * (i // 2)
        parts.append(_line((x, y), (x + 16, y), f'stroke-width="2.5" {_pen(i)}'))
        parts.append(_text(x + 21, y + 4, label, "start"))
    return parts


def _line(start, end, stroke):
    (x1, y1), (x2, y2) = start, end
    return f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}" {stroke}/>'


def _text(x, y, words, anchor, size=11):
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
    return f"<text {place}>{html.escape(words)}</text>"


def _number(value):
    return f"{value:.3g}" if abs(value) < 1e5 else f"{value:.1e}"
