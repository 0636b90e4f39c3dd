"""`shapes`: captioned pictures of flat shapes, each a pure function of (seed, index).

A caption follows a fixed grammar (below) and a picture shows exactly what it says: one to three objects
on a plain background. Sizes, cells of a 4 x 4 grid and anything else the caption leaves open are random,
within a composition as a photographer would choose: one object stands near the middle, two share one of the
two middle rows (or columns), half a picture apart, three are the corners of a triangle, and all objects of a
picture have one size. `anywhere` drops that: objects of any sizes stand in any cells in which the caption is true,
as where a person draws. One in eight of the composed captions is held out of training, so that `heldout` asks for
combinations never seen.

    a {shape}                                        single object
    a {colour} {shape}                               colour
    two|three {colour} {shape}s                      counting
    a {colour} {shape} {relation} a {colour} {shape} two objects, position, colour attribution

each optionally followed by ` on a {colour} background` (without it the background is near-black).
"""

import dataclasses
import zlib

import numpy as np

COLOURS = {
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
SPLITS = ("train", "heldout")

# Objects fill cells of a grid and sizes are few, all as shares of the side: at 32 px with 8 px latent cells
# this keeps the number of distinct patches small enough for a model that trains on two cores.
_GRID = 4
_CELLS = tuple((i + 0.5) / _GRID for i in range(_GRID))
_INNER = _CELLS[1:-1]
_LOWER = _CELLS[2:]
_CORNERS = tuple(i / _GRID for i in range(1, _GRID))  # of four cells, which a large object fills
_SMALL, _LARGE = (3 / 32, 4 / 32), 8 / 32
_GAP = 1.5 / 32  # least empty space between objects
_KINDS = ("shape", "colour", "count", "relation")
_KIND_CUMULATIVE = (0.06, 0.18, 0.42, 1.0)
_BACKGROUND_PROBABILITY = 0.3
STREAMS = (
    "example",
    "anywhere",
    "sketch",
    "choice",
)  # what is drawn of one (seed, index), each independent of the others


@dataclasses.dataclass(frozen=True)
class Object:
    """One object. x, y: centre, size: half extent, all as shares of the picture's side.

    colour is None where a caption leaves it open; x, y and size are 0 in captions.
    """

    colour: str | None
    shape: str
    x: float = 0.0
    y: float = 0.0
    size: float = 0.0


@dataclasses.dataclass(frozen=True)
class Caption:
    """Meaning of a caption: what must be in the picture.

    kind: "shape", "colour", "count" or "relation". background: None means near-black.
    """

    kind: str
    objects: tuple[Object, ...]
    relation: str | None
    background: str | None

    def text(self) -> str:
        first = self.objects[0]
        if self.kind == "shape":
            words = f"a {first.shape}"
        elif self.kind == "colour":
            words = f"a {first.colour} {first.shape}"
        elif self.kind == "count":
            number = {n: word for word, n in NUMBERS.items()}[len(self.objects)]
            words = f"{number} {first.colour} {first.shape}s"
        else:
            second = self.objects[1]
            words = (
                f"a {first.colour} {first.shape} {self.relation} a {second.colour} {second.shape}"
            )
        return words + (f" on a {self.background} background" if self.background else "")


@dataclasses.dataclass(frozen=True)
class Example:
    """image: uint8 [size, size, 3]; text: its caption; caption, objects: what it shows."""

    image: np.ndarray
    text: str
    caption: Caption
    objects: tuple[Object, ...]


def parse(text: str) -> Caption:
    """The meaning of a caption of the grammar. Raises ValueError for any other text."""
    error = ValueError(
        f"{text!r} is not a caption of the `shapes` grammar (see sprint_jax/toy/shapes.py)"
    )
    words, background = text.split(), None
    if len(words) >= 4 and words[-1] == "background" and words[-4:-2] == ["on", "a"]:
        background, words = words[-2], words[:-4]
        if background not in COLOURS:
            raise error
    if len(words) == 2 and words[0] == "a" and words[1] in SHAPES:
        return Caption("shape", (Object(None, words[1]),), None, background)
    if len(words) == 3 and words[0] == "a" and words[1] in COLOURS and words[2] in SHAPES:
        return Caption("colour", (Object(words[1], words[2]),), None, background)
    if len(words) == 3 and words[0] in NUMBERS and words[1] in COLOURS and words[2][:-1] in SHAPES:
        if words[2].endswith("s"):
            same = Object(words[1], words[2][:-1])
            return Caption("count", (same,) * NUMBERS[words[0]], None, background)
    relation = " ".join(words[3:-3])
    if len(words) >= 7 and relation in RELATIONS and words[0] == words[-3] == "a":
        pair = [(words[1], words[2]), (words[-2], words[-1])]
        if all(c in COLOURS and s in SHAPES for c, s in pair):
            return Caption("relation", tuple(Object(*p) for p in pair), relation, background)
    raise error


def is_heldout(caption: Caption) -> bool:
    """Whether a caption is kept out of training: one in eight of those that combine three or more words."""
    if caption.kind in ("shape", "colour") and caption.background is None:
        return False
    return zlib.crc32(caption.text().encode()) % 8 == 0


def stream(seed: int, index: int, split: str, name: str) -> np.random.Generator:
    """Random numbers of an example for one of STREAMS. Use random() alone: that part of NumPy's generators is stable."""
    # Streams are so far apart in Philox's counter of 256 bits that they never meet.
    counter = [0, 0, 0, STREAMS.index(name)]
    return np.random.Generator(
        np.random.Philox(key=[seed, 2 * index + SPLITS.index(split)], counter=counter)
    )


def example(
    seed: int, index: int, *, size: int = 32, split: str = "train", anywhere: bool = False
) -> Example:
    """Picture and caption number `index`. Depends on nothing but the arguments.

    Args:
      seed, index: non-negative integers; together they name the example.
      size: side in pixels.
      split: "train" or "heldout"; the caption is drawn from that side of `is_heldout`.
      anywhere: objects in any cells of the grid. Another example than the one without, caption included.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: use one of {SPLITS}")
    rng = stream(seed, index, split, "anywhere" if anywhere else "example")
    kind = _KINDS[int(np.searchsorted(_KIND_CUMULATIVE, rng.random(), side="right"))]
    while True:
        caption = _draw_caption(rng, kind)
        if is_heldout(caption) == (split == "heldout"):
            break
    background = caption.background
    objects = _place(rng, caption, background, anywhere)
    return Example(render(objects, background, size), caption.text(), caption, objects)


def _pick(rng, options):
    return options[int(rng.random() * len(options))]


def _draw_caption(rng, kind) -> Caption:
    colours = list(COLOURS)
    background = None
    if rng.random() < _BACKGROUND_PROBABILITY:
        background = _pick(rng, colours)
        colours.remove(background)
    first = Object(_pick(rng, colours), _pick(rng, SHAPES))
    if kind == "shape":
        return Caption(kind, (Object(None, first.shape),), None, background)
    if kind == "colour":
        return Caption(kind, (first,), None, background)
    if kind == "count":
        return Caption(kind, (first,) * _pick(rng, (2, 3)), None, background)
    while True:  # two equal objects would be a count, not a relation
        second = Object(_pick(rng, colours), _pick(rng, SHAPES))
        if second != first:
            return Caption(kind, (first, second), _pick(rng, RELATIONS), background)


def _place(rng, caption, background, anywhere) -> tuple[Object, ...]:
    """The caption's objects with what it leaves open: colours, sizes and positions."""
    wanted = [
        dataclasses.replace(
            o, colour=o.colour or _pick(rng, [c for c in COLOURS if c != background])
        )
        for o in caption.objects
    ]
    return (_scatter if anywhere else _compose)(rng, wanted, caption.relation)


def _scatter(rng, wanted, relation) -> tuple[Object, ...]:
    """Objects of any sizes in any cells, apart from each other and in the relation asked for."""
    while True:
        placed = []
        for o in wanted:
            half = _half(rng, len(wanted))
            free = _CORNERS if half == _LARGE else _CELLS
            placed.append(dataclasses.replace(o, x=_pick(rng, free), y=_pick(rng, free), size=half))
        if _apart(placed) and (relation is None or _related(placed, relation)):
            return tuple(placed)


def _compose(rng, wanted, relation) -> tuple[Object, ...]:
    """Objects of one size in one of few arrangements, no two of which share more than one cell.

    Few, because a step of the student has to choose one of them from the noise alone; and where two arrangements share
    two cells it learns to draw those two and nothing else.
    """
    half = _half(rng, len(wanted))
    centres = _alone(rng, half) if len(wanted) == 1 else _together(rng, len(wanted), relation)
    return tuple(
        dataclasses.replace(o, x=x, y=y, size=half)
        for o, (x, y) in zip(wanted, centres, strict=True)
    )


def _half(rng, count):
    return _pick(rng, (*_SMALL, _LARGE) if count == 1 else _SMALL)


def _alone(rng, half):
    """Centre of a single object."""
    free = (0.5,) if half == _LARGE else _INNER
    return [(_pick(rng, free), _pick(rng, free))]


def _together(rng, count, relation):
    """Centres of two or three objects, half a picture apart along a row or a column."""
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


def _apart(objects) -> bool:
    for i, a in enumerate(objects):
        for b in objects[:i]:
            if max(abs(a.x - b.x), abs(a.y - b.y)) < a.size + b.size + _GAP:
                return False
    return True


def _related(objects, relation) -> bool:
    """Generously inside the checker's rule: farther apart on one axis than on the other; the grid's steps are a quarter."""
    a, b = objects
    dx, dy = b.x - a.x, b.y - a.y
    along, across = {
        "left of": (dx, dy),
        "right of": (-dx, dy),
        "above": (dy, dx),
        "below": (-dy, dx),
    }[relation]
    return along > abs(across)


def distance(shape, dx, dy, half):
    """Signed distance to the border of one shape, negative inside; outside a corner to the edges' prolongations.

    dx, dy: arrays, to the right of and below the shape's centre, in the unit of `half`.
    """
    if shape == "circle":
        return np.hypot(dx, dy) - half
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - half
    slope = np.sqrt(5.0)  # isosceles, apex up: base and height both 2 * half
    return np.maximum(dy - half, (2 * np.abs(dx) - dy - half) / slope)


def coverage(shape, x, y, half, size):
    """Anti-aliased mask of one shape. Arguments in pixels. Returns float64 [size, size] in [0, 1]."""
    ys, xs = np.mgrid[:size, :size] + 0.5
    return np.clip(0.5 - distance(shape, xs - x, ys - y, half), 0, 1)


def render(objects, background, size) -> np.ndarray:
    """uint8 [size, size, 3] of objects on a background colour (None: near-black)."""
    image = np.empty((size, size, 3))
    image[:] = COLOURS[background] if background else BLACK
    for o in objects:
        alpha = coverage(o.shape, o.x * size, o.y * size, o.size * size, size)[..., None]
        image = image * (1 - alpha) + np.array(COLOURS[o.colour]) * alpha
    return np.round(image).astype(np.uint8)
