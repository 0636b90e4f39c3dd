"""Depthwise convolution, written so that every direction of it is fast on every platform.

Accelerators have a good `conv_general_dilated`. XLA's CPU backend runs grouped convolutions
naively, and even shifted multiplies, one per tap, are slow in the reduction that gives the weight
gradient. Here the value and the input gradient are fused shifted multiplies on a CPU, and the
weight gradient accumulates over the batch. On a GPU the input gradient needs a form of its own,
and there are kernels (`ops/pallas/depthwise.py`).
"""

import functools
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array

from sprint_jax.ops import autodiff, placement
from sprint_jax.ops.pallas import depthwise as kernels


def _offsets(shape: Sequence[int]) -> list[tuple[int, int]]:
    """Return the offsets ((i, j), ...) of a square stencil [k, k, C], row by row."""
    return [(i, j) for i in range(shape[0]) for j in range(shape[1])]


def _pad(x: Array, k: int) -> Array:
    return jnp.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))


def _shifts(x: Array, w: Array) -> Array:
    """Convolve by one shifted multiply per tap, in at least float32.

    x [B, H, W, C], w [k, k, C] -> [B, H, W, C].
    """
    height, width = x.shape[1:3]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    padded, w = _pad(x, w.shape[0]).astype(wide), w.astype(wide)
    taps = (padded[:, i : i + height, j : j + width] * w[i, j] for i, j in _offsets(w.shape))
    return cast(Array, sum(taps))


def _grouped_conv(x: Array, w: Array) -> Array:
    """Convolve by the library's grouped convolution. The shapes are those of `_shifts`."""
    y = jax.lax.conv_general_dilated(
        x,
        w[:, :, None, :],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )
    return y.astype(jnp.promote_types(x.dtype, jnp.float32))


def _conv(x: Array, w: Array) -> Array:
    return jax.lax.platform_dependent(x, w, cpu=_shifts, default=_grouped_conv)


def _weight_gradient_by_batch(x: Array, g: Array, k: int) -> Array:
    """Accumulate the weight gradient over samples: the running sums [H, W, C] stay in cache."""
    _, height, width, channels = x.shape
    padded, g = placement.scan_over_samples(_pad(x, k)), placement.scan_over_samples(g)
    offsets = _offsets((k, k))

    def add(sums, samples):
        xs, gs = samples  # one of each device
        return tuple(
            s + xs[:, i : i + height, j : j + width] * gs for s, (i, j) in zip(sums, offsets)
        ), None

    zeros = tuple(jnp.zeros(g.shape[1:], g.dtype) for _ in offsets)
    sums, _ = jax.lax.scan(add, zeros, (padded, g))
    return jnp.stack([s.sum((0, 1, 2)) for s in sums]).reshape(k, k, channels).astype(x.dtype)


def _weight_gradient_by_conv(x: Array, g: Array, k: int) -> Array:
    """Return the transpose of `_grouped_conv` in its weights."""
    shape = jax.ShapeDtypeStruct((k, k, x.shape[-1]), x.dtype)
    (dw,) = jax.linear_transpose(lambda w: _grouped_conv(x, w), shape)(g)
    return dw


def _input_gradient(w: Array, g: Array) -> Array:
    """Convolve like the forward pass, with the stencil rotated by 180 degrees.

    JAX's transpose rotates the stencil by `rev`, which XLA takes for a "backward data"
    convolution. On a GPU in bfloat16 those are many times slower, mostly in copies between layouts.
    """
    return _conv(g.astype(w.dtype), _rotate(w))


def _rotate(w: Array) -> Array:
    """Return the stencil rotated by 180 degrees."""
    return jnp.stack([w[i, j] for i, j in reversed(_offsets(w.shape))]).reshape(w.shape)


def _weight_gradient(x: Array, g: Array, k: int) -> Array:
    """Return the cotangent of the stencil. g: of at least float32."""
    return jax.lax.platform_dependent(
        x,
        g,
        cpu=lambda x, g: _weight_gradient_by_batch(x, g, k),
        default=lambda x, g: _weight_gradient_by_conv(x, g, k),
    )


@functools.cache
def _map(k: int) -> autodiff.Bilinear:
    """Return the convolution by stencils of k x k."""
    return autodiff.Bilinear(_conv, _input_gradient, functools.partial(_weight_gradient, k=k))


def depthwise_conv(x: Array, w: Array) -> Array:
    """Return the depthwise k x k convolution, zero-padded to the same size, with stride 1.

    It is a cross-correlation, as in PyTorch. Forward mode, reverse mode and any mixture of them
    work.

    Args:
      x: [B, H, W, C].
      w: [k, k, C], k odd, same dtype.

    Returns:
      [B, H, W, C] of at least float32, so that a bias can be added before the one rounding.
    """
    return _map(w.shape[0])(x, w)


def conv(
    x: Array, w: Array, bias: Array | None = None, gated: bool = False, backend: str = "plain"
) -> Array:
    """Return the depthwise convolution with a bias and, if asked for, a gate: value * SiLU(gate).

    The convolution with its bias is rounded once, and so are the SiLU and the product.

    "plain" has derivatives of any order and mode. Kernels support forward mode, reverse mode, and
    reverse mode around a stopped tangent. A tangent that is not stopped gives NaN.

    Args:
      x: [B, H, W, C].
      w: [k, k, C], k odd, same dtype.
      bias: [C], or None.
      gated: whether the second half of the channels gates the first.
      backend: one of `backend.DEPTHWISE`. Shapes that the kernel does not take use "plain".

    Returns:
      [B, H, W, C], or C / 2 channels with a gate, in x's dtype.
    """
    bias = jnp.zeros(x.shape[-1], x.dtype) if bias is None else bias
    if backend == "plain" or kernels.tile(x.shape, x.dtype, gated) is None:
        return _formula(x, w, bias, gated)
    return _by_kernel(x, w, bias, gated, backend)


def _formula(x: Array, w: Array, bias: Array, gated: bool) -> Array:
    y = (depthwise_conv(x, w) + bias).astype(x.dtype)
    if not gated:
        return y
    value, gate = jnp.split(y, 2, -1)
    return value * jax.nn.silu(gate.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _by_kernel(x: Array, w: Array, bias: Array, gated: bool, backend: str) -> Array:
    return kernels.conv(x, w, bias, gated=gated, backend=backend)


def _by_kernel_jvp(gated: bool, backend: str, primals: Any, tangents: Any) -> Any:
    # Call the function, not its implementation, so that an outer derivative finds the custom rule.
    out = _by_kernel(*primals, gated, backend)
    if all(map(autodiff.is_zero, tangents)):
        return out, jnp.zeros_like(out)
    if all(map(autodiff.is_zero, tangents[1:])):
        tangents = tangents[:1]  # sCM: parameters do not move
    along = functools.partial(_along, gated, backend)
    transpose = functools.partial(_transpose, gated, backend, len(tangents) > 1)
    return out, autodiff.linear_map(along, transpose, primals, tangents)


_by_kernel.defjvp(_by_kernel_jvp, symbolic_zeros=True)


def _along(gated: bool, backend: str, primals: Any, tangents: Any) -> Array:
    """Return the tangent of `_by_kernel`."""
    x, w, bias = primals
    if len(tangents) > 1:
        return jax.jvp(functools.partial(_formula, gated=gated), primals, tangents)[1]
    if gated:
        return kernels.gated_tangent(x, *tangents, w, bias, backend=backend)
    return kernels.conv(*tangents, w, jnp.zeros_like(bias), gated=False, backend=backend)


def _transpose(
    gated: bool, backend: str, with_parameters: bool, primals: Any, g: Array
) -> tuple[Array, ...]:
    """Return the cotangents of x and, if asked for, of w and bias."""
    x, w, bias = primals
    if gated:
        g = kernels.gate_gradient(x, g, w, bias, backend=backend)
    of_x = kernels.conv(g, _rotate(w), jnp.zeros_like(bias), gated=False, backend=backend)
    if not with_parameters:
        return (of_x,)
    wide = g.astype(jnp.promote_types(g.dtype, jnp.float32))
    return of_x, _weight_gradient(x, wide, w.shape[0]), wide.sum((0, 1, 2)).astype(bias.dtype)
