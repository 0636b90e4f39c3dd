"""Aspect-ratio bins of the published models: diffusers' sizes of about one megapixel for them (the trainer has a finer table of 40)."""

import jax
import numpy as np

# (height, width) of the 33 bins of the 1024 px models.
BINS_1024 = (
    (512, 2048), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600), (640, 1536), (704, 1472),
    (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152), (896, 1152), (896, 1088),
    (960, 1088), (960, 1024), (1024, 1024), (1024, 960), (1088, 960), (1088, 896), (1152, 896), (1152, 832),
    (1216, 832), (1280, 768), (1344, 768), (1408, 704), (1472, 704), (1536, 640), (1600, 640), (1728, 576),
    (2048, 512),
)  # fmt: skip


def nearest(height, width):
    """The bin whose ratio height / width, rounded to two digits as published, is nearest to that asked for."""
    return min(BINS_1024, key=lambda bin: abs(round(bin[0] / bin[1], 2) - height / width))


def fit(images, height, width):
    """Scales pictures to cover height x width and cuts out the middle. uint8 [B, H, W, 3] -> uint8.

    Bilinear without antialiasing, as the published pipeline does after decoding a bin.
    """
    count, have_height, have_width, _ = images.shape
    if (have_height, have_width) == (height, width):
        return images
    ratio = max(height / have_height, width / have_width)
    # Rounded down as published, but never below what is cut out of it: ratios are not exact.
    size = max(height, int(have_height * ratio)), max(width, int(have_width * ratio))
    resize = jax.jit(lambda x: jax.image.resize(x, (count, *size, 3), "linear", antialias=False))
    resized = np.asarray(resize(images.astype(np.float32)))
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    cut = resized[:, top : top + height, left : left + width]
    return np.clip(np.round(cut), 0, 255).astype(np.uint8)
