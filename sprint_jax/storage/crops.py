"""Resizing images to cover a size, with a crop of the middle.

There are four functions, because each reproduces another program or has another purpose:

    fit_lanczos     images that users give: the best quality
    fit_bicubic     training images: crops before it resizes, in fractions of a pixel
    fit_bilinear    generated images: the published pipeline, after it decodes an aspect-ratio bin
    fit_short_side  images to be scored: torchvision's preprocessing, as in published scores
"""

import numpy as np
from PIL import Image, ImageOps


def fit_lanczos(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Resize an RGB image of PIL to cover height x width. Returns uint8 [height, width, 3].

    It crops before it resizes, so that an image of one row does not become huge on the way.
    """
    return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))


def fit_bicubic(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize an image, uint8 [H, W, 3], to cover [height, width, 3]; bicubic and antialiased.

    The crop is part of the resize and has fractional borders. A very long image therefore never
    exists at its scaled size. An image of the right size is returned as it is.
    """
    have_height, have_width = image.shape[:2]
    if (have_height, have_width) == (height, width):
        return image
    scale = max(height / have_height, width / have_width)
    seen_height, seen_width = min(height / scale, have_height), min(width / scale, have_width)
    top, left = (have_height - seen_height) / 2, (have_width - seen_width) / 2
    box = (left, top, left + seen_width, top + seen_height)
    return np.array(
        Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC, box=box)
    )


def fit_bilinear(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize images, uint8 [B, H, W, 3], to cover [B, height, width, 3]; bilinear, not antialiased.

    Images of the right size are returned as they are.
    """
    import jax  # only here: commands that crop on the host start faster without it

    count, have_height, have_width, _ = images.shape
    if (have_height, have_width) == (height, width):
        return images
    ratio = max(height / have_height, width / have_width)
    # Rounded down as published, but never below the size of the crop: ratios are not exact.
    size = max(height, int(have_height * ratio)), max(width, int(have_width * ratio))
    resize = jax.jit(lambda x: jax.image.resize(x, (count, *size, 3), "linear", antialias=False))
    resized = np.asarray(resize(images.astype(np.float32)))
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    cropped = resized[:, top : top + height, left : left + width]
    return np.clip(np.round(cropped), 0, 255).astype(np.uint8)


def fit_short_side(
    image: np.ndarray, size: int, method: Image.Resampling = Image.Resampling.BILINEAR
) -> np.ndarray:
    """Resize the shorter side of an image, uint8 [H, W, 3], and crop to [size, size, 3].

    This equals Resize(size) and CenterCrop(size) of torchvision on an image of PIL.
    """
    height, width = image.shape[:2]
    short, long = min(height, width), max(height, width)
    other = int(size * long / short)
    rows, columns = (size, other) if height <= width else (other, size)
    if (rows, columns) != (height, width):
        image = np.asarray(Image.fromarray(image).resize((columns, rows), method))
    top, left = round((rows - size) / 2), round((columns - size) / 2)
    return image[top : top + size, left : left + size]
