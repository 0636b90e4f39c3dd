"""`emoji`: captioned pictures made of the glyphs of a colour font, each a pure function of (seed, index, size).

Captions use the Unicode names of the glyphs:

    a {name}                                      single, any size and place
    a {name} left of|right of|above|below a {name}
    two|three {names}

and about half of them name the background:

    ... on a {colour} background
    ... on a {colour} to {colour} gradient background
    ... on a striped|dotted|checked {colour} background

`Emoji` writes such pictures as a TFDS data set, without TensorFlow. Needs Noto Color Emoji or another font with
colour bitmaps of 109 px.
"""

import hashlib
import io
import pathlib
import unicodedata

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw, ImageFont

from sprint_jax.errors import UserError

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
SIZES = (64, 128)
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {"two": 2, "three": 3}
COLOURS = {
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
_BITMAP = 109  # the one size that the font's bitmaps have
# The emoji blocks beyond the basic plane (in that, "black" and "white" mean filled and outlined), without what came
# after Unicode 14, which is what Python 3.11 has names for: data must not depend on the Python version.
_BLOCKS = (
    (0x1F300, 0x1F5FF),
    (0x1F600, 0x1F64F),
    (0x1F680, 0x1F6FF),
    (0x1F7E0, 0x1F7EB),
    (0x1F900, 0x1F9FF),
    (0x1FA70, 0x1FAFF),
)
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
# Not things of their own, or named by an outline that the font fills with another colour; "two hearts" and its
# like would read as a count, and "grapes" not as one thing (`_is_several`).
_LEFT_OUT = ("emoji modifier", "emoji component", "keycap", "white sun", "two ", "three ")
_LEFT_OUT_ENDS = ("backhand index",)
_VOWELS_BY_SOUND = {"european": "a", "unicorn": "a", "one": "a", "one-piece": "a", "x-ray": "an"}
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


def candidates():
    """[(code point, lower-cased Unicode name)] of the emoji that pictures are made of, whatever font is there."""
    listed = []
    for first, last in _BLOCKS:
        for point in range(first, last + 1):
            name = unicodedata.name(chr(point), "").lower()
            wanted = (
                point not in _NEWER
                and not name.startswith(_LEFT_OUT)
                and not name.endswith(_LEFT_OUT_ENDS)
            )
            if name and wanted and not _is_several(name):
                listed.append((point, name))
    return listed


class Glyphs:
    """The glyphs of one font file.

    names: those that it has, in the order of their code points. digest: a hash of the file.
    """

    def __init__(self, path=FONT):
        data = _font_file(path)
        self.digest = hashlib.sha256(data).hexdigest()
        try:
            # BASIC: one code point is one glyph, whether or not PIL was built with a text shaper.
            layout = ImageFont.Layout.BASIC
            self._font = ImageFont.truetype(io.BytesIO(data), _BITMAP, layout_engine=layout)
        except OSError as error:
            raise UserError(
                f"{path} has no bitmaps of {_BITMAP} px ({error}): give --font=NotoColorEmoji.ttf of the Debian "
                "package fonts-noto-color-emoji"
            ) from None
        # What the font draws for a character that there is none of, often a box, is no glyph.
        self._lacking = self._font.getmask(chr(_NO_CHARACTER))
        self._points = {name: point for point, name in candidates() if self._has(point)}
        self.names = tuple(self._points)
        if len(self.names) < 2:
            raise UserError(
                f"{path} has {len(self.names)} emoji: give --font=NotoColorEmoji.ttf of the Debian package "
                "fonts-noto-color-emoji"
            )
        self._pictures = {}

    def _has(self, point):
        left, top, right, bottom = self._font.getbbox(chr(point))
        return (
            right > left and bottom > top and not self._is_lacking(self._font.getmask(chr(point)))
        )

    def _is_lacking(self, mask):
        return mask.size == self._lacking.size and bytes(mask) == bytes(self._lacking)

    def picture(self, name):
        """uint8 [h, w, 4] RGBA, cut to what is drawn. Rendered once; do not write to it."""
        if name not in self._pictures:
            text = chr(self._points[name])
            _, _, right, bottom = self._font.getbbox(text)
            canvas = Image.new("RGBA", (right, bottom))
            ImageDraw.Draw(canvas).text((0, 0), text, font=self._font, embedded_color=True)
            self._pictures[name] = np.asarray(canvas.crop(canvas.getchannel("A").getbbox()))
        return self._pictures[name]


def _font_file(path):
    try:
        return pathlib.Path(path).read_bytes()
    except OSError:
        raise UserError(
            f"no font {path}: install the Debian package fonts-noto-color-emoji or name a copy of NotoColorEmoji.ttf "
            "with --font"
        ) from None


def article(words):
    """ "a" or "an", as the words sound."""
    by_sound = _VOWELS_BY_SOUND.get(words.split()[0])
    return by_sound or ("an" if words[0] in "aeiou" else "a")


def _noun(words):
    """Index of the noun: the last word before "with", "of" and their like."""
    return (
        next((i for i, word in enumerate(words) if i and word in _AFTER_THE_NOUN), len(words)) - 1
    )


def _is_several(name):
    words = name.split()
    word = words[_noun(words)]
    return word.endswith("s") and not word.endswith(_SINGULAR_ENDS)


def plural(name):
    """The name of several: its noun in the plural."""
    words = name.split()
    noun = _noun(words)
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


def example(font, seed, index, size):
    """Picture and caption number `index`: uint8 [size, size, 3], str. Depends on the arguments alone.

    Args:
      font: a `Glyphs`.
      seed, index: non-negative integers; together they name the example, which is the same scene at any size.
      size: side in pixels.
    """
    rng = np.random.default_rng([seed, index])
    ground, where = _background(rng, size)
    things, words = _scene(rng, font.names)
    for name, x, y, extent in things:
        _put(ground, font.picture(name), x, y, extent)
    return ground.round().astype(np.uint8), words + where


def _pick(rng, options):
    # random() alone is used throughout: its stream is the part of NumPy's generators that is stable.
    return options[int(rng.random() * len(options))]


def _between(rng, low, high):
    return low + (high - low) * rng.random()


def _background(rng, size):
    """float64 [size, size, 3] in 0 to 255, and the end of the caption that names it, empty in half of the cases."""
    kind = rng.random()
    colour, other = _pick(rng, tuple(COLOURS)), _pick(rng, tuple(COLOURS))
    pattern, angle, period = (
        _pick(rng, PATTERNS),
        _pick(rng, (0, 1, 2)),
        _pick(rng, (0.125, 0.1875, 0.25)),
    )
    told = rng.random() < 0.5
    share = (np.arange(size) + 0.5) / size
    x, y = share[None, :] + 0 * share[:, None], share[:, None] + 0 * share[None, :]
    base = np.array(COLOURS[colour], float)
    if kind < 0.4 or (kind < 0.6 and other == colour):
        mix, words = np.zeros((size, size)), f"{colour} background"
        end = base
    elif kind < 0.6:
        mix, words = (y, x, (x + y) / 2)[angle], f"{colour} to {other} gradient background"
        end = np.array(COLOURS[other], float)
    else:
        mix, words = (
            _pattern(pattern, angle, x / period, y / period),
            f"{pattern} {colour} background",
        )
        # A paler or, for pale colours, darker shade of itself: the colour stays what it is called.
        end = base + 0.5 * (255 - base) if base.mean() < 170 else 0.75 * base
    ground = base + mix[..., None] * (end - base)
    return ground, f" on {article(words)} {words}" if told else ""


def _pattern(pattern, angle, x, y):
    """Where the second shade is: float64 0 or 1 like x and y, which count periods."""
    if pattern == "striped":
        return ((y, x, x + y)[angle] % 1 < 0.5).astype(float)
    if pattern == "dotted":
        return (np.hypot(x % 1 - 0.5, y % 1 - 0.5) < 0.28).astype(float)
    return ((np.floor(x) + np.floor(y)) % 2).astype(float)


def _scene(rng, names):
    """[(name, x, y, extent)] and the words for it. x, y: centres; extent: longer side; all as shares of the side."""
    kind = rng.random()
    name = _pick(rng, names)
    if kind < 0.6:
        extent = _between(rng, 0.4, 0.9)
        x, y = (_between(rng, extent / 2, 1 - extent / 2) for _ in range(2))
        return [(name, x, y, extent)], f"{article(name)} {name}"
    if kind < 0.8:
        other = _pick(rng, [n for n in names if n != name])
        relation = _pick(rng, RELATIONS)
        near, far = _between(rng, 0.22, 0.28), _between(rng, 0.72, 0.78)
        level = _between(rng, 0.25, 0.75)
        levels = [level + _between(rng, -0.03, 0.03) for _ in range(2)]
        along = (near, far) if relation in ("left of", "above") else (far, near)
        flat = relation in ("left of", "right of")
        things = [
            (n, *((a, b) if flat else (b, a)), _between(rng, 0.3, 0.43))
            for n, a, b in zip((name, other), along, levels, strict=True)
        ]
        return things, f"{article(name)} {name} {relation} {article(other)} {other}"
    number = _pick(rng, tuple(NUMBERS))
    extent = _between(rng, 0.3, 0.43)
    corners = np.argsort([rng.random() for _ in range(4)])[: NUMBERS[number]]
    things = []
    for corner in corners.tolist():
        x, y = (
            0.25 + 0.5 * side + _between(rng, -0.03, 0.03) for side in (corner % 2, corner // 2)
        )
        things.append((name, x, y, extent))
    return things, f"{number} {plural(name)}"


def _put(ground, glyph, x, y, extent):
    """Draws RGBA uint8 [h, w, 4] into float64 [S, S, 3], its longer side `extent` of S, whole."""
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
    """Writes the data set `emoji`: split train, features image (PNG), caption, id, in the order of the ids."""

    name = "emoji"
    VERSION = tfds.core.Version("1.0.0")
    # Said here because TFDS's own way of finding it imports a package that it does not ask pip for.
    code_path = pathlib.Path(__file__)

    def __init__(self, *, font, seed, size, count, each=iter, **options):
        """font, seed, size: as in `example`. count: pictures. each: wraps the ids, as a progress bar does."""
        self._settings = {"seed": seed, "size": size, "count": count, "font_sha256": font.digest}
        self._glyphs, self._each = font, each
        super().__init__(file_format="array_record", **options)

    def _info(self):
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

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        s = self._settings
        for index in self._each(range(s["count"])):
            image, caption = example(self._glyphs, s["seed"], index, s["size"])
            png = io.BytesIO()
            Image.fromarray(image).save(png, format="PNG")
            # An array instead of a file's bytes would make TFDS ask for TensorFlow.
            yield index, {"image": png.getvalue(), "caption": caption, "id": index}
