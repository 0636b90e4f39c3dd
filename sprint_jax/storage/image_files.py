"""Image files: reading one to start from, and writing images and grids whole or not at all."""

import pathlib

import numpy as np
from PIL import Image, ImageOps

from sprint_jax.errors import UserError
from sprint_jax.storage import crops, files

MOST_PIXELS = 100_000_000
Color = tuple[int, int, int]
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def grid(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """Arrange uint8 [N, H, W, 3] row by row on a gray background."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 96, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def enlarge(image: np.ndarray, zoom: int) -> np.ndarray:
    """Repeat the pixels of [H, W, ...] `zoom` times along both sides."""
    return np.repeat(np.repeat(image, zoom, 0), zoom, 1)


def save(
    path: pathlib.Path | str, image: np.ndarray, zoom: int = 1, file_format: str = "PNG"
) -> None:
    """Write uint8 [H, W, 3] as PNG or JPEG, PIL's default quality, pixels repeated `zoom` times."""
    image = enlarge(image, zoom)
    with files.whole(path) as partial:
        Image.fromarray(image).save(partial, format=file_format)


def load(path: pathlib.Path | str, height: int, width: int, ground: Color = WHITE) -> np.ndarray:
    """Read an image file and crop it as `cover` does.

    Raises UserError for a file that is not a whole image, or has more than 100 million pixels.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise UserError(
                    f"{path} has {image.width} x {image.height} pixels: use at most {MOST_PIXELS}"
                )
            return cover(image, height, width, ground)
    except UserError:
        raise
    except Exception as error:  # decoders raise dozens of kinds for damaged bytes
        raise UserError(
            f"cannot read the image {path} ({error}): give a PNG or JPEG file"
        ) from None


def cover(image: Image.Image, height: int, width: int, ground: Color) -> np.ndarray:
    """Scale PIL's image by Lanczos to cover uint8 [height, width, 3] and crop its middle.

    ground: as for `flatten`.
    """
    return crops.fit_lanczos(flatten(image, ground), height, width)


def flatten(image: Image.Image, ground: Color = WHITE) -> Image.Image:
    """Turn PIL's image into an RGB one: its first frame, rotated as EXIF says.

    ground: (r, g, b) behind transparent pixels. 16-bit gray, which PIL would clip, keeps its upper
    eight bits.
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
