"""Agreement of the edges of images with reference edges."""

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage


def agreement(edges_a: ArrayLike, edges_b: ArrayLike) -> np.ndarray:
    """Return the intersection over union of edge maps that are dilated by one pixel.

    Dilation adds the eight neighbors of every edge pixel. So straight lines that are one pixel
    apart agree by half (2 of 4 pixels across), and lines three pixels apart not at all. Two empty
    maps agree by 1. The measure is symmetric.

    edges_a, edges_b: [B, H, W], bool or numbers; nonzero is an edge. Returns float64 [B] in [0, 1].
    Raises ValueError for unequal shapes.
    """
    a, b = np.asarray(edges_a) != 0, np.asarray(edges_b) != 0
    if a.shape != b.shape or a.ndim != 3:
        raise ValueError(
            f"edge maps of shapes {a.shape} and {b.shape}: give two of one shape [B, H, W]"
        )
    a, b = _dilated(a), _dilated(b)
    both, either = (a & b).sum((1, 2)), (a | b).sum((1, 2))
    return np.where(either == 0, 1.0, both / np.maximum(either, 1))


def _dilated(edges):
    return np.asarray(ndimage.binary_dilation(edges, np.ones((1, 3, 3), bool)), bool)
