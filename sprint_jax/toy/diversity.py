"""Diversity of images of `shapes`: in how many arrangements a generator draws one caption.

A caption leaves open where its objects stand and how large they are: the arrangement. Of each
caption N images from N noises are read; those count that are right and show an arrangement of the
data. The effective number of arrangements is exp(H) with the entropy H of their frequencies: 1 for
a generator that always draws the same, the number of arrangements for one that draws all alike. A
generator that shows fewer than its teacher has collapsed, however many of its images are right.
"""

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np

from sprint_jax.toy import checker, shapes

# The color, shape, place (in eighths of the side) and size of each object, sorted.
Arrangement: TypeAlias = tuple[tuple, ...]
# The number of an image's arrangement among those possible; -1 where the image is wrong or shows
# another.
Numbers: TypeAlias = np.ndarray
NONE = -1

_PLACES = 8
_SIZES = (3 / 32, 4 / 32, 8 / 32)
_DRAWS = 600  # of a caption, to find its arrangements: at most 54 that are equally probable


def arrangement(objects: Iterable[shapes.Object]) -> Arrangement:
    """Return the arrangement of objects, as drawn or as read."""
    place = lambda part: round(part * _PLACES)
    size = lambda half: int(np.argmin(np.abs(np.subtract(_SIZES, half))))
    found = [(str(o.color), str(o.shape), place(o.x), place(o.y), size(o.size)) for o in objects]
    return tuple(sorted(found))


@functools.cache
def possible(caption: shapes.Caption) -> tuple[Arrangement, ...]:
    """Return the arrangements in which the data show a caption, sorted."""
    draws = (shapes.arrange(caption, index) for index in range(_DRAWS))
    return tuple(sorted(set(map(arrangement, draws))))


def captions(split: str, count: int, *, seed: int) -> list[shapes.Caption]:
    """Return the first `count` distinct captions of a split."""
    found: dict[str, shapes.Caption] = {}
    index = 0
    while len(found) < count:
        example = shapes.example(seed, index, split=split, size=8)
        found.setdefault(example.text, example.caption)
        index += 1
    return list(found.values())


def read(images: np.ndarray, asked: Sequence[shapes.Caption]) -> Numbers:
    """Return the arrangement of each image of each caption, int [captions, N].

    images: uint8 [captions x N, S, S, 3], those of one caption after the other.
    """
    groups = zip(asked, np.split(images, len(asked)), strict=True)
    return np.array([[_number(image, caption) for image in some] for caption, some in groups])


def _number(image, caption):
    reading, known = checker.read(image), possible(caption)
    if not checker.judge(reading, caption)["overall"]:
        return NONE
    found = arrangement(reading.objects)
    return known.index(found) if found in known else NONE


def effective(numbers: Numbers) -> float:
    """Return exp(entropy) of the arrangements [N] of one caption; 0 if none counts."""
    counts = np.array(list(Counter(numbers[numbers != NONE].tolist()).values()), float)
    p = counts / counts.sum()
    return float(np.exp(-(p * np.log(p)).sum())) if len(p) else 0.0


def figures(found: Numbers, asked: Sequence[shapes.Caption]) -> dict[str, float]:
    """Return the mean over captions of the effective number ("arrangements"), and of the share of
    possible arrangements that no image shows ("never_drawn").
    """
    drawn = [len(set(row.tolist()) - {NONE}) for row in found]
    known = [len(possible(caption)) for caption in asked]
    return {
        "arrangements": float(np.mean([effective(row) for row in found])),
        "never_drawn": float(1 - np.mean(np.divide(drawn, known))),
    }


def same(found: Numbers, other: Numbers) -> float:
    """Return how often an image's arrangement is that of the other's image of the same noise, where
    that has one.
    """
    there = other != NONE
    return float((found == other)[there].mean()) if there.any() else 0.0
