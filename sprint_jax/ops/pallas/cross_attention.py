"""Masked softmax attention of image tokens to text tokens, as kernels for value, tangent and gradient.

`plain` is the published arithmetic; `attention` computes the same by kernels that never write the scores out. Per
query, with s_j = q k_j / sqrt(d) + bias_j, p = softmax(s) and a dot for the tangent,

    out = sum_j p_j v_j        s'_j = (q' k_j + q k'_j) / sqrt(d)        out' = sum_j p_j (s'_j - sum_i p_i s'_i) v_j + p_j v'_j

The forward pass keeps the row's largest score and one over its sum of exponentials, apart from each other: their log-sum-exp
would lose digits where scores are large or masked. Nothing is divided inside a loop: a GPU makes a division of several
instructions. Tangent and gradient rebuild p from them. Keys are walked through twice where a mean over them comes off
first (s' above, and the gradient's p (g v - sum p g v)): with so few keys that is cheaper than what is
lost when the mean is taken off the rounded sum instead.

Shape letters: B batch, N queries, L keys, h heads, d head width.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sprint_jax.ops import backend as backends
from sprint_jax.ops import matmul
from sprint_jax.ops.autodiff import is_zero, kept, linear_map
from sprint_jax.ops.backend import Operand, dot, single_dot

QUERIES, KEYS = 64, 64  # at a time; a TPU takes 128 keys
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
    scores = matmul.batched(q, jnp.swapaxes(k, 2, 3)) / math.sqrt(q.shape[-1])
    bias = jnp.where(mask.astype(bool), 0.0, MASKED)[:, None, None, :]
    weights = jax.nn.softmax(scores + bias, axis=-1).astype(v.dtype)
    return jnp.swapaxes(weights @ v, 1, 2)


def attention(q, k, v, mask, *, backend):
    """`plain` by kernels; same arguments and result.

    backend: "interpret", "triton" or "tpu", see `ops/backend.py`.
    Forward mode (with a cheaper kernel where k and v have no tangent, as in sCM), reverse mode, and reverse mode
    around a stopped tangent; a tangent that is not stopped gives NaN.
    """
    if k.shape != v.shape or q.shape[2:] != k.shape[2:] or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k and v do not fit: {q.shape} {q.dtype}, {k.shape} {k.dtype}, {v.shape} {v.dtype}"
        )
    bias = jax.lax.stop_gradient(
        jnp.where(mask.astype(bool), 0.0, MASKED)[:, None, :].astype(jnp.float32)
    )
    return _attend(_Tiling.of(q.shape, k.shape[1], backend), q, k, v, bias)[0]


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """How one call is cut."""

    queries: int  # N
    keys: int  # L
    heads: int
    width: int  # d
    pieces: tuple[int, ...]  # widths in which the kernels take the channels of a head
    block_q: int
    block_k: int
    inner: int  # blocks of queries that one program of the gradient of the keys walks through
    parts: int  # such programs for each block of keys
    backend: str

    @classmethod
    def of(cls, shape, keys, backend):
        batch, queries, heads, width = shape
        # Blocks of a TPU end on 128 lanes.
        pieces = (128,) if backend == "tpu" else _pieces(width)
        block_k = 128 if backend == "tpu" else max(16, min(KEYS, backends.next_power_of_two(keys)))
        block_q = max(16, min(QUERIES, backends.next_power_of_two(queries)))
        blocks, programs = (
            -(-queries // block_q),
            backends.local_batch(batch) * heads * -(-keys // block_k),
        )
        wanted = max(-(-blocks * block_q // 1024), math.ceil(128 / programs))
        inner = -(-blocks // min(blocks, wanted))
        return cls(
            queries,
            keys,
            heads,
            width,
            pieces,
            block_q,
            block_k,
            inner,
            -(-blocks // inner),
            backend,
        )

    @property
    def scale(self):
        return 1 / math.sqrt(self.width)

    @property
    def head(self):
        """Channels of a head inside the kernels."""
        return sum(self.pieces)

    @property
    def rows(self):
        """N, padded."""
        return self.block_q * self.inner * self.parts

    @property
    def columns(self):
        """L, padded."""
        return backends.padded_to(self.keys, self.block_k)

    @property
    def padded(self):
        """Whether heads and lengths are filled up in memory. Elsewhere kernels leave out what is not there as they read and write,
        which spares a copy of each array; a TPU reads whole blocks."""
        return self.backend == "tpu"

    def tiled(self, x, length):
        """[B, n, h, d] -> what kernels read: [B, n, h d], or [B, length, h head] filled up with zeros."""
        if self.padded:
            x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, self.head - self.width)))
        return x.reshape(*x.shape[:2], -1)

    def untiled(self, x, length):
        """The inverse of `tiled`."""
        return x.reshape(*x.shape[:2], self.heads, -1)[:, :length, :, : self.width]


def _pieces(width):
    """Triton's arrays are powers of two, of at least 16 in products: two of them where that is less than one (72 -> 64 + 16)."""
    whole = max(16, backends.next_power_of_two(width))
    first = whole // 2
    both = first, max(16, backends.next_power_of_two(width - first))
    return both if first >= 16 and sum(both) < whole else (whole,)


_OF_QUERIES = ("q", "dq", "g", "out", "dout", "gq")


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
            partial=lambda a: Operand(
                a, (None, None, t.block_k, t.head), lambda b, h, j, n: (b, n, j, h)
            ),
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
    if not t.padded:  # a program sees all of a sample and reads its own
        for kind in ("queries", "keys"):
            make[kind] = lambda a: Operand(a, (None, *a.shape[1:]), lambda b, *rest: (b, 0, 0))
        make["partial"] = lambda a: Operand(
            a, (None, None, *a.shape[2:]), lambda b, h, j, n: (b, n, 0, 0)
        )
        shapes["queries"] = (batch, t.queries, t.heads * t.width), dtype
        shapes["partial"] = (batch, t.parts, t.keys, t.heads * t.width), jnp.float32
    return backends.launch(
        lambda refs: body(_Program(t, dtype, by_keys, refs)),
        grid,
        {key: make[kind](array) for key, (kind, array) in ins.items()},
        {key: make[kind](jax.ShapeDtypeStruct(*shapes[kind])) for key, kind in outs.items()},
        backend=t.backend,
        name=name,
    )


# -------------------------------------------------------------------------------------------------- kernel bodies


class _Program:
    """One program of a kernel: what it was given, and where in the arrays its block begins.

    Blocks of queries and keys are tuples of arrays, one for each piece of the channels.
    """

    def __init__(self, t, dtype, by_keys, refs):
        self.t, self.dtype, self.refs = t, dtype, refs
        # Read here, for the interpreter knows them outside loops alone.
        self.channel = pl.program_id(1) * t.width
        self.query = (
            pl.program_id(3) * (t.block_q * t.inner) if by_keys else pl.program_id(2) * t.block_q
        )
        self.key = pl.program_id(2) * t.block_k if by_keys else 0

    def _places(self, name, start, size):
        """(index, mask) of `size` rows of the program's head, from `start` of its block on, for each piece of the channels."""
        begin, length = (
            (self.query, self.t.queries) if name in _OF_QUERIES else (self.key, self.t.keys)
        )
        begin, channel, places = begin + start, 0, []
        for piece in self.t.pieces:
            rows = begin + jax.lax.broadcasted_iota(jnp.int32, (size, piece), 0)
            channels = channel + jax.lax.broadcasted_iota(jnp.int32, (size, piece), 1)
            mask = (rows < length) & (channels < self.t.width)
            places.append(((pl.ds(begin, size), pl.ds(self.channel + channel, piece)), mask))
            channel += piece
        return places

    def load(self, name, start, size):
        """Arrays of `size` rows, zeros where there is nothing."""
        if self.t.padded:
            return (self.refs[name][pl.ds(start, size), :],)
        from jax.experimental.pallas import triton  # its masks are the interpreter's too

        return tuple(
            triton.load(self.refs[name].at[index], mask=mask, other=0.0)
            for index, mask in self._places(name, start, size)
        )

    def queries(self, name):
        return self.load(name, 0, self.t.block_q)

    def keys(self, name, j):
        """The block of keys from j on."""
        return self.load(name, j, self.t.block_k)

    def store(self, name, values):
        """A block of queries, or of the gradient of keys, in the array's dtype."""
        ref = self.refs[name]
        if self.t.padded:
            (ref[...],) = (value.astype(ref.dtype) for value in values)
            return
        from jax.experimental.pallas import triton

        for value, (index, mask) in zip(values, self._places(name, 0, len(values[0])), strict=True):
            triton.store(ref.at[index], value.astype(ref.dtype), mask=mask)

    def over_keys(self, step, start):
        """step(first key of a block, sums) -> sums over the blocks of keys."""
        at = lambda j: pl.multiple_of(j * self.t.block_k, self.t.block_k)
        return jax.lax.fori_loop(
            0, self.t.columns // self.t.block_k, lambda j, sums: step(at(j), sums), start
        )

    def scores(self, q, j):
        """Of a block of queries and the block of keys from j on."""
        return self.scaled(q, self.keys("k", j)) + self.refs["bias"][:, pl.ds(j, self.t.block_k)]

    def scaled(self, a, b):
        """a b^T / sqrt(d)."""
        return _across(a, b) * self.t.scale

    def weights(self, q, j):
        """p of the same, float32, from what the forward pass kept."""
        return jnp.exp(self.scores(q, j) - self.refs["largest"][...]) * self.refs["inverse"][...]

    def column(self):
        """Zeros, one for each query."""
        return jnp.zeros((self.t.block_q, 1), jnp.float32)

    def zeros(self, rows):
        """Zeros for each channel of so many rows."""
        return tuple(jnp.zeros((rows, piece), jnp.float32) for piece in self.t.pieces)


def _across(a, b):
    """a b^T over the channels."""
    return sum(single_dot(x, y, (1, 1)) for x, y in zip(a, b, strict=True))


def _plus(sums, product, p, b):
    """sums + product(p, b), piece by piece."""
    return tuple(s + product(p, y) for s, y in zip(sums, b, strict=True))


def _forward(program):
    t, r, q = program.t, program.refs, program.queries("q")

    def step(j, sums):
        out, largest, total = sums
        scores = program.scores(q, j)
        larger = jnp.maximum(largest, scores.max(1, keepdims=True))
        shrink, p = jnp.exp(largest - larger), jnp.exp(scores - larger)
        out = _plus(
            (o * shrink for o in out), single_dot, p.astype(program.dtype), program.keys("v", j)
        )
        return out, larger, total * shrink + p.sum(1, keepdims=True)

    start = (
        program.zeros(t.block_q),
        jnp.full((t.block_q, 1), 2 * _ABSENT, jnp.float32),
        program.column(),
    )
    out, largest, total = program.over_keys(step, start)
    inverse = 1 / total
    program.store("out", [o * inverse for o in out])
    r["largest"][...] = largest
    r["inverse"][...] = inverse


def _forward_tangent(program):
    """With or without tangents of k and v."""
    dtype, q, dq, moving = (
        program.dtype,
        program.queries("q"),
        program.queries("dq"),
        "dk" in program.refs,
    )

    def moved(j):
        scores = program.scaled(dq, program.keys("k", j))
        return scores + program.scaled(q, program.keys("dk", j)) if moving else scores

    mean = program.over_keys(
        lambda j, mean: mean + (program.weights(q, j) * moved(j)).sum(1, keepdims=True),
        program.column(),
    )

    def step(j, out):
        p = program.weights(q, j)
        out = _plus(out, single_dot, (p * (moved(j) - mean)).astype(dtype), program.keys("v", j))
        return _plus(out, single_dot, p.astype(dtype), program.keys("dv", j)) if moving else out

    program.store("dout", program.over_keys(step, program.zeros(program.t.block_q)))


def _query_gradient(program):
    """Cotangent of q, and sum_j p_j g v_j for `_key_gradient`."""
    t, q, g = program.t, program.queries("q"), program.queries("g")
    of_weights = lambda j: _across(g, program.keys("v", j))
    mean = program.over_keys(
        lambda j, mean: mean + (program.weights(q, j) * of_weights(j)).sum(1, keepdims=True),
        program.column(),
    )
    product = functools.partial(dot, dtype=program.dtype)

    def step(j, of_q):
        of_scores = program.weights(q, j) * (of_weights(j) - mean) * t.scale
        return _plus(of_q, product, of_scores, program.keys("k", j))

    program.store("gq", program.over_keys(step, program.zeros(t.block_q)))
    program.refs["mean"][...] = mean


def _key_gradient(program):
    """Cotangents of k and v, each summed over the queries of one part."""
    t, dtype, r = program.t, program.dtype, program.refs
    k, v, bias = program.keys("k", 0), program.keys("v", 0), r["bias"][...]
    of_k = functools.partial(dot, dtype=dtype, contract=(0, 0))
    of_v = functools.partial(single_dot, contract=(0, 0))

    def step(i, sums):
        first = pl.multiple_of(i * t.block_q, t.block_q)
        rows = pl.ds(first, t.block_q)
        q, g = program.load("q", first, t.block_q), program.load("g", first, t.block_q)
        p = jnp.exp(program.scaled(q, k) + bias - r["largest"][rows, :]) * r["inverse"][rows, :]
        of_scores = p * (_across(g, v) - r["mean"][rows, :]) * t.scale
        return _plus(sums[0], of_k, of_scores, q), _plus(sums[1], of_v, p.astype(dtype), g)

    of_keys, of_values = jax.lax.fori_loop(
        0, t.inner, step, (program.zeros(t.block_k), program.zeros(t.block_k))
    )
    program.store("gk", of_keys)
    program.store("gv", of_values)


# --------------------------------------------------------------------------------------------- the four passes


def _inputs(t, q, k, v, bias):
    missing = ((0, 0), (0, 0), (0, t.columns - t.keys))
    return {
        "q": ("queries", t.tiled(q, t.rows)),
        "k": ("keys", t.tiled(k, t.columns)),
        "v": ("keys", t.tiled(v, t.columns)),
        "bias": ("bias", jnp.pad(bias, missing, constant_values=_ABSENT)),
    }


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(t, q, k, v, bias):
    """(out [B, N, h, d], largest score and one over the sum of exponentials, each [B, h, rows, 1]); only out has a derivative."""
    found = _run(
        t,
        "cross_attention",
        _forward,
        _inputs(t, q, k, v, bias),
        {"out": "queries", "largest": "column", "inverse": "column"},
        q.shape[0],
        q.dtype,
    )
    return t.untiled(found["out"], t.queries), found["largest"], found["inverse"]


def _attend_jvp(t, primals, tangents):
    # By the function itself, so that a derivative around this one finds its rule.
    out, largest, inverse = _attend(t, *primals)
    largest, inverse = kept(largest), kept(inverse)
    tangents = tangents[:3]
    if all(map(is_zero, tangents[1:])):
        tangents = tangents[:1]  # sCM: the text does not move
    dout = jnp.zeros_like(out)
    if not all(map(is_zero, tangents)):
        q, k, v, bias = primals
        residuals = (q, k, v, *jax.lax.stop_gradient((bias, largest, inverse)))
        transpose = functools.partial(_transpose, t, len(tangents) > 1)
        dout = linear_map(functools.partial(_tangent, t), transpose, residuals, tangents)
    return (out, largest, inverse), (dout, jnp.zeros_like(largest), jnp.zeros_like(inverse))


_attend.defjvp(_attend_jvp, symbolic_zeros=True)


def _residuals(t, residuals):
    *inputs, largest, inverse = residuals
    return _inputs(t, *inputs) | {"largest": ("column", largest), "inverse": ("column", inverse)}


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
    by_q = run(
        "cross_attention_query_gradient", _query_gradient, ins, {"gq": "queries", "mean": "column"}
    )
    found = (t.untiled(by_q["gq"], t.queries),)
    if with_keys:
        ins |= {"mean": ("column", by_q["mean"])}
        outs = {"gk": "partial", "gv": "partial"}
        by_k = run("cross_attention_key_gradient", _key_gradient, ins, outs, by_keys=True)
        found += tuple(t.untiled(by_k[name].sum(1), t.keys).astype(k.dtype) for name in outs)
    return found
