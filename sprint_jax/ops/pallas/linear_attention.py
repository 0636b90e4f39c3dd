"""ReLU linear attention with the RMSNorm of queries and keys inside, as kernels for value, tangent and gradient.

`plain` is the published arithmetic; `attention` computes the same by kernels. Per head, with a = relu(k'), c = relu(q')
of the normalised keys and queries,

    S = sum_n a_n v_n^T      z = sum_n a_n      out_n = c_n S / (c_n z + eps)

and forward and backward passes are two kernels each: one over keys, one over queries, between which only S and z (or
their tangents or cotangents) travel. Several heads share a block of channels; products of different heads inside it
are masked away, which costs a matrix unit nothing and spares a transpose of the heads. The one number per token that
RMSNorm needs, the sum of squares over all channels, is a row reduction that XLA makes before the kernels; what it adds to
the gradient is added after them. Beside that nothing stands between the projection and the kernels: q, k and v are read
where it left them, side by side, and partial sums are added by whoever reads them.

Shape letters: B batch, N tokens, D width, h heads, d head width, C channels of a block, G blocks.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sprint_jax.ops import backend as backends
from sprint_jax.ops.autodiff import is_zero, kept, linear_map
from sprint_jax.ops.backend import Operand, dot, rounded

CHANNELS, TOKENS = 32, 64  # at a time; a TPU takes 128 channels
EPS = 1e-15  # of the denominator, diffusers; the official repository uses 1e-8


def rms_norm(x, weight, eps):
    """RMSNorm over the last axis. [..., D], weight [D] -> [..., D] in x's dtype, computed in float32.

    x / rms has the weight's dtype: a weight in float32, as in training, leaves one rounding; one in bfloat16 three, as in diffusers.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + eps)
    return (x32.astype(weight.dtype) * weight).astype(x.dtype)


def by_heads(q, k, v):
    """ReLU linear attention, float32 inside. q, k, v [B, N, h, d] -> [B, N, h, d] in v's dtype."""
    q, k, v32 = (a.astype(jnp.float32) for a in (jax.nn.relu(q), jax.nn.relu(k), v))
    product = functools.partial(
        jnp.einsum, precision=jax.lax.Precision.HIGHEST
    )  # by default TF32 on a GPU, bfloat16 on a TPU
    state = product("bnhe,bnhd->bhed", k, v32)
    numerator = product("bnhe,bhed->bnhd", q, state)
    denominator = product("bnhe,bhe->bnh", q, k.sum(1))
    return (numerator / (denominator[..., None] + EPS)).astype(v.dtype)


def plain(qkv, norm_q, norm_k, *, heads, eps):
    """Linear attention of normalised queries and keys.

    Args:
      qkv: [B, N, 3 D], queries, keys and values side by side.
      norm_q, norm_k: weights [D] of RMSNorm over all channels, before the split into heads; None for no norm.
      heads: h, a divisor of D.
      eps: of RMSNorm.
    Returns:
      [B, N, D] in the same dtype.
    """
    q, k, v = jnp.split(qkv, 3, -1)
    if norm_q is not None:
        q = rms_norm(q, norm_q, eps)
    if norm_k is not None:
        k = rms_norm(k, norm_k, eps)
    split = lambda a: a.reshape(*a.shape[:2], heads, -1)
    return by_heads(split(q), split(k), split(v)).reshape(v.shape)


def plain_of_heads(qkv, *, heads):
    """Linear attention without norms of heads that have their queries, keys and values beside each other, as in a DC-AE.

    qkv: [B, N, h 3 d], of each head first q, then k, then v. Returns [B, N, h d] in the same dtype.
    """
    q, k, v = jnp.split(qkv.reshape(*qkv.shape[:2], heads, -1), 3, -1)
    out = by_heads(q, k, v)
    return out.reshape(*out.shape[:2], -1)


def attention_of_heads(qkv, *, heads, backend):
    """`plain_of_heads` by kernels; same arguments and result. backend and derivatives: as `attention`."""
    shape = _shape(qkv, heads)
    unread = jnp.zeros(shape[-1], jnp.float32)
    return _attend(_Tiling.of(shape, heads, backend, None, by_head=True), qkv, unread, unread)[0]


def attention(qkv, norm_q, norm_k, *, heads, eps, backend):
    """`plain` by kernels; same arguments and result.

    backend: "interpret", "triton" or "tpu", see `ops/backend.py`. Weights of both norms, or of neither.
    Forward mode, reverse mode, and reverse mode around a stopped tangent; a tangent that is not stopped gives NaN.
    """
    if (norm_q is None) != (norm_k is None):
        raise ValueError("give the weights of both norms, or of neither")
    shape = _shape(qkv, heads)
    if norm_q is None:
        norm_q = norm_k = jnp.zeros(shape[-1], jnp.float32)  # not read
        eps = None
    return _attend(_Tiling.of(shape, heads, backend, eps), qkv, norm_q, norm_k)[0]


def _shape(qkv, heads):
    """(B, N, D) of [B, N, 3 D]."""
    *shape, channels = qkv.shape
    if channels % (3 * heads):
        raise ValueError(
            f"qkv {qkv.shape}: its last axis is not three times the width of {heads} heads"
        )
    return *shape, channels // 3


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """How one call is cut. `eps` None: no norm."""

    tokens: int  # N
    width: int  # D
    heads: int
    head: int  # channels of a head inside the kernels, a power of two
    channels: int  # C
    groups: int  # G
    block: int  # tokens at a time
    inner: int  # blocks that one program of a summing kernel walks through
    parts: int  # such programs along N
    backend: str
    eps: float | None
    by_head: bool  # q, k and v of each head beside each other, instead of those of all heads

    @classmethod
    def of(cls, shape, heads, backend, eps, by_head=False):
        batch, tokens, width = shape
        head = backends.next_power_of_two(width // heads)
        # A TPU's lanes are 128; on a GPU narrower blocks waste less on products of different heads.
        channels = max(128 if backend == "tpu" else 16 if by_head else CHANNELS, head)
        groups = -(-heads * head // channels)
        block = max(16, min(max(TOKENS, channels), backends.next_power_of_two(tokens)))
        blocks = -(-tokens // block)
        # Partial sums over at most 1024 tokens, fewer where there are not programs enough for a GPU's cores.
        wanted = max(
            -(-blocks * block // 1024), math.ceil(128 / (backends.local_batch(batch) * groups))
        )
        inner = -(-blocks // min(blocks, wanted))
        return cls(
            tokens,
            width,
            heads,
            head,
            channels,
            groups,
            block,
            inner,
            -(-blocks // inner),
            backend,
            eps,
            by_head,
        )

    @property
    def rows(self):
        """N, padded."""
        return self.block * self.inner * self.parts

    @property
    def whole(self):
        """Whether blocks cover tokens and channels as they are, with nothing to fill up."""
        covered = (
            self.rows == self.tokens
            and self.head * self.heads == self.width == self.groups * self.channels
        )
        return covered and (not self.by_head or self.groups == self.heads)

    def split(self, qkv):
        """[B, N, 3 D] -> q, k and v [B, N, D]."""
        if not self.by_head:
            return jnp.split(qkv, 3, -1)
        parts = jnp.split(qkv.reshape(*qkv.shape[:2], self.heads, -1), 3, -1)
        return [x.reshape(*x.shape[:2], -1) for x in parts]

    def joined(self, parts):
        """The inverse of `split`."""
        if not self.by_head:
            return jnp.concatenate(parts, -1)
        x = jnp.concatenate([x.reshape(*x.shape[:2], self.heads, -1) for x in parts], -1)
        return x.reshape(*x.shape[:2], -1)

    def views(self, qkv):
        """q, k and v of [B, N, 3 D], each (an array, the block of channels with which it begins there, blocks from one of its
        groups to the next)."""
        if not self.whole:
            return [(self.tiled(x), 0, 1) for x in self.split(qkv)]
        return [(qkv, i, 3) if self.by_head else (qkv, i * self.groups, 1) for i in range(3)]

    def tiled(self, x):
        """[B, N, D] -> [B, rows, G C]: heads, tokens and channels filled up with zeros."""
        x, more = self._filled(x), self.rows - self.tokens
        return jnp.pad(x, ((0, 0), (0, more), (0, 0))) if more else x

    def _filled(self, x):
        """[..., D] -> [..., G C]: heads and channels filled up with zeros."""
        missing = self.head - self.width // self.heads
        if missing:
            x = x.reshape(*x.shape[:-1], self.heads, -1)
            x = jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, missing),)).reshape(*x.shape[:-2], -1)
        more = self.groups * self.channels - x.shape[-1]
        return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, more),)) if more else x

    def untiled(self, x):
        """The inverse of `tiled`."""
        x = x[:, : self.tokens, : self.heads * self.head]
        if self.heads * self.head != self.width:
            x = x.reshape(*x.shape[:2], self.heads, self.head)[..., : self.width // self.heads]
        return x.reshape(*x.shape[:2], self.width)

    def row(self, weight):
        """Weights [D] of a norm -> [1, G C]."""
        return (weight if self.whole else self._filled(weight))[None]


# ---------------------------------------------------------------------------------------------- blocks of arrays


# Times that one group's partial sums are read, up to which that costs less than another kernel.
_MOST_READS = 128


def _operands(t, summing):
    """Makers of `Operand`s for a kernel with grid (B, G, programs along N)."""
    size = t.block * t.inner if summing else t.block
    part = lambda b, g, n: (b, n, g, 0, 0)
    every = lambda b, g, n: (b, 0, g, 0, 0)

    def tokens(a):
        array, first, stride = a if isinstance(a, tuple) else (a, 0, 1)
        return Operand(array, (None, size, t.channels), lambda b, g, n: (b, n, first + stride * g))

    def width_sum(which):
        return lambda a: Operand(a, (None, None, size, 1), lambda b, g, n: (b, which, n, 0))

    return dict(
        tokens=tokens,
        width_sum_q=width_sum(0),
        width_sum_k=width_sum(1),
        columns=lambda a: Operand(a, (None, None, size, 1), lambda b, g, n: (b, g, n, 0)),
        weight=lambda a: Operand(a, (1, t.channels), lambda b, g, n: (0, g), shared=True),
        state=lambda a: Operand(a, (None, a.shape[1], None, t.channels, t.channels), every),
        total=lambda a: Operand(a, (None, a.shape[1], None, 1, t.channels), every),
        states=lambda a: Operand(a, (None, None, None, t.channels, t.channels), part),
        totals=lambda a: Operand(a, (None, None, None, 1, t.channels), part),
    )


def _run(t, name, body, ins, outs, batch, dtype):
    """ins: {name: (kind, array)}. outs: {name: kind}, whose shapes follow from the kind.

    What a kernel sums over tokens it gives in parts, "states" and "totals", which others read as "state" and "total". Readers
    add the parts up where these are few; where many programs would read many, it is done here.
    """
    summing = any(kind in ("states", "totals") for kind in outs.values())
    make = _operands(t, summing)
    shapes = dict(
        tokens=((batch, t.rows, t.groups * t.channels), dtype),
        columns=((batch, t.groups, t.rows, 1), jnp.float32),
        states=((batch, t.parts, t.groups, t.channels, t.channels), jnp.float32),
        totals=((batch, t.parts, t.groups, 1, t.channels), jnp.float32),
    )
    found = backends.launch(
        functools.partial(body, t, dtype),
        (None, t.groups, t.parts if summing else t.parts * t.inner),
        {key: make[kind](array) for key, (kind, array) in ins.items()},
        {key: make[kind](jax.ShapeDtypeStruct(*shapes[kind])) for key, kind in outs.items()},
        backend=t.backend,
        name=name,
    )
    if t.parts**2 * t.inner <= _MOST_READS:
        return found
    return {
        key: a.sum(1, keepdims=True) if outs[key] in ("states", "totals") else a
        for key, a in found.items()
    }


# -------------------------------------------------------------------------------------------------- kernel bodies


def _same_head(t, dtype):
    """[C, C]: 1 where two channels belong to one head."""
    head = lambda axis: (
        jax.lax.broadcasted_iota(jnp.int32, (t.channels, t.channels), axis) // t.head
    )
    return (head(0) == head(1)).astype(dtype)


def _by_head(t, dtype, a):
    """Sums over the channels of each head of float32 [n, C]: [n, C], or [n, 1] where all channels are one head's."""
    return a.sum(1, keepdims=True) if t.channels == t.head else dot(a, _same_head(t, dtype), dtype)


def _of_heads(t, state):
    """A state without products of different heads."""
    return state if t.channels == t.head else state * _same_head(t, jnp.float32)


def _sum_of(r, key):
    """All parts of a sum over tokens."""
    return jax.lax.fori_loop(1, r[key].shape[0], lambda i, sums: sums + r[key][i], r[key][0])


def _weight(r, key):
    return r[key][...].astype(jnp.float32)


def _inverse_rms(t, r, x, rows):
    """1 / rms of the tokens `rows` of q or k, float32 [n, 1]."""
    return jax.lax.rsqrt(r[f"squares_{x}"][rows, :] / t.width + t.eps)


def _load(r, key, rows):
    return r[key][rows, :]


def _features(t, dtype, r, x, rows):
    """(relu(x'), x', x / rms) of the tokens `rows` of q or k, float32, rounded as `rms_norm` has them."""
    value = _load(r, x, rows).astype(jnp.float32)
    if t.eps is None:
        return jnp.maximum(value, 0), value, value
    unit = rounded(value * _inverse_rms(t, r, x, rows), r[f"weight_{x}"].dtype)
    value = rounded(unit * _weight(r, f"weight_{x}"), dtype)
    return jnp.maximum(value, 0), value, unit


def _moved_features(t, dtype, r, x, rows):
    """(relu(x'), its tangent), both float32 and as `dtype` rounds them; the tangent is rounded only here."""
    out, value, unit = _features(t, dtype, r, x, rows)
    moved = _load(r, f"d{x}", rows).astype(jnp.float32)
    if t.eps is not None:
        inverse = _inverse_rms(t, r, x, rows)
        moved_inverse = -(inverse**3) * r[f"along_{x}"][rows, :] / t.width
        moved = moved * inverse + _load(r, x, rows).astype(jnp.float32) * moved_inverse
        moved = moved * _weight(r, f"weight_{x}")
        if f"dweight_{x}" in r:
            moved = moved + unit * _weight(r, f"dweight_{x}")
    return out, rounded(jnp.where(value > 0, moved, 0.0), dtype)


def _walk(t, step, sums):
    """step(rows, sums) -> sums over the blocks of a summing kernel."""
    at = lambda i: pl.ds(pl.multiple_of(i * t.block, t.block), t.block)
    return jax.lax.fori_loop(0, t.inner, lambda i, sums: step(at(i), sums), sums)


def _zeros(t):
    return jnp.zeros((t.channels, t.channels), jnp.float32), jnp.zeros((1, t.channels), jnp.float32)


def _column_sum(a):
    return a.sum(0, keepdims=True)


def _sum_state(t, dtype, r):
    """S and z."""

    def step(rows, sums):
        a, _, _ = _features(t, dtype, r, "k", rows)
        a, v = a.astype(dtype), _load(r, "v", rows)
        return sums[0] + dot(a, v, dtype, (0, 0)), sums[1] + _column_sum(a.astype(jnp.float32))

    state, total = _walk(t, step, _zeros(t))
    r["state"][...] = _of_heads(t, state)
    r["total"][...] = total


def _quotient(t, dtype, c, state, total):
    """(out [n, C], one over its denominator as `_by_head` has it), float32."""
    inverse = 1 / (_by_head(t, dtype, c * total) + EPS)
    return dot(c.astype(dtype), state, dtype) * inverse, inverse


def _divide(t, dtype, r):
    c, _, _ = _features(t, dtype, r, "q", slice(None))
    out, _ = _quotient(t, dtype, c, _sum_of(r, "state"), _sum_of(r, "total"))
    r["out"][...] = out.astype(dtype)


def _sum_state_tangent(t, dtype, r):
    """Tangents of S and z."""

    def step(rows, sums):
        a, da = _moved_features(t, dtype, r, "k", rows)
        a, da = a.astype(dtype), da.astype(dtype)
        moved = dot(da, _load(r, "v", rows), dtype, (0, 0)) + dot(
            a, _load(r, "dv", rows), dtype, (0, 0)
        )
        return sums[0] + moved, sums[1] + _column_sum(da.astype(jnp.float32))

    state, total = _walk(t, step, _zeros(t))
    r["dstate"][...] = _of_heads(t, state)
    r["dtotal"][...] = total


def _divide_tangent(t, dtype, r):
    c, dc = _moved_features(t, dtype, r, "q", slice(None))
    state, total = _sum_of(r, "state"), _sum_of(r, "total")
    out, inverse = _quotient(t, dtype, c, state, total)
    numerator = dot(dc.astype(dtype), state, dtype) + dot(
        c.astype(dtype), _sum_of(r, "dstate"), dtype
    )
    moved = _by_head(t, dtype, dc * total + c * _sum_of(r, "dtotal"))
    r["dout"][...] = ((numerator - out * moved) * inverse).astype(dtype)


def _store_norm_gradient(t, dtype, r, x, rows, gradient, value, unit):
    """Takes the cotangent of relu(x') back to x / rms, stores it and its product with x; returns the weight's."""
    gradient = jnp.where(value > 0, gradient, 0.0)
    if t.eps is None:
        r[f"g{x}"][rows, :] = gradient.astype(dtype)
        return jnp.zeros((1, t.channels), jnp.float32)
    of_unit = rounded(gradient * _weight(r, f"weight_{x}"), dtype)
    r[f"g{x}"][rows, :] = of_unit.astype(dtype)
    r[f"along_{x}"][rows, :] = (of_unit * _load(r, x, rows).astype(jnp.float32)).sum(
        1, keepdims=True
    )
    return _column_sum(gradient * unit)


def _query_gradient(t, dtype, r):
    """Cotangents of q / rms, S, z and the weight of its norm."""
    state, total = _sum_of(r, "state"), _sum_of(r, "total")

    def step(rows, sums):
        c, value, unit = _features(t, dtype, r, "q", rows)
        out, inverse = _quotient(t, dtype, c, state, total)
        g = _load(r, "g", rows).astype(jnp.float32)
        of_numerator = g * inverse
        of_denominator = -_by_head(t, dtype, of_numerator * out)
        of_c = dot(of_numerator, state, dtype, (1, 1)) + of_denominator * total
        weight = _store_norm_gradient(t, dtype, r, "q", rows, of_c, value, unit)
        of_state = dot(c.astype(dtype), of_numerator, dtype, (0, 0))
        return sums[0] + of_state, sums[1] + _column_sum(c * of_denominator), sums[2] + weight

    zeros = _zeros(t)
    of_state, of_total, weight = _walk(t, step, (*zeros, zeros[1]))
    r["gstate"][...] = _of_heads(t, of_state)
    r["gtotal"][...] = of_total
    if t.eps is not None:
        r["gweight_q"][...] = weight


def _key_gradient(t, dtype, r):
    """Cotangents of k / rms, v and the weight of the norm of k."""
    of_state, of_total = _sum_of(r, "gstate"), _sum_of(r, "gtotal")

    def step(rows, sums):
        a, value, unit = _features(t, dtype, r, "k", rows)
        of_a = dot(_load(r, "v", rows), of_state, dtype, (1, 1)) + of_total
        r["gv"][rows, :] = dot(a.astype(dtype), of_state, dtype).astype(dtype)
        return (sums[0] + _store_norm_gradient(t, dtype, r, "k", rows, of_a, value, unit),)

    (weight,) = _walk(t, step, (_zeros(t)[1],))
    if t.eps is not None:
        r["gweight_k"][...] = weight
    else:
        r["unused"][...] = weight


# --------------------------------------------------------------------------------------------- the four passes


def _width_sums(t, a):
    """Sums over the width of q's and k's part of [B, N, 3 D], not by head -> float32 [B, 2, rows, 1]."""
    both = a[..., : 2 * t.width].reshape(*a.shape[:2], 2, t.width)
    sums = jnp.swapaxes(both.sum(-1), 1, 2)[..., None]
    return (
        sums
        if t.rows == t.tokens
        else jnp.pad(sums, ((0, 0), (0, 0), (0, t.rows - t.tokens), (0, 0)))
    )


def _wide(a):
    return a.astype(jnp.float32)


def _inputs(t, qkv, norms):
    """What kernels read of (q, k, v)."""
    found = [{x: ("tokens", view)} for x, view in zip("qkv", t.views(qkv))]
    if t.eps is not None:
        squares = _width_sums(t, jnp.square(_wide(qkv)))
        for x, weight, its in zip("qk", norms, found):
            its |= {
                f"squares_{x}": (f"width_sum_{x}", squares),
                f"weight_{x}": ("weight", t.row(weight)),
            }
    return found


def _moved_inputs(t, qkv, norms, dqkv, dnorms):
    """The same with their tangents. dnorms: of both weights, or ()."""
    found = _inputs(t, qkv, norms)
    for x, view, its in zip("qkv", t.views(dqkv), found):
        its |= {f"d{x}": ("tokens", view)}
    if t.eps is not None:
        along = _width_sums(t, _wide(qkv) * _wide(dqkv))
        for x, its in zip("qk", found):
            its |= {f"along_{x}": (f"width_sum_{x}", along)}
        for x, weight, its in zip("qk", dnorms, found):
            its |= {f"dweight_{x}": ("weight", t.row(weight))}
    return found


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(t, qkv, norm_q, norm_k):
    """(out [B, N, D], S and z as `_run` gives them, [B, parts, G, C | 1, C]); the last two for the derivative, which they have none of."""
    run = functools.partial(_run, t, batch=qkv.shape[0], dtype=qkv.dtype)
    q, k, v = _inputs(t, qkv, (norm_q, norm_k))
    sums = run("linear_attention_state", _sum_state, k | v, {"state": "states", "total": "totals"})
    ins = q | {key: (key, a) for key, a in sums.items()}
    out = run("linear_attention_out", _divide, ins, {"out": "tokens"})["out"]
    return t.untiled(out), sums["state"], sums["total"]


def _attend_jvp(t, primals, tangents):
    # By the function itself, so that a derivative around this one finds its rule.
    out, state, total = _attend(t, *primals)
    state, total = kept(state), kept(total)
    if t.eps is None or all(map(is_zero, tangents[1:])):
        tangents = tangents[:1]
    dout = jnp.zeros_like(out)
    if not all(map(is_zero, tangents)):
        transpose = functools.partial(_transpose, t, len(tangents) > 1)
        residuals = (*primals, *jax.lax.stop_gradient((state, total)))
        dout = linear_map(functools.partial(_tangent, t), transpose, residuals, tangents)
    return (out, state, total), (dout, jnp.zeros_like(state), jnp.zeros_like(total))


_attend.defjvp(_attend_jvp, symbolic_zeros=True)


def _tangent(t, residuals, tangents):
    qkv, *norms, state, total = residuals
    dqkv, *dnorms = tangents
    run = functools.partial(_run, t, batch=qkv.shape[0], dtype=qkv.dtype)
    q, k, v = _moved_inputs(t, qkv, norms, dqkv, dnorms)
    moved = run(
        "linear_attention_state_tangent",
        _sum_state_tangent,
        k | v,
        {"dstate": "states", "dtotal": "totals"},
    )
    sums = {"state": state, "total": total} | moved
    ins = q | {key: (key.removeprefix("d"), a) for key, a in sums.items()}
    return t.untiled(
        run("linear_attention_out_tangent", _divide_tangent, ins, {"dout": "tokens"})["dout"]
    )


def _transpose(t, with_norms, residuals, g):
    qkv, *norms, state, total = residuals
    run = functools.partial(_run, t, batch=qkv.shape[0], dtype=qkv.dtype)
    normed = t.eps is not None
    of_norm = lambda x: {f"along_{x}": "columns", f"gweight_{x}": "totals"} if normed else {}
    q, k, v = _inputs(t, qkv, norms)
    by_q = run(
        "linear_attention_query_gradient",
        _query_gradient,
        q | {"g": ("tokens", t.tiled(g)), "state": ("state", state), "total": ("total", total)},
        {"gq": "tokens", "gstate": "states", "gtotal": "totals"} | of_norm("q"),
    )
    by_k = run(
        "linear_attention_key_gradient",
        _key_gradient,
        k | v | {"gstate": ("state", by_q["gstate"]), "gtotal": ("total", by_q["gtotal"])},
        {"gk": "tokens", "gv": "tokens"} | (of_norm("k") if normed else {"unused": "totals"}),
    )
    found = by_q | by_k
    cotangents = [t.untiled(found[f"g{x}"]) for x in "qkv"]
    if normed:
        squares = q["squares_q"][1][:, :, : t.tokens]
        for i, (x, part) in enumerate(zip("qk", t.split(qkv))):
            cotangents[i] = _through_rms(t, part, squares[:, i], cotangents[i], found[f"along_{x}"])
    gradients = [t.joined(cotangents)]
    if with_norms:
        for x, weight in zip("qk", norms):
            of_weight = found[f"gweight_{x}"].sum((0, 1)).reshape(1, 1, -1)
            gradients.append(
                dataclasses.replace(t, tokens=1).untiled(of_weight)[0, 0].astype(weight.dtype)
            )
    return tuple(gradients)


def _through_rms(t, x, squares, of_unit, along):
    """Cotangent of x from that of u = x / rms. squares: of x, summed [B, N, 1]. along: products of x with the cotangent, summed by
    blocks of channels [B, G, rows, 1]."""
    inverse, along = jax.lax.rsqrt(squares / t.width + t.eps), along.sum(1)[:, : t.tokens]
    return (inverse * _wide(of_unit) - _wide(x) * (inverse**3 * along / t.width)).astype(x.dtype)
