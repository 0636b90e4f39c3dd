"""The edge detector of ControlNet (ControlNetHED): soft edges of images, in float32.

The method is holistically-nested edge detection (Xie and Tu, arXiv 1504.06375). The network is
lllyasviel's, published under Apache-2.0: a learned offset of each channel, the convolutions of VGG,
and a side output from each stage. The result is the mean of the side outputs instead of a learned
fusion. `sprint_jax/conditioning/hed_weights.py` reads its published weights.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_PRECISION = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class HED:
    """The network: stages of 3x3 convolutions with ReLU, with 2x2 maximum pooling between stages.

    An image needs sides of at least 2^(stages - 1) pixels. Pooling drops an odd row or column.
    """

    widths: tuple[int, ...]  # channels of each stage
    convs: tuple[int, ...]  # number of convolutions of each stage

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Draw random parameters with He-normal kernels.

        Returns {"offset" [3], "stages": {"0": {"convs": {"0": {"kernel" [3, 3, in, out],
        "bias" [out]}, ...}, "side": {"kernel" [out, 1], "bias" [1]}}, ...}}.
        """
        stages, into = {}, 3
        for i, (width, convs) in enumerate(zip(self.widths, self.convs, strict=True)):
            layers = {}
            for j in range(convs):
                key, own = jax.random.split(key)
                layers[str(j)] = _dense(own, (3, 3, into, width))
                into = width
            key, own = jax.random.split(key)
            stages[str(i)] = {"convs": layers, "side": _dense(own, (width, 1))}
        return {"offset": jnp.zeros(3), "stages": stages}

    def apply(self, params: dict[str, Any], images: jax.Array | np.ndarray) -> jax.Array:
        """Return edge probabilities, float32 [B, H, W] in [0, 1].

        The result is the sigmoid of the mean of the side outputs. Each side output is resized to
        the image bilinearly, with aligned pixel centers. The published detector runs on images from
        `sketches.resize_for_detector`.

        images: RGB from 0 to 255, uint8 or float [B, H, W, 3].
        """
        x = jnp.asarray(images, jnp.float32)
        shape, total = x.shape[:3], jnp.zeros((), jnp.float32)
        x = x - params["offset"]
        for i, convs in enumerate(self.convs):
            stage = params["stages"][str(i)]
            if i:
                x = jax.lax.reduce_window(
                    x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
                )
            for j in range(convs):
                x = jax.nn.relu(_conv3x3(stage["convs"][str(j)], x))
            side = (
                jnp.matmul(x, stage["side"]["kernel"], precision=_PRECISION)[..., 0]
                + stage["side"]["bias"]
            )
            total = total + jax.image.resize(
                side, shape, "linear", antialias=False, precision=_PRECISION
            )
        return jax.nn.sigmoid(total / len(self.convs))


PUBLISHED = HED(widths=(64, 128, 256, 512, 512), convs=(2, 2, 3, 3, 3))


def _dense(key: jax.Array, shape: tuple[int, ...]) -> dict[str, jax.Array]:
    """Draw kernel and bias of a layer; the last two axes of `shape` are its channels."""
    deviation = np.sqrt(2 / np.prod(shape[:-1]))
    return {"kernel": deviation * jax.random.normal(key, shape), "bias": jnp.zeros(shape[-1])}


def _conv3x3(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    x = jax.lax.conv_general_dilated(
        x,
        layer["kernel"],
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=_PRECISION,
    )
    return x + layer["bias"]
