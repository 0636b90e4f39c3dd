"""Rough sketches of `shapes`, as a person draws on the page: off the grid, of another size, wobbling, with any pen.

A picture stays on its grid, since the small patch codec knows aligned patches alone; so a ControlNet that sees the
sketch and learns the picture learns to snap a drawing to the nearest clean composition. The page (serving/page.js)
draws white lines with round joins on a canvas of 256 pixels or more, which the server scales to the picture's side:
lines that are grey at their borders, and a thin one is grey all over. A sketch is drawn as that looks afterwards.
"""

import functools

import numpy as np

from sprint_jax.toy import shapes

# Shares of the picture's side, but for SCALE.
SHIFT = 1 / 8  # half a cell: beyond it the nearest cell is another one
SCALE = (0.75, 1.3)  # the large size at its least is still above the small ones at their most
WOBBLE = 1 / 32  # the most that an outline goes in or out
WIDTH = (
    0.02,
    0.16,
)  # of a stroke: from the page's finest pen to its brush; its usual pen is in the middle
_WAVES = (2, 3, 4)  # in and out, so many times around: low, as a hand's
_CORNERS = (
    24  # of the polygon that an outline is drawn as; those of squares and triangles are on its rays
)


def chosen(seed: int, index: int, share: float) -> bool:
    """Whether a training example is a composition anywhere with its rough sketch. share: the probability."""
    return bool(shapes.stream(seed, index, "train", "choice").random() < share)


def sketch(seed: int, index: int, objects, *, size: int, split: str):
    """Outlines of objects drawn by hand: uint8 [size, size], 255 on a stroke and grey at its borders.

    Depends on nothing but the arguments. seed, index, split: of the example that holds `objects`.
    """
    rng = shapes.stream(seed, index, split, "sketch")
    low, high = WIDTH
    width = (
        low * (high / low) ** rng.random()
    )  # by ratios, or most strokes would be nearer the brush than the pen
    ink = np.zeros((size, size))
    for o in objects:
        half = o.size * (SCALE[0] + (SCALE[1] - SCALE[0]) * rng.random())
        # Nobody draws beyond the paper.
        x, y = (min(max(at + SHIFT * (2 * rng.random() - 1), half), 1 - half) for at in (o.x, o.y))
        heights = [2 * rng.random() - 1 for _ in _WAVES]
        phases = [2 * np.pi * rng.random() for _ in _WAVES]
        points = np.array([x, y]) + outline(
            o.shape, half, np.array(heights) * WOBBLE / len(_WAVES), phases
        )
        ink = np.maximum(ink, stroke(points * size, width * size, size))
    return np.round(255 * ink).astype(np.uint8)


def outline(shape, half, heights, phases):
    """Corners of a shape's wobbling outline, float64 [_CORNERS, 2], x and y from its centre, in the unit of `half`.

    heights, phases: of the waves by which it goes out and in along its rays; heights in the unit of `half`, phases in radians.
    """
    angles, rays, border = _border(shape)
    waves = sum(h * np.cos(k * angles + p) for k, h, p in zip(_WAVES, heights, phases, strict=True))
    return (half * border + waves)[:, None] * rays


@functools.cache  # found by halving, which would be a quarter of the time of a batch
def _border(shape):
    """Directions of the rays, angles and vectors, and how far the border of a shape of half extent 1 is along each."""
    angles = np.linspace(0, 2 * np.pi, _CORNERS, endpoint=False)
    rays = np.stack([np.cos(angles), np.sin(angles)], -1)
    near, far = np.zeros(_CORNERS), np.full(_CORNERS, 2.0)  # the border is between
    for _ in range(20):
        middle = (near + far) / 2
        inside = shapes.distance(shape, *(middle[:, None] * rays).T, 1) < 0
        near, far = np.where(inside, middle, near), np.where(inside, far, middle)
    return angles, rays, near


def stroke(points, width, size):
    """A closed line through points [N, 2] with round joins. All in pixels. float32 [size, size]: the share of each in it."""
    middles = np.arange(size, dtype=np.float32) + 0.5
    points = points.astype(np.float32)
    edges = np.roll(points, -1, 0) - points
    lengths = np.maximum(np.hypot(*edges.T), 1e-6)
    ahead = edges / lengths[:, None]
    # Arrays [N, rows, columns] as sums of what depends on one of the two alone, for speed.
    dx, dy = middles - points[:, :1], middles - points[:, 1:]
    along = (dx * ahead[:, :1])[:, None] + (dy * ahead[:, 1:])[..., None]
    # How far along each edge its nearest place to a pixel is; the rest is Pythagoras.
    square = (dx**2)[:, None] + (dy**2)[..., None]
    reached = np.clip(along, 0, lengths[:, None, None])
    nearest = np.sqrt(np.maximum((square - reached * (2 * along - reached)).min(0), 0))
    # A line that is thinner than a pixel fills none: what a box of one pixel sees of it.
    return np.clip((width + 1) / 2 - nearest, 0, min(width, 1))
