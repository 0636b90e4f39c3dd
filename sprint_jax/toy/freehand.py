"""Rough sketches of `shapes`, like those that people draw on the web page.

They are off the grid, of another size, wobbly, and drawn with a pen of any width. The image of a
sketch stays on the grid, because the small patch codec can only represent aligned patches. A
ControlNet that sees sketches and learns such images learns to snap a drawing to the nearest clean
composition.

The page (serving/page.js) draws white lines with round joins on a canvas of at least 256 pixels.
The server scales it to the side of the image. Lines then have gray borders, and a thin line is gray
everywhere. Sketches here look like the result of that.
"""

import functools
from collections.abc import Iterable, Sequence

import numpy as np

from sprint_jax.toy import shapes

# Fractions of the image's side, except for SCALE.
SHIFT = 1 / 8  # half a cell; with a larger shift another cell would be nearest
SCALE = (0.75, 1.3)  # the smallest large object is still larger than the largest small one
WOBBLE = 1 / 32  # maximum displacement of an outline
WIDTH = (0.02, 0.16)  # of a stroke, from the page's finest pen to its brush
_WAVES = (2, 3, 4)  # periods around an outline; hands wobble at low frequencies
_CORNERS = 24  # of the polygon of an outline; squares and triangles have their corners on rays


def is_rough(seed: int, index: int, probability: float) -> bool:
    """Return whether a training example is drawn anywhere and shown as a rough sketch."""
    return bool(shapes.stream(seed, index, "train", "choice").random() < probability)


def sketch(
    seed: int, index: int, objects: Iterable[shapes.Object], *, size: int, split: str
) -> np.ndarray:
    """Draw the outlines of objects by hand. The result depends on the arguments only.

    seed, index, split: name the example that shows the objects.
    Returns uint8 [size, size]: 255 on a stroke, 0 beside it, gray at its borders.
    """
    rng = shapes.stream(seed, index, split, "sketch")
    low, high = WIDTH
    # Log-uniform: with a uniform width most strokes would be as wide as the brush.
    width = low * (high / low) ** rng.random()
    ink = np.zeros((size, size))
    for o in objects:
        assert o.shape is not None
        half = o.size * (SCALE[0] + (SCALE[1] - SCALE[0]) * rng.random())
        # Keep the object inside the canvas.
        x, y = (min(max(at + SHIFT * (2 * rng.random() - 1), half), 1 - half) for at in (o.x, o.y))
        heights = [2 * rng.random() - 1 for _ in _WAVES]
        phases = [2 * np.pi * rng.random() for _ in _WAVES]
        points = np.array([x, y]) + outline(
            o.shape, half, np.array(heights) * WOBBLE / len(_WAVES), phases
        )
        ink = np.maximum(ink, stroke(points * size, width * size, size))
    return np.round(255 * ink).astype(np.uint8)


def outline(
    shape: str, half: float, heights: Sequence[float] | np.ndarray, phases: Sequence[float]
) -> np.ndarray:
    """Return the corners of a wobbly outline, float64 [_CORNERS, 2]: x and y from the center.

    half: half extent of the shape, in the unit of the result. heights, phases: amplitudes (same
    unit) and phases (radians) of the waves that displace the outline along its rays.
    """
    angles, rays, border = _border(shape)
    waves = sum(h * np.cos(k * angles + p) for k, h, p in zip(_WAVES, heights, phases, strict=True))
    return (half * border + waves)[:, None] * rays


@functools.cache  # the bisection would take a quarter of the time of a batch
def _border(shape: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return angles [N], directions [N, 2] and border distances [N] of the rays of a shape."""
    angles = np.linspace(0, 2 * np.pi, _CORNERS, endpoint=False)
    rays = np.stack([np.cos(angles), np.sin(angles)], -1)
    near, far = np.zeros(_CORNERS), np.full(_CORNERS, 2.0)  # the border is between
    for _ in range(20):
        middle = (near + far) / 2
        inside = shapes.distance(shape, *(middle[:, None] * rays).T, 1) < 0
        near, far = np.where(inside, middle, near), np.where(inside, far, middle)
    return angles, rays, near


def stroke(points: np.ndarray, width: float, size: int) -> np.ndarray:
    """Draw a closed line through points [N, 2] with round joins. All arguments are in pixels.

    Returns float32 [size, size], the fraction of each pixel that the line covers.
    """
    middles = np.arange(size, dtype=np.float32) + 0.5
    points = points.astype(np.float32)
    edges = np.roll(points, -1, 0) - points
    lengths = np.maximum(np.hypot(*edges.T), 1e-6)
    ahead = edges / lengths[:, None]
    # Sums of terms that depend on either the row or the column, broadcast to [N, rows, columns].
    dx, dy = middles - points[:, :1], middles - points[:, 1:]
    along = (dx * ahead[:, :1])[:, None] + (dy * ahead[:, 1:])[..., None]
    # The distance to an edge follows from the distance along it by Pythagoras.
    square = (dx**2)[:, None] + (dy**2)[..., None]
    reached = np.clip(along, 0, lengths[:, None, None])
    nearest = np.sqrt(np.maximum((square - reached * (2 * along - reached)).min(0), 0))
    # A line thinner than a pixel covers at most its own width of it.
    return np.clip((width + 1) / 2 - nearest, 0, min(width, 1))
