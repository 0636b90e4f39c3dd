"""Kernels of ReLU linear attention with the RMSNorm of queries and keys inside, and their rules.

There are kernels for value, tangent and gradient. Each direction takes two: one over keys and one
over queries, between which only the sums S and z of `ops/linear_attention.py` (or their tangents
or cotangents) travel.

Several heads share a block of channels. Products of different heads inside it are masked away,
which costs a matrix unit nothing and saves a transpose of the heads. RMSNorm needs one number per
token, the sum of squares over all channels. XLA computes that row reduction before the kernels,
and adds its part of the gradient after them. The kernels read q, k and v side by side as the
projection wrote them, and the readers of partial sums add them up.

Shape letters: B batch, N tokens, D width, h heads, d head width, C channels of a block, G blocks.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from sprint_jax.ops.autodiff import is_zero, linear_map, mark_expensive
from sprint_jax.ops.pallas import kernel
from sprint_jax.ops.pallas.kernel import Operand, dot, round_to

CHANNELS, TOKENS = 32, 64  # of one block; a TPU takes 128 channels


def attend(
    qkv: Array,
    norm_q: Array | None,
    norm_k: Array | None,
    *,
    heads: int,
    eps: float,
    denominator_eps: float,
    backend: str,
) -> Array:
    """Return the linear attention of normalized queries and keys, [B, N, D] in qkv's dtype.

    The arguments and derivatives are those of `ops.linear_attention.attend`.

    Raises:
      ValueError: if one norm is missing, if qkv has another width, or for an unknown backend.
    """
    if (norm_q is None) != (norm_k is None):
        raise ValueError("give the weights of both norms, or of neither")
    shape = _shape(qkv, heads)
    normed = norm_q is not None
    if not normed:
        norm_q = norm_k = jnp.zeros(shape[-1], jnp.float32)  # not read
    tiling = _Tiling.of(
        shape,
        heads,
        backend,
        eps=eps if normed else None,
        denominator_eps=denominator_eps,
        interleaved=False,
    )
    return _attend(tiling, qkv, norm_q, norm_k)[0]


def attend_interleaved(qkv: Array, *, heads: int, denominator_eps: float, backend: str) -> Array:
    """Return linear attention without norms, of projections interleaved by head.

    The arguments and derivatives are those of `ops.linear_attention.attend_interleaved`.

    Raises:
      ValueError: if qkv has another width, or for an unknown backend.
    """
    shape = _shape(qkv, heads)
    unread = jnp.zeros(shape[-1], jnp.float32)
    tiling = _Tiling.of(
        shape, heads, backend, eps=None, denominator_eps=denominator_eps, interleaved=True
    )
    return _attend(tiling, qkv, unread, unread)[0]


def _shape(qkv: Array, heads: int) -> tuple[int, int, int]:
    """Return (B, N, D) of qkv [B, N, 3 D]."""
    batch, tokens, channels = qkv.shape
    if channels % (3 * heads):
        raise ValueError(
            f"qkv {qkv.shape}: its last axis is not three times the width of {heads} heads"
        )
    return batch, tokens, channels // 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tiling:
    """How one call is split into programs."""

    tokens: int  # N
    width: int  # D
    heads: int
    head: int  # channels of a head inside the kernels, a power of two
    channels: int  # C
    groups: int  # G
    block: int  # tokens that a program loads at a time
    inner: int  # blocks that one program of a summing kernel walks through
    parts: int  # programs of a summing kernel along N
    backend: str
    eps: float | None  # of the norms; None for no norm
    denominator_eps: float
    interleaved: bool  # q, k and v lie side by side for each head, instead of for all heads

    @classmethod
    def of(
        cls,
        shape: tuple[int, int, int],
        heads: int,
        backend: str,
        *,
        eps: float | None,
        denominator_eps: float,
        interleaved: bool,
    ) -> "_Tiling":
        """Choose the tiling of arrays of `shape` (B, N, D)."""
        batch, tokens, width = shape
        head = kernel.next_power_of_two(width // heads)
        # A TPU has 128 lanes. On a GPU narrow blocks waste less on products of different heads.
        channels = max(128 if backend == "tpu" else 16 if interleaved else CHANNELS, head)
        groups = -(-heads * head // channels)
        block = max(16, min(max(TOKENS, channels), kernel.next_power_of_two(tokens)))
        blocks = -(-tokens // block)
        # Partial sums cover at most 1024 tokens, fewer if that leaves cores of a GPU idle.
        programs = kernel.local_batch(batch) * groups
        wanted = max(-(-blocks * block // 1024), math.ceil(128 / programs))
        inner = -(-blocks // min(blocks, wanted))
        return cls(
            tokens=tokens,
            width=width,
            heads=heads,
            head=head,
            channels=channels,
            groups=groups,
            block=block,
            inner=inner,
            parts=-(-blocks // inner),
            backend=backend,
            eps=eps,
            denominator_eps=denominator_eps,
            interleaved=interleaved,
        )

    @property
    def rows(self) -> int:
        """N, padded."""
        return self.block * self.inner * self.parts

    @property
    def unpadded(self) -> bool:
        """Whether blocks cover tokens and channels exactly, without padding."""
        covered = (
            self.rows == self.tokens
            and self.head * self.heads == self.width == self.groups * self.channels
        )
        return covered and (not self.interleaved or self.groups == self.heads)

    def split(self, qkv: Array) -> Sequence[Array]:
        """Split [B, N, 3 D] into q, k and v [B, N, D]."""
        if not self.interleaved:
            return jnp.split(qkv, 3, -1)
        parts = jnp.split(qkv.reshape(*qkv.shape[:2], self.heads, -1), 3, -1)
        return [x.reshape(*x.shape[:2], -1) for x in parts]

    def join(self, parts: Sequence[Array]) -> Array:
        """Invert `split`."""
        if not self.interleaved:
            return jnp.concatenate(parts, -1)
        x = jnp.concatenate([x.reshape(*x.shape[:2], self.heads, -1) for x in parts], -1)
        return x.reshape(*x.shape[:2], -1)

    def views(self, qkv: Array) -> list[tuple[Array, int, int]]:
        """Return q, k and v of [B, N, 3 D] as views of arrays.

        A view is an array, the block of channels with which it begins there, and the number of
        blocks from one of its groups to the next.
        """
        if not self.unpadded:
            return [(self.pad(x), 0, 1) for x in self.split(qkv)]
        return [(qkv, i, 3) if self.interleaved else (qkv, i * self.groups, 1) for i in range(3)]

    def pad(self, x: Array) -> Array:
        """Pad heads, tokens and channels with zeros, [B, N, D] -> [B, rows, G C]."""
        x, more = self._pad_channels(x), self.rows - self.tokens
        return jnp.pad(x, ((0, 0), (0, more), (0, 0))) if more else x

    def _pad_channels(self, x: Array) -> Array:
        """Pad heads and channels with zeros, [..., D] -> [..., G C]."""
        missing = self.head - self.width // self.heads
        if missing:
            x = x.reshape(*x.shape[:-1], self.heads, -1)
            x = jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, missing),)).reshape(*x.shape[:-2], -1)
        more = self.groups * self.channels - x.shape[-1]
        return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, more),)) if more else x

    def unpad(self, x: Array) -> Array:
        """Invert `pad`."""
        return self.unpad_channels(x[:, : self.tokens])

    def unpad_channels(self, x: Array) -> Array:
        """Remove the padding of heads and channels, [..., G C] -> [..., D]."""
        lead, x = x.shape[:-1], x[..., : self.heads * self.head]
        if self.heads * self.head != self.width:
            x = x.reshape(*lead, self.heads, self.head)[..., : self.width // self.heads]
        return x.reshape(*lead, self.width)

    def inverse_rms(self, squares: Array) -> Array:
        """Return 1 / rms of tokens from the sums of their squares."""
        assert self.eps is not None
        return jax.lax.rsqrt(squares / self.width + self.eps)

    def row(self, weight: Array) -> Array:
        """Return the weights [D] of a norm as [1, G C]."""
        return (weight if self.unpadded else self._pad_channels(weight))[None]


# Below this many reads, readers add the partial sums of a group themselves. Above it a separate
# reduction is cheaper.
_MOST_READS = 128


def _operands(tiling: _Tiling, summing: bool) -> dict[str, Callable[[Any], Operand]]:
    """Return makers of `Operand`s, by kind, for a kernel with grid (B, G, programs along N)."""
    size = tiling.block * tiling.inner if summing else tiling.block
    channels = tiling.channels
    part = lambda b, g, n: (b, n, g, 0, 0)
    every = lambda b, g, n: (b, 0, g, 0, 0)

    def tokens(a):
        array, first, stride = a if isinstance(a, tuple) else (a, 0, 1)
        return Operand(array, (None, size, channels), lambda b, g, n: (b, n, first + stride * g))

    def width_sum(which):
        return lambda a: Operand(a, (None, None, size, 1), lambda b, g, n: (b, which, n, 0))

    return dict(
        tokens=tokens,
        width_sum_q=width_sum(0),
        width_sum_k=width_sum(1),
        columns=lambda a: Operand(a, (None, None, size, 1), lambda b, g, n: (b, g, n, 0)),
        weight=lambda a: Operand(a, (1, channels), lambda b, g, n: (0, g), shared=True),
        state=lambda a: Operand(a, (None, a.shape[1], None, channels, channels), every),
        total=lambda a: Operand(a, (None, a.shape[1], None, 1, channels), every),
        states=lambda a: Operand(a, (None, None, None, channels, channels), part),
        totals=lambda a: Operand(a, (None, None, None, 1, channels), part),
    )


def _run(
    tiling: _Tiling,
    name: str,
    body: Callable[["_Program"], None],
    ins: dict[str, tuple[str, Any]],
    outs: dict[str, str],
    *,
    batch: int,
    dtype: Any,
) -> dict[str, Array]:
    """Run a kernel on {name: (kind, array)} and return {name: array} for `outs`, {name: kind}.

    The shapes of outputs follow from their kinds. Sums over tokens are stored in parts, "states"
    and "totals", which other kernels read as "state" and "total". Readers add the parts up if
    these are few. If many programs would read many parts, they are added up here.
    """
    summing = any(kind in ("states", "totals") for kind in outs.values())
    make = _operands(tiling, summing)
    channels, groups, parts = tiling.channels, tiling.groups, tiling.parts
    shapes = dict(
        tokens=((batch, tiling.rows, groups * channels), dtype),
        columns=((batch, groups, tiling.rows, 1), jnp.float32),
        states=((batch, parts, groups, channels, channels), jnp.float32),
        totals=((batch, parts, groups, 1, channels), jnp.float32),
    )
    found = kernel.launch(
        lambda refs: body(_Program(tiling, dtype, refs)),
        (groups, parts if summing else parts * tiling.inner),
        {key: make[kind](array) for key, (kind, array) in ins.items()},
        {key: make[kind](jax.ShapeDtypeStruct(*shapes[kind])) for key, kind in outs.items()},
        backend=tiling.backend,
        name=name,
    )
    if parts**2 * tiling.inner <= _MOST_READS:
        return found
    return {
        key: a.sum(1, keepdims=True) if outs[key] in ("states", "totals") else a
        for key, a in found.items()
    }


_Norm = Literal["q", "k"]


@dataclasses.dataclass(frozen=True)
class _Program:
    """One program of a kernel: the tiling, the dtype of products and the references."""

    tiling: _Tiling
    dtype: Any
    refs: kernel.Refs

    def load(self, key: str, rows: Any) -> Array:
        """Return the tokens `rows` of a reference."""
        return self.refs[key][rows, :]

    def weight(self, key: str) -> Array:
        """Return the weight of a norm in float32, [1, C]."""
        return self.refs[key][...].astype(jnp.float32)

    def sum_parts(self, key: str) -> Array:
        """Return the sum of all parts of a sum over tokens."""
        parts = self.refs[key]
        return jax.lax.fori_loop(1, parts.shape[0], lambda i, sums: sums + parts[i], parts[0])

    def sum_by_head(self, a: Array) -> Array:
        """Sum float32 [n, C] over the channels of each head.

        Returns [n, C], or [n, 1] if all channels belong to one head.
        """
        if self.tiling.channels == self.tiling.head:
            return a.sum(1, keepdims=True)
        return dot(a, _same_head(self.tiling, self.dtype), self.dtype)

    def mask_heads(self, state: Array) -> Array:
        """Return a state [C, C] without products of different heads."""
        if self.tiling.channels == self.tiling.head:
            return state
        return state * _same_head(self.tiling, jnp.float32)

    def inverse_rms(self, x: _Norm, rows: Any) -> Array:
        """Return 1 / rms of the tokens `rows` of q or k, float32 [n, 1]."""
        return self.tiling.inverse_rms(self.refs[f"squares_{x}"][rows, :])

    def features(self, x: _Norm, rows: Any) -> tuple[Array, Array, Array]:
        """Return (relu(x'), x', x / rms) of the tokens `rows` of q or k.

        All are float32 and rounded as by `rms_norm`.
        """
        value = self.load(x, rows).astype(jnp.float32)
        if self.tiling.eps is None:
            return jnp.maximum(value, 0), value, value
        unit = round_to(value * self.inverse_rms(x, rows), self.refs[f"weight_{x}"].dtype)
        value = round_to(unit * self.weight(f"weight_{x}"), self.dtype)
        return jnp.maximum(value, 0), value, unit

    def moved_features(self, x: _Norm, rows: Any) -> tuple[Array, Array]:
        """Return (relu(x'), its tangent), float32 and rounded to `dtype`.

        The tangent is rounded only here.
        """
        out, value, unit = self.features(x, rows)
        moved = self.load(f"d{x}", rows).astype(jnp.float32)
        if self.tiling.eps is not None:
            inverse = self.inverse_rms(x, rows)
            along = self.refs[f"along_{x}"][rows, :]
            moved_inverse = -(inverse**3) * along / self.tiling.width
            moved = moved * inverse + self.load(x, rows).astype(jnp.float32) * moved_inverse
            moved = moved * self.weight(f"weight_{x}")
            if f"dweight_{x}" in self.refs:
                moved = moved + unit * self.weight(f"dweight_{x}")
        return out, round_to(jnp.where(value > 0, moved, 0.0), self.dtype)

    def walk(self, step: Callable[[Any, Any], Any], sums: Any) -> Any:
        """Fold step(rows, sums) -> sums over the blocks of a summing kernel."""
        block = self.tiling.block
        at = lambda i: pl.ds(pl.multiple_of(i * block, block), block)
        return jax.lax.fori_loop(0, self.tiling.inner, lambda i, sums: step(at(i), sums), sums)

    def zeros(self) -> tuple[Array, Array]:
        """Return a state and a total of zeros."""
        channels = self.tiling.channels
        return jnp.zeros((channels, channels), jnp.float32), jnp.zeros((1, channels), jnp.float32)

    def quotient(self, c: Array, state: Array, total: Array) -> tuple[Array, Array]:
        """Return (out [n, C], one over its denominator as `sum_by_head` has it), float32."""
        inverse = 1 / (self.sum_by_head(c * total) + self.tiling.denominator_eps)
        return dot(c.astype(self.dtype), state, self.dtype) * inverse, inverse

    def store_norm_gradient(
        self, x: _Norm, rows: Any, gradient: Array, value: Array, unit: Array
    ) -> Array:
        """Pull the cotangent of relu(x') back to x / rms and store it with its product with x.

        Returns the cotangent of the weight, [1, C].
        """
        gradient = jnp.where(value > 0, gradient, 0.0)
        if self.tiling.eps is None:
            self.refs[f"g{x}"][rows, :] = gradient.astype(self.dtype)
            return jnp.zeros((1, self.tiling.channels), jnp.float32)
        of_unit = round_to(gradient * self.weight(f"weight_{x}"), self.dtype)
        self.refs[f"g{x}"][rows, :] = of_unit.astype(self.dtype)
        along = (of_unit * self.load(x, rows).astype(jnp.float32)).sum(1, keepdims=True)
        self.refs[f"along_{x}"][rows, :] = along
        return _column_sum(gradient * unit)


def _same_head(tiling: _Tiling, dtype: Any) -> Array:
    """Return [C, C], 1 where two channels belong to one head."""
    shape = (tiling.channels, tiling.channels)
    head = lambda axis: jax.lax.broadcasted_iota(jnp.int32, shape, axis) // tiling.head
    return (head(0) == head(1)).astype(dtype)


def _column_sum(a: Array) -> Array:
    return a.sum(0, keepdims=True)


def _sum_state(program: _Program) -> None:
    """Store S and z."""
    dtype = program.dtype

    def step(rows, sums):
        a, _, _ = program.features("k", rows)
        a, v = a.astype(dtype), program.load("v", rows)
        return sums[0] + dot(a, v, dtype, (0, 0)), sums[1] + _column_sum(a.astype(jnp.float32))

    state, total = program.walk(step, program.zeros())
    program.refs["state"][...] = program.mask_heads(state)
    program.refs["total"][...] = total


def _divide(program: _Program) -> None:
    """Store the output."""
    c, _, _ = program.features("q", slice(None))
    out, _ = program.quotient(c, program.sum_parts("state"), program.sum_parts("total"))
    program.refs["out"][...] = out.astype(program.dtype)


def _sum_state_tangent(program: _Program) -> None:
    """Store the tangents of S and z."""
    dtype = program.dtype

    def step(rows, sums):
        a, da = program.moved_features("k", rows)
        a, da = a.astype(dtype), da.astype(dtype)
        moved = dot(da, program.load("v", rows), dtype, (0, 0)) + dot(
            a, program.load("dv", rows), dtype, (0, 0)
        )
        return sums[0] + moved, sums[1] + _column_sum(da.astype(jnp.float32))

    state, total = program.walk(step, program.zeros())
    program.refs["dstate"][...] = program.mask_heads(state)
    program.refs["dtotal"][...] = total


def _divide_tangent(program: _Program) -> None:
    """Store the tangent of the output."""
    dtype = program.dtype
    c, dc = program.moved_features("q", slice(None))
    state, total = program.sum_parts("state"), program.sum_parts("total")
    out, inverse = program.quotient(c, state, total)
    numerator = dot(dc.astype(dtype), state, dtype) + dot(
        c.astype(dtype), program.sum_parts("dstate"), dtype
    )
    moved = program.sum_by_head(dc * total + c * program.sum_parts("dtotal"))
    program.refs["dout"][...] = ((numerator - out * moved) * inverse).astype(dtype)


def _query_gradient(program: _Program) -> None:
    """Store the cotangents of q / rms, S, z and the weight of the norm of q."""
    dtype = program.dtype
    state, total = program.sum_parts("state"), program.sum_parts("total")

    def step(rows, sums):
        c, value, unit = program.features("q", rows)
        out, inverse = program.quotient(c, state, total)
        g = program.load("g", rows).astype(jnp.float32)
        of_numerator = g * inverse
        of_denominator = -program.sum_by_head(of_numerator * out)
        of_c = dot(of_numerator, state, dtype, (1, 1)) + of_denominator * total
        weight = program.store_norm_gradient("q", rows, of_c, value, unit)
        of_state = dot(c.astype(dtype), of_numerator, dtype, (0, 0))
        return sums[0] + of_state, sums[1] + _column_sum(c * of_denominator), sums[2] + weight

    zeros = program.zeros()
    of_state, of_total, weight = program.walk(step, (*zeros, zeros[1]))
    program.refs["gstate"][...] = program.mask_heads(of_state)
    program.refs["gtotal"][...] = of_total
    if program.tiling.eps is not None:
        program.refs["gweight_q"][...] = weight


def _key_gradient(program: _Program) -> None:
    """Store the cotangents of k / rms, v and the weight of the norm of k."""
    dtype = program.dtype
    of_state, of_total = program.sum_parts("gstate"), program.sum_parts("gtotal")

    def step(rows, sums):
        a, value, unit = program.features("k", rows)
        of_a = dot(program.load("v", rows), of_state, dtype, (1, 1)) + of_total
        program.refs["gv"][rows, :] = dot(a.astype(dtype), of_state, dtype).astype(dtype)
        return (sums[0] + program.store_norm_gradient("k", rows, of_a, value, unit),)

    (weight,) = program.walk(step, (program.zeros()[1],))
    name = "unused" if program.tiling.eps is None else "gweight_k"
    program.refs[name][...] = weight


def _width_sums(tiling: _Tiling, a: Array) -> Array:
    """Sum the q and k of [B, N, 3 D] (not interleaved) over D, to float32 [B, 2, rows, 1]."""
    both = a[..., : 2 * tiling.width].reshape(*a.shape[:2], 2, tiling.width)
    sums = jnp.swapaxes(both.sum(-1), 1, 2)[..., None]
    if tiling.rows == tiling.tokens:
        return sums
    return jnp.pad(sums, ((0, 0), (0, 0), (0, tiling.rows - tiling.tokens), (0, 0)))


def _wide(a: Array) -> Array:
    return a.astype(jnp.float32)


_Inputs = list[dict[str, tuple[str, Any]]]


def _inputs(tiling: _Tiling, qkv: Array, norms: Sequence[Array]) -> _Inputs:
    """Return what kernels read of q, of k and of v, as {name: (kind, array)} each."""
    found: _Inputs = [{x: ("tokens", view)} for x, view in zip("qkv", tiling.views(qkv))]
    if tiling.eps is not None:
        squares = _width_sums(tiling, jnp.square(_wide(qkv)))
        for x, weight, own in zip("qk", norms, found):
            own |= {
                f"squares_{x}": (f"width_sum_{x}", squares),
                f"weight_{x}": ("weight", tiling.row(weight)),
            }
    return found


def _moved_inputs(
    tiling: _Tiling,
    qkv: Array,
    norms: Sequence[Array],
    dqkv: Array,
    dnorms: Sequence[Array],
) -> _Inputs:
    """Return `_inputs` with their tangents. dnorms: of both weights, or ()."""
    found = _inputs(tiling, qkv, norms)
    for x, view, own in zip("qkv", tiling.views(dqkv), found):
        own |= {f"d{x}": ("tokens", view)}
    if tiling.eps is not None:
        along = _width_sums(tiling, _wide(qkv) * _wide(dqkv))
        for x, own in zip("qk", found):
            own |= {f"along_{x}": (f"width_sum_{x}", along)}
        for x, weight, own in zip("qk", dnorms, found):
            own |= {f"dweight_{x}": ("weight", tiling.row(weight))}
    return found


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(
    tiling: _Tiling, qkv: Array, norm_q: Array, norm_k: Array
) -> tuple[Array, Array, Array]:
    """Return the output [B, N, D], S and z as `_run` gives them, [B, parts, G, C | 1, C].

    S and z are there for the derivative and have none themselves.
    """
    run = functools.partial(_run, tiling, batch=qkv.shape[0], dtype=qkv.dtype)
    q, k, v = _inputs(tiling, qkv, (norm_q, norm_k))
    sums = run("linear_attention_state", _sum_state, k | v, {"state": "states", "total": "totals"})
    ins = q | {key: (key, a) for key, a in sums.items()}
    out = run("linear_attention_out", _divide, ins, {"out": "tokens"})["out"]
    return tiling.unpad(out), sums["state"], sums["total"]


def _attend_jvp(tiling: _Tiling, primals: Any, tangents: Any) -> Any:
    # Call the function, not its implementation, so that an outer derivative finds the custom rule.
    out, state, total = _attend(tiling, *primals)
    state, total = mark_expensive(state), mark_expensive(total)
    if tiling.eps is None or all(map(is_zero, tangents[1:])):
        tangents = tangents[:1]
    dout = jnp.zeros_like(out)
    if not all(map(is_zero, tangents)):
        transpose = functools.partial(_transpose, tiling, len(tangents) > 1)
        residuals = (*primals, *jax.lax.stop_gradient((state, total)))
        dout = linear_map(functools.partial(_tangent, tiling), transpose, residuals, tangents)
    return (out, state, total), (dout, jnp.zeros_like(state), jnp.zeros_like(total))


_attend.defjvp(_attend_jvp, symbolic_zeros=True)


def _tangent(tiling: _Tiling, residuals: Any, tangents: Any) -> Array:
    """Return the tangent of the output."""
    qkv, *norms, state, total = residuals
    dqkv, *dnorms = tangents
    run = functools.partial(_run, tiling, batch=qkv.shape[0], dtype=qkv.dtype)
    q, k, v = _moved_inputs(tiling, qkv, norms, dqkv, dnorms)
    moved = run(
        "linear_attention_state_tangent",
        _sum_state_tangent,
        k | v,
        {"dstate": "states", "dtotal": "totals"},
    )
    sums = {"state": state, "total": total} | moved
    ins = q | {key: (key.removeprefix("d"), a) for key, a in sums.items()}
    return tiling.unpad(
        run("linear_attention_out_tangent", _divide_tangent, ins, {"dout": "tokens"})["dout"]
    )


def _transpose(tiling: _Tiling, with_norms: bool, residuals: Any, g: Array) -> tuple[Array, ...]:
    """Return the cotangents of qkv and, if asked for, of the weights of both norms."""
    qkv, *norms, state, total = residuals
    run = functools.partial(_run, tiling, batch=qkv.shape[0], dtype=qkv.dtype)
    normed = tiling.eps is not None
    of_norm = lambda x: {f"along_{x}": "columns", f"gweight_{x}": "totals"} if normed else {}
    q, k, v = _inputs(tiling, qkv, norms)
    by_q = run(
        "linear_attention_query_gradient",
        _query_gradient,
        q | {"g": ("tokens", tiling.pad(g)), "state": ("state", state), "total": ("total", total)},
        {"gq": "tokens", "gstate": "states", "gtotal": "totals"} | of_norm("q"),
    )
    by_k = run(
        "linear_attention_key_gradient",
        _key_gradient,
        k | v | {"gstate": ("state", by_q["gstate"]), "gtotal": ("total", by_q["gtotal"])},
        {"gk": "tokens", "gv": "tokens"} | (of_norm("k") if normed else {"unused": "totals"}),
    )
    found = by_q | by_k
    cotangents = [tiling.unpad(found[f"g{x}"]) for x in "qkv"]
    if normed:
        squares = q["squares_q"][1][:, :, : tiling.tokens]
        for i, (x, part) in enumerate(zip("qk", tiling.split(qkv))):
            cotangents[i] = _through_rms(
                tiling, part, squares[:, i], cotangents[i], found[f"along_{x}"]
            )
    gradients = [tiling.join(cotangents)]
    if with_norms:
        for x, weight in zip("qk", norms):
            of_weight = tiling.unpad_channels(found[f"gweight_{x}"].sum((0, 1)).reshape(-1))
            gradients.append(of_weight.astype(weight.dtype))
    return tuple(gradients)


def _through_rms(tiling: _Tiling, x: Array, squares: Array, of_unit: Array, along: Array) -> Array:
    """Return the cotangent of x from the cotangent of u = x / rms.

    squares: sums of x^2, [B, N, 1]. along: products of x with the cotangent, summed over blocks of
    channels, [B, G, rows, 1].
    """
    inverse = tiling.inverse_rms(squares)
    along = along.sum(1)[:, : tiling.tokens]
    term = inverse**3 * along / tiling.width
    return (inverse * _wide(of_unit) - _wide(x) * term).astype(x.dtype)
