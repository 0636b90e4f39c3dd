"""Plots with Pillow: values over seeds as dots, their mean and standard error as a bar, a row
each.
"""

import math
import unicodedata

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from experiments.ablations import verdict
from sprint_jax.storage import files

_SCALE = 2  # pixels for each unit below
_LEFT, _WIDTH, _RIGHT, _ROW, _TOP, _BOTTOM = 190, 420, 30, 24, 26, 34
_INK, _GREY, _SEED, _MEAN = (30, 30, 30), (205, 205, 205), (120, 160, 205), (20, 70, 140)


def dots(groups) -> Image.Image:
    """Return a figure of panels below each other.

    groups: [(title, logarithmic axis or not, [(label, values over seeds)])], one for each panel.
    """
    panels = [_panel(title, rows, logarithmic) for title, logarithmic, rows in groups]
    sheet = Image.new("RGB", (panels[0].width, sum(p.height for p in panels)), "white")
    top = 0
    for panel in panels:
        sheet.paste(panel, (0, top))
        top += panel.height
    return sheet


def save(path, image):
    """Write a PNG whole or not at all."""
    with files.whole(path) as partial:
        image.save(partial, format="PNG")


def axis(values, logarithmic: bool) -> tuple[float, float, list[float]]:
    """Return (lowest, highest, ticks) that show all finite values.

    Of a logarithmic axis all three are decimal logarithms.
    """
    finite = [v for v in values if math.isfinite(v) and (v > 0 or not logarithmic)]
    shown = [math.log10(v) if logarithmic else v for v in finite] or [0.0, 1.0]
    low, high = min(shown), max(shown)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 0.1  # something where all values are equal
    low, high = low - room, high + room
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step = next(m * step for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 6)
    ticks = np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step
    return low, high, [float(t) for t in ticks]


def _panel(title, rows, logarithmic):
    height = _TOP + _ROW * len(rows) + _BOTTOM
    image = Image.new("RGB", (_SCALE * (_LEFT + _WIDTH + _RIGHT), _SCALE * height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(11 * _SCALE)
    low, high, ticks = axis([v for _, values in rows for v in values], logarithmic)
    place = lambda v: _LEFT + _WIDTH * (v - low) / (high - low)
    bottom = _TOP + _ROW * len(rows)
    _text(draw, font, (_LEFT, 4), title, "la", _INK)
    for tick in ticks:
        _line(draw, (place(tick), _TOP), (place(tick), bottom), _GREY, 1)
        _text(
            draw,
            font,
            (place(tick), bottom + 5),
            f"{10**tick if logarithmic else tick:.3g}",
            "ma",
            _INK,
        )
    for i, (label, values) in enumerate(rows):
        y = _TOP + _ROW * (i + 0.5)
        _text(draw, font, (_LEFT - 8, y), label, "rm", _INK)
        shown = [
            math.log10(v) if logarithmic else v
            for v in values
            if math.isfinite(v) and (v > 0 or not logarithmic)
        ]
        if not shown:
            _text(
                draw,
                font,
                (_LEFT + 6, y),
                "not finite" if values else "no result yet",
                "lm",
                (150, 150, 150),
            )
            continue
        for value in shown:
            _dot(draw, place(value), y, 3, _SEED)
        mean, error = verdict.summary(shown)
        if not math.isnan(error):
            _line(draw, (place(mean - error), y), (place(mean + error), y), _MEAN, 2)
        _line(draw, (place(mean), y - 6), (place(mean), y + 6), _MEAN, 2)
    return image


def plain(text):
    """Return the text in the letters that Pillow's own font has: without accents."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def _text(draw, font, at, text, anchor, colour):
    draw.text([_SCALE * x for x in at], plain(text), fill=colour, font=font, anchor=anchor)


def _line(draw, start, end, colour, width):
    draw.line(
        [*(_SCALE * x for x in start), *(_SCALE * x for x in end)],
        fill=colour,
        width=_SCALE * width,
    )


def _dot(draw, x, y, radius, colour):
    draw.ellipse(
        [
            _SCALE * (x - radius),
            _SCALE * (y - radius),
            _SCALE * (x + radius),
            _SCALE * (y + radius),
        ],
        fill=colour,
    )
