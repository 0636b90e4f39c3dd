"""ReLU linear attention with RMSNorm of queries and keys: the formula, or a kernel of it.

Per head, with a = relu(k'), c = relu(q') of the normalized keys and queries,

    S = sum_n a_n v_n^T      z = sum_n a_n      out_n = c_n S / (c_n z + eps)

Shape letters: B batch, N tokens, D width, h heads, d head width.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from sprint_jax.ops.norms import rms_norm
from sprint_jax.ops.pallas import linear_attention as kernels

EPS = 1e-15  # of the denominator, as in diffusers; the official repository uses 1e-8


def attend(
    qkv: Array,
    norm_q: Array | None,
    norm_k: Array | None,
    *,
    heads: int,
    eps: float,
    backend: str = "plain",
) -> Array:
    """Return the linear attention of normalized queries and keys, [B, N, D] in qkv's dtype.

    "plain" has derivatives of any order and mode. Kernels support forward mode, reverse mode, and
    reverse mode around a stopped tangent. A tangent that is not stopped gives NaN.

    Args:
      qkv: [B, N, 3 D], queries, keys and values side by side.
      norm_q, norm_k: weights [D] of RMSNorm over all channels, before the split into heads. None
        for no norm; kernels take both or neither.
      heads: h, a divisor of D.
      eps: epsilon of RMSNorm.
      backend: one of `backend.BACKENDS`.
    """
    if backend != "plain":
        return kernels.attend(
            qkv,
            norm_q,
            norm_k,
            heads=heads,
            eps=eps,
            denominator_eps=EPS,
            backend=backend,
        )
    q, k, v = jnp.split(qkv, 3, -1)
    if norm_q is not None:
        q = rms_norm(q, norm_q, eps)
    if norm_k is not None:
        k = rms_norm(k, norm_k, eps)
    split = lambda a: a.reshape(*a.shape[:2], heads, -1)
    return relu_attention(split(q), split(k), split(v)).reshape(v.shape)


def attend_interleaved(qkv: Array, *, heads: int, backend: str = "plain") -> Array:
    """Return linear attention without norms, of projections interleaved by head as in a DC-AE.

    qkv: [B, N, h 3 d], for each head first its q, then its k, then its v. backend: as in `attend`.
    Returns [B, N, h d] in the same dtype.
    """
    if backend != "plain":
        return kernels.attend_interleaved(qkv, heads=heads, denominator_eps=EPS, backend=backend)
    q, k, v = jnp.split(qkv.reshape(*qkv.shape[:2], heads, -1), 3, -1)
    out = relu_attention(q, k, v)
    return out.reshape(*out.shape[:2], -1)


def relu_attention(q: Array, k: Array, v: Array) -> Array:
    """Return the ReLU linear attention of q, k, v [B, N, h, d] in v's dtype, float32 inside."""
    q, k, v32 = (a.astype(jnp.float32) for a in (jax.nn.relu(q), jax.nn.relu(k), v))
    # The default precision is TF32 on a GPU and bfloat16 on a TPU.
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    state = product("bnhe,bnhd->bhed", k, v32)
    numerator = product("bnhe,bhed->bnhd", q, state)
    denominator = product("bnhe,bhe->bnh", q, k.sum(1))
    return (numerator / (denominator[..., None] + EPS)).astype(v.dtype)
