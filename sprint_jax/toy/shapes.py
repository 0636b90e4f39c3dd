"""The data set `shapes`: captioned images of flat shapes, each a pure function of (seed, index).

An image shows exactly what its caption says: one to three objects on a plain background. The
captions follow a fixed grammar:

    a {shape}                                        single object
    a {color} {shape}                                color
    two|three {color} {shape}s                       counting
    a {color} {shape} {relation} a {color} {shape}   two objects, position, color attribution

Each may end with ` on a {color} background`; without it the background is near-black.

Sizes, positions and everything else that a caption leaves open are random. By default they follow a
composition: one object stands near the center, two stand half a side apart in one of the two middle
rows or columns, three form a triangle, and all objects of an image have the same size. With
`anywhere=True` objects of any size stand in any cells of a 4 x 4 grid that make the caption true,
as in drawings by people.

One in eight of the captions that combine words is held out of training, so that the held-out split
asks for combinations that a model has never seen. Its captions are cut in halves: "selection" for
searches, early stops and the choice of what ships, and "final" for the scores that are reported.
"""

import dataclasses
import zlib
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 90, 225),
    "yellow": (240, 210, 50),
    "purple": (150, 60, 200),
    "white": (245, 245, 245),
}
BLACK = (16, 16, 20)
SHAPES = ("circle", "square", "triangle")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {"two": 2, "three": 3}
HALVES = ("selection", "final")
SPLITS = ("train", "heldout", *HALVES)  # heldout is both halves

# Positions are cells of a grid and sizes are few, all as fractions of the side. At 32 px with
# latent cells of 8 px, there are few enough distinct patches for a model that trains on two cores.
_GRID = 4
_CELLS = tuple((i + 0.5) / _GRID for i in range(_GRID))
_INNER = _CELLS[1:-1]
_LOWER = _CELLS[2:]
_CORNERS = tuple(i / _GRID for i in range(1, _GRID))  # a large object fills four cells around one
_SMALL, _LARGE = (3 / 32, 4 / 32), 8 / 32
_GAP = 1.5 / 32  # minimum space between objects
_KINDS = ("shape", "color", "count", "relation")
_KIND_CUMULATIVE = (0.06, 0.18, 0.42, 1.0)
_BACKGROUND_PROBABILITY = 0.3
# The independent random streams of one (seed, index).
STREAMS = ("example", "anywhere", "sketch", "choice", "arrangement")


@dataclasses.dataclass(frozen=True)
class Object:
    """One object of a caption or of an image. In captions x, y and size are 0."""

    color: str | None  # None if the caption does not name it
    shape: str | None  # None if the checker does not recognize it
    _: dataclasses.KW_ONLY
    x: float = 0.0  # center and half extent, as fractions of the side
    y: float = 0.0
    size: float = 0.0


@dataclasses.dataclass(frozen=True)
class Caption:
    """The meaning of a caption: what the image must show."""

    kind: str  # one of _KINDS
    objects: tuple[Object, ...]
    relation: str | None  # one of RELATIONS, for the kind "relation"
    background: str | None  # None means near-black

    def text(self) -> str:
        """Return the caption in the words of the grammar."""
        first = self.objects[0]
        if self.kind == "shape":
            words = f"a {first.shape}"
        elif self.kind == "color":
            words = f"a {first.color} {first.shape}"
        elif self.kind == "count":
            number = {n: word for word, n in NUMBERS.items()}[len(self.objects)]
            words = f"{number} {first.color} {first.shape}s"
        else:
            second = self.objects[1]
            words = f"a {first.color} {first.shape} {self.relation} a {second.color} {second.shape}"
        return words + (f" on a {self.background} background" if self.background else "")


@dataclasses.dataclass(frozen=True)
class Example:
    """An image with its caption."""

    image: np.ndarray  # uint8 [size, size, 3]
    text: str
    caption: Caption  # the meaning of `text`
    objects: tuple[Object, ...]  # the objects as drawn


def parse(text: str) -> Caption:
    """Return the meaning of a caption. Raises ValueError for a text outside the grammar."""
    error = ValueError(
        f"{text!r} is not a caption of the `shapes` grammar (see sprint_jax/toy/shapes.py)"
    )
    words, background = text.split(), None
    if len(words) >= 4 and words[-1] == "background" and words[-4:-2] == ["on", "a"]:
        background, words = words[-2], words[:-4]
        if background not in COLORS:
            raise error
    if len(words) == 2 and words[0] == "a" and words[1] in SHAPES:
        return Caption("shape", (Object(None, words[1]),), None, background)
    if len(words) == 3 and words[0] == "a" and words[1] in COLORS and words[2] in SHAPES:
        return Caption("color", (Object(words[1], words[2]),), None, background)
    if len(words) == 3 and words[0] in NUMBERS and words[1] in COLORS and words[2][:-1] in SHAPES:
        if words[2].endswith("s"):
            same = Object(words[1], words[2][:-1])
            return Caption("count", (same,) * NUMBERS[words[0]], None, background)
    relation = " ".join(words[3:-3])
    if len(words) >= 7 and relation in RELATIONS and words[0] == words[-3] == "a":
        pair = [(words[1], words[2]), (words[-2], words[-1])]
        if all(c in COLORS and s in SHAPES for c, s in pair):
            return Caption("relation", tuple(Object(*p) for p in pair), relation, background)
    raise error


def is_heldout(caption: Caption) -> bool:
    """Return whether training never sees a caption: one in eight of those that combine words."""
    if caption.kind in ("shape", "color") and caption.background is None:
        return False
    return _hash(caption) % 8 == 0


def is_in(caption: Caption, split: str) -> bool:
    """Return whether a caption belongs to a split.

    One caption of the kind "shape" is held out, so it is in both halves.
    """
    if split in HALVES:
        half = HALVES[_hash(caption) // 8 % 2]
        return is_heldout(caption) and (caption.kind == "shape" or half == split)
    return is_heldout(caption) == (split == "heldout")


def _hash(caption: Caption) -> int:
    return zlib.crc32(caption.text().encode())


def stream(seed: int, index: int, split: str, name: str) -> np.random.Generator:
    """Return the random generator of an example for one of STREAMS.

    Call only `random()` on it: no other method is stable across versions of NumPy.
    """
    # Philox has a 256-bit counter, so that streams with different high words never overlap.
    counter = [0, 0, 0, STREAMS.index(name)]
    return np.random.Generator(
        np.random.Philox(key=[seed, 2 * index + (split != "train")], counter=counter)
    )


def example(
    seed: int, index: int, *, size: int = 32, split: str = "train", anywhere: bool = False
) -> Example:
    """Draw the image and the caption number `index`. The result depends on the arguments only.

    Args:
      seed, index: non-negative integers that together name the example.
      size: side in pixels.
      split: one of SPLITS; `is_in` tells which captions belong to which.
      anywhere: place objects in any cells of the grid. This is a different example, with a caption
        of its own.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: use one of {SPLITS}")
    rng = stream(seed, index, split, "anywhere" if anywhere else "example")
    kind = _KINDS[int(np.searchsorted(_KIND_CUMULATIVE, rng.random(), side="right"))]
    while True:
        caption = _draw_caption(rng, kind)
        if is_in(caption, split):
            break
    background = caption.background
    objects = _place(rng, caption, background, anywhere)
    return Example(render(objects, background, size), caption.text(), caption, objects)


def arrange(caption: Caption, index: int) -> tuple[Object, ...]:
    """Draw the objects of a caption as the images of training show them, by an index alone."""
    return _place(stream(0, index, "train", "arrangement"), caption, caption.background, False)


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]


def _draw_caption(rng: np.random.Generator, kind: str) -> Caption:
    colors = list(COLORS)
    background = None
    if rng.random() < _BACKGROUND_PROBABILITY:
        background = _pick(rng, colors)
        colors.remove(background)
    first = Object(_pick(rng, colors), _pick(rng, SHAPES))
    if kind == "shape":
        return Caption(kind, (Object(None, first.shape),), None, background)
    if kind == "color":
        return Caption(kind, (first,), None, background)
    if kind == "count":
        return Caption(kind, (first,) * _pick(rng, (2, 3)), None, background)
    while True:  # two equal objects would be the kind "count"
        second = Object(_pick(rng, colors), _pick(rng, SHAPES))
        if second != first:
            return Caption(kind, (first, second), _pick(rng, RELATIONS), background)


def _place(
    rng: np.random.Generator, caption: Caption, background: str | None, anywhere: bool
) -> tuple[Object, ...]:
    """Draw what the caption leaves open: colors, sizes and positions."""
    objects = []
    for o in caption.objects:
        color = o.color or _pick(rng, [c for c in COLORS if c != background])
        objects.append(dataclasses.replace(o, color=color))
    return (_scatter if anywhere else _compose)(rng, objects, caption.relation)


def _scatter(
    rng: np.random.Generator, objects: list[Object], relation: str | None
) -> tuple[Object, ...]:
    """Place objects of any sizes in any cells, without contact and in the given relation."""
    while True:
        placed = []
        for o in objects:
            half = _pick_size(rng, len(objects))
            free = _CORNERS if half == _LARGE else _CELLS
            placed.append(dataclasses.replace(o, x=_pick(rng, free), y=_pick(rng, free), size=half))
        if _are_apart(placed) and (relation is None or _are_related(placed, relation)):
            return tuple(placed)


def _compose(
    rng: np.random.Generator, objects: list[Object], relation: str | None
) -> tuple[Object, ...]:
    """Place objects of equal size in one of a few arrangements.

    The arrangements are few because a one-step student must choose one of them from the noise
    alone. No two share more than one cell: if two did, the student would learn to draw only those
    two cells.
    """
    half = _pick_size(rng, len(objects))
    if len(objects) == 1:
        centers = [_place_one(rng, half)]
    else:
        centers = _place_group(rng, len(objects), relation)
    return tuple(
        dataclasses.replace(o, x=x, y=y, size=half)
        for o, (x, y) in zip(objects, centers, strict=True)
    )


def _pick_size(rng: np.random.Generator, count: int) -> float:
    return _pick(rng, (*_SMALL, _LARGE) if count == 1 else _SMALL)


def _place_one(rng: np.random.Generator, half: float) -> tuple[float, float]:
    """Draw the center of a single object."""
    free = (0.5,) if half == _LARGE else _INNER
    return _pick(rng, free), _pick(rng, free)


def _place_group(
    rng: np.random.Generator, count: int, relation: str | None
) -> list[tuple[float, float]]:
    """Draw the centers of two or three objects, half a side apart along a row or a column."""
    start = _pick(rng, _CELLS[:2])
    if count == 3:
        level = _pick(rng, _LOWER)
        return [(start, level), (start + 0.25, level - 0.5), (start + 0.5, level)]
    level = _pick(rng, _INNER)
    across, down = [(start, level), (start + 0.5, level)], [(level, start), (level, start + 0.5)]
    if relation is None:
        return _pick(rng, (across, down))
    pair = across if relation in ("left of", "right of") else down
    return pair[::-1] if relation in ("right of", "below") else pair


def _are_apart(objects: Sequence[Object]) -> bool:
    for i, a in enumerate(objects):
        for b in objects[:i]:
            if max(abs(a.x - b.x), abs(a.y - b.y)) < a.size + b.size + _GAP:
                return False
    return True


def _are_related(objects: Sequence[Object], relation: str) -> bool:
    """Return whether two objects stand in a relation: farther apart along its axis than across.

    This implies the checker's rule with a margin, since grid steps are a quarter of the side.
    """
    a, b = objects
    dx, dy = b.x - a.x, b.y - a.y
    along, across = {
        "left of": (dx, dy),
        "right of": (-dx, dy),
        "above": (dy, dx),
        "below": (-dy, dx),
    }[relation]
    return along > abs(across)


def distance(shape: str, dx: np.ndarray, dy: np.ndarray, half: float) -> np.ndarray:
    """Return the signed distance to the border of a shape, negative inside.

    Outside a corner it is the distance to the lines that extend the edges.

    dx, dy: offsets to the right of and below the shape's center, in the unit of `half`.
    """
    if shape == "circle":
        return np.hypot(dx, dy) - half
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - half
    slope = np.sqrt(5.0)  # isosceles, apex up: base and height both 2 * half
    return np.maximum(dy - half, (2 * np.abs(dx) - dy - half) / slope)


def coverage(shape: str, x: float, y: float, half: float, size: int) -> np.ndarray:
    """Return the anti-aliased mask of a shape, float64 [size, size] in [0, 1].

    x, y, half, size: center, half extent and side of the image, in pixels.
    """
    ys, xs = np.mgrid[:size, :size] + 0.5
    return np.clip(0.5 - distance(shape, xs - x, ys - y, half), 0, 1)


def render(objects: Iterable[Object], background: str | None, size: int) -> np.ndarray:
    """Draw objects on a background color (None: near-black). Returns uint8 [size, size, 3]."""
    image = np.empty((size, size, 3))
    image[:] = COLORS[background] if background else BLACK
    for o in objects:
        assert o.color is not None and o.shape is not None, f"{o} leaves a color or shape open"
        alpha = coverage(o.shape, o.x * size, o.y * size, o.size * size, size)[..., None]
        image = image * (1 - alpha) + np.array(COLORS[o.color]) * alpha
    return np.round(image).astype(np.uint8)
