"""The Inception-v3 that FID is defined on (2015-12-05), up to its 2048 pooled features.

It differs from torchvision's network in three details of the TensorFlow weights: average pooling
does not count padding, the last block's pooling takes the maximum, and the classifier (left out
here) has 1008 classes. Layer names are those of pytorch-fid's state dict. Batch normalization, with
eps 0.001, is a scale and a shift.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

SIDE = 299
FEATURES = 2048
EPS = 1e-3

Params = Any  # a tree of arrays
Shapes = dict[str, tuple[int, int, int, int]]
_Conv = Callable[..., Array]  # (layer, x, stride, padding) -> convolution by its name


def layer_shapes() -> Shapes:
    """Return {layer: (kernel height, kernel width, channels in, channels out)}."""
    shapes: Shapes = {
        "Conv2d_1a_3x3": (3, 3, 3, 32), "Conv2d_2a_3x3": (3, 3, 32, 32),
        "Conv2d_2b_3x3": (3, 3, 32, 64), "Conv2d_3b_1x1": (1, 1, 64, 80),
        "Conv2d_4a_3x3": (3, 3, 80, 192),
    }  # fmt: skip
    blocks = [
        _a_shapes(f"Mixed_5{c}", width, pool)
        for c, width, pool in (("b", 192, 32), ("c", 256, 64), ("d", 288, 64))
    ]
    blocks.append({
        "Mixed_6a.branch3x3": (3, 3, 288, 384), "Mixed_6a.branch3x3dbl_1": (1, 1, 288, 64),
        "Mixed_6a.branch3x3dbl_2": (3, 3, 64, 96), "Mixed_6a.branch3x3dbl_3": (3, 3, 96, 96),
    })  # fmt: skip
    blocks += [
        _c_shapes(f"Mixed_6{c}", inner)
        for c, inner in (("b", 128), ("c", 160), ("d", 160), ("e", 192))
    ]
    blocks.append({
        "Mixed_7a.branch3x3_1": (1, 1, 768, 192), "Mixed_7a.branch3x3_2": (3, 3, 192, 320),
        "Mixed_7a.branch7x7x3_1": (1, 1, 768, 192), "Mixed_7a.branch7x7x3_2": (1, 7, 192, 192),
        "Mixed_7a.branch7x7x3_3": (7, 1, 192, 192), "Mixed_7a.branch7x7x3_4": (3, 3, 192, 192),
    })  # fmt: skip
    blocks += [_e_shapes(f"Mixed_7{c}", width) for c, width in (("b", 1280), ("c", 2048))]
    for block in blocks:
        shapes |= block
    return shapes


def _a_shapes(name: str, width: int, pool: int) -> Shapes:
    return {
        f"{name}.branch1x1": (1, 1, width, 64), f"{name}.branch5x5_1": (1, 1, width, 48),
        f"{name}.branch5x5_2": (5, 5, 48, 64), f"{name}.branch3x3dbl_1": (1, 1, width, 64),
        f"{name}.branch3x3dbl_2": (3, 3, 64, 96), f"{name}.branch3x3dbl_3": (3, 3, 96, 96),
        f"{name}.branch_pool": (1, 1, width, pool),
    }  # fmt: skip


def _c_shapes(name: str, inner: int) -> Shapes:
    return {
        f"{name}.branch1x1": (1, 1, 768, 192), f"{name}.branch7x7_1": (1, 1, 768, inner),
        f"{name}.branch7x7_2": (1, 7, inner, inner), f"{name}.branch7x7_3": (7, 1, inner, 192),
        f"{name}.branch7x7dbl_1": (1, 1, 768, inner),
        f"{name}.branch7x7dbl_2": (7, 1, inner, inner),
        f"{name}.branch7x7dbl_3": (1, 7, inner, inner),
        f"{name}.branch7x7dbl_4": (7, 1, inner, inner),
        f"{name}.branch7x7dbl_5": (1, 7, inner, 192), f"{name}.branch_pool": (1, 1, 768, 192),
    }  # fmt: skip


def _e_shapes(name: str, width: int) -> Shapes:
    return {
        f"{name}.branch1x1": (1, 1, width, 320), f"{name}.branch3x3_1": (1, 1, width, 384),
        f"{name}.branch3x3_2a": (1, 3, 384, 384), f"{name}.branch3x3_2b": (3, 1, 384, 384),
        f"{name}.branch3x3dbl_1": (1, 1, width, 448), f"{name}.branch3x3dbl_2": (3, 3, 448, 384),
        f"{name}.branch3x3dbl_3a": (1, 3, 384, 384), f"{name}.branch3x3dbl_3b": (3, 1, 384, 384),
        f"{name}.branch_pool": (1, 1, width, 192),
    }  # fmt: skip


def params_of(tensors: Mapping[str, np.ndarray]) -> Params:
    """Return the parameters of `features` from a state dict of NumPy arrays.

    Entries that the features do not need (fc, AuxLogits, counters) are ignored.

    Args:
      tensors: arrays by pytorch-fid's names, kernels [out, in, h, w].

    Returns:
      {layer: {"kernel" [h, w, in, out], "scale" [out], "shift" [out]}}, float32.

    Raises:
      ValueError: naming an entry that is missing or has another shape.
    """
    params = {}
    for layer, shape in layer_shapes().items():
        read = {}
        names = {"conv.weight": (shape[3], shape[2], shape[0], shape[1])}
        names |= {
            f"bn.{part}": (shape[3],) for part in ("weight", "bias", "running_mean", "running_var")
        }
        for part, wanted in names.items():
            name = f"{layer}.{part}"
            if name not in tensors:
                raise ValueError(f"{name} is missing")
            read[part] = np.asarray(tensors[name], np.float64)
            if read[part].shape != wanted:
                raise ValueError(f"{name} has shape {read[part].shape}, the network needs {wanted}")
        if (read["bn.running_var"] < 0).any():
            raise ValueError(f"{layer}.bn.running_var is below 0")
        scale = read["bn.weight"] / np.sqrt(read["bn.running_var"] + EPS)
        params[layer] = {
            "kernel": read["conv.weight"].transpose(2, 3, 1, 0).astype(np.float32),
            "scale": scale.astype(np.float32),
            "shift": (read["bn.bias"] - read["bn.running_mean"] * scale).astype(np.float32),
        }
    return params


def resized(images: Shaped[Array, "b h w 3"]) -> Float[Array, "b 299 299 3"]:
    """Resize images in 0..255 (uint8 or float) to float32 in -1..1, as pytorch-fid does.

    The resize is bilinear between pixel centers, without antialiasing, so only the nearest pixels
    of a large image are read.
    """
    x = jnp.asarray(images, jnp.float32) / 255
    x = jax.image.resize(
        x, (len(x), SIDE, SIDE, 3), "linear", antialias=False, precision=jax.lax.Precision.HIGHEST
    )
    return 2 * x - 1


def features(params: Params, x: Float[Array, "b h w 3"]) -> Float[Array, "b 2048"]:
    """Return the pooled features of images in -1..1. FID needs H = W = 299."""
    conv = lambda layer, y, stride=1, pad=(0, 0): _conv(params[layer], y, stride, pad)
    x = conv("Conv2d_1a_3x3", x, 2)
    x = conv("Conv2d_2a_3x3", x)
    x = _max_pool(conv("Conv2d_2b_3x3", x, pad=(1, 1)), 2, 0)
    x = conv("Conv2d_3b_1x1", x)
    x = _max_pool(conv("Conv2d_4a_3x3", x), 2, 0)
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = _block_a(conv, name, x)
    y = conv("Mixed_6a.branch3x3dbl_2", conv("Mixed_6a.branch3x3dbl_1", x), pad=(1, 1))
    x = _join(
        conv("Mixed_6a.branch3x3", x, 2), conv("Mixed_6a.branch3x3dbl_3", y, 2), _max_pool(x, 2, 0)
    )
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = _block_c(conv, name, x)
    x = _block_d(conv, x)
    x = _block_e(conv, "Mixed_7b", x, _average_pool)
    x = _block_e(conv, "Mixed_7c", x, lambda y: _max_pool(y, 1, 1))
    return x.mean((1, 2))


def _block_a(conv: _Conv, name: str, x: Array) -> Array:
    five = conv(f"{name}.branch5x5_2", conv(f"{name}.branch5x5_1", x), pad=(2, 2))
    three = conv(f"{name}.branch3x3dbl_2", conv(f"{name}.branch3x3dbl_1", x), pad=(1, 1))
    three = conv(f"{name}.branch3x3dbl_3", three, pad=(1, 1))
    return _join(
        conv(f"{name}.branch1x1", x), five, three, conv(f"{name}.branch_pool", _average_pool(x))
    )


def _block_c(conv: _Conv, name: str, x: Array) -> Array:
    wide, tall = (0, 3), (3, 0)
    seven = conv(f"{name}.branch7x7_2", conv(f"{name}.branch7x7_1", x), pad=wide)
    seven = conv(f"{name}.branch7x7_3", seven, pad=tall)
    double = conv(f"{name}.branch7x7dbl_1", x)
    for part, pad in (("2", tall), ("3", wide), ("4", tall), ("5", wide)):
        double = conv(f"{name}.branch7x7dbl_{part}", double, pad=pad)
    return _join(
        conv(f"{name}.branch1x1", x), seven, double, conv(f"{name}.branch_pool", _average_pool(x))
    )


def _block_d(conv: _Conv, x: Array) -> Array:
    three = conv("Mixed_7a.branch3x3_2", conv("Mixed_7a.branch3x3_1", x), 2)
    seven = conv("Mixed_7a.branch7x7x3_2", conv("Mixed_7a.branch7x7x3_1", x), pad=(0, 3))
    seven = conv("Mixed_7a.branch7x7x3_4", conv("Mixed_7a.branch7x7x3_3", seven, pad=(3, 0)), 2)
    return _join(three, seven, _max_pool(x, 2, 0))


def _block_e(conv: _Conv, name: str, x: Array, pool: Callable[[Array], Array]) -> Array:
    split = lambda layer, y: (
        conv(f"{name}.{layer}a", y, pad=(0, 1)),
        conv(f"{name}.{layer}b", y, pad=(1, 0)),
    )
    three = split("branch3x3_2", conv(f"{name}.branch3x3_1", x))
    double = conv(f"{name}.branch3x3dbl_2", conv(f"{name}.branch3x3dbl_1", x), pad=(1, 1))
    double = split("branch3x3dbl_3", double)
    return _join(
        conv(f"{name}.branch1x1", x), *three, *double, conv(f"{name}.branch_pool", pool(x))
    )


def _conv(layer: Params, x: Array, stride: int, pad: tuple[int, int]) -> Array:
    """Apply convolution, normalization and ReLU, in true float32 on any device."""
    x = jax.lax.conv_general_dilated(
        x,
        layer["kernel"],
        (stride, stride),
        [(p, p) for p in pad],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )
    return jax.nn.relu(x * layer["scale"] + layer["shift"])


def _window(x: Array, start: float, operation: Callable, stride: int, pad: int) -> Array:
    padding = [(0, 0), (pad, pad), (pad, pad), (0, 0)]
    return jax.lax.reduce_window(x, start, operation, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def _max_pool(x: Array, stride: int, pad: int) -> Array:
    return _window(x, -jnp.inf, jax.lax.max, stride, pad)


def _average_pool(x: Array) -> Array:
    """Average over 3 x 3 pixels at the same size. At the border only pixels of the image count."""
    count = _window(jnp.ones((1, *x.shape[1:3], 1), x.dtype), 0.0, jax.lax.add, 1, 1)
    return _window(x, 0.0, jax.lax.add, 1, 1) / count


def _join(*branches: Array) -> Array:
    return jnp.concatenate(branches, -1)
