"""The lines that condition a ControlNet: white on black, uint8, computed with NumPy on the host.

There are three kinds (`KINDS`):

    edges      color steps, by Sobel gradients and fixed thresholds; needs no weights
    hed        soft edges of the published HED detector (sprint_jax/conditioning/hed.py)
    scribble   strokes of one thickness along the crests of soft edges, as if drawn by hand

The published SANA ControlNet is trained on scribbles of HED. `scribble` is its post-processing with
scipy.ndimage instead of OpenCV, with the same kernels, thresholds and borders. The crests are
bit-identical. Half a percent of the pixels of strokes differ, at their borders, because OpenCV
blurs bytes in fixed-point arithmetic.
"""

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

KINDS = ("edges", "hed", "scribble")

# Thresholds of `edges` for a step between flat colors, in levels of 255 of the channel with the
# largest step. A line starts where a step reaches STRONG and continues while it is above WEAK. They
# equal OpenCV's customary 200 and 100 of a Sobel sum, which is four times a step. The closest two
# colors of `shapes` are 100 apart. Noise of 8 levels draws nothing.
STRONG = 50.0
WEAK = 25.0
_SOBEL_OF_STEP = 4.0
# A gradient within 22.5 degrees of an axis counts as parallel to it.
_SECTOR = np.float32(np.tan(np.pi / 8))

# The published settings of `scribble`, meant for images of about 512 pixels.
PUBLISHED_SIGMA = 3.0  # pixels
PUBLISHED_THICKNESS = (0, 24)  # pixels: minimum and maximum, drawn for each example
RIDGE = 127  # of 255: minimum of a crest after smoothing
_BLUR_THRESHOLD = 4  # of 255: makes a blurred crest a band of 13 pixels at sigma 3
_EROSION = 4  # pixels: side of the square that thickness 0 erodes with

DETECTOR_MULTIPLE = 64  # pixels: the detector's input has sides that are multiples of it


def gradient_edges(images: np.ndarray) -> np.ndarray:
    """Find lines of one pixel where colors step. uint8 [B, H, W, 3] -> uint8 [B, H, W], 255 or 0.

    This is Canny's method without the first blur, which would close gaps of two pixels in small
    images. It takes the Sobel gradient of the steepest channel, keeps its maxima along the gradient
    (four sectors), and keeps WEAK pixels that are connected (eight neighbors) to a STRONG one.

    Between two flat colors the line is on the side that the gradient points to: the brighter one in
    the steepest channel. The thresholds do not depend on the image, so a noisy empty image has no
    lines, and the lines of an object do not depend on other objects.
    """
    square, dy, dx = _steepest(np.asarray(images))
    crest = _uphill_crests(square, dy, dx) & (square >= WEAK**2)
    neighbors = np.zeros((3, 3, 3), bool)
    neighbors[1] = True  # connect pixels within an image, never across the batch
    labels = np.zeros(crest.shape, np.int32)
    ndimage.label(crest, neighbors, output=labels)
    kept = np.zeros(labels.max(initial=0) + 1, bool)
    kept[labels[crest & (square >= STRONG**2)]] = True
    return np.where(kept[labels], np.uint8(255), np.uint8(0))


def _steepest(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (dy^2 + dx^2, dy, dx), float32 [B, H, W], of the channel with the largest gradient.

    The unit is a level of a step. Channels are processed one by one, so that arrays stay in the
    cache.
    """
    square, dy, dx = _sobel(images[..., 0])
    for channel in (1, 2):
        other = _sobel(images[..., channel])
        steeper = other[0] > square
        square, dy, dx = (
            np.where(steeper, new, old) for new, old in zip(other, (square, dy, dx), strict=True)
        )
    return square, dy, dx


def _sobel(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (dy^2 + dx^2, dy, dx), float32 [B, H, W], of one channel, uint8 [B, H, W].

    This equals ndimage.sobel of each image with mode "nearest"; on a batch, ndimage would smooth
    across images. Sums are exact 16-bit integers, so that ties stay ties.
    """
    x = np.pad(x.astype(np.int16), ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]
    columns = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    dy = (columns[:, 2:] - columns[:, :-2]).astype(np.float32) / np.float32(_SOBEL_OF_STEP)
    dx = (rows[..., 2:] - rows[..., :-2]).astype(np.float32) / np.float32(_SOBEL_OF_STEP)
    return dy * dy + dx * dx, dy, dx


def _uphill_crests(square: np.ndarray, dy: np.ndarray, dx: np.ndarray) -> np.ndarray:
    """Find the maxima of `square` along the gradient, bool [B, H, W].

    Of two equal neighbors only the uphill one is a maximum.
    """
    # Uphill is one of eight neighbors: a step of -1, 0 or 1 down and to the right.
    down = np.sign(dy) * (np.abs(dy) >= _SECTOR * np.abs(dx))
    right = np.sign(dx) * (np.abs(dx) >= _SECTOR * np.abs(dy))
    around = np.pad(square, ((0, 0), (1, 1), (1, 1)))
    here = np.arange(around.size).reshape(around.shape)[:, 1:-1, 1:-1]
    step = (down * around.shape[2] + right).astype(np.intp)
    around = around.ravel()
    return (square > around[here + step]) & (square >= around[here - step])


def scribble(soft_edges: np.ndarray, *, thickness: int, sigma: float) -> np.ndarray:
    """Draw strokes along the crests of soft edges.

    The steps are the published ones: `crests`, a Gaussian blur truncated at three sigma and
    rounded, and a threshold at 4 of 255, which gives strokes of 13 pixels at sigma 3. The thickness
    then erodes or dilates the strokes.

    Args:
      soft_edges: uint8 [H, W] or [B, H, W].
      thickness: in pixels. 0 erodes with a square of 4. 1 to 3 leave strokes as they are. A larger
        thickness dilates with a square of thickness // 2. Published training draws it from 0 to 24.
      sigma: in pixels, `PUBLISHED_SIGMA` for images of 512 pixels. There a line of one pixel is no
        crest, because smoothing leaves 34 of 255. Use 0.5 for binary edges of small images, which
        gives strokes of 3 pixels.

    Returns:
      uint8 of the same shape, 255 or 0.

    Raises ValueError for a negative thickness, or a sigma that is not positive.
    """
    if thickness < 0 or sigma <= 0:
        raise ValueError(f"thickness {thickness} and sigma {sigma}: use 0 or more, and more than 0")
    thin = crests(soft_edges, sigma=sigma)
    blurred = np.rint(
        ndimage.gaussian_filter(
            thin.astype(np.float32), sigma, mode="mirror", truncate=3.0, axes=(-2, -1)
        )
    )
    strokes = np.where(blurred > _BLUR_THRESHOLD, np.uint8(255), np.uint8(0))
    # Squares of even side extend one pixel farther up and left. Pixels outside the image have no
    # effect.
    if thickness == 0:
        return ndimage.minimum_filter(strokes, _EROSION, mode="constant", cval=255, axes=(-2, -1))
    return ndimage.maximum_filter(
        strokes, max(1, thickness // 2), mode="constant", cval=0, axes=(-2, -1)
    )


def crests(soft_edges: np.ndarray, *, sigma: float) -> np.ndarray:
    """Thin soft edges to their crests. uint8 [..., H, W] -> uint8 [..., H, W], 255 or 0.

    A crest is a pixel above RIDGE, after a Gaussian blur truncated at four sigma, that is a maximum
    of three along at least one of four directions; ties count. This thins edges that bend or vary
    in strength, as real edges do. A perfectly straight and even edge keeps every pixel above RIDGE,
    because its pixels tie along the edge.
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


def to_uint8(probabilities: npt.ArrayLike) -> np.ndarray:
    """Convert probabilities in [0, 1] to uint8, truncated as in the published detector."""
    return np.clip(np.asarray(probabilities) * 255.0, 0, 255).astype(np.uint8)


def to_rgb(lines: np.ndarray) -> np.ndarray:
    """Repeat lines, uint8 [..., H, W], in three channels, [..., H, W, 3], for an autoencoder."""
    return np.repeat(np.asarray(lines)[..., None], 3, -1)


def resize(lines: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize lines, uint8 [h, w], to [height, width]; bicubic and antialiased, as published."""
    if lines.shape == (height, width):
        return lines
    return np.asarray(Image.fromarray(lines).resize((width, height), Image.Resampling.BICUBIC))


def detector_size(height: int, width: int, resolution: int) -> tuple[int, int]:
    """Return the (height, width) of the detector's input for an image of height x width.

    The short side becomes about `resolution`. Both are rounded to multiples of 64, at least 64.
    """
    scale = resolution / min(height, width)
    nearest = lambda side: max(1, round(side * scale / DETECTOR_MULTIPLE)) * DETECTOR_MULTIPLE
    return nearest(height), nearest(width)


def resize_for_detector(image: np.ndarray, resolution: int) -> np.ndarray:
    """Resize an image, uint8 [H, W, 3], to `detector_size`: with Lanczos to enlarge, else by area.

    These are PIL's filters instead of OpenCV's of the same names. Area averaging is equal; PIL's
    Lanczos has three lobes instead of four.
    """
    short = min(image.shape[:2])
    height, width = detector_size(image.shape[0], image.shape[1], resolution)
    method = Image.Resampling.LANCZOS if resolution > short else Image.Resampling.BOX
    return np.asarray(Image.fromarray(image).resize((width, height), method))
