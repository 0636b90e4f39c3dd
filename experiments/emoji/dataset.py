"""The data set `emoji`: captioned images composed of the glyphs of a color font.

An image is a pure function of (seed, index, size). Captions use the Unicode names of the glyphs:

    a {name}                                         of any size, anywhere
    a {name} left of|right of|above|below a {name}
    two|three {names}

About half of them name the background:

    ... on a {color} background
    ... on a {color} to {color} gradient background
    ... on a striped|dotted|checked {color} background

`Emoji` writes the images as a TFDS data set, without TensorFlow. It needs Noto Color Emoji, or
another font with color bitmaps of 109 px.
"""

import io
import os
import pathlib
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw, ImageFont

from sprint_jax.errors import UserError
from sprint_jax.storage import digests

T = TypeVar("T")
_Thing: TypeAlias = tuple[str, float, float, float]  # name, x, y, extent

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
SIZES = (64, 128)
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {"two": 2, "three": 3}
COLORS = {
    "red": (205, 50, 50),
    "orange": (240, 150, 40),
    "yellow": (250, 220, 70),
    "light green": (180, 230, 160),
    "green": (50, 150, 70),
    "turquoise": (60, 200, 190),
    "light blue": (165, 210, 245),
    "blue": (50, 90, 200),
    "purple": (125, 65, 175),
    "pink": (250, 170, 200),
    "brown": (125, 80, 50),
    "grey": (140, 140, 145),
    "white": (250, 250, 250),
    "black": (20, 20, 24),
}
PATTERNS = ("striped", "dotted", "checked")

_NO_CHARACTER = 0x10FFFF
_BITMAP = 109  # the only size of the font's bitmaps
# The emoji blocks beyond the basic plane, in which "black" and "white" mean filled and outlined.
_BLOCKS = (
    (0x1F300, 0x1F5FF),
    (0x1F600, 0x1F64F),
    (0x1F680, 0x1F6FF),
    (0x1F7E0, 0x1F7EB),
    (0x1F900, 0x1F9FF),
    (0x1FA70, 0x1FAFF),
)
# Python 3.11 knows the names of Unicode 14. Characters that are newer than that are left out,
# because the data must not depend on the version of Python.
_NEWER = {
    0x1F6D8,
    0x1F6DC,
    *range(0x1FA75, 0x1FA78),
    *range(0x1FA87, 0x1FA90),
    *range(0x1FAAD, 0x1FAB0),
    *range(0x1FABB, 0x1FAC0),
    *range(0x1FAC6, 0x1FAD0),
    *range(0x1FADA, 0x1FAE0),
    *range(0x1FAE8, 0x1FAF0),
    *range(0x1FAF7, 0x1FB00),
}
# Names that do not work in captions: parts of other emoji, and outlines that the font fills with
# another color. "two hearts" would read as a count.
_LEFT_OUT = ("emoji modifier", "emoji component", "keycap", "white sun", "two ", "three ")
_LEFT_OUT_ENDS = ("backhand index",)
_ARTICLE_BY_SOUND = {"european": "a", "unicorn": "a", "one": "a", "one-piece": "a", "x-ray": "an"}
_AFTER_THE_NOUN = {
    "with",
    "without",
    "of",
    "in",
    "on",
    "behind",
    "over",
    "from",
    "to",
    "for",
    "at",
    "above",
    "holding",
    "throwing",
    "doing",
    "savouring",
    "raising",
    "bowing",
    "screaming",
    "pointing",
    "fluttering",
}
_SINGULAR_ENDS = ("ss", "us", "os")
_IRREGULAR = {
    "child": "children",
    "mouse": "mice",
    "tooth": "teeth",
    "foot": "feet",
    "fish": "fish",
    "sheep": "sheep",
    "leaf": "leaves",
    "wolf": "wolves",
    "knife": "knives",
    "elf": "elves",
    "person": "people",
    "ox": "oxen",
}


def candidates() -> list[tuple[int, str]]:
    """Return [(code point, lower-case Unicode name)] of the emoji that images may show.

    The list does not depend on the font. Names in the plural, such as "grapes", are left out.
    """
    listed = []
    for first, last in _BLOCKS:
        for point in range(first, last + 1):
            name = unicodedata.name(chr(point), "").lower()
            left_out = name.startswith(_LEFT_OUT) or name.endswith(_LEFT_OUT_ENDS)
            if name and point not in _NEWER and not left_out and not _is_plural(name):
                listed.append((point, name))
    return listed


class Glyphs:
    """The glyphs of a font file.

    names: the names of the available emoji, in the order of their code points.
    digest: SHA-256 of the file.
    """

    def __init__(self, path: str | os.PathLike[str] = FONT):
        """Open a font. Raises UserError if it lacks bitmaps of 109 px or emoji."""
        data = _read_font(path)
        self.digest = digests.hash_bytes(data)
        try:
            # With BASIC, a code point is a glyph even if PIL was built with a text shaper.
            layout = ImageFont.Layout.BASIC
            self._font = ImageFont.truetype(io.BytesIO(data), _BITMAP, layout_engine=layout)
        except OSError as error:
            raise UserError(
                f"{path} has no bitmaps of {_BITMAP} px ({error}): give --font=NotoColorEmoji.ttf "
                "of the Debian package fonts-noto-color-emoji"
            ) from None
        # Fonts draw a placeholder, often a box, for characters that they do not have.
        self._placeholder = self._mask(_NO_CHARACTER)
        self._points = {name: point for point, name in candidates() if self._has(point)}
        self.names = tuple(self._points)
        if len(self.names) < 2:
            raise UserError(
                f"{path} has {len(self.names)} emoji: give --font=NotoColorEmoji.ttf of the Debian "
                "package fonts-noto-color-emoji"
            )
        self._images: dict[str, np.ndarray] = {}

    def _has(self, point: int) -> bool:
        left, top, right, bottom = self._font.getbbox(chr(point))
        if right <= left or bottom <= top:
            return False
        return self._mask(point) != self._placeholder

    def _mask(self, point: int) -> tuple[tuple[int, int], bytes]:
        """Return the size and the pixels of a glyph's mask."""
        mask: Any = self._font.getmask(chr(point))
        return mask.size, bytes(mask)

    def image(self, name: str) -> np.ndarray:
        """Return a glyph as RGBA, uint8 [h, w, 4], cropped to its opaque part.

        The array is cached; do not write to it.
        """
        if name not in self._images:
            text = chr(self._points[name])
            _, _, right, bottom = self._font.getbbox(text)
            canvas = Image.new("RGBA", (int(right), int(bottom)))
            ImageDraw.Draw(canvas).text((0, 0), text, font=self._font, embedded_color=True)
            self._images[name] = np.asarray(canvas.crop(canvas.getchannel("A").getbbox()))
        return self._images[name]


def _read_font(path: str | os.PathLike[str]) -> bytes:
    try:
        return pathlib.Path(path).read_bytes()
    except OSError:
        raise UserError(
            f"no font {path}: install the Debian package fonts-noto-color-emoji or pass a copy of "
            "NotoColorEmoji.ttf with --font"
        ) from None


def article(words: str) -> str:
    """Return "a" or "an", as the words are pronounced."""
    by_sound = _ARTICLE_BY_SOUND.get(words.split()[0])
    return by_sound or ("an" if words[0] in "aeiou" else "a")


def _find_noun(words: Sequence[str]) -> int:
    """Return the index of the noun: the last word before "with", "of" or a similar word."""
    later = (i for i, word in enumerate(words) if i and word in _AFTER_THE_NOUN)
    return next(later, len(words)) - 1


def _is_plural(name: str) -> bool:
    words = name.split()
    word = words[_find_noun(words)]
    return word.endswith("s") and not word.endswith(_SINGULAR_ENDS)


def plural(name: str) -> str:
    """Return a name with its noun in the plural."""
    words = name.split()
    noun = _find_noun(words)
    word = words[noun]
    if word in _IRREGULAR:
        word = _IRREGULAR[word]
    elif word.endswith("man") and word not in ("human", "shaman"):
        word = word[:-3] + "men"
    elif word.endswith("y") and word[-2:-1] not in "aeiou":
        word = word[:-1] + "ies"
    else:
        word += "es" if word.endswith(("ch", "sh", "x", "z", *_SINGULAR_ENDS)) else "s"
    return " ".join((*words[:noun], word, *words[noun + 1 :]))


def example(font: Glyphs, seed: int, index: int, size: int) -> tuple[np.ndarray, str]:
    """Draw an image, uint8 [size, size, 3], and its caption. They depend on the arguments only.

    Args:
      font: the glyphs.
      seed, index: non-negative integers that together name the example. It is the same scene at any
        size.
      size: side in pixels.
    """
    rng = np.random.default_rng([seed, index])
    ground, where = _background(rng, size)
    things, words = _scene(rng, font.names)
    for name, x, y, extent in things:
        _paste(ground, font.image(name), (x, y), extent)
    return ground.round().astype(np.uint8), words + where


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    # This module calls only random(): no other method is stable across versions of NumPy.
    return options[int(rng.random() * len(options))]


def _draw_between(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _background(rng: np.random.Generator, size: int) -> tuple[np.ndarray, str]:
    """Draw a background, float64 [size, size, 3] from 0 to 255, and the end of the caption.

    The end of the caption names the background, or is empty in half of the cases.
    """
    kind = rng.random()
    color, other = _pick(rng, tuple(COLORS)), _pick(rng, tuple(COLORS))
    pattern, angle, period = (
        _pick(rng, PATTERNS),
        _pick(rng, (0, 1, 2)),
        _pick(rng, (0.125, 0.1875, 0.25)),
    )
    named = rng.random() < 0.5
    share = (np.arange(size) + 0.5) / size
    x, y = share[None, :] + 0 * share[:, None], share[:, None] + 0 * share[None, :]
    base = np.array(COLORS[color], float)
    if kind < 0.4 or (kind < 0.6 and other == color):
        mix, words = np.zeros((size, size)), f"{color} background"
        end = base
    elif kind < 0.6:
        mix, words = (y, x, (x + y) / 2)[angle], f"{color} to {other} gradient background"
        end = np.array(COLORS[other], float)
    else:
        mix, words = (
            _pattern(pattern, angle, x / period, y / period),
            f"{pattern} {color} background",
        )
        # The second shade is paler, or darker for pale colors, so that the name still fits.
        end = base + 0.5 * (255 - base) if base.mean() < 170 else 0.75 * base
    ground = base + mix[..., None] * (end - base)
    return ground, f" on {article(words)} {words}" if named else ""


def _pattern(pattern: str, angle: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return where the second shade is: float64, 0 or 1, of the shape of x and y.

    x, y: coordinates in periods of the pattern.
    """
    if pattern == "striped":
        return ((y, x, x + y)[angle] % 1 < 0.5).astype(float)
    if pattern == "dotted":
        return (np.hypot(x % 1 - 0.5, y % 1 - 0.5) < 0.28).astype(float)
    return ((np.floor(x) + np.floor(y)) % 2).astype(float)


def _scene(rng: np.random.Generator, names: Sequence[str]) -> tuple[list[_Thing], str]:
    """Draw a scene: [(name, x, y, extent)], and the words for it.

    x, y: centers. extent: longer side of a glyph. All are fractions of the image's side.
    """
    kind = rng.random()
    name = _pick(rng, names)
    if kind < 0.6:
        extent = _draw_between(rng, 0.4, 0.9)
        x, y = (_draw_between(rng, extent / 2, 1 - extent / 2) for _ in range(2))
        return [(name, x, y, extent)], f"{article(name)} {name}"
    if kind < 0.8:
        other = _pick(rng, [n for n in names if n != name])
        relation = _pick(rng, RELATIONS)
        near, far = _draw_between(rng, 0.22, 0.28), _draw_between(rng, 0.72, 0.78)
        level = _draw_between(rng, 0.25, 0.75)
        levels = [level + _draw_between(rng, -0.03, 0.03) for _ in range(2)]
        along = (near, far) if relation in ("left of", "above") else (far, near)
        flat = relation in ("left of", "right of")
        things = [
            (n, *((a, b) if flat else (b, a)), _draw_between(rng, 0.3, 0.43))
            for n, a, b in zip((name, other), along, levels, strict=True)
        ]
        return things, f"{article(name)} {name} {relation} {article(other)} {other}"
    number = _pick(rng, tuple(NUMBERS))
    extent = _draw_between(rng, 0.3, 0.43)
    corners = np.argsort([rng.random() for _ in range(4)])[: NUMBERS[number]]
    things = []
    for corner in corners.tolist():
        x, y = (
            0.25 + 0.5 * side + _draw_between(rng, -0.03, 0.03)
            for side in (corner % 2, corner // 2)
        )
        things.append((name, x, y, extent))
    return things, f"{number} {plural(name)}"


def _paste(
    ground: np.ndarray, glyph: np.ndarray, center: tuple[float, float], extent: float
) -> None:
    """Paste a glyph into an image in place, moved so that all of it is inside.

    ground: float64 [S, S, 3]. glyph: RGBA, uint8 [h, w, 4]. center: (x, y). center, extent: as in
    `_scene`.
    """
    x, y = center
    size, scale = len(ground), extent * len(ground) / max(glyph.shape[:2])
    height, width = (max(1, round(scale * side)) for side in glyph.shape[:2])
    drawn = np.asarray(
        Image.fromarray(glyph).resize((width, height), Image.Resampling.LANCZOS), float
    )
    top = min(max(0, round(y * size - height / 2)), size - height)
    left = min(max(0, round(x * size - width / 2)), size - width)
    alpha, region = drawn[..., 3:] / 255, ground[top : top + height, left : left + width]
    region[:] = region * (1 - alpha) + drawn[..., :3] * alpha


class Emoji(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The builder of the data set `emoji`, split "train", in the order of ids.

    Its features are image (PNG), caption and id.
    """

    name = "emoji"
    VERSION = tfds.core.Version("1.0.0")
    # Set explicitly, because TFDS finds it with a package that it does not declare as a dependency.
    code_path: Any = pathlib.Path(__file__)

    def __init__(
        self,
        *,
        font: Glyphs,
        seed: int,
        size: int,
        count: int,
        each: Callable[[Iterable[int]], Iterable[int]] = iter,
        **options: Any,
    ):
        """Describe a data set; `download_and_prepare` writes it.

        font, seed, size: as in `example`. count: number of images. each: wraps the ids, for example
        in a progress bar. options: of the TFDS builder.
        """
        self._settings = {"seed": seed, "size": size, "count": count, "font_sha256": font.digest}
        self._glyphs, self._each = font, each
        super().__init__(file_format="array_record", **options)

    def _info(self) -> tfds.core.DatasetInfo:
        size = self._settings["size"]
        return tfds.core.DatasetInfo(
            builder=self,
            description="Captioned pictures of emoji on varied backgrounds.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
                    "caption": tfds.features.Text(),
                    "id": np.int64,
                }
            ),
            metadata=tfds.core.MetadataDict(self._settings),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        s = self._settings
        for index in self._each(range(s["count"])):
            image, caption = example(self._glyphs, s["seed"], index, s["size"])
            png = io.BytesIO()
            Image.fromarray(image).save(png, format="PNG")
            # Bytes of a file, because TFDS needs TensorFlow to encode an array.
            yield index, {"image": png.getvalue(), "caption": caption, "id": index}
