"""Line plots as SVG text: axes, ticks, lines and a legend, for a page that needs no library to be read."""

import dataclasses
import html
import math

_WIDTH, _HEIGHT = 430, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 30, 42
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
_DASHES = ("", ' stroke-dasharray="5 3"', ' stroke-dasharray="2 2"')  # where colours begin again
_LEGEND_ROW = 15


@dataclasses.dataclass(frozen=True)
class Line:
    """label: in the legend. x, y: numbers of equal count; a gap where y is not finite."""

    label: str
    x: list
    y: list


def plot(title, lines, *, x_label, log=False):
    """One plot as an <svg> element.

    log: logarithmic in y; values that are not positive are gaps then. Says so where no line has a point.
    """
    lines = [_shown(line, log) for line in lines]
    points = [p for line in lines for p in zip(line.x, line.y) if p[1] is not None]
    legend = lines if len(lines) > 1 else []
    height = _HEIGHT + _LEGEND_ROW * -(-len(legend) // 2)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" role="img">',
        f"<title>{html.escape(title)}</title>",
        _text(_WIDTH / 2, 18, title, "middle", size=13),
    ]
    if points:
        parts += _frame(points, x_label, log) + _drawn(lines, points) + _legend(legend)
    else:
        parts.append(_text(_WIDTH / 2, _HEIGHT / 2, "no values", "middle"))
    return "\n".join([*parts, "</svg>"])


def _shown(line, log):
    """The line with y as it is drawn, None for gaps."""
    height = lambda y: (
        None if not math.isfinite(y) or (log and y <= 0) else math.log10(y) if log else y
    )
    return Line(line.label, list(line.x), [height(y) for y in line.y])


def _range(values):
    low, high = min(values), max(values)
    room = 0.04 * (high - low) or 0.05 * abs(high) or 0.5
    return low - room, high + room


def _places(points):
    """(x -> pixel, y -> pixel, range of x, range of y)."""
    (x0, x1), (y0, y1) = _range([x for x, _ in points]), _range([y for _, y in points])
    across = lambda x: _LEFT + (x - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)
    up = lambda y: _HEIGHT - _BOTTOM - (y - y0) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM)
    return across, up, (x0, x1), (y0, y1)


def ticks(low, high):
    """Round numbers within [low, high], 1, 2 or 5 times a power of ten apart, about five of them."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [
        i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def log_ticks(low, high):
    """Values for a logarithmic axis from 10^low to 10^high: 1, 2 and 5 of each power, powers alone where there are many."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    within = lambda values: [v for v in values if low <= math.log10(v) <= high]
    close = within(m * 10.0**p for p in powers for m in (1, 2, 5))
    if len(close) < 2:  # less than a factor of two or so: even steps serve as well
        return [v for v in ticks(10**low, 10**high) if v > 0]
    return close if len(close) <= 7 else within(10.0**p for p in powers[:: -(-len(powers) // 7)])


def _frame(points, x_label, log):
    across, up, x_range, y_range = _places(points)
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for value in log_ticks(*y_range) if log else ticks(*y_range):
        y = math.log10(value) if log else value
        parts.append(
            f'<line x1="{_LEFT}" x2="{right}" y1="{up(y):.1f}" y2="{up(y):.1f}" stroke="#ddd"/>'
        )
        parts.append(_text(_LEFT - 5, up(y) + 4, _number(value), "end"))
    for x in ticks(*x_range):
        parts.append(
            f'<line x1="{across(x):.1f}" x2="{across(x):.1f}" y1="{bottom}" y2="{bottom + 4}" stroke="#555"/>'
        )
        parts.append(_text(across(x), bottom + 17, _number(x), "middle"))
    parts.append(f'<path d="M{_LEFT},{_TOP}V{bottom}H{right}" fill="none" stroke="#555"/>')
    return [*parts, _text((_LEFT + right) / 2, _HEIGHT - 8, x_label, "middle")]


def _drawn(lines, points):
    across, up, *_ = _places(points)
    parts = []
    for i, line in enumerate(lines):
        colour, dashes = _pen(i)
        path, pen_down, single = (
            [],
            False,
            len(line.x) <= 12,
        )  # few points are marked, as a gap may leave one alone
        for x, y in zip(line.x, line.y, strict=True):
            if y is not None:
                path.append(f"{'L' if pen_down else 'M'}{across(x):.1f},{up(y):.1f}")
                if single:
                    parts.append(
                        f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.2" fill="{colour}"/>'
                    )
            pen_down = y is not None
        parts.append(
            f'<path class="line" d="{"".join(path)}" fill="none" stroke="{colour}" stroke-width="1.4"{dashes}/>'
        )
    return parts


def _pen(i):
    return _COLOURS[i % len(_COLOURS)], _DASHES[i // len(_COLOURS) % len(_DASHES)]


def _legend(lines):
    parts = []
    for i, line in enumerate(lines):
        x, y = _LEFT + (i % 2) * (_WIDTH - _LEFT) / 2, _HEIGHT + 4 + _LEGEND_ROW * (i // 2)
        colour, dashes = _pen(i)
        parts.append(
            f'<line x1="{x}" x2="{x + 16}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2.5"{dashes}/>'
        )
        parts.append(_text(x + 21, y + 4, line.label, "start"))
    return parts


def _text(x, y, words, anchor, size=11):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{html.escape(words)}</text>'


def _number(value):
    return f"{value:.3g}" if abs(value) < 1e5 else f"{value:.1e}"
