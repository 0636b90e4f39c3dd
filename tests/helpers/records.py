"""Records of encoded data sets that contain their own number."""

from typing import Any

import numpy as np

from sprint_jax.data import encoded

MANIFEST_FIELDS = dict(
    model="tiny", source="made up", text="tokens", text_dim=0, text_length=7, channels=3, factor=32
)


def numbered_record(
    number: int, shape: tuple[int, int] = (4, 4), kind: str = "tokens", length: int | None = None
) -> dict[str, np.ndarray]:
    """Return a record whose latent [*shape, 3] is filled with its number.

    The length of its text is `length`, or else 1 + number % 7. `kind` is "tokens" or "text".
    """
    length = 1 + number % 7 if length is None else length
    if kind == "text":
        text = np.full((length, 5), number, np.float16)
    else:
        text = np.full(length, number, np.int32)
    caption = np.frombuffer(f"number {number}".encode(), np.uint8)
    return {"latent": np.full((*shape, 3), number, np.float16), "caption": caption, kind: text}


def is_readable(data: Any, index: int) -> bool:
    """Return whether a record of a data set can be read."""
    try:
        data.read(index)
    except encoded.BadRecord:
        return False
    return True
