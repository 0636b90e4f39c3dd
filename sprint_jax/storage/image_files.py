"""Picture files: reading one to start from, and PNGs and grids, written whole or not at all."""

import numpy as np
from PIL import Image, ImageOps

from sprint_jax.errors import UserError
from sprint_jax.storage import crops, files

MOST_PIXELS = 100_000_000
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


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


def load(path, height, width, ground=WHITE):
    """A picture file as `covering` gives it.

    Raises UserError for what is no whole picture, or has more than 100 million pixels.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise UserError(
                    f"{path} has {image.width} x {image.height} pixels: use at most {MOST_PIXELS}"
                )
            return covering(image, height, width, ground)
    except UserError:
        raise
    except Exception as error:  # decoders raise dozens of kinds for damaged bytes
        raise UserError(
            f"cannot read the picture {path} ({error}): give a PNG or JPEG file"
        ) from None


def covering(image, height, width, ground):
    """PIL's picture as uint8 [height, width, 3]: scaled by Lanczos to cover that, its middle cut out. ground: as in `opaque`."""
    return crops.fit_lanczos(opaque(image, ground), height, width)


def opaque(image, ground=WHITE):
    """PIL's picture as an RGB one: first frame, turned as EXIF says.

    ground: (r, g, b) behind what is transparent. Of 16 bits of grey, which PIL would clip, the upper eight.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray(
            (np.clip(np.asarray(image, np.int64), 0, 65535) >> 8).astype(np.uint8)
        )
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, (*ground, 255)), layer).convert(
        "RGB"
    )
