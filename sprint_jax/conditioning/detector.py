"""Pictures to the pictures that steer a ControlNet: `data.conditions`, with the published detector where lines need it."""

import dataclasses
import hashlib
from collections.abc import Callable

import jax
import numpy as np

from sprint_jax.conditioning import hed, hed_weights, sketches
from sprint_jax.storage import weights


@dataclasses.dataclass(frozen=True, eq=False)
class Detector:
    """Soft edges of pictures. identity: names the weights by what is in them, whichever kind of file they came from.

    detect: (uint8 [H, W, 3], resolution) -> uint8 [h, w] of `sketches.detector_size`, compiled once for each size.
    """

    identity: str
    detect: Callable


def detector(path) -> Detector:
    """The published detector with weights of `path`, .pth or .safetensors. Raises UserError as `conversion.hed.load`."""
    params = hed_weights.load(path, hed.PUBLISHED)
    digest = hashlib.sha256()
    weights.feed(digest, params)
    params, apply = jax.device_put(params), jax.jit(hed.PUBLISHED.apply)

    def detect(image, resolution):
        return sketches.levels(apply(params, sketches.detector_picture(image, resolution)[None])[0])

    return Detector(digest.hexdigest()[:16], detect)


@dataclasses.dataclass(frozen=True, eq=False)
class Lines:
    """One kind of condition for a whole data set.

    kind: of `sketches.KINDS`. detector: None for edges. thickness: (least, most) pixels of the strokes of scribbles,
    from which each example draws by its name; None for the others.
    """

    kind: str
    detector: Detector | None
    thickness: tuple[int, int] | None

    @property
    def identity(self) -> str:
        """Names what decides about the lines of a picture."""
        parts = [self.kind]
        if self.detector:
            parts.append(f"detector {self.detector.identity}")
        if self.thickness:
            parts.append(f"thickness {self.thickness[0]} to {self.thickness[1]}")
        return ", ".join(parts)

    def pictures(self, images, keys, each=map):
        """White lines on black. uint8 [B, H, W, 3] -> uint8 [B, H, W, 3]; keys: the B names of the examples.

        The detector sees a picture at its own short side and strokes are drawn at the size that it saw, as published;
        only then are lines brought to H x W. each: as `map`, for what runs on the host.
        """
        height, width = images.shape[1:3]
        if self.detector:
            soft = [self.detector.detect(image, min(height, width)) for image in images]
            drawn = each(self._strokes, soft, keys) if self.thickness else soft
        else:
            drawn = each(lambda image: sketches.gradient_edges(image[None])[0], images)
        return sketches.as_picture(
            np.stack([sketches.resized(lines, height, width) for lines in drawn])
        )

    def _strokes(self, soft, key):
        return sketches.scribble(
            soft, thickness=thickness_of(key, self.thickness), sigma=sketches.PUBLISHED_SIGMA
        )


def thickness_of(key, among):
    """The thickness of an example's strokes, of least to most. Neither order nor other examples matter.

    key: the example's name. among: (least, most), both possible.
    """
    # Not the digest that holds examples out: those held out would all have thin strokes.
    drawn = hashlib.sha256(b"thickness of " + key.encode("utf-8", "surrogateescape")).digest()[:8]
    return among[0] + int.from_bytes(drawn, "big") % (among[1] - among[0] + 1)
