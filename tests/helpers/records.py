"""Records of encoded data sets that say their own number."""

import numpy as np

from sprint_jax.data import encoded

DESCRIBED = dict(
    model="tiny", source="made up", text="tokens", text_dim=0, text_length=7, channels=3, factor=32
)


def record(number, shape=(4, 4), kind="tokens", length=None):
    """A record whose latent says its number, and whose text length is told by it."""
    length = 1 + number % 7 if length is None else length
    text = (
        np.full((length, 5), number, np.float16)
        if kind == "text"
        else np.full(length, number, np.int32)
    )
    caption = np.frombuffer(f"number {number}".encode(), np.uint8)
    return {"latent": np.full((*shape, 3), number, np.float16), "caption": caption, kind: text}


def fine(data, index):
    try:
        data.read(index)
    except encoded.BadRecord:
        return False
    return True
