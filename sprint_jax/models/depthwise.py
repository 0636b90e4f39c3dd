"""3x3 depthwise convolution, written so that every direction of it is fast on every platform.

Accelerators have a good `conv_general_dilated`. XLA's CPU backend does not: it runs grouped
convolutions naively, and even nine shifted multiplies lose their time in one place, the reduction
that gives the weight gradient. Here the value and the input gradient are nine fused shifted
multiplies and the weight gradient accumulates over the batch (`benchmarks/RESULTS.md` has the ratios).

The convolution is bilinear in (x, w). Only the rule in w is ours: a `custom_jvp` whose tangent is a
`linear_call` with its own transpose, which keeps forward mode (sCM's tangent), reverse mode and reverse
over a stopped forward all available.
"""

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, linear_call


def _shifts(x, w):
    """Nine shifted multiplies. x [B, H, W, C], w [3, 3, C] -> [B, H, W, C]."""
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(
        padded[:, i : i + height, j : j + width] * w[i, j] for i in range(3) for j in range(3)
    )


def _grouped_conv(x, w):
    """The library convolution. Same shapes as `_shifts`."""
    return jax.lax.conv_general_dilated(
        x, w[:, :, None, :], (1, 1), ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1],
    )  # fmt: skip


def _conv(x, w):
    return jax.lax.platform_dependent(x, w, cpu=_shifts, default=_grouped_conv)


def _weight_gradient_by_batch(x, g):
    """Accumulates sample by sample: the running sums [H, W, C] stay in cache."""
    _, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    offsets = [(i, j) for i in range(3) for j in range(3)]

    def add(sums, sample):
        xi, gi = sample
        return tuple(
            s + xi[i : i + height, j : j + width] * gi for s, (i, j) in zip(sums, offsets)
        ), None

    zeros = tuple(jnp.zeros((height, width, channels), x.dtype) for _ in offsets)
    sums, _ = jax.lax.scan(add, zeros, (padded, g))
    return jnp.stack([s.sum((0, 1)) for s in sums]).reshape(3, 3, channels)


def _weight_gradient_by_conv(x, g):
    """The transpose of `_grouped_conv` in its weights."""
    shape = jax.ShapeDtypeStruct((3, 3, x.shape[-1]), x.dtype)
    (dw,) = jax.linear_transpose(lambda w: _grouped_conv(x, w), shape)(g)
    return dw


def _weight_gradient(x, g):
    return jax.lax.platform_dependent(
        x, g, cpu=_weight_gradient_by_batch, default=_weight_gradient_by_conv
    )


def _linear_in_w(x, w):
    return linear_call(_conv, _weight_gradient, x, w)


@jax.custom_jvp
def depthwise_conv3x3(x, w):
    """Depthwise 3x3 convolution with zero padding 1 and stride 1 (cross-correlation, as in PyTorch).

    Args:
      x: [B, H, W, C].
      w: [3, 3, C], same dtype.
    Returns:
      [B, H, W, C].

    Forward mode, reverse mode, and reverse mode through a stopped tangent all work. Reverse mode through
    a tangent in w that is not stopped does not (`linear_call` has no derivative of its residuals).
    """
    return _conv(x, w)


def _jvp(primals, tangents):
    x, w = primals
    dx, dw = tangents
    out = depthwise_conv3x3(x, w)
    terms = []
    if not isinstance(dx, SymbolicZero):
        terms.append(_conv(dx, w))
    if not isinstance(dw, SymbolicZero):
        terms.append(_linear_in_w(x, dw))
    return out, sum(terms) if terms else jnp.zeros_like(out)


depthwise_conv3x3.defjvp(_jvp, symbolic_zeros=True)
