"""Functions, arrays and derivatives on which kernels are tested."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from helpers.arrays import normal_arrays
from helpers.networks import linear_dit
from sprint_jax.ops import cross_attention, linear_attention

EPS = 1e-5
Arrays = tuple[Any, ...]

TINY_MODEL = linear_dit(
    in_channels=3,
    width=64,
    depth=2,
    heads=2,
    cross_heads=4,
    mlp_ratio=1.0,
    text_dim=6,
    remat="block",
)


def derivatives(
    f: Callable, primals: Arrays, tangents: Arrays, cotangent: Any, scan: bool = True
) -> tuple:
    """Return value, jvp, vjp, the gradient of a loss around a stopped jvp, and a partial jvp.

    The loss goes through two layers in a loop. Without `scan` its gradient is left out.
    """

    def scm(scales):
        def layer(x, _):
            moved = f(x, *(a * s for a, s in zip(primals[1:], scales[1:])))
            return x * scales[0] + moved, None

        net = lambda x: jax.lax.scan(jax.checkpoint(layer), x, None, length=2)[0]
        value, J = jax.jvp(net, (primals[0] * scales[0],), (tangents[0],))
        return ((value + jax.lax.stop_gradient(J - value)) ** 2 * cotangent).sum()

    def run(primals, tangents, cotangent):
        scales = jnp.ones(len(primals), primals[0].dtype)
        return (
            jax.jvp(f, primals, tangents),
            jax.vjp(f, *primals)[1](cotangent),
            jax.grad(scm)(scales) if scan else (),
            jax.jvp(lambda x: f(x, *primals[1:]), primals[:1], tangents[:1])[1],
        )

    return jax.device_get(jax.jit(run)(primals, tangents, cotangent))


def linear_case(
    seed: int,
    batch: int,
    tokens: int,
    heads: int,
    head: int,
    norm: bool,
    *,
    dtype: DTypeLike = np.float32,
) -> tuple[Arrays, Arrays, Any]:
    """Return (primals, tangents, cotangent) of linear attention."""
    width = heads * head
    q, k, v, dq, dk, dv, g = normal_arrays(*((batch, tokens, width),) * 7, seed=seed)
    weights = (
        tuple(1 + 0.3 * w for w in normal_arrays(*((width,),) * 4, seed=seed + 1)) if norm else ()
    )
    cast = lambda arrays: tuple(jnp.asarray(a, dtype) for a in arrays)
    return (
        (*cast((q, k, v)), *weights[:2]),
        (*cast((dq, dk, dv)), *weights[2:]),
        jnp.asarray(g, dtype),
    )


def linear(function: Callable, heads: int, **options: Any) -> Callable:
    """Return a function of q, k, v and the weights of their norms."""

    def f(q, k, v, norm_q=None, norm_k=None):
        return function(
            jnp.concatenate((q, k, v), -1), norm_q, norm_k, heads=heads, eps=EPS, **options
        )

    return f


def cross_case(
    seed: int,
    batch: int,
    queries: int,
    keys: int,
    heads: int,
    head: int,
    *,
    dtype: DTypeLike = np.float32,
) -> tuple[Arrays, Arrays, Any]:
    """Return (primals, tangents, cotangent) of cross-attention."""
    q, dq, g = normal_arrays(*((batch, queries, heads, head),) * 3, seed=seed)
    k, v, dk, dv = normal_arrays(*((batch, keys, heads, head),) * 4, seed=seed + 1)
    cast = lambda arrays: tuple(jnp.asarray(a, dtype) for a in arrays)
    return cast((q, k, v)), cast((dq, dk, dv)), jnp.asarray(g, dtype)


def cross(function: Callable, mask: np.ndarray, **options: Any) -> Callable:
    """Return a function of q, k and v."""
    return lambda q, k, v: function(q, k, v, mask, **options)


def uneven_mask(batch: int, keys: int) -> np.ndarray:
    """Return a mask [B, L]: one key of the first sample, and the first two thirds of the others."""
    mask = np.arange(keys) < (2 * keys + 2) // 3 * np.ones((batch, 1))
    mask[0] = np.arange(keys) == keys // 2
    return mask.astype(np.float32)


def published_case(kind: str | int, name: str, batch: int = 2) -> tuple[Callable, tuple]:
    """Return (function by kernels, abstract arguments) at published widths, bfloat16."""
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
    if kind == "linear":
        heads = {1152: 36, 2240: 70}
        width = 1152 if batch == 2 else 2240
        weight = jax.ShapeDtypeStruct((width,), jnp.float32)
        f = linear(linear_attention.attend, heads[width], backend=name)
        return f, (*(shape(batch, 1024, width),) * 3, weight, weight)
    heads, head = {32: (36, 32), 72: (16, 72), 112: (20, 112)}[kind]
    f = cross(cross_attention.attend, np.ones((batch, 300)), backend=name)
    return f, (shape(batch, 1024, heads, head), *(shape(batch, 300, heads, head),) * 2)


def differentiation_modes(f: Callable) -> dict[str, Callable]:
    """Return {direction: function}."""
    summed = lambda *primals: f(*primals).astype(jnp.float32).sum()
    return {
        "forward": f,
        "jvp": lambda x, *rest: jax.jvp(lambda x: f(x, *rest), (x,), (x,)),
        "grad": lambda *primals: jax.grad(summed, range(len(primals)))(*primals),
    }


def depthwise_loops(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Compute a depthwise cross-correlation with zeros outside.

    x is [B, H, W, C] and w is [k, k, C].
    """
    out, k = np.zeros_like(x), w.shape[0]
    _, height, width, _ = x.shape
    for row in range(height):
        for column in range(width):
            for i in range(k):
                for j in range(k):
                    r, c = row + i - k // 2, column + j - k // 2
                    if 0 <= r < height and 0 <= c < width:
                        out[:, row, column] += x[:, r, c] * w[i, j]
    return out
