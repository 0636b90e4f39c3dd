"""Picture files: reading one to start from, and PNGs and grids, written whole or not at all."""

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sprint_jax import files
from sprint_jax.errors import UserError

_MOST_PIXELS = 100_000_000


def grid(images, columns, gap=2):
    """uint8 [N, H, W, 3] -> one picture, row by row, on a grey ground."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 96, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def save(path, image, zoom=1, file_format="PNG"):
    """Writes uint8 [H, W, 3] as PNG or JPEG (of PIL's default quality), each pixel repeated `zoom` times."""
    image = np.repeat(np.repeat(image, zoom, 0), zoom, 1)
    with files.whole(path) as partial:
        Image.fromarray(image).save(partial, format=file_format)


def load(path, height, width):
    """A picture file as uint8 [height, width, 3]: first frame, turned as EXIF says, resized by Lanczos."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise UserError(f"{path} has {image.width} x {image.height} pixels: use at most {_MOST_PIXELS}")
            image = ImageOps.exif_transpose(image).convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the picture {path} ({error}): give a PNG or JPEG file") from None
    return np.asarray(image)
