"""Matrix products with float32 sums, whose gradients are products in the operands' dtype too.

A product of bfloat16 operands with a float32 result has a float32 cotangent. JAX's own rule then
multiplies a float32 operand by a bfloat16 one in the backward pass. A GPU converts the latter and
multiplies in TF32, at half the speed. Here the cotangent is rounded to the operands' dtype first,
as in a network whose activations have that dtype. Products of float32 operands use JAX's rule,
since there is nothing to round.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array

from sprint_jax.ops.autodiff import Bilinear, is_zero


def dense(x: Array, kernel: Array, rounded: bool = False) -> Array:
    """Return x [..., n] times kernel [n, m], multiplied in x's dtype and summed in float32.

    A kernel of a wider dtype than x gets its gradient in that dtype, summed in float32 over
    samples and devices. Training steps pass kernels in x's dtype (`placement.gather_weights`), so
    their gradient is rounded once after that sum, as with PyTorch's autocast.

    Args:
      x: [..., n].
      kernel: [n, m].
      rounded: return x's dtype. Use it if no bias follows, since it saves a pass over memory where
        a library multiplies.

    Returns:
      [..., m], float32 unless `rounded`.
    """
    if x.dtype == jnp.float32:
        return jnp.matmul(x, kernel.astype(x.dtype))
    return _dense(x.dtype, x.dtype if rounded else jnp.float32)(x, kernel)


def affine(x: Array, kernel: Array, bias: Array) -> Array:
    """Return x [..., n] times kernel [n, m] plus bias [m], [..., m] in x's dtype.

    x, kernel and their gradients are as in `dense`. Product and sum are float32 and rounded once.
    On an NVIDIA GPU the sum is written in x's dtype: libraries add the bias before they round,
    which saves a float32 array and a pass over it. If the compiler chooses its own product there,
    it rounds twice.
    """
    if x.dtype == jnp.float32:
        return jnp.matmul(x, kernel.astype(x.dtype)) + bias
    return _affine(x, kernel, bias)


@jax.custom_jvp
def _affine(x: Array, kernel: Array, bias: Array) -> Array:
    def added(out, x, kernel, bias):
        return (_dense(x.dtype, out).value(x, kernel) + bias.astype(out)).astype(x.dtype)

    by = lambda out: functools.partial(added, out)
    return jax.lax.platform_dependent(x, kernel, bias, cuda=by(x.dtype), default=by(jnp.float32))


def _affine_jvp(primals, tangents):
    x, kernel, _ = primals
    out, (*moving, slide) = _affine(*primals), tangents
    tangent = _dense(x.dtype, x.dtype).tangent((x, kernel), moving)
    terms = [] if tangent is None else [tangent]
    if not is_zero(slide):
        # Broadcast before rounding, so that its gradient is a float32 sum.
        terms.append(jnp.broadcast_to(slide, out.shape).astype(x.dtype))
    if not terms:
        return out, jnp.zeros_like(out)
    # Behind the barrier a cotangent is rounded for all three of its uses. The compiler would keep
    # float32 for the sum alone, and write and read twice as much for it.
    return out, jax.lax.optimization_barrier(cast(Array, sum(terms)))


_affine.defjvp(_affine_jvp, symbolic_zeros=True)


@functools.cache
def _dense(dtype: Any, out: Any) -> Bilinear:
    """Return the product of x in `dtype` by a kernel, with a result in the dtype `out`."""

    def value(x, kernel):
        return jnp.matmul(x, kernel.astype(dtype), preferred_element_type=out)

    def to_x(kernel, g):
        return jnp.matmul(g.astype(dtype), kernel.astype(dtype).T)

    def to_kernel(x, g):
        x, g = (a.reshape(-1, a.shape[-1]) for a in (x, g.astype(dtype)))
        return jnp.matmul(x.T, g, preferred_element_type=jnp.float32)

    return Bilinear(value, to_x, to_kernel)


def batched(a: Array, b: Array) -> Array:
    """Return a [..., N, d] times b [..., d, M] in float32, [..., N, M].

    Both have the same dtype and the same leading axes.
    """
    return jnp.matmul(a, b) if a.dtype == jnp.float32 else _BATCHED(a, b)


_BATCHED = Bilinear(
    lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32),
    lambda b, g: jnp.matmul(g.astype(b.dtype), jnp.swapaxes(b, -1, -2)),
    lambda a, g: jnp.matmul(jnp.swapaxes(a, -1, -2), g.astype(a.dtype)),
)
