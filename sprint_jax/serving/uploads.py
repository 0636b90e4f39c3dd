"""Pictures that strangers send: bytes to uint8 [H, W, 3], or a refusal.

What a picture is, its bytes say: names and MIME types are not looked at. Its size is read from the header, before
anything is decoded. An animated picture is its first frame; what is transparent shows the ground it is laid on; 16 bits
become the upper eight; the camera's orientation (EXIF) is obeyed and all other metadata is left behind.
"""

import io

from PIL import Image, UnidentifiedImageError

from sprint_jax.serving.refused import Refused
from sprint_jax.storage import image_files

MOST_BYTES = 8 * 2**20
MOST_PIXELS = 2**24  # 64 MB as RGBA
_FORMATS = ("PNG", "JPEG", "WEBP")  # every further decoder of PIL would be one more to trust


def picture(data: bytes, height: int, width: int, ground=image_files.WHITE):
    """An uploaded picture, scaled to cover height x width and cut to its middle: uint8 [height, width, 3].

    data: the file. ground: (r, g, b) behind what is transparent. Raises Refused with 400 for what is no whole picture,
    413 for one that is too large, 415 for any other format.
    """
    if not data:
        raise Refused(400, "the picture is empty: send a PNG, JPEG or WebP file")
    if len(data) > MOST_BYTES:
        raise Refused(413, f"the picture has {len(data)} bytes: send at most {MOST_BYTES}")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise Refused(
                    413,
                    f"the picture has {image.width} x {image.height} pixels: send at most {MOST_PIXELS}",
                )
            return image_files.covering(image, height, width, ground)
    except Refused:
        raise
    except Image.DecompressionBombError:
        raise Refused(413, f"the picture has too many pixels: send at most {MOST_PIXELS}") from None
    except UnidentifiedImageError:
        raise Refused(
            415, "the picture is not a PNG, JPEG or WebP file: convert it to one"
        ) from None
    except Exception:  # decoders raise dozens of kinds for damaged bytes, and none may reach the server's log as its own fault
        raise Refused(
            400, "the picture is damaged and cannot be read: save it again as PNG"
        ) from None
