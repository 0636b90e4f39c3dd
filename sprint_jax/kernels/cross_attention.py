"""Masked softmax attention of image tokens to text tokens, as kernels for value, tangent and gradient.

`plain` is the published arithmetic; `attention` computes the same by kernels that never write the scores out. Per
query, with s_j = q k_j / sqrt(d) + bias_j, p = softmax(s) and a dot for the tangent,

    out = sum_j p_j v_j        s'_j = (q' k_j + q k'_j) / sqrt(d)        out' = sum_j p_j (s'_j - sum_i p_i s'_i) v_j + p_j v'_j

The forward pass keeps the row's largest score and its sum of exponentials, apart from each other: their log-sum-exp
would lose digits where scores are large or masked. Tangent and gradient rebuild p from them. Keys are walked through
twice where a mean over them comes off first (s' above, and the gradient's p (g v - sum p g v)): with so few keys that
is cheaper than what is lost when the mean is taken off the rounded sum instead.

Shape letters: B batch, N queries, L keys, h heads, d head width.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sprint_jax.kernels import backend as backends
from sprint_jax.kernels import products
from sprint_jax.kernels.backend import Operand, dot, single_dot
from sprint_jax.kernels.derivatives import is_zero, linear_map

MASKED = -1e4  # added to the scores of masked keys, as published
_ABSENT = -1e30  # added to those of keys that only fill a block: they have no weight even where every key is masked


def plain(q, k, v, mask):
    """Softmax attention over text.

    Args:
      q: [B, N, h, d]. k, v: [B, L, h, d]. One dtype.
      mask: [B, L], non-zero where a text token counts. Where none does, all count.
    Returns:
      [B, N, h, d] in v's dtype.

    Heads lead in both products: XLA's CPU backend takes half the time of the same products as einsums.
    """
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
    scores = products.batched(q, jnp.swapaxes(k, 2, 3)) / math.sqrt(q.shape[-1])
    bias = jnp.where(mask.astype(bool), 0.0, MASKED)[:, None, None, :]
    weights = jax.nn.softmax(scores + bias, axis=-1).astype(v.dtype)
    return jnp.swapaxes(weights @ v, 1, 2)


def attention(q, k, v, mask, *, backend):
    """`plain` by kernels; same arguments and result.

    backend: "interpret", "triton" or "tpu", see `kernels/backend.py`.
    Forward mode (with a cheaper kernel where k and v have no tangent, as in sCM), reverse mode, and reverse mode
    around a stopped tangent; a tangent that is not stopped gives NaN.
    """
    if k.shape != v.shape or q.shape[2:] != k.shape[2:] or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v do not fit: {q.shape} {q.dtype}, {k.shape} {k.dtype}, {v.shape} {v.dtype}")
    bias = jax.lax.stop_gradient(jnp.where(mask.astype(bool), 0.0, MASKED)[:, None, :].astype(jnp.float32))
    return _attend(_Tiling.of(q.shape, k.shape[1], backend), q, k, v, bias)[0]


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """How one call is cut."""

    queries: int  # N
    keys: int  # L
    heads: int
    width: int  # d
    head: int  # channels of a head inside the kernels
    block_q: int
    block_k: int
    inner: int  # blocks of queries that one program of the gradient of the keys walks through
    parts: int  # such programs for each block of keys
    backend: str

    @classmethod
    def of(cls, shape, keys, backend):
        batch, queries, heads, width = shape
        # Blocks of a TPU end on 128 lanes; Triton's arrays are powers of two, of at least 16 in products.
        head = 128 if backend == "tpu" else max(16, backends.next_power_of_two(width))
        block_k = 128 if backend == "tpu" else max(16, min(64, backends.next_power_of_two(keys)))
        block_q = max(16, min(64, backends.next_power_of_two(queries)))
        blocks, programs = -(-queries // block_q), backends.local_batch(batch) * heads * -(-keys // block_k)
        wanted = max(-(-blocks * block_q // 1024), math.ceil(128 / programs))
        inner = -(-blocks // min(blocks, wanted))
        return cls(queries, keys, heads, width, head, block_q, block_k, inner, -(-blocks // inner), backend)

    @property
    def rows(self):
        """N, padded."""
        return self.block_q * self.inner * self.parts

    @property
    def columns(self):
        """L, padded."""
        return backends.padded_to(self.keys, self.block_k)

    def tiled(self, x, length):
        """[B, n, h, d] -> [B, length, h head], filled up with zeros."""
        x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, self.head - self.width)))
        return x.reshape(*x.shape[:2], -1)

    def untiled(self, x, length):
        """The inverse of `tiled`."""
        return x.reshape(*x.shape[:2], self.heads, self.head)[:, :length, :, : self.width]


def _run(t, name, body, ins, outs, batch, dtype, *, by_keys=False):
    """ins: {name: (kind, array)}. outs: {name: kind}. Grid (B, h, blocks of queries), or with by_keys
    (B, h, blocks of keys, parts of the queries)."""
    if by_keys:
        rows, grid = t.block_q * t.inner, (None, t.heads, t.columns // t.block_k, t.parts)
        make = dict(
            queries=lambda a: Operand(a, (None, rows, t.head), lambda b, h, j, n: (b, n, h)),
            column=lambda a: Operand(a, (None, None, rows, 1), lambda b, h, j, n: (b, h, n, 0)),
            keys=lambda a: Operand(a, (None, t.block_k, t.head), lambda b, h, j, n: (b, j, h)),
            bias=lambda a: Operand(a, (None, 1, t.block_k), lambda b, h, j, n: (b, 0, j)),
            partial=lambda a: Operand(a, (None, None, t.block_k, t.head), lambda b, h, j, n: (b, n, j, h)),
        )
    else:
        grid = (None, t.heads, t.rows // t.block_q)
        make = dict(
            queries=lambda a: Operand(a, (None, t.block_q, t.head), lambda b, h, i: (b, i, h)),
            column=lambda a: Operand(a, (None, None, t.block_q, 1), lambda b, h, i: (b, h, i, 0)),
            keys=lambda a: Operand(a, (None, t.columns, t.head), lambda b, h, i: (b, 0, h)),
            bias=lambda a: Operand(a, (None, 1, t.columns), lambda b, h, i: (b, 0, 0)),
        )
    shapes = dict(
        queries=((batch, t.rows, t.heads * t.head), dtype),
        column=((batch, t.heads, t.rows, 1), jnp.float32),
        partial=((batch, t.parts, t.columns, t.heads * t.head), jnp.float32),
    )
    return backends.launch(
        functools.partial(body, t, dtype), grid,
        {key: make[kind](array) for key, (kind, array) in ins.items()},
        {key: make[kind](jax.ShapeDtypeStruct(*shapes[kind])) for key, kind in outs.items()},
        backend=t.backend, name=name,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------- kernel bodies


def _product(t, a, b):
    """a b^T / sqrt(d), divided as `plain` does."""
    return single_dot(a, b, (1, 1)) / math.sqrt(t.width)


def _over_keys(t, step, start):
    """step(columns, sums) -> sums over the blocks of keys."""
    at = lambda j: pl.ds(pl.multiple_of(j * t.block_k, t.block_k), t.block_k)
    return jax.lax.fori_loop(0, t.columns // t.block_k, lambda j, sums: step(at(j), sums), start)


def _weights(t, r, q, columns):
    """p of a block of queries and a block of keys, float32, from what the forward pass kept."""
    scores = _product(t, q, r["k"][columns, :]) + r["bias"][:, columns]
    return jnp.exp(scores - r["largest"][...]) / r["sum"][...]


def _forward(t, dtype, r):
    q = r["q"][...]

    def step(columns, sums):
        out, largest, total = sums
        scores = _product(t, q, r["k"][columns, :]) + r["bias"][:, columns]
        larger = jnp.maximum(largest, scores.max(1, keepdims=True))
        shrink, p = jnp.exp(largest - larger), jnp.exp(scores - larger)
        out = out * shrink + single_dot(p.astype(dtype), r["v"][columns, :])
        return out, larger, total * shrink + p.sum(1, keepdims=True)

    start = (
        jnp.zeros((t.block_q, t.head), jnp.float32), jnp.full((t.block_q, 1), 2 * _ABSENT, jnp.float32),
        jnp.zeros((t.block_q, 1), jnp.float32),
    )  # fmt: skip
    out, largest, total = _over_keys(t, step, start)
    r["out"][...] = (out / total).astype(dtype)
    r["largest"][...] = largest
    r["sum"][...] = total


def _forward_tangent(t, dtype, r):
    """With or without tangents of k and v."""
    q, dq, moving = r["q"][...], r["dq"][...], "dk" in r

    def moved(columns):
        scores = _product(t, dq, r["k"][columns, :])
        return scores + _product(t, q, r["dk"][columns, :]) if moving else scores

    mean = _over_keys(
        t, lambda columns, mean: mean + (_weights(t, r, q, columns) * moved(columns)).sum(1, keepdims=True),
        jnp.zeros((t.block_q, 1), jnp.float32),
    )  # fmt: skip

    def step(columns, out):
        p = _weights(t, r, q, columns)
        out = out + single_dot((p * (moved(columns) - mean)).astype(dtype), r["v"][columns, :])
        return out + single_dot(p.astype(dtype), r["dv"][columns, :]) if moving else out

    r["dout"][...] = _over_keys(t, step, jnp.zeros((t.block_q, t.head), jnp.float32)).astype(dtype)


def _query_gradient(t, dtype, r):
    """Cotangent of q, and sum_j p_j g v_j for `_key_gradient`."""
    q, g = r["q"][...], r["g"][...]
    of_weights = lambda columns: single_dot(g, r["v"][columns, :], (1, 1))
    mean = _over_keys(
        t, lambda columns, mean: mean + (_weights(t, r, q, columns) * of_weights(columns)).sum(1, keepdims=True),
        jnp.zeros((t.block_q, 1), jnp.float32),
    )  # fmt: skip

    def step(columns, of_q):
        of_scores = _weights(t, r, q, columns) * (of_weights(columns) - mean) / math.sqrt(t.width)
        return of_q + dot(of_scores, r["k"][columns, :], dtype)

    r["gq"][...] = _over_keys(t, step, jnp.zeros((t.block_q, t.head), jnp.float32)).astype(dtype)
    r["mean"][...] = mean


def _key_gradient(t, dtype, r):
    """Cotangents of k and v, each summed over the queries of one part."""
    k, v, bias = r["k"][...], r["v"][...], r["bias"][...]

    def step(i, sums):
        rows = pl.ds(pl.multiple_of(i * t.block_q, t.block_q), t.block_q)
        q, g = r["q"][rows, :], r["g"][rows, :]
        p = jnp.exp(_product(t, q, k) + bias - r["largest"][rows, :]) / r["sum"][rows, :]
        of_scores = p * (single_dot(g, v, (1, 1)) - r["mean"][rows, :]) / math.sqrt(t.width)
        return sums[0] + dot(of_scores, q, dtype, (0, 0)), sums[1] + single_dot(p.astype(dtype), g, (0, 0))

    zeros = jnp.zeros((t.block_k, t.head), jnp.float32)
    r["gk"][...], r["gv"][...] = jax.lax.fori_loop(0, t.inner, step, (zeros, zeros))


# --------------------------------------------------------------------------------------------- the four passes


def _inputs(t, q, k, v, bias):
    missing = ((0, 0), (0, 0), (0, t.columns - t.keys))
    return {
        "q": ("queries", t.tiled(q, t.rows)), "k": ("keys", t.tiled(k, t.columns)), "v": ("keys", t.tiled(v, t.columns)),
        "bias": ("bias", jnp.pad(bias, missing, constant_values=_ABSENT)),
    }  # fmt: skip


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(t, q, k, v, bias):
    """(out [B, N, h, d], largest score and sum of exponentials, each [B, h, rows, 1]); only out has a derivative."""
    found = _run(
        t, "cross_attention", _forward, _inputs(t, q, k, v, bias),
        {"out": "queries", "largest": "column", "sum": "column"}, q.shape[0], q.dtype,
    )  # fmt: skip
    return t.untiled(found["out"], t.queries), found["largest"], found["sum"]


def _attend_jvp(t, primals, tangents):
    # By the function itself, so that a derivative around this one finds its rule.
    out, largest, total = _attend(t, *primals)
    tangents = tangents[:3]
    if all(map(is_zero, tangents[1:])):
        tangents = tangents[:1]  # sCM: the text does not move
    dout = jnp.zeros_like(out)
    if not all(map(is_zero, tangents)):
        q, k, v, bias = primals
        residuals = (q, k, v, *jax.lax.stop_gradient((bias, largest, total)))
        transpose = functools.partial(_transpose, t, len(tangents) > 1)
        dout = linear_map(functools.partial(_tangent, t), transpose, residuals, tangents)
    return (out, largest, total), (dout, jnp.zeros_like(largest), jnp.zeros_like(total))


_attend.defjvp(_attend_jvp, symbolic_zeros=True)


def _residuals(t, residuals):
    *inputs, largest, total = residuals
    return _inputs(t, *inputs) | {"largest": ("column", largest), "sum": ("column", total)}


def _tangent(t, residuals, tangents):
    dq, *rest = tangents
    ins = _residuals(t, residuals) | {"dq": ("queries", t.tiled(dq, t.rows))}
    ins |= {name: ("keys", t.tiled(a, t.columns)) for name, a in zip(("dk", "dv"), rest)}
    name = "cross_attention_tangent" if rest else "cross_attention_tangent_of_queries"
    found = _run(t, name, _forward_tangent, ins, {"dout": "queries"}, dq.shape[0], dq.dtype)
    return t.untiled(found["dout"], t.queries)


def _transpose(t, with_keys, residuals, g):
    q, k = residuals[:2]
    ins = _residuals(t, residuals) | {"g": ("queries", t.tiled(g, t.rows))}
    run = functools.partial(_run, t, batch=q.shape[0], dtype=q.dtype)
    by_q = run("cross_attention_query_gradient", _query_gradient, ins, {"gq": "queries", "mean": "column"})
    found = (t.untiled(by_q["gq"], t.queries),)
    if with_keys:
        ins |= {"mean": ("column", by_q["mean"])}
        outs = {"gk": "partial", "gv": "partial"}
        by_k = run("cross_attention_key_gradient", _key_gradient, ins, outs, by_keys=True)
        found += tuple(t.untiled(by_k[name].sum(1), t.keys).astype(k.dtype) for name in outs)
    return found
