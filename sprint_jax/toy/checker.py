"""Reads a `shapes` picture back and says whether it shows what its caption asks for.

The reader knows nothing of how a picture was made: it finds the background, cuts out connected objects,
names each one's colour and shape, and measures where it is. Scores follow GenEval's six tasks.
"""

import dataclasses
from collections import Counter

import numpy as np
from scipy import ndimage

from sprint_jax.toy import shapes

# The parts of a caption that can be right or wrong on their own; each is GenEval's task of that name.
TASKS = ("single_object", "two_objects", "counting", "colours", "position", "colour_attribution")

_PALETTE = np.array([*shapes.COLOURS.values(), shapes.BLACK], np.float64)
_NAMES = (*shapes.COLOURS, None)
_FOREGROUND = 60.0  # RGB distance from the background at which a pixel belongs to an object
_MIN_AREA = 0.012  # of the picture; smaller specks are noise (the smallest object covers 0.03)
_MIN_MATCH = 0.6  # overlap below which a region is none of the known shapes


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a picture shows. background: colour name or None for near-black; shape None: unrecognised."""

    objects: tuple[shapes.Object, ...]
    background: str | None


def _nearest(rgb):
    return _NAMES[int(np.argmin(((_PALETTE - rgb) ** 2).sum(-1)))]


def read(image) -> Reading:
    """uint8 [S, S, 3] -> Reading."""
    image = np.asarray(image, np.float64)
    size = image.shape[0]
    border = np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])
    ground = np.median(border, 0)
    mask = np.sqrt(((image - ground) ** 2).sum(-1)) > _FOREGROUND
    labels, count = ndimage.label(mask)
    objects = []
    for label in range(1, count + 1):
        region = labels == label
        if region.sum() >= _MIN_AREA * size * size:
            objects.append(_read_object(image, ground, region, size))
    return Reading(tuple(objects), _nearest(ground))


def _read_object(image, ground, region, size):
    # Edges blend into the background, so the colour is read in the interior where there is one.
    core = ndimage.binary_erosion(region)
    rgb = np.median(image[core if core.any() else region], 0)
    rows, columns = np.nonzero(region.any(1))[0], np.nonzero(region.any(0))[0]
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    x, y = (left + right) / 2, (top + bottom) / 2
    half = ((bottom - top) + (right - left)) / 4
    towards = rgb - ground  # how far each pixel has gone from the background to the object's colour
    # Of many colours the median can be the background's: then it is no colour that anything has gone towards.
    alpha = np.clip((image - ground) @ towards / max(1e-9, towards @ towards), 0, 1) * region
    matches = {shape: _best_overlap(alpha, shape, x, y, half, size) for shape in shapes.SHAPES}
    shape = max(matches, key=matches.get)
    if matches[shape] < _MIN_MATCH:
        shape = None
    return shapes.Object(_nearest(rgb), shape, x / size, y / size, half / size)


def _best_overlap(alpha, shape, x, y, half, size):
    """Largest soft intersection over union of a region's opacity with a shape of about its bounding box."""
    scores = []
    for grow in (-0.5, 0.0, 0.5):
        template = shapes.coverage(shape, x, y, half + grow, size)
        scores.append(
            np.minimum(alpha, template).sum() / max(1e-6, np.maximum(alpha, template).sum())
        )
    return max(scores)


def judge(reading: Reading, caption: shapes.Caption) -> dict[str, bool]:
    """Which tasks of a caption a reading fulfils, and `overall`: everything the caption says holds.

    Only the tasks that the caption has are present. `overall` also needs the background and no object
    too many; a single task looks at its own part alone.
    """
    objects = reading.objects
    found_shapes = Counter(o.shape for o in objects)
    found_pairs = Counter((o.colour, o.shape) for o in objects)
    wanted_shapes = Counter(o.shape for o in caption.objects)
    wanted_pairs = Counter((o.colour, o.shape) for o in caption.objects)
    background = reading.background == caption.background
    if caption.kind == "shape":
        right = found_shapes == wanted_shapes
        return {"single_object": right, "overall": right and background}
    pairs = found_pairs == wanted_pairs
    if caption.kind == "colour":
        return {
            "single_object": found_shapes == wanted_shapes,
            "colours": {o.colour for o in objects} == {o.colour for o in caption.objects},
            "overall": pairs and background,
        }
    if caption.kind == "count":
        counted = len(objects) == len(caption.objects)
        return {
            "counting": counted and found_shapes == wanted_shapes,
            "overall": pairs and background,
        }
    placed = _placed(objects, caption)
    return {
        "two_objects": found_shapes == wanted_shapes,
        "colour_attribution": pairs,
        "position": placed,
        "overall": pairs and placed and background,
    }


def _placed(objects, caption):
    """Whether objects of the two shapes and colours stand in the relation (GenEval's axis rule)."""
    first, second = (
        [o for o in objects if (o.colour, o.shape) == (wanted.colour, wanted.shape)]
        for wanted in caption.objects
    )
    return any(_holds(a, b, caption.relation) for a in first for b in second)


def _holds(a, b, relation):
    """b lies on the named side of a: clearly apart on that axis, and more so than on the other."""
    dx, dy = b.x - a.x, b.y - a.y
    along, across = {
        "left of": (dx, dy),
        "right of": (-dx, dy),
        "above": (dy, dx),
        "below": (-dy, dx),
    }[relation]
    return along > 0.1 and along > abs(across)


def score(images, captions) -> tuple[float, dict[str, float]]:
    """Share of pictures that show their whole caption, and the share right of each task.

    Args:
      images: uint8 [B, S, S, 3]. captions: B parsed captions.
    Returns:
      (overall, {task: share}); a task that no caption has is left out.
    """
    judged = [judge(read(image), caption) for image, caption in zip(images, captions, strict=True)]
    tasks = {}
    for task in TASKS:
        results = [j[task] for j in judged if task in j]
        if results:
            tasks[task] = float(np.mean(results))
    return float(np.mean([j["overall"] for j in judged])), tasks


def chance(captions_shown, captions_asked) -> float:
    """How often a perfectly read picture of one caption also fulfils another (for mismatch tests)."""
    right = [
        judge(Reading(example.objects, example.caption.background), asked)["overall"]
        for example, asked in zip(captions_shown, captions_asked, strict=True)
    ]
    return float(np.mean(right))
