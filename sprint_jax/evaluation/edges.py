"""How well the edges of a picture agree with those it was asked for."""

import numpy as np
from scipy import ndimage


def agreement(edges_a, edges_b):
    """Intersection over union of two edge maps after both are dilated by one pixel. -> float64 [B] in [0, 1].

    Each map becomes the set of pixels within one pixel, diagonals included (a 3 x 3 square), of any of its edges; the
    share is of the pixels in both sets among those in either. So lines one pixel apart still agree by half (a straight
    line: 2 of 4 pixels across), and lines three apart not at all. Two empty maps agree: 1.

    edges_a, edges_b: [B, H, W], bool or numbers, an edge where not 0. Symmetric. Raises ValueError for unequal shapes.
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
    return ndimage.binary_dilation(edges, np.ones((1, 3, 3), bool))
