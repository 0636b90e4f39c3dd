"""Depthwise convolution, written so that every direction of it is fast on every platform.

Accelerators have a good `conv_general_dilated`. XLA's CPU backend does not: it runs grouped
convolutions naively, and even shifted multiplies, one per tap, lose their time in one place, the
reduction that gives the weight gradient. Here the value and the input gradient are fused shifted
multiplies and the weight gradient accumulates over the batch (`docs/results/speed.md` has the ratios).
On a GPU the input gradient is what needs a form of its own, and there are kernels (`ops/pallas/depthwise.py`).
"""

import functools

import jax
import jax.numpy as jnp

from sprint_jax.ops import autodiff, placement
from sprint_jax.ops.pallas import depthwise


def _offsets(w_shape):
    """((i, j), ...) of a square stencil [k, k, C], row by row."""
    return [(i, j) for i in range(w_shape[0]) for j in range(w_shape[1])]


def _pad(x, k):
    return jnp.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))


def _shifts(x, w):
    """One shifted multiply per tap. x [B, H, W, C], w [k, k, C] -> [B, H, W, C] of at least float32."""
    height, width = x.shape[1:3]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    padded, w = _pad(x, w.shape[0]).astype(wide), w.astype(wide)
    taps = (padded[:, i : i + height, j : j + width] * w[i, j] for i, j in _offsets(w.shape))
    return sum(taps)


def _grouped_conv(x, w):
    """The library convolution. Same shapes as `_shifts`."""
    y = jax.lax.conv_general_dilated(
        x,
        w[:, :, None, :],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )
    return y.astype(jnp.promote_types(x.dtype, jnp.float32))


def _conv(x, w):
    return jax.lax.platform_dependent(x, w, cpu=_shifts, default=_grouped_conv)


def _weight_gradient_by_batch(x, g, k):
    """Accumulates sample by sample: the running sums [H, W, C] stay in cache."""
    _, height, width, channels = x.shape
    padded, g = placement.samples_first(_pad(x, k)), placement.samples_first(g)
    offsets = _offsets((k, k))

    def add(sums, samples):
        xs, gs = samples  # one of each device
        return tuple(
            s + xs[:, i : i + height, j : j + width] * gs for s, (i, j) in zip(sums, offsets)
        ), None

    zeros = tuple(jnp.zeros(g.shape[1:], g.dtype) for _ in offsets)
    sums, _ = jax.lax.scan(add, zeros, (padded, g))
    return jnp.stack([s.sum((0, 1, 2)) for s in sums]).reshape(k, k, channels).astype(x.dtype)


def _weight_gradient_by_conv(x, g, k):
    """The transpose of `_grouped_conv` in its weights."""
    shape = jax.ShapeDtypeStruct((k, k, x.shape[-1]), x.dtype)
    (dw,) = jax.linear_transpose(lambda w: _grouped_conv(x, w), shape)(g)
    return dw


def _input_gradient(w, g):
    """A convolution like the forward one, with the stencil turned round.

    Written out: transposed by JAX it turns the stencil by `rev`, which XLA takes for a "backward data" convolution, and on an
    H200 those took 10 ms instead of 0.2 in bfloat16, most of it in copies between layouts (`docs/results/speed.md`).
    """
    return _conv(g.astype(w.dtype), _turned(w))


def _turned(w):
    """The stencil turned round."""
    return jnp.stack([w[i, j] for i, j in reversed(_offsets(w.shape))]).reshape(w.shape)


def _weight_gradient(x, g, k):
    """g: of at least float32."""
    return jax.lax.platform_dependent(
        x,
        g,
        cpu=lambda x, g: _weight_gradient_by_batch(x, g, k),
        default=lambda x, g: _weight_gradient_by_conv(x, g, k),
    )


@functools.cache
def _map(k):
    """The convolution by stencils of k x k."""
    return autodiff.Bilinear(_conv, _input_gradient, functools.partial(_weight_gradient, k=k))


def depthwise_conv(x, w):
    """Depthwise k x k convolution, zero-padded to the same size, stride 1 (cross-correlation, as in PyTorch).

    Args:
      x: [B, H, W, C].
      w: [k, k, C], k odd, same dtype.
    Returns:
      [B, H, W, C], of at least float32: whoever adds a bias rounds once, after it.

    Forward mode, reverse mode, and any mixture of them work.
    """
    return _map(w.shape[0])(x, w)


def smooth(x, w, bias=None, gated=False, backend="plain"):
    """Depthwise convolution with a bias, and with a gate: value * SiLU(gate), halves of the channels.

    Args:
      x: [B, H, W, C].
      w: [k, k, C], k odd, same dtype.
      bias: [C], or None.
      backend: "plain", or what `kernels.depthwise.conv` takes, for the shapes that it takes.
    Returns:
      [B, H, W, C], or C / 2 channels with a gate, in x's dtype. The convolution with its bias is rounded once, so are the SiLU
      and the product.

    "plain" has derivatives of any order and mode. By kernels forward mode, reverse mode, and reverse mode around a stopped tangent
    work; a tangent that is not stopped gives NaN.
    """
    bias = jnp.zeros(x.shape[-1], x.dtype) if bias is None else bias
    if backend == "plain" or depthwise.tile(x.shape, x.dtype, gated) is None:
        return _formula(x, w, bias, gated)
    return _by_kernel(x, w, bias, gated, backend)


def _formula(x, w, bias, gated):
    y = (depthwise_conv(x, w) + bias).astype(x.dtype)
    if not gated:
        return y
    value, gate = jnp.split(y, 2, -1)
    return value * jax.nn.silu(gate.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _by_kernel(x, w, bias, gated, backend):
    return depthwise.conv(x, w, bias, gated=gated, backend=backend)


def _by_kernel_jvp(gated, backend, primals, tangents):
    # By the function itself, so that a derivative around this one finds its rule.
    out = _by_kernel(*primals, gated, backend)
    if all(map(autodiff.is_zero, tangents)):
        return out, jnp.zeros_like(out)
    if all(map(autodiff.is_zero, tangents[1:])):
        tangents = tangents[:1]  # sCM: parameters do not move
    along = functools.partial(_along, gated, backend)
    transpose = functools.partial(_transpose, gated, backend, len(tangents) > 1)
    return out, autodiff.linear_map(along, transpose, primals, tangents)


_by_kernel.defjvp(_by_kernel_jvp, symbolic_zeros=True)


def _along(gated, backend, primals, tangents):
    """Tangent of `_by_kernel`."""
    x, w, bias = primals
    if len(tangents) > 1:
        return jax.jvp(functools.partial(_formula, gated=gated), primals, tangents)[1]
    if gated:
        return depthwise.gated_tangent(x, *tangents, w, bias, backend=backend)
    return depthwise.conv(*tangents, w, jnp.zeros_like(bias), gated=False, backend=backend)


def _transpose(gated, backend, with_parameters, primals, g):
    """Cotangents of x, and of w and bias."""
    x, w, bias = primals
    if gated:
        g = depthwise.gate_gradient(x, g, w, bias, backend=backend)
    of_x = depthwise.conv(g, _turned(w), jnp.zeros_like(bias), gated=False, backend=backend)
    if not with_parameters:
        return (of_x,)
    wide = g.astype(jnp.promote_types(g.dtype, jnp.float32))
    return of_x, _weight_gradient(x, wide, w.shape[0]), wide.sum((0, 1, 2)).astype(bias.dtype)
