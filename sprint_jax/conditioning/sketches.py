"""Pictures to what a ControlNet is steered by: white lines on black. NumPy on the host, pure functions of arrays.

Three kinds (`KINDS`), all uint8 with 255 on a line and 0 beside it:

    edges      where colours step, by Sobel's gradient and fixed thresholds; needs no weights (the embedded default)
    hed        soft edges of the published HED detector, by weights that the user has (sprint_jax/conditioning/hed.py)
    scribble   strokes of one thickness along the crests of soft edges, as if drawn by hand

The published SANA ControlNet is trained on scribbles of HED. `scribble` is its post-processing with scipy.ndimage in the
place of OpenCV, kernels, cut-offs and borders alike: crests are the same bit by bit, and of the strokes half a percent of
the pixels differ, at their borders, since OpenCV blurs bytes in fixed point.
"""

import numpy as np
from PIL import Image
from scipy import ndimage

KINDS = ("edges", "hed", "scribble")

# `edges`: heights of a step between flat colours, in levels of 255 of the channel that steps most. A line begins where a
# step reaches STRONG and goes on while it is above WEAK. They are OpenCV's customary 200 and 100 of a Sobel sum, which is
# four times a step. The nearest two colours of `shapes` are 100 apart; noise of 8 levels draws nothing.
STRONG = 50.0
WEAK = 25.0
_SOBEL_OF_STEP = 4.0
_SECTOR = np.float32(
    np.tan(np.pi / 8)
)  # within 22.5 degrees of an axis a gradient counts as along it

# `scribble`, published: made for pictures of about 512 pixels.
PUBLISHED_SIGMA = 3.0  # pixels
PUBLISHED_THICKNESS = (0, 24)  # pixels: least and most, drawn for each example
RIDGE = 127  # of 255: a crest, after smoothing, that is drawn
_SMEARED = (
    4  # of 255: what a blurred crest is cut at, which makes it a band of 13 pixels at sigma 3
)
_ERODED = 4  # pixels of the square that thickness 0 erodes with

DETECTOR_MULTIPLE = 64  # pixels: the detector's pictures have sides that are multiples of it


def gradient_edges(images):
    """Lines of one pixel where colours step. uint8 [B, H, W, 3] -> uint8 [B, H, W], 255 or 0.

    Canny's way without its first blur, which would close gaps of two pixels in small pictures: Sobel's gradient of each
    channel, of the three the largest; kept where it is a maximum along its own direction (four sectors); then
    hysteresis, WEAK pixels count where they touch (eight neighbours) a STRONG one. Between two flat colours the line is
    on the side that the gradient points to, the brighter one in the channel that steps most. Thresholds are fixed, never
    those of a picture, so noise on an empty picture stays empty. Lines depend on nothing farther than their object.
    """
    square, dy, dx = _steepest(np.asarray(images))
    crest = _uphill_crests(square, dy, dx) & (square >= WEAK**2)
    neighbours = np.zeros((3, 3, 3), bool)
    neighbours[1] = True  # within a picture, never from one of a batch to the next
    labels, count = ndimage.label(crest, neighbours)
    kept = np.zeros(count + 1, bool)
    kept[labels[crest & (square >= STRONG**2)]] = True
    return np.where(kept[labels], np.uint8(255), np.uint8(0))


def _steepest(images):
    """(dy^2 + dx^2, dy, dx), float32 [B, H, W], of the channel with the largest gradient, in levels of a step.

    A channel at a time, so that what is in work stays in the cache.
    """
    square, dy, dx = _sobel(images[..., 0])
    for channel in (1, 2):
        other = _sobel(images[..., channel])
        steeper = other[0] > square
        square, dy, dx = (
            np.where(steeper, new, old) for new, old in zip(other, (square, dy, dx), strict=True)
        )
    return square, dy, dx


def _sobel(x):
    """(dy^2 + dx^2, dy, dx), float32 [B, H, W], of one channel, uint8 [B, H, W].

    ndimage.sobel of a picture, mode "nearest"; of a batch that would smooth from one picture to the next. In integers of 16
    bits and exact, so ties are ties.
    """
    x = np.pad(x.astype(np.int16), ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]
    columns = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    dy = (columns[:, 2:] - columns[:, :-2]).astype(np.float32) / np.float32(_SOBEL_OF_STEP)
    dx = (rows[..., 2:] - rows[..., :-2]).astype(np.float32) / np.float32(_SOBEL_OF_STEP)
    return dy * dy + dx * dx, dy, dx


def _uphill_crests(square, dy, dx):
    """Where `square` is a maximum along its gradient: bool [B, H, W]. Of two equal neighbours the one uphill."""
    # Uphill is one of eight neighbours: a step of -1, 0 or 1 down and to the right.
    down = np.sign(dy) * (np.abs(dy) >= _SECTOR * np.abs(dx))
    right = np.sign(dx) * (np.abs(dx) >= _SECTOR * np.abs(dy))
    around = np.pad(square, ((0, 0), (1, 1), (1, 1)))
    here = np.arange(around.size).reshape(around.shape)[:, 1:-1, 1:-1]
    step = (down * around.shape[2] + right).astype(np.intp)
    around = around.ravel()
    return (square > around[here + step]) & (square >= around[here - step])


def scribble(soft_edges, *, thickness, sigma):
    """Strokes along the crests of soft edges. uint8 [H, W] or [B, H, W] -> the same shape, 255 or 0.

    The published steps: `crests`, a Gaussian of sigma cut to three of them and rounded, more than 4 of 255 is a stroke
    (13 pixels wide at sigma 3). Then thickness, in pixels: 0 erodes with a square of 4, 1 leaves strokes as they are,
    above 1 dilates with a square of thickness // 2 (so 2 and 3 leave them too). Published training draws it from 0 to 24.

    sigma: pixels, `PUBLISHED_SIGMA` at 512. A line of one pixel is no crest there, it has 34 of 255 after smoothing;
    binary edges of small pictures take 0.5, which gives strokes of 3 pixels.
    """
    if thickness < 0 or sigma <= 0:
        raise ValueError(f"thickness {thickness} and sigma {sigma}: use 0 or more, and more than 0")
    thin = crests(soft_edges, sigma=sigma)
    smeared = np.rint(
        ndimage.gaussian_filter(
            thin.astype(np.float32), sigma, mode="mirror", truncate=3.0, axes=(-2, -1)
        )
    )
    strokes = np.where(smeared > _SMEARED, np.uint8(255), np.uint8(0))
    # Squares of an even side reach one pixel farther up and left; nothing comes in from outside a picture.
    if thickness == 0:
        return ndimage.minimum_filter(strokes, _ERODED, mode="constant", cval=255, axes=(-2, -1))
    return ndimage.maximum_filter(
        strokes, max(1, thickness // 2), mode="constant", cval=0, axes=(-2, -1)
    )


def crests(soft_edges, *, sigma):
    """Non-maximum suppression: soft edges thinned to their crests. uint8 [..., H, W] -> uint8 [..., H, W], 255 or 0.

    After a Gaussian of sigma pixels (cut to four of them), pixels above RIDGE that are a maximum of three along any one of
    the four directions, ties included. So an edge is thinned where it bends or changes in strength, as real ones do; of
    one that is exactly straight and even all of what is above RIDGE stays, since along itself it is a tie.
    """
    soft = ndimage.gaussian_filter(
        np.asarray(soft_edges).astype(np.float32), sigma, mode="mirror", truncate=4.0, axes=(-2, -1)
    )
    crest = np.zeros(soft.shape, bool)
    level, diagonal = np.array([[0, 0, 0], [1, 1, 1], [0, 0, 0]], bool), np.eye(3, dtype=bool)
    for line in (level, level.T, diagonal, diagonal[::-1]):
        footprint = line.reshape((1,) * (soft.ndim - 2) + (3, 3))
        crest |= (
            ndimage.maximum_filter(soft, footprint=footprint, mode="constant", cval=-np.inf) == soft
        )
    return np.where(crest & (soft > RIDGE), np.uint8(255), np.uint8(0))


def levels(soft_edges):
    """Probabilities in [0, 1], float [...], as uint8 [...]: 255 times them, cut off as the published detector does."""
    return np.clip(np.asarray(soft_edges) * 255.0, 0, 255).astype(np.uint8)


def as_picture(edges):
    """uint8 [..., H, W] -> uint8 [..., H, W, 3], the three channels equal: what an autoencoder encodes as the control input."""
    return np.repeat(np.asarray(edges)[..., None], 3, -1)


def resized(lines, height, width):
    """Lines that were drawn at another size, uint8 [h, w] -> uint8 [height, width]. Bicubic, antialiased, as published."""
    if lines.shape == (height, width):
        return lines
    return np.asarray(Image.fromarray(lines).resize((width, height), Image.Resampling.BICUBIC))


def detector_size(height, width, resolution):
    """(height, width) that the detector sees: the short side near `resolution`, both to the nearest multiple of 64, at least one."""
    scale = resolution / min(height, width)
    nearest = lambda side: max(1, round(side * scale / DETECTOR_MULTIPLE)) * DETECTOR_MULTIPLE
    return nearest(height), nearest(width)


def detector_picture(image, resolution):
    """uint8 [H, W, 3] -> uint8 of `detector_size`, resized by Lanczos to a larger one, by areas to a smaller one.

    PIL's filters in the place of OpenCV's of those names: areas are equal, Lanczos has three lobes instead of four.
    """
    height, width = detector_size(*image.shape[:2], resolution)
    method = Image.Resampling.LANCZOS if resolution > min(image.shape[:2]) else Image.Resampling.BOX
    return np.asarray(Image.fromarray(image).resize((width, height), method))
