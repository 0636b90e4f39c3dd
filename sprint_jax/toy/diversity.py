"""Diversity of images of `shapes`: in how many arrangements a generator draws one caption.

A caption leaves open where its objects stand and how large they are: the arrangement. Of each
caption N images from N noises are read; those that are right count. The effective number of
arrangements is exp(H) with the entropy H of their frequencies: 1 for a generator that always draws
the same, the number of arrangements for one that draws all alike. A generator that shows fewer than
its teacher has collapsed, however many of its images are right.
"""

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np

from sprint_jax.toy import checker, shapes

# The color, shape, place (in eighths of the side) and size of each object, sorted; None where an
# image is wrong.
Arrangement: TypeAlias = tuple[tuple, ...] | None

_PLACES = 8
_SIZES = (3 / 32, 4 / 32, 8 / 32)
_DRAWS = 600  # of a caption, to find its arrangements: at most 54 that are equally probable


def arrangement(objects: Iterable[shapes.Object]) -> Arrangement:
    """Return the arrangement of objects, as drawn or as read."""
    place = lambda part: round(part * _PLACES)
    size = lambda half: int(np.argmin(np.abs(np.subtract(_SIZES, half))))
    return tuple(sorted((o.color, o.shape, place(o.x), place(o.y), size(o.size)) for o in objects))


@functools.cache
def possible(caption: shapes.Caption) -> frozenset[Arrangement]:
    """Return the arrangements in which the data show a caption."""
    draws = (shapes.arrange(caption, index) for index in range(_DRAWS))
    return frozenset(map(arrangement, draws))


def captions(split: str, count: int, *, seed: int) -> list[shapes.Caption]:
    """Return the first `count` distinct captions of a split."""
    found: dict[str, shapes.Caption] = {}
    index = 0
    while len(found) < count:
        example = shapes.example(seed, index, split=split, size=8)
        found.setdefault(example.text, example.caption)
        index += 1
    return list(found.values())


def read(
    images: np.ndarray, asked: Sequence[shapes.Caption], per_caption: int
) -> list[list[Arrangement]]:
    """Return the arrangement of each image of each caption.

    images: uint8 [captions x per_caption, S, S, 3], those of one caption after the other.
    """
    found = []
    for caption, some in zip(asked, np.split(images, len(asked)), strict=True):
        readings = [checker.read(image) for image in some]
        right = [checker.judge(reading, caption)["overall"] for reading in readings]
        found.append(
            [
                arrangement(reading.objects) if ok else None
                for reading, ok in zip(readings, right, strict=True)
            ]
        )
        assert len(readings) == per_caption
    return found


def effective(arrangements: Sequence[Arrangement]) -> float:
    """Return exp(entropy) of the arrangements of the right images; 0 if all are wrong."""
    counts = np.array(list(Counter(a for a in arrangements if a is not None).values()), float)
    p = counts / counts.sum()
    return float(np.exp(-(p * np.log(p)).sum())) if len(p) else 0.0


def figures(
    found: Sequence[Sequence[Arrangement]], asked: Sequence[shapes.Caption]
) -> dict[str, float]:
    """Return the mean over captions of the effective number ("arrangements"), and of the share of
    possible arrangements that no image shows ("never drawn").
    """
    missing = [
        1 - len(possible(caption).intersection(one)) / len(possible(caption))
        for one, caption in zip(found, asked, strict=True)
    ]
    return {
        "arrangements": float(np.mean([effective(one) for one in found])),
        "never_drawn": float(np.mean(missing)),
    }


def same(found: Sequence[Sequence[Arrangement]], other: Sequence[Sequence[Arrangement]]) -> float:
    """Return how often the arrangement is that of the other's image of the same noise, where that
    is right.
    """
    pairs = [
        (a, b)
        for one, two in zip(found, other, strict=True)
        for a, b in zip(one, two, strict=True)
        if b is not None
    ]
    return float(np.mean([a == b for a, b in pairs])) if pairs else 0.0
