"""Condition images of a whole data set, with the published edge detector where a kind needs it."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from sprint_jax.conditioning import hed, hed_weights, sketches
from sprint_jax.storage import digests, weights


@dataclasses.dataclass(frozen=True, eq=False)
class Detector:
    """A soft-edge detector with its weights."""

    identity: str  # names the values of the weights, whatever kind of file they came from
    # (uint8 [H, W, 3], resolution) -> uint8 [h, w] of the size `sketches.detector_size`
    detect: Callable[[np.ndarray, int], np.ndarray]


def load(path: pathlib.Path | str) -> Detector:
    """Load the published detector from a .pth or .safetensors file.

    Its function `detect` compiles once for each image size. Raises UserError as `hed_weights.load`.
    """
    params = hed_weights.load(path, hed.PUBLISHED)
    digest = hashlib.sha256()
    weights.feed(digest, params)
    params, apply = jax.device_put(params), jax.jit(hed.PUBLISHED.apply)

    def detect(image: np.ndarray, resolution: int) -> np.ndarray:
        resized = sketches.resize_for_detector(image, resolution)
        return sketches.to_uint8(apply(params, resized[None])[0])

    return Detector(digest.hexdigest()[:16], detect)


@dataclasses.dataclass(frozen=True, eq=False)
class Lines:
    """One kind of condition for a whole data set."""

    kind: str  # one of `sketches.KINDS`
    detector: Detector | None  # None for edges
    # (minimum, maximum) stroke width of scribbles, in pixels; drawn for each example by its name
    thickness: tuple[int, int] | None

    @property
    def identity(self) -> str:
        """The settings that determine the lines of an image, as stored in manifests."""
        parts = [self.kind]
        if self.detector:
            parts.append(f"detector {self.detector.identity}")
        if self.thickness:
            parts.append(f"thickness {self.thickness[0]} to {self.thickness[1]}")
        return ", ".join(parts)

    def draw(
        self,
        images: np.ndarray,
        keys: Sequence[str],
        map_images: Callable[..., Iterable[Any]] = map,
    ) -> np.ndarray:
        """Draw the condition images, white lines on black.

        As published, the detector works at an image's own short side and strokes are drawn at the
        size that it worked at. Only then are the lines resized to H x W.

        Args:
          images: uint8 [B, H, W, 3].
          keys: the names of the B examples.
          map_images: replaces `map` for work on the host, for example to use threads.

        Returns:
          uint8 [B, H, W, 3].
        """
        height, width = images.shape[1:3]
        if self.detector:
            side = min(height, width)
            drawn = [self.detector.detect(image, side) for image in images]
            if self.thickness:
                drawn = map_images(self._scribble, drawn, keys)
        else:
            drawn = map_images(lambda image: sketches.gradient_edges(image[None])[0], images)
        return sketches.to_rgb(np.stack([sketches.resize(lines, height, width) for lines in drawn]))

    def _scribble(self, soft: np.ndarray, key: str) -> np.ndarray:
        assert self.thickness is not None
        thickness = draw_thickness(key, self.thickness)
        return sketches.scribble(soft, thickness=thickness, sigma=sketches.PUBLISHED_SIGMA)


def draw_thickness(key: str, limits: tuple[int, int]) -> int:
    """Draw the stroke thickness of an example from its name alone.

    key: the name of the example. limits: (minimum, maximum), both included.
    """
    # A prefix, because the hash of the bare name selects held-out examples: all of those would get
    # thin strokes.
    return limits[0] + digests.draw_integer(f"thickness of {key}") % (limits[1] - limits[0] + 1)
