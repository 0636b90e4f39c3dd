"""Captioned examples, and what the readers of image sources have in common."""

import codecs
import dataclasses
import io
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from PIL import Image

from sprint_jax.encoders.prompts import is_blank
from sprint_jax.storage import digests, image_files, json_files

NOT_UTF8 = "caption is not UTF-8"
# Byte-order marks; that of UTF-32 begins as that of UTF-16 does.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)


@dataclasses.dataclass(frozen=True)
class Example:
    """One captioned image."""

    key: str  # unique within its source, and the same each time that the source is opened
    image: bytes | None  # an image file that may not decode; None if there is only a latent
    latent: (
        np.ndarray | None
    )  # float32 [C, h, w], finite and scaled; None if there is only an image
    caption: str  # not empty, without white space at its ends


class BadExample(Exception):
    """An example that cannot be used.

    The message is a short reason, the same for all examples with the same defect. Manifests store
    it.
    """


class Source(Protocol):
    """A set of captioned images on disk.

    A source can be pickled, and several threads may read it at the same time.
    """

    def __len__(self) -> int:
        """Return the number of examples, including those that cannot be used."""
        ...

    def __getitem__(self, index: int) -> Example:
        """Read an example. Raises BadExample if it cannot be used, IndexError beyond the end."""
        ...

    def key(self, index: int) -> str:
        """Return the key of an example, usable or not, without reading it."""
        ...

    def identity(self) -> str:
        """Return a hash of the names and sizes of the files, not of their content."""
        ...


def check_index(index: int, source: Source) -> None:
    """Raise IndexError unless `source` has an example `index`."""
    if not 0 <= index < len(source):
        raise IndexError(f"example {index} of {len(source)}")


def hash_files(kind: str, files: Iterable[tuple[str, int]]) -> str:
    """Return the identity of a source. files: (name, bytes) in a fixed order."""
    lines = [kind, *(f"{size} {name}" for name, size in files)]
    return digests.hash_text("\n".join(lines))


def parse_json(data: bytes) -> Any:
    """Parse the JSON of an example. Raises BadExample if it is damaged."""
    try:
        return json_files.parse(data)
    except UnicodeDecodeError:
        raise BadExample(NOT_UTF8) from None
    except ValueError:
        raise BadExample("corrupt record") from None


def first_text(fields: Any, names: Iterable[str]) -> str:
    """Return the first of the named fields that is a string and not blank, stripped, or "".

    A list of strings, captions that were written for one image, counts by its first one.
    """
    if isinstance(fields, Mapping):
        for name in names:
            value = fields.get(name)
            values: list[Any] = value if isinstance(value, list) else [value]
            if all(isinstance(text, str) for text in values):
                found = next((text.strip() for text in values if not is_blank(text)), "")
                if found:
                    return found
    return ""


def encode_text(text: str) -> bytes:
    """Encode text as UTF-8. Keep unpaired surrogates, which `decode_caption` then rejects."""
    return text.encode("utf-8", "surrogatepass")


def decode_text(data: bytes) -> str:
    """Decode UTF-8, or UTF-16 and UTF-32 with a byte-order mark. Raises UnicodeDecodeError."""
    return data.decode(next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8"))


def decode_caption(data: bytes) -> str:
    """Decode the bytes of a caption, as `decode_text` does.

    Raises BadExample if they are blank or no such text. An unpaired surrogate, which JSON can hold,
    is not UTF-8. NUL characters are refused because UTF-16 without a mark reads as them.
    """
    try:
        caption = decode_text(data).strip()
    except UnicodeDecodeError:
        raise BadExample(NOT_UTF8) from None
    if "\0" in caption:
        raise BadExample("caption holds NUL characters, as UTF-16 without a byte-order mark does")
    if is_blank(caption):
        raise BadExample("missing caption")
    return caption


def decode_image(data: bytes) -> np.ndarray:
    """Decode an image file as uint8 [H, W, 3].

    The image is rotated as its EXIF data says, transparency becomes white, and only the first frame
    is read. Raises BadExample if it does not decode, or has more than 100 million pixels.
    """
    if data.startswith(b"version https://git-lfs"):
        raise BadExample("a pointer of Git LFS, not the image")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > image_files.MOST_PIXELS:
                raise ValueError("a decompression bomb")
            return np.array(image_files.flatten(image))
    except Exception:  # decoders of malformed bytes raise many kinds of errors
        raise BadExample("undecodable image") from None
