"""Types that the sources of training batches share."""

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import numpy as np

# Arrays of one batch by name: "latent" [b, h, w, c], "mask" [b, L], and "text" [b, L, D] or
# "tokens" [b, L]. With a ControlNet also "control" [b, h, w, c]. Tokens are int32, the others
# float32.
Batch: TypeAlias = dict[str, np.ndarray]


class ImageCodec(Protocol):
    """An encoder of images that needs no separate parameters."""

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Encode images, uint8 [B, H, W, 3], as latents, float32 [B, h, w, c]."""
        ...


class CaptionEncoder(Protocol):
    """An encoder of captions that needs no separate parameters."""

    def encode(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return features, float32 [B, L, D], and their mask, float32 [B, L]."""
        ...
