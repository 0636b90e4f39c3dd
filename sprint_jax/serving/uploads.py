"""Images that strangers send: base64 or bytes to uint8 [H, W, 3], or a refusal.

The bytes decide the format; names and MIME types are ignored. The size is read from the header
before anything is decoded. An animation uses its first frame. Transparency shows the background.
16 bits become the upper eight. The camera's orientation (EXIF) is applied, and all other metadata
is dropped.
"""

import base64
import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from sprint_jax.serving.refused import Refused
from sprint_jax.storage import image_files

MOST_BYTES = 8 * 2**20
MOST_PIXELS = 2**24  # 64 MB as RGBA
_FORMATS = ("PNG", "JPEG", "WEBP")  # every further decoder of PIL would be one more to trust


def from_base64(
    text: str,
    height: int,
    width: int,
    *,
    name: str = "image",
    background: image_files.Color = image_files.WHITE,
) -> np.ndarray:
    """Decode base64 text or a data: URL, then do as `from_bytes`."""
    encoded = text.partition(",")[2] if text.startswith("data:") else text
    try:
        data = base64.b64decode("".join(encoded.split()), validate=True)  # encoders break lines
    except ValueError:  # also for characters beyond ASCII
        raise Refused(
            400, f"{name} is not base64: encode the bytes of a PNG, JPEG or WebP file"
        ) from None
    return from_bytes(data, height, width, name=name, background=background)


def from_bytes(
    data: bytes,
    height: int,
    width: int,
    *,
    name: str = "image",
    background: image_files.Color = image_files.WHITE,
) -> np.ndarray:
    """Scale an image file to cover height x width and crop its center: uint8 [height, width, 3].

    name: what the refusals call it. background: (r, g, b) behind transparent pixels. Raises Refused
    with 400 for a file that is empty or damaged, 413 for one that is too large, and 415 for any
    other format.
    """
    if not data:
        raise Refused(400, f"{name} is empty: send a PNG, JPEG or WebP file")
    if len(data) > MOST_BYTES:
        raise Refused(413, f"{name} has {len(data)} bytes: send at most {MOST_BYTES}")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                size = f"{image.width} x {image.height}"
                raise Refused(413, f"{name} has {size} pixels: send at most {MOST_PIXELS}")
            return image_files.cover(image, height, width, background)
    except Refused:
        raise
    except Image.DecompressionBombError:
        raise Refused(413, f"{name} has too many pixels: send at most {MOST_PIXELS}") from None
    except UnidentifiedImageError:
        raise Refused(415, f"{name} is not a PNG, JPEG or WebP file: convert it to one") from None
    except (
        Exception
    ):  # decoders raise dozens of kinds for damaged bytes; none is the server's fault
        raise Refused(400, f"{name} is damaged and cannot be read: save it again as PNG") from None
