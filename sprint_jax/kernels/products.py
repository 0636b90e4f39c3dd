"""Matrix products with float32 sums whose gradients are products of the operands' dtype too.

A product of bfloat16 operands with a float32 result has a float32 cotangent. Left to JAX, the two products of the
backward pass then have one float32 operand, for which a GPU converts the other one and multiplies in TF32, at half the
speed. Here the cotangent is rounded to the operands' dtype first, as where a network's activations have that dtype.
float32 operands are left to JAX: there is nothing to round.
"""

import functools

import jax.numpy as jnp

from sprint_jax.kernels.derivatives import Bilinear


def dense(x, kernel, rounded=False):
    """x [..., n] times kernel [n, m], multiplied in x's dtype and summed in float32 -> [..., m] float32.

    rounded: in x's dtype instead, for a product to which nothing is added: where a library multiplies, that spares a pass over it.
    A kernel with more digits than x keeps them in its gradient, which is summed in float32 over samples and devices.
    """
    if x.dtype == jnp.float32:
        return jnp.matmul(x, kernel.astype(x.dtype))
    return _dense(x.dtype, x.dtype if rounded else jnp.float32)(x, kernel)


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
