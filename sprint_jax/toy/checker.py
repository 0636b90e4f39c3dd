"""The checker of `shapes`: reads an image and judges whether it shows what its caption says.

The reader does not know how an image was made. It finds the background, separates connected
objects, names the color and shape of each, and measures its position. Scores follow the six tasks
of GenEval.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import ndimage

from sprint_jax.toy import shapes

# GenEval's names of the parts of a caption that are judged separately; keys of summary.json.
TASKS = ("single_object", "two_objects", "counting", "colours", "position", "colour_attribution")

_PALETTE = np.array([*shapes.COLORS.values(), shapes.BLACK], np.float64)
_NAMES = (*shapes.COLORS, None)
_FOREGROUND = 60.0  # RGB distance from the background at which a pixel belongs to an object
_MIN_AREA = 0.012  # of the image; smaller regions are noise (the smallest object covers 0.03)
_MIN_MATCH = 0.6  # minimum overlap of a region with a known shape


@dataclasses.dataclass(frozen=True)
class Reading:
    """The content of an image."""

    objects: tuple[shapes.Object, ...]  # shape None: not recognized
    background: str | None  # None: near-black


def _nearest_color(rgb: np.ndarray) -> str | None:
    return _NAMES[int(np.argmin(((_PALETTE - rgb) ** 2).sum(-1)))]


def read(image: np.ndarray) -> Reading:
    """Find the objects and the background of an image, uint8 [S, S, 3]."""
    image = np.asarray(image, np.float64)
    size = image.shape[0]
    border = np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])
    ground = np.median(border, 0)
    mask = np.sqrt(((image - ground) ** 2).sum(-1)) > _FOREGROUND
    labels = np.zeros(mask.shape, np.int32)
    ndimage.label(mask, output=labels)
    objects = []
    for label in range(1, labels.max() + 1):
        region = labels == label
        if region.sum() >= _MIN_AREA * size * size:
            objects.append(_read_object(image, ground, region, size))
    return Reading(tuple(objects), _nearest_color(ground))


def _read_object(
    image: np.ndarray, ground: np.ndarray, region: np.ndarray, size: int
) -> shapes.Object:
    # Edges blend into the background, so the interior gives the color if there is one.
    core = np.asarray(ndimage.binary_erosion(region), bool)
    rgb = np.median(image[core if core.any() else region], 0)
    rows, columns = np.nonzero(region.any(1))[0], np.nonzero(region.any(0))[0]
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    x, y = (left + right) / 2, (top + bottom) / 2
    half = ((bottom - top) + (right - left)) / 4
    # Opacity is the projection of each pixel on the line from the background to the object's color.
    # The median of many colors can equal the background; the line then has no length.
    towards = rgb - ground
    alpha = np.clip((image - ground) @ towards / max(1e-9, towards @ towards), 0, 1) * region
    matches = {shape: _best_overlap(alpha, shape, x, y, half, size) for shape in shapes.SHAPES}
    shape = max(matches, key=lambda name: matches[name])
    known = shape if matches[shape] >= _MIN_MATCH else None
    return shapes.Object(_nearest_color(rgb), known, x=x / size, y=y / size, size=half / size)


def _best_overlap(
    alpha: np.ndarray, shape: str, x: float, y: float, half: float, size: int
) -> float:
    """Return the largest soft intersection over union of an opacity mask with a shape.

    The shape is drawn in the bounding box of the region and half a pixel smaller and larger.
    """
    scores = []
    for grow in (-0.5, 0.0, 0.5):
        template = shapes.coverage(shape, x, y, half + grow, size)
        scores.append(
            np.minimum(alpha, template).sum() / max(1e-6, np.maximum(alpha, template).sum())
        )
    return max(scores)


def judge(reading: Reading, caption: shapes.Caption) -> dict[str, bool]:
    """Judge a reading by a caption: {task: fulfilled} for the tasks of the caption, and "overall".

    A task looks at its own part of the caption only. "overall" is true if everything that the
    caption says holds, including the background, and there is no additional object.
    """
    objects = reading.objects
    found_shapes = Counter(o.shape for o in objects)
    found_pairs = Counter((o.color, o.shape) for o in objects)
    wanted_shapes = Counter(o.shape for o in caption.objects)
    wanted_pairs = Counter((o.color, o.shape) for o in caption.objects)
    background = reading.background == caption.background
    if caption.kind == "shape":
        right = found_shapes == wanted_shapes
        return {"single_object": right, "overall": right and background}
    pairs = found_pairs == wanted_pairs
    if caption.kind == "color":
        return {
            "single_object": found_shapes == wanted_shapes,
            "colours": {o.color for o in objects} == {o.color for o in caption.objects},
            "overall": pairs and background,
        }
    if caption.kind == "count":
        counted = len(objects) == len(caption.objects)
        return {
            "counting": counted and found_shapes == wanted_shapes,
            "overall": pairs and background,
        }
    placed = _are_placed(objects, caption)
    return {
        "two_objects": found_shapes == wanted_shapes,
        "colour_attribution": pairs,
        "position": placed,
        "overall": pairs and placed and background,
    }


def _are_placed(objects: Sequence[shapes.Object], caption: shapes.Caption) -> bool:
    """Return whether objects of the two shapes and colors stand in the caption's relation."""
    if caption.relation is None:
        return False
    first, second = (
        [o for o in objects if (o.color, o.shape) == (wanted.color, wanted.shape)]
        for wanted in caption.objects
    )
    return any(_holds(a, b, caption.relation) for a in first for b in second)


def _holds(a: shapes.Object, b: shapes.Object, relation: str) -> bool:
    """Return whether a stands in the relation to b, by GenEval's axis rule.

    The two must be at least 0.1 apart along the axis of the relation, and farther than across it.
    """
    dx, dy = b.x - a.x, b.y - a.y
    along, across = {
        "left of": (dx, dy),
        "right of": (-dx, dy),
        "above": (dy, dx),
        "below": (-dy, dx),
    }[relation]
    return along > 0.1 and along > abs(across)


def score(
    images: Iterable[np.ndarray], captions: Iterable[shapes.Caption]
) -> tuple[float, dict[str, float]]:
    """Return the fraction of images that show their whole caption, and the fraction by task.

    Args:
      images: B images, uint8 [S, S, 3].
      captions: the B parsed captions.

    Returns:
      (overall, {task: fraction}), without the tasks that no caption has.
    """
    judged = [judge(read(image), caption) for image, caption in zip(images, captions, strict=True)]
    tasks = {}
    for task in TASKS:
        results = [j[task] for j in judged if task in j]
        if results:
            tasks[task] = float(np.mean(results))
    return float(np.mean([j["overall"] for j in judged])), tasks


def reward(prompts: Sequence[str], images: Sequence[np.ndarray]) -> np.ndarray:
    """Return a verdict in [0, 1] of each image: half for the whole caption, half for the share of
    its tasks. A judge for training; scores of what was trained by it measure nothing.
    """
    found = []
    for prompt, image in zip(prompts, images, strict=True):
        judged = judge(read(image), shapes.parse(prompt))
        tasks = [right for task, right in judged.items() if task != "overall"]
        found.append(0.5 * judged["overall"] + 0.5 * float(np.mean(tasks)))
    return np.asarray(found)


def chance(shown: Iterable[shapes.Example], asked: Iterable[shapes.Caption]) -> float:
    """Return how often an image, read without error, also fulfils the caption of another."""
    right = [
        judge(Reading(example.objects, example.caption.background), caption)["overall"]
        for example, caption in zip(shown, asked, strict=True)
    ]
    return float(np.mean(right))
