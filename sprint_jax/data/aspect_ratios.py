"""Aspect-ratio bins of the published models, and the choice of a size for an image."""

import math
from collections.abc import Iterable

# (height, width) of the 33 bins of the 1024 px models, of about one megapixel each. These are the
# sizes in diffusers; the published trainer has a finer table of 40.
BINS_1024 = (
    (512, 2048), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600), (640, 1536),
    (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152),
    (896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024), (1024, 960), (1088, 960),
    (1088, 896), (1152, 896), (1152, 832), (1216, 832), (1280, 768), (1344, 768), (1408, 704),
    (1472, 704), (1536, 640), (1600, 640), (1728, 576), (2048, 512),
)  # fmt: skip


def nearest_bin(height: int, width: int) -> tuple[int, int]:
    """Return the bin with the nearest ratio of height to width.

    Ratios of bins are rounded to two digits, as published.
    """
    return min(BINS_1024, key=lambda bin: abs(round(bin[0] / bin[1], 2) - height / width))


def nearest_bucket(height: int, width: int, buckets: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Return the bucket (h, w) that crops the least of an image of height x width.

    Ratios are compared by their quotient, so that transposing the image and the buckets transposes
    the result. Of several buckets with one ratio, the nearest in area wins. The order of buckets
    does not matter.
    """

    def distance(bucket: tuple[int, int]) -> tuple[float, float, int]:
        h, w = bucket
        return abs(math.log(h * width / (w * height))), abs(math.log(h * w / (height * width))), h

    height, width = min(buckets, key=distance)
    return height, width
