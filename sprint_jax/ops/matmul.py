"""Matrix products with float32 sums whose gradients are products of the operands' dtype too.

A product of bfloat16 operands with a float32 result has a float32 cotangent. Left to JAX, the two products of the
backward pass then have one float32 operand, for which a GPU converts the other one and multiplies in TF32, at half the
speed. Here the cotangent is rounded to the operands' dtype first, as where a network's activations have that dtype.
float32 operands are left to JAX: there is nothing to round.
"""

import functools

import jax
import jax.numpy as jnp

from sprint_jax.ops.autodiff import Bilinear, is_zero


def dense(x, kernel, rounded=False):
    """x [..., n] times kernel [n, m], multiplied in x's dtype and summed in float32 -> [..., m] float32.

    rounded: in x's dtype instead, for a product to which nothing is added: where a library multiplies, that spares a pass over it.
    A kernel with more digits than x keeps them in its gradient, which is summed in float32 over samples and devices. Training steps
    hand over kernels in x's dtype (`placement.gathered`), so theirs is rounded once after that sum, as under PyTorch's autocast.
    """
    if x.dtype == jnp.float32:
        return jnp.matmul(x, kernel.astype(x.dtype))
    return _dense(x.dtype, x.dtype if rounded else jnp.float32)(x, kernel)


def affine(x, kernel, bias):
    """x [..., n] times kernel [n, m], plus bias [m] -> [..., m] in x's dtype; x, kernel and their gradients as in `dense`.

    Product and sum are float32 and rounded once. On an NVIDIA GPU the sum is written in x's dtype: libraries add it before they round,
    and spare a float32 array and a pass over it; where the compiler's own product is chosen it rounds twice.
    """
    if x.dtype == jnp.float32:
        return jnp.matmul(x, kernel.astype(x.dtype)) + bias
    return _affine(x, kernel, bias)


@jax.custom_jvp
def _affine(x, kernel, bias):
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
        # Spread out before it is rounded: its gradient is then a float32 sum.
        terms.append(jnp.broadcast_to(slide, out.shape).astype(x.dtype))
    # Behind the barrier a cotangent is rounded for all three of its uses; the compiler would keep float32 for the sum alone, and
    # write and read twice as much for it.
    return out, jax.lax.optimization_barrier(sum(terms)) if terms else jnp.zeros_like(out)


_affine.defjvp(_affine_jvp, symbolic_zeros=True)


@functools.cache
def _dense(dtype, out):
    def value(x, kernel):
        return jnp.matmul(x, kernel.astype(dtype), preferred_element_type=out)

    def to_x(kernel, g):
        return jnp.matmul(g.astype(dtype), kernel.astype(dtype).T)

    def to_kernel(x, g):
        x, g = (a.reshape(-1, a.shape[-1]) for a in (x, g.astype(dtype)))
        return jnp.matmul(x.T, g, preferred_element_type=jnp.float32)

    return Bilinear(value, to_x, to_kernel)


def batched(a, b):
    """a [..., N, d] times b [..., d, M], of one dtype and with the same leading axes -> [..., N, M] float32."""
    return jnp.matmul(a, b) if a.dtype == jnp.float32 else _BATCHED(a, b)


_BATCHED = Bilinear(
    lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32),
    lambda b, g: jnp.matmul(g.astype(b.dtype), jnp.swapaxes(b, -1, -2)),
    lambda a, g: jnp.matmul(jnp.swapaxes(a, -1, -2), g.astype(a.dtype)),
)
