"""Kernels of masked softmax attention for value, tangent and gradient, and their derivative rules.

The scores are never written to memory. Per query, with s_j = q k_j / sqrt(d) + bias_j,
p = softmax(s) and a prime for the tangent,

    out   = sum_j p_j v_j
    s'_j  = (q' k_j + q k'_j) / sqrt(d)
    out'  = sum_j p_j (s'_j - sum_i p_i s'_i) v_j + p_j v'_j

The forward pass saves the largest score of a row and one over its sum of exponentials, from which
tangent and gradient rebuild p. It saves two numbers, since their log-sum-exp would lose digits of
large or masked scores. Loops multiply by an inverse, since a GPU needs several instructions for a
division. If a mean over the keys is subtracted (s' above, and the gradient's p (g v - sum p g v)),
kernels walk through the keys twice. With so few keys that is cheaper than the digits lost by
subtracting the mean from a rounded sum.

Shape letters: B batch, N queries, L keys, h heads, d head width.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from sprint_jax.ops.autodiff import is_zero, linear_map, mark_expensive
from sprint_jax.ops.pallas import kernel
from sprint_jax.ops.pallas.kernel import Operand, dot, single_dot

QUERIES, KEYS = 64, 64  # of one block; a TPU takes 128 keys
# Added to the scores of padding keys, so that they have no weight even if all real keys are masked.
_ABSENT = -1e30


def attend(q: Array, k: Array, v: Array, bias: Array, *, backend: str) -> Array:
    """Return the softmax attention over text, [B, N, h, d] in v's dtype.

    Args:
      q: [B, N, h, d]. k, v: [B, L, h, d]. All of one dtype.
      bias: [B, L], added to the scores. It has no derivative.
      backend: "interpret", "triton" or "tpu".

    Raises:
      ValueError: if shapes or dtypes differ, or for an unknown backend.
    """
    if k.shape != v.shape or q.shape[2:] != k.shape[2:] or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k and v do not fit: {q.shape} {q.dtype}, {k.shape} {k.dtype}, {v.shape} {v.dtype}"
        )
    bias = jax.lax.stop_gradient(bias[:, None, :].astype(jnp.float32))
    return _attend(_Tiling.of(q.shape, k.shape[1], backend), q, k, v, bias)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tiling:
    """How one call is split into programs."""

    queries: int  # N
    keys: int  # L
    heads: int
    width: int  # d
    pieces: tuple[int, ...]  # widths in which the kernels take the channels of a head
    block_q: int
    block_k: int
    inner: int  # blocks of queries that one program of the gradient of the keys walks through
    parts: int  # programs of the gradient of the keys for each block of keys
    backend: str

    @classmethod
    def of(cls, shape: tuple[int, ...], keys: int, backend: str) -> "_Tiling":
        """Choose the tiling of queries of `shape` (B, N, h, d) and this number of keys."""
        batch, queries, heads, width = shape
        # Blocks of a TPU end on 128 lanes.
        pieces = (128,) if backend == "tpu" else _pieces(width)
        block_k = 128 if backend == "tpu" else max(16, min(KEYS, kernel.next_power_of_two(keys)))
        block_q = max(16, min(QUERIES, kernel.next_power_of_two(queries)))
        blocks = -(-queries // block_q)
        programs = kernel.local_batch(batch) * heads * -(-keys // block_k)
        wanted = max(-(-blocks * block_q // 1024), math.ceil(128 / programs))
        inner = -(-blocks // min(blocks, wanted))
        return cls(
            queries=queries,
            keys=keys,
            heads=heads,
            width=width,
            pieces=pieces,
            block_q=block_q,
            block_k=block_k,
            inner=inner,
            parts=-(-blocks // inner),
            backend=backend,
        )

    @property
    def scale(self) -> float:
        """1 / sqrt(d)."""
        return 1 / math.sqrt(self.width)

    @property
    def head(self) -> int:
        """Channels of a head inside the kernels."""
        return sum(self.pieces)

    @property
    def rows(self) -> int:
        """N, padded."""
        return self.block_q * self.inner * self.parts

    @property
    def columns(self) -> int:
        """L, padded."""
        return kernel.round_up(self.keys, self.block_k)

    @property
    def padded(self) -> bool:
        """Whether heads and lengths are padded in memory.

        A TPU reads whole blocks. Elsewhere kernels mask what they read and write, which saves a
        copy of each array.
        """
        return self.backend == "tpu"

    def pad(self, x: Array, length: int) -> Array:
        """Bring x [B, n, h, d] into the form that kernels read.

        Returns [B, n, h d], or [B, length, h head] padded with zeros.
        """
        if self.padded:
            x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, self.head - self.width)))
        return x.reshape(*x.shape[:2], -1)

    def unpad(self, x: Array, length: int) -> Array:
        """Invert `pad`."""
        return x.reshape(*x.shape[:2], self.heads, -1)[:, :length, :, : self.width]


def _pieces(width: int) -> tuple[int, ...]:
    """Return one or two powers of two, of at least 16, that cover the channels of a head.

    Triton's arrays are powers of two, of at least 16 in products. Two arrays are used if they are
    smaller than one (72 -> 64 + 16).
    """
    whole = max(16, kernel.next_power_of_two(width))
    first = whole // 2
    both = first, max(16, kernel.next_power_of_two(width - first))
    return both if first >= 16 and sum(both) < whole else (whole,)


_OF_QUERIES = ("q", "dq", "g", "out", "dout", "gq")


def _operands(tiling: _Tiling, by_keys: bool) -> dict[str, Callable[[Any], Operand]]:
    """Return makers of `Operand`s by kind, for the grids of `_run`."""
    heads_wide, block_q, block_k = tiling.head, tiling.block_q, tiling.block_k
    rows = block_q * tiling.inner
    if by_keys:
        make = dict(
            queries=lambda a: Operand(a, (None, rows, heads_wide), lambda b, h, j, n: (b, n, h)),
            column=lambda a: Operand(a, (None, None, rows, 1), lambda b, h, j, n: (b, h, n, 0)),
            keys=lambda a: Operand(a, (None, block_k, heads_wide), lambda b, h, j, n: (b, j, h)),
            bias=lambda a: Operand(a, (None, 1, block_k), lambda b, h, j, n: (b, 0, j)),
            partial=lambda a: Operand(
                a, (None, None, block_k, heads_wide), lambda b, h, j, n: (b, n, j, h)
            ),
        )
    else:
        columns = tiling.columns
        make = dict(
            queries=lambda a: Operand(a, (None, block_q, heads_wide), lambda b, h, i: (b, i, h)),
            column=lambda a: Operand(a, (None, None, block_q, 1), lambda b, h, i: (b, h, i, 0)),
            keys=lambda a: Operand(a, (None, columns, heads_wide), lambda b, h, i: (b, 0, h)),
            bias=lambda a: Operand(a, (None, 1, columns), lambda b, h, i: (b, 0, 0)),
        )
    if not tiling.padded:  # a program sees all of a sample and masks what is not its own
        for kind in ("queries", "keys"):
            make[kind] = lambda a: Operand(a, (None, *a.shape[1:]), lambda b, *rest: (b, 0, 0))
        make["partial"] = lambda a: Operand(
            a, (None, None, *a.shape[2:]), lambda b, h, j, n: (b, n, 0, 0)
        )
    return make


def _run(
    tiling: _Tiling,
    name: str,
    body: Callable[["_Program"], None],
    ins: dict[str, tuple[str, Array]],
    outs: dict[str, str],
    *,
    batch: int,
    dtype: Any,
    by_keys: bool = False,
) -> dict[str, Array]:
    """Run a kernel on {name: (kind, array)} and return {name: array} for `outs`, {name: kind}.

    The grid is (B, h, blocks of queries), or (B, h, blocks of keys, parts of the queries) with
    by_keys.
    """
    make = _operands(tiling, by_keys)
    rows, columns, head = tiling.rows, tiling.columns, tiling.head
    if not tiling.padded:
        rows, columns, head = tiling.queries, tiling.keys, tiling.width
    shapes = dict(
        queries=((batch, rows, tiling.heads * head), dtype),
        column=((batch, tiling.heads, tiling.rows, 1), jnp.float32),
        partial=((batch, tiling.parts, columns, tiling.heads * head), jnp.float32),
    )
    if by_keys:
        grid = (tiling.heads, tiling.columns // tiling.block_k, tiling.parts)
    else:
        grid = (tiling.heads, tiling.rows // tiling.block_q)
    return kernel.launch(
        lambda refs: body(_Program(tiling, dtype, by_keys, refs)),
        grid,
        {key: make[kind](array) for key, (kind, array) in ins.items()},
        {key: make[kind](jax.ShapeDtypeStruct(*shapes[kind])) for key, kind in outs.items()},
        backend=tiling.backend,
        name=name,
    )


Pieces = tuple[Array, ...]


class _Program:
    """One program of a kernel: its references, and where in the arrays its block begins.

    Blocks of queries and keys are tuples of arrays, one for each piece of the channels.
    """

    def __init__(self, tiling: _Tiling, dtype: Any, by_keys: bool, refs: kernel.Refs) -> None:
        self.tiling, self.dtype, self.refs = tiling, dtype, refs
        # Read here, since the interpreter knows program ids only outside loops.
        self.channel = pl.program_id(1) * tiling.width
        self.query = (
            pl.program_id(3) * (tiling.block_q * tiling.inner)
            if by_keys
            else pl.program_id(2) * tiling.block_q
        )
        self.key = pl.program_id(2) * tiling.block_k if by_keys else 0

    def _places(self, name: str, start: Any, size: int) -> list[tuple[Any, Array]]:
        """Return (index, mask) for each piece of the channels of the program's head.

        They select `size` rows from `start` of the program's block on.
        """
        tiling = self.tiling
        begin, length = (
            (self.query, tiling.queries) if name in _OF_QUERIES else (self.key, tiling.keys)
        )
        begin, channel, places = begin + start, 0, []
        for piece in tiling.pieces:
            rows = begin + jax.lax.broadcasted_iota(jnp.int32, (size, piece), 0)
            channels = channel + jax.lax.broadcasted_iota(jnp.int32, (size, piece), 1)
            mask = (rows < length) & (channels < tiling.width)
            places.append(((pl.ds(begin, size), pl.ds(self.channel + channel, piece)), mask))
            channel += piece
        return places

    def load(self, name: str, start: Any, size: int) -> Pieces:
        """Return `size` rows, with zeros outside the array."""
        if self.tiling.padded:
            return (self.refs[name][pl.ds(start, size), :],)
        from jax.experimental.pallas import triton  # its masks work in the interpreter too

        return tuple(
            triton.load(self.refs[name].at[index], mask=mask, other=0.0)
            for index, mask in self._places(name, start, size)
        )

    def queries(self, name: str) -> Pieces:
        """Return the program's block of queries."""
        return self.load(name, 0, self.tiling.block_q)

    def keys(self, name: str, j: Any) -> Pieces:
        """Return the block of keys from j on."""
        return self.load(name, j, self.tiling.block_k)

    def store(self, name: str, values: Iterable[Array]) -> None:
        """Store a block of queries, or of the gradient of keys, in the array's dtype."""
        ref, values = self.refs[name], tuple(values)
        if self.tiling.padded:
            (ref[...],) = (value.astype(ref.dtype) for value in values)
            return
        from jax.experimental.pallas import triton

        for value, (index, mask) in zip(values, self._places(name, 0, len(values[0])), strict=True):
            triton.store(ref.at[index], value.astype(ref.dtype), mask=mask)

    def over_keys(self, step: Callable[[Any, Any], Any], start: Any) -> Any:
        """Fold step(first key of a block, sums) -> sums over the blocks of keys."""
        block_k = self.tiling.block_k
        at = lambda j: pl.multiple_of(j * block_k, block_k)
        return jax.lax.fori_loop(
            0, self.tiling.columns // block_k, lambda j, sums: step(at(j), sums), start
        )

    def scores(self, q: Pieces, j: Any) -> Array:
        """Return the scores of a block of queries and the block of keys from j on."""
        bias = self.refs["bias"][:, pl.ds(j, self.tiling.block_k)]
        return self.scaled(q, self.keys("k", j)) + bias

    def scaled(self, a: Pieces, b: Pieces) -> Array:
        """Return a b^T / sqrt(d)."""
        return _across(a, b) * self.tiling.scale

    def weights(self, q: Pieces, j: Any) -> Array:
        """Return p of the same blocks, float32, from what the forward pass saved."""
        return jnp.exp(self.scores(q, j) - self.refs["largest"][...]) * self.refs["inverse"][...]

    def column(self) -> Array:
        """Return a zero for each query."""
        return jnp.zeros((self.tiling.block_q, 1), jnp.float32)

    def zeros(self, rows: int) -> Pieces:
        """Return `rows` rows of zeros."""
        return tuple(jnp.zeros((rows, piece), jnp.float32) for piece in self.tiling.pieces)


def _across(a: Pieces, b: Pieces) -> Array:
    """Return a b^T over the channels."""
    return cast(Array, sum(single_dot(x, y, (1, 1)) for x, y in zip(a, b, strict=True)))


def _plus(
    sums: Iterable[Array], product: Callable[[Array, Array], Array], p: Array, b: Pieces
) -> Pieces:
    """Return sums + product(p, b), piece by piece."""
    return tuple(s + product(p, y) for s, y in zip(sums, b, strict=True))


def _forward(program: _Program) -> None:
    """Store the output, the largest score and one over the sum of exponentials."""
    tiling, refs, q = program.tiling, program.refs, program.queries("q")

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
        program.zeros(tiling.block_q),
        jnp.full((tiling.block_q, 1), 2 * _ABSENT, jnp.float32),
        program.column(),
    )
    out, largest, total = program.over_keys(step, start)
    inverse = 1 / total
    program.store("out", [o * inverse for o in out])
    refs["largest"][...] = largest
    refs["inverse"][...] = inverse


def _forward_tangent(program: _Program) -> None:
    """Store the tangent of the output, with or without tangents of k and v."""
    dtype, q, dq = program.dtype, program.queries("q"), program.queries("dq")
    moving = "dk" in program.refs

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

    program.store("dout", program.over_keys(step, program.zeros(program.tiling.block_q)))


def _query_gradient(program: _Program) -> None:
    """Store the cotangent of q, and sum_j p_j g v_j for `_key_gradient`."""
    tiling, q, g = program.tiling, program.queries("q"), program.queries("g")
    of_weights = lambda j: _across(g, program.keys("v", j))
    mean = program.over_keys(
        lambda j, mean: mean + (program.weights(q, j) * of_weights(j)).sum(1, keepdims=True),
        program.column(),
    )
    product = functools.partial(dot, dtype=program.dtype)

    def step(j, of_q):
        of_scores = program.weights(q, j) * (of_weights(j) - mean) * tiling.scale
        return _plus(of_q, product, of_scores, program.keys("k", j))

    program.store("gq", program.over_keys(step, program.zeros(tiling.block_q)))
    program.refs["mean"][...] = mean


def _key_gradient(program: _Program) -> None:
    """Store the cotangents of k and v, each summed over the queries of one part."""
    tiling, dtype, refs = program.tiling, program.dtype, program.refs
    k, v, bias = program.keys("k", 0), program.keys("v", 0), refs["bias"][...]
    of_k = functools.partial(dot, dtype=dtype, contract=(0, 0))
    of_v = functools.partial(single_dot, contract=(0, 0))

    def step(i, sums):
        first = pl.multiple_of(i * tiling.block_q, tiling.block_q)
        rows = pl.ds(first, tiling.block_q)
        q, g = program.load("q", first, tiling.block_q), program.load("g", first, tiling.block_q)
        scores = program.scaled(q, k) + bias
        p = jnp.exp(scores - refs["largest"][rows, :]) * refs["inverse"][rows, :]
        of_scores = p * (_across(g, v) - refs["mean"][rows, :]) * tiling.scale
        return _plus(sums[0], of_k, of_scores, q), _plus(sums[1], of_v, p.astype(dtype), g)

    zeros = program.zeros(tiling.block_k)
    of_keys, of_values = jax.lax.fori_loop(0, tiling.inner, step, (zeros, zeros))
    program.store("gk", of_keys)
    program.store("gv", of_values)


def _inputs(
    tiling: _Tiling, q: Array, k: Array, v: Array, bias: Array
) -> dict[str, tuple[str, Array]]:
    """Return what kernels read of the arguments, {name: (kind, array)}."""
    missing = ((0, 0), (0, 0), (0, tiling.columns - tiling.keys))
    return {
        "q": ("queries", tiling.pad(q, tiling.rows)),
        "k": ("keys", tiling.pad(k, tiling.columns)),
        "v": ("keys", tiling.pad(v, tiling.columns)),
        "bias": ("bias", jnp.pad(bias, missing, constant_values=_ABSENT)),
    }


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(
    tiling: _Tiling, q: Array, k: Array, v: Array, bias: Array
) -> tuple[Array, Array, Array]:
    """Return the output [B, N, h, d], and of each row what `_forward` saves, [B, h, rows, 1] each.

    Only the output has a derivative.
    """
    found = _run(
        tiling,
        "cross_attention",
        _forward,
        _inputs(tiling, q, k, v, bias),
        {"out": "queries", "largest": "column", "inverse": "column"},
        batch=q.shape[0],
        dtype=q.dtype,
    )
    return tiling.unpad(found["out"], tiling.queries), found["largest"], found["inverse"]


def _attend_jvp(tiling: _Tiling, primals: Any, tangents: Any) -> Any:
    # Call the function, not its implementation, so that an outer derivative finds the custom rule.
    out, largest, inverse = _attend(tiling, *primals)
    largest, inverse = mark_expensive(largest), mark_expensive(inverse)
    tangents = tangents[:3]
    if all(map(is_zero, tangents[1:])):
        tangents = tangents[:1]  # sCM: the text does not move
    dout = jnp.zeros_like(out)
    if not all(map(is_zero, tangents)):
        q, k, v, bias = primals
        residuals = (q, k, v, *jax.lax.stop_gradient((bias, largest, inverse)))
        transpose = functools.partial(_transpose, tiling, len(tangents) > 1)
        dout = linear_map(functools.partial(_tangent, tiling), transpose, residuals, tangents)
    return (out, largest, inverse), (dout, jnp.zeros_like(largest), jnp.zeros_like(inverse))


_attend.defjvp(_attend_jvp, symbolic_zeros=True)


def _residuals(tiling: _Tiling, residuals: Any) -> dict[str, tuple[str, Array]]:
    *inputs, largest, inverse = residuals
    saved = {"largest": ("column", largest), "inverse": ("column", inverse)}
    return _inputs(tiling, *inputs) | saved


def _tangent(tiling: _Tiling, residuals: Any, tangents: Any) -> Array:
    """Return the tangent of the output."""
    dq, *rest = tangents
    ins = _residuals(tiling, residuals) | {"dq": ("queries", tiling.pad(dq, tiling.rows))}
    ins |= {name: ("keys", tiling.pad(a, tiling.columns)) for name, a in zip(("dk", "dv"), rest)}
    found = _run(
        tiling,
        "cross_attention_tangent" if rest else "cross_attention_tangent_of_queries",
        _forward_tangent,
        ins,
        {"dout": "queries"},
        batch=dq.shape[0],
        dtype=dq.dtype,
    )
    return tiling.unpad(found["dout"], tiling.queries)


def _transpose(tiling: _Tiling, with_keys: bool, residuals: Any, g: Array) -> tuple[Array, ...]:
    """Return the cotangents of q and, if asked for, of k and v."""
    q, k = residuals[:2]
    ins = _residuals(tiling, residuals) | {"g": ("queries", tiling.pad(g, tiling.rows))}
    run = functools.partial(_run, tiling, batch=q.shape[0], dtype=q.dtype)
    by_q = run(
        "cross_attention_query_gradient", _query_gradient, ins, {"gq": "queries", "mean": "column"}
    )
    found = (tiling.unpad(by_q["gq"], tiling.queries),)
    if with_keys:
        ins |= {"mean": ("column", by_q["mean"])}
        outs = {"gk": "partial", "gv": "partial"}
        by_k = run("cross_attention_key_gradient", _key_gradient, ins, outs, by_keys=True)
        found += tuple(
            tiling.unpad(by_k[name].sum(1), tiling.keys).astype(k.dtype) for name in outs
        )
    return found
