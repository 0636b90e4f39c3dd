"""Masked softmax attention of image tokens to text tokens: the formula, or a kernel of it.

Shape letters: B batch, N queries, L keys, h heads, d head width.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from sprint_jax.ops import matmul
from sprint_jax.ops.pallas import cross_attention as kernels

MASKED = -1e4  # added to the scores of masked keys, as published


def attend(q: Array, k: Array, v: Array, mask: Array, *, backend: str = "plain") -> Array:
    """Return the softmax attention over text, [B, N, h, d] in v's dtype.

    "plain" has derivatives of any order and mode. Kernels support forward mode, with a cheaper
    kernel if k and v have no tangent as in sCM, reverse mode, and reverse mode around a stopped
    tangent. A tangent that is not stopped gives NaN.

    Args:
      q: [B, N, h, d]. k, v: [B, L, h, d]. All of one dtype.
      mask: [B, L], non-zero for text tokens that count. If none does, all count.
      backend: one of `backend.BACKENDS`.
    """
    bias = jnp.where(mask.astype(bool), 0.0, MASKED)
    if backend != "plain":
        return kernels.attend(q, k, v, bias, backend=backend)
    # Heads lead in both products: XLA's CPU backend takes twice as long for the same einsums.
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
    scores = matmul.batched(q, jnp.swapaxes(k, 2, 3)) / math.sqrt(q.shape[-1])
    weights = jax.nn.softmax(scores + bias[:, None, None, :], axis=-1).astype(v.dtype)
    return jnp.swapaxes(weights @ v, 1, 2)
