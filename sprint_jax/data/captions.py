"""Captions as rows of a batch: UTF-8, padded with zeros, for judges that read them on the host."""

from collections.abc import Sequence

import numpy as np

LENGTH = 512  # bytes; longer captions are cut between characters


def to_rows(texts: Sequence[str]) -> np.ndarray:
    """Return captions as uint8 [B, LENGTH]."""
    rows = np.zeros((len(texts), LENGTH), np.uint8)
    for row, text in zip(rows, texts, strict=True):
        encoded = text.encode()[:LENGTH].decode(errors="ignore").encode()
        row[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    return rows


def from_rows(rows: np.ndarray) -> list[str]:
    """Invert `to_rows`."""
    return [row.tobytes().rstrip(b"\0").decode() for row in np.asarray(rows)]
