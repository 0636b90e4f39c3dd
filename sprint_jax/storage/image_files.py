"""Image files: which they are, reading one, and writing images and grids whole or not at all."""

import functools
import os
import pathlib
import posixpath

import numpy as np
from PIL import Image, ImageOps

from sprint_jax.errors import UserError
from sprint_jax.storage import crops, files

MOST_PIXELS = 100_000_000
Color = tuple[int, int, int]
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
_USUAL = (".png", ".jpg", ".jpeg", ".webp")
# Formats whose header alone Pillow knows, and those that it hands to another program.
_UNREAD = frozenset(("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"))
_LOOK_ALIKE = frozenset(
    (".svg", ".svgz", ".heic", ".heif", ".jxl", ".jxr", ".exr", ".hdr", ".xcf", ".kra", ".mng",
     ".eps", ".ps", ".emf", ".wmf", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2",
     ".raw", ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv",
     ".gifv")
)  # fmt: skip
# The first and the last bytes of whole files.
_ENDS_OF_FILES = (
    (b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xae\x42\x60\x82"),
    (b"\xff\xd8", b"\xff\xd9"),
)


@functools.cache
def endings() -> tuple[str, ...]:
    """Return the endings of the names of files that Pillow reads, in lower case, usual ones first.

    It knows more endings: of formats that it only writes, recognizes without reading them, or
    hands to another program.
    """
    Image.init()
    readable = (Image.OPEN.keys() | {"MPO"}) - _UNREAD
    found = sorted(e for e, form in Image.registered_extensions().items() if form in readable)
    return (*_USUAL, *(ending for ending in found if ending not in _USUAL))


def is_image(name: str) -> bool:
    """Return whether a file of this name is read as an image; case does not matter."""
    return posixpath.splitext(name)[1].lower() in endings()


def resembles_image(name: str) -> bool:
    """Return whether a name is that of an image or a video of a format that is not read."""
    ending = posixpath.splitext(name)[1].lower()
    return ending in _LOOK_ALIKE and ending not in endings()


def is_whole(path: str | os.PathLike) -> bool:
    """Return whether a PNG or JPEG file exists and has its beginning and its end.

    A crash leaves files that are empty, cut, or end in zeros. Pixels are not decoded, which would
    take minutes for the images of a benchmark.
    """
    try:
        with open(path, "rb") as file:
            first = file.read(8)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 12))
            last = file.read()
    except OSError:
        return False
    return any(first.startswith(head) and last.endswith(tail) for head, tail in _ENDS_OF_FILES)


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

    ground: (r, g, b) behind transparent pixels. Levels become those of eight bits, as
    `eight_bits` says.
    """
    clear = _transparent(image)  # before the pixels are decoded
    turned = ImageOps.exif_transpose(image)
    if turned.mode[0] in "IF":
        values = np.asarray(turned)
        turned = Image.fromarray(_levels(values, image))
        if clear is not None:
            turned.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    elif clear is not None:
        turned.info["transparency"] = clear
    if not turned.has_transparency_data:
        return turned.convert("RGB")
    layer = turned.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, (*ground, 255)), layer).convert(
        "RGB"
    )


def eight_bits(image: Image.Image) -> Image.Image:
    """Return gray of more than eight bits as an image of eight bits; PIL would clip or wrap it.

    Whole numbers of 12 or 16 bits keep their upper eight bits. Those of 32 bits are levels up to
    255, 65535 or the largest, and real numbers levels up to 1, 255 or 65535: the first of these
    that no pixel exceeds. Other images are returned as they are.
    """
    return Image.fromarray(_levels(np.asarray(image), image)) if image.mode[0] in "IF" else image


def _levels(values: np.ndarray, image: Image.Image) -> np.ndarray:
    """Return the pixels of an image of mode I, I;16 or F as uint8."""
    top = values.max(initial=0)
    if image.mode == "F":
        values = np.nan_to_num(values.astype(np.float64), nan=0.0)
        top = next((t for t in (1, 255, 65535) if values.max(initial=0) <= t), values.max())
        return np.rint(np.clip(values / top, 0, 1) * 255).astype(np.uint8)
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if image.mode != "I" or image.format in ("PNG", "PPM"):
        bits = min(16, max(8, tags.get(258, (16,))[0]))
        found = np.clip(values.astype(np.int64) >> (bits - 8), 0, 255).astype(np.uint8)
        return 255 - found if tags.get(262) == 0 else found  # 0 is white, which PIL leaves so
    values = values.astype(np.int64)
    signed = tags.get(339) == (2,)
    if values.min(initial=0) < 0 and not signed:
        values, top = values & 0xFFFFFFFF, 2**32  # PIL reads all of 32 bits with a sign
    bits = next((b for b in (8, 16) if top < 2**b), 31 if signed else 32)
    return np.clip(values >> (bits - 8), 0, 255).astype(np.uint8)


def _transparent(image: Image.Image) -> int | tuple[int, ...] | None:
    """Return the color that a gray or RGB image declares transparent, in the scale of its pixels.

    PIL gives it in the scale of the file.
    """
    clear = image.info.get("transparency")
    tiles = getattr(image, "tile", None)  # of a file that is not decoded yet
    raw = str(tiles[0][3]) if tiles else ""
    if isinstance(clear, int) and image.mode != "P":
        return clear * {"L;2": 85, "L;4": 17}.get(raw, 1)
    if isinstance(clear, tuple):
        return tuple(part >> 8 for part in clear) if raw == "RGB;16B" else clear
    return None
