"""The edge detector of ControlNet (ControlNetHED): soft edges of a picture. Pure functions of arrays, float32.

Holistically-nested edge detection (Xie and Tu, arXiv 1504.06375) as lllyasviel's Apache-2.0 network: VGG's convolutions
after a learned offset of each channel, a side output from each stage, and their mean instead of a learned fusion.
`sprint_jax/conditioning/hed_weights.py` reads its published weights.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

_PRECISION = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class HED:
    """widths: channels of each stage. convs: 3x3 convolutions of each stage, ReLU after each; 2x2 maxima between stages.

    Sides of a picture are at least 2 to the power of stages - 1; an odd row or column is left out where a maximum is taken.
    """

    widths: tuple[int, ...]
    convs: tuple[int, ...]

    def init(self, key):
        """Random parameters, He-normal kernels, of the structure that `apply` takes:

        {"offset" [3], "stages": {"0": {"convs": {"0": {"kernel" [3, 3, in, out], "bias" [out]}, ...},
        "side": {"kernel" [out, 1], "bias" [1]}}, ...}}
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

    def apply(self, params, images):
        """Probabilities of edges. RGB in 0..255, uint8 or float [B, H, W, 3] -> float32 [B, H, W] in [0, 1].

        The sigmoid of the mean of the side outputs, each resized to the picture bilinearly between pixel centres. The
        published detector takes it on pictures of `data.conditions.detector_picture`.
        """
        x = jnp.asarray(images, jnp.float32)
        shape, total = x.shape[:3], 0.0
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


def _dense(key, shape):
    """Kernel and bias of a layer, the last two axes of the kernel being channels in and out."""
    deviation = np.sqrt(2 / np.prod(shape[:-1]))
    return {"kernel": deviation * jax.random.normal(key, shape), "bias": jnp.zeros(shape[-1])}


def _conv3x3(layer, x):
    x = jax.lax.conv_general_dilated(
        x,
        layer["kernel"],
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=_PRECISION,
    )
    return x + layer["bias"]
