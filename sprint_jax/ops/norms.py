"""Normalization over the last axis, computed in float32 whatever the dtype.

Gemma-2 and CLIP keep norms of their own beside their networks, since the published arithmetic
rounds differently.
"""

import jax
import jax.numpy as jnp
from jax import Array


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Return the RMSNorm of x [..., D] with weight [D], in x's dtype.

    x / rms is rounded to the weight's dtype. A float32 weight, as in training, leaves one rounding.
    A bfloat16 weight leaves three, as in diffusers.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + eps)
    return (x32.astype(weight.dtype) * weight).astype(x.dtype)


def layer_norm(x: Array, eps: float = 1e-6) -> Array:
    """Return the LayerNorm of x [..., D] without affine parameters, in x's dtype."""
    x32 = x.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True)
    centered = x32 - mean
    variance = jnp.square(centered).mean(-1, keepdims=True)
    return (centered * jax.lax.rsqrt(variance + eps)).astype(x.dtype)
