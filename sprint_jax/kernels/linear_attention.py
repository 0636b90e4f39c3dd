"""ReLU linear attention with the RMSNorm of queries and keys inside, as kernels for value, tangent and gradient.

`plain` is the published arithmetic; `attention` computes the same by kernels. Per head, with a = relu(k'), c = relu(q')
of the normalised keys and queries,

    S = sum_n a_n v_n^T      z = sum_n a_n      out_n = c_n S / (c_n z + eps)

and forward and backward passes are two kernels each: one over keys, one over queries, between which only S and z (or
their tangents or cotangents) travel. Several heads share a block of channels; products of different heads inside it
are masked away, which costs a matrix unit nothing and spares a transpose of the heads. The one number per token that
RMSNorm needs, 1 / rms over all channels, is a row reduction that XLA makes before the kernels; what it adds to the
gradient is added after them.

Shape letters: B batch, N tokens, D width, h heads, d head width, C channels of a block, G blocks.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sprint_jax.kernels import backend as backends
from sprint_jax.kernels.backend import Operand, dot, rounded
from sprint_jax.kernels.derivatives import is_zero, linear_map

EPS = 1e-15  # of the denominator, diffusers; the official repository uses 1e-8


def rms_norm(x, weight, eps):
    """RMSNorm over the last axis. [..., D], weight [D] -> [..., D], computed in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * weight.astype(x.dtype)


def by_heads(q, k, v):
    """ReLU linear attention, float32 inside. q, k, v [B, N, h, d] -> [B, N, h, d] in v's dtype."""
    q, k, v32 = (a.astype(jnp.float32) for a in (jax.nn.relu(q), jax.nn.relu(k), v))
    state = jnp.einsum("bnhe,bnhd->bhed", k, v32)
    numerator = jnp.einsum("bnhe,bhed->bnhd", q, state)
    denominator = jnp.einsum("bnhe,bhe->bnh", q, k.sum(1))
    return (numerator / (denominator[..., None] + EPS)).astype(v.dtype)


def plain(q, k, v, norm_q, norm_k, *, heads, eps):
    """Linear attention of normalised queries and keys.

    Args:
      q, k, v: [B, N, D], one dtype.
      norm_q, norm_k: weights [D] of RMSNorm over all channels, before the split into heads; None for no norm.
      heads: h, a divisor of D.
      eps: of RMSNorm.
    Returns:
      [B, N, D] in v's dtype.
    """
    if norm_q is not None:
        q = rms_norm(q, norm_q, eps)
    if norm_k is not None:
        k = rms_norm(k, norm_k, eps)
    split = lambda a: a.reshape(*a.shape[:2], heads, -1)
    return by_heads(split(q), split(k), split(v)).reshape(v.shape)


def attention(q, k, v, norm_q, norm_k, *, heads, eps, backend):
    """`plain` by kernels; same arguments and result.

    backend: "interpret", "triton" or "tpu", see `kernels/backend.py`. Weights of both norms, or of neither.
    Forward mode, reverse mode, and reverse mode around a stopped tangent; a tangent that is not stopped gives NaN.
    """
    if (norm_q is None) != (norm_k is None):
        raise ValueError("give the weights of both norms, or of neither")
    if not q.shape == k.shape == v.shape or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v differ: {q.shape} {q.dtype}, {k.shape} {k.dtype}, {v.shape} {v.dtype}")
    if norm_q is None:
        norm_q = norm_k = jnp.zeros(q.shape[-1], jnp.float32)  # not read
        tiling = _Tiling.of(q.shape, heads, backend, None)
    else:
        tiling = _Tiling.of(q.shape, heads, backend, eps)
    return _attend(tiling, q, k, v, norm_q, norm_k)[0]


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

    @classmethod
    def of(cls, shape, heads, backend, eps):
        batch, tokens, width = shape
        head = backends.next_power_of_two(width // heads)
        # A TPU's lanes are 128; on a GPU narrower blocks waste less on products of different heads.
        channels = max(128 if backend == "tpu" else 64, head)
        groups = -(-heads * head // channels)
        block = max(16, min(channels, backends.next_power_of_two(tokens)))
        blocks = -(-tokens // block)
        # Partial sums over at most 1024 tokens, fewer where there are not programs enough for a GPU's cores.
        wanted = max(-(-blocks * block // 1024), math.ceil(128 / (backends.local_batch(batch) * groups)))
        inner = -(-blocks // min(blocks, wanted))
        return cls(tokens, width, heads, head, channels, groups, block, inner, -(-blocks // inner), backend, eps)

    @property
    def rows(self):
        """N, padded."""
        return self.block * self.inner * self.parts

    def tiled(self, x):
        """[B, N, D] -> [B, rows, G C]: heads, tokens and channels filled up with zeros."""
        batch, tokens, width = x.shape
        missing = self.head - width // self.heads
        if missing:
            x = x.reshape(batch, tokens, self.heads, -1)
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing))).reshape(batch, tokens, -1)
        more = (self.rows - tokens if tokens > 1 else 0, self.groups * self.channels - x.shape[-1])
        return jnp.pad(x, ((0, 0), (0, more[0]), (0, more[1]))) if any(more) else x

    def untiled(self, x):
        """The inverse of `tiled`."""
        x = x[:, : self.tokens, : self.heads * self.head]
        if self.heads * self.head != self.width:
            x = x.reshape(*x.shape[:2], self.heads, self.head)[..., : self.width // self.heads]
        return x.reshape(*x.shape[:2], self.width)

    def row(self, weight, dtype):
        """Weights [D] of a norm, as the compute dtype holds them -> float32 [1, G C]."""
        return self.tiled(rounded(weight, dtype)[None, None])[0]


# ---------------------------------------------------------------------------------------------- blocks of arrays


def _operands(t, summing):
    """Makers of `Operand`s for a kernel with grid (B, G, programs along N)."""
    size = t.block * t.inner if summing else t.block
    whole = lambda b, g, n: (b, g, 0, 0)
    part = lambda b, g, n: (b, n, g, 0, 0)
    return dict(
        tokens=lambda a: Operand(a, (None, size, t.channels), lambda b, g, n: (b, n, g)),
        column=lambda a: Operand(a, (None, size, 1), lambda b, g, n: (b, n, 0)),
        columns=lambda a: Operand(a, (None, None, size, 1), lambda b, g, n: (b, g, n, 0)),
        weight=lambda a: Operand(a, (1, t.channels), lambda b, g, n: (0, g), shared=True),
        state=lambda a: Operand(a, (None, None, t.channels, t.channels), whole),
        total=lambda a: Operand(a, (None, None, 1, t.channels), whole),
        states=lambda a: Operand(a, (None, None, None, t.channels, t.channels), part),
        totals=lambda a: Operand(a, (None, None, None, 1, t.channels), part),
    )


def _run(t, name, body, ins, outs, batch, dtype):
    """ins: {name: (kind, array)}. outs: {name: kind}, whose shapes follow from the kind; sums over parts are made here."""
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
    return {key: a.sum(1) if outs[key] in ("states", "totals") else a for key, a in found.items()}


# -------------------------------------------------------------------------------------------------- kernel bodies


def _same_head(t, dtype):
    """[C, C]: 1 where two channels belong to one head."""
    head = lambda axis: jax.lax.broadcasted_iota(jnp.int32, (t.channels, t.channels), axis) // t.head
    return (head(0) == head(1)).astype(dtype)


def _normed(t, dtype, x, inverse, weight):
    """(x' and x / rms, both as `dtype` rounds them) in float32. inverse: 1 / rms of each token."""
    if t.eps is None:
        x = x.astype(jnp.float32)
        return x, x
    unit = rounded(x.astype(jnp.float32) * inverse, dtype)
    return rounded(unit * weight, dtype), unit


def _load(r, key, rows):
    return r[key][rows, :]


def _features(t, dtype, r, x, rows):
    """(relu(x'), x', x / rms) of the tokens `rows` of q or k."""
    normed = t.eps is not None
    inverse, weight = (_load(r, f"inverse_{x}", rows), r[f"weight_{x}"][...]) if normed else (None, None)
    value, unit = _normed(t, dtype, _load(r, x, rows), inverse, weight)
    return jnp.maximum(value, 0), value, unit


def _moved_features(t, dtype, r, x, rows):
    """(relu(x'), its tangent), both float32 and as `dtype` rounds them; the tangent is rounded only here."""
    out, value, unit = _features(t, dtype, r, x, rows)
    moved = _load(r, f"d{x}", rows).astype(jnp.float32)
    if t.eps is not None:
        moved = moved * _load(r, f"inverse_{x}", rows) + _load(r, x, rows).astype(jnp.float32) * _load(r, f"dinverse_{x}", rows)
        moved = moved * r[f"weight_{x}"][...]
        if f"dweight_{x}" in r:
            moved = moved + unit * r[f"dweight_{x}"][...]
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
    r["state"][...] = state * _same_head(t, jnp.float32)
    r["total"][...] = total


def _quotient(t, dtype, c, state, total):
    """(out, denominator), float32 [n, C]."""
    denominator = dot(c * total, _same_head(t, dtype), dtype) + EPS
    return dot(c.astype(dtype), state, dtype) / denominator, denominator


def _divide(t, dtype, r):
    c, _, _ = _features(t, dtype, r, "q", slice(None))
    out, _ = _quotient(t, dtype, c, r["state"][...], r["total"][...])
    r["out"][...] = out.astype(dtype)


def _sum_state_tangent(t, dtype, r):
    """Tangents of S and z."""

    def step(rows, sums):
        a, da = _moved_features(t, dtype, r, "k", rows)
        a, da = a.astype(dtype), da.astype(dtype)
        moved = dot(da, _load(r, "v", rows), dtype, (0, 0)) + dot(a, _load(r, "dv", rows), dtype, (0, 0))
        return sums[0] + moved, sums[1] + _column_sum(da.astype(jnp.float32))

    state, total = _walk(t, step, _zeros(t))
    r["dstate"][...] = state * _same_head(t, jnp.float32)
    r["dtotal"][...] = total


def _divide_tangent(t, dtype, r):
    c, dc = _moved_features(t, dtype, r, "q", slice(None))
    state, total = r["state"][...], r["total"][...]
    out, denominator = _quotient(t, dtype, c, state, total)
    numerator = dot(dc.astype(dtype), state, dtype) + dot(c.astype(dtype), r["dstate"][...], dtype)
    moved = dot(dc * total + c * r["dtotal"][...], _same_head(t, dtype), dtype)
    r["dout"][...] = ((numerator - out * moved) / denominator).astype(dtype)


def _store_norm_gradient(t, dtype, r, x, rows, gradient, value, unit):
    """Takes the cotangent of relu(x') back to x / rms, stores it and its product with x; returns the weight's."""
    gradient = jnp.where(value > 0, gradient, 0.0)
    if t.eps is None:
        r[f"g{x}"][rows, :] = gradient.astype(dtype)
        return jnp.zeros((1, t.channels), jnp.float32)
    of_unit = rounded(gradient * r[f"weight_{x}"][...], dtype)
    r[f"g{x}"][rows, :] = of_unit.astype(dtype)
    r[f"along_{x}"][rows, :] = (of_unit * _load(r, x, rows).astype(jnp.float32)).sum(1, keepdims=True)
    return _column_sum(gradient * unit)


def _query_gradient(t, dtype, r):
    """Cotangents of q / rms, S, z and the weight of its norm."""

    def step(rows, sums):
        c, value, unit = _features(t, dtype, r, "q", rows)
        state, total = r["state"][...], r["total"][...]
        out, denominator = _quotient(t, dtype, c, state, total)
        g = _load(r, "g", rows).astype(jnp.float32)
        of_numerator = g / denominator
        of_denominator = -dot(of_numerator * out, _same_head(t, dtype), dtype)  # one number a head
        of_c = dot(of_numerator, state, dtype, (1, 1)) + of_denominator * total
        weight = _store_norm_gradient(t, dtype, r, "q", rows, of_c, value, unit)
        of_state = dot(c.astype(dtype), of_numerator, dtype, (0, 0))
        return sums[0] + of_state, sums[1] + _column_sum(c * of_denominator), sums[2] + weight

    zeros = _zeros(t)
    state, total, weight = _walk(t, step, (*zeros, zeros[1]))
    r["gstate"][...] = state * _same_head(t, jnp.float32)
    r["gtotal"][...] = total
    if t.eps is not None:
        r["gweight_q"][...] = weight


def _key_gradient(t, dtype, r):
    """Cotangents of k / rms, v and the weight of the norm of k."""

    def step(rows, sums):
        a, value, unit = _features(t, dtype, r, "k", rows)
        of_state = r["gstate"][...]
        of_a = dot(_load(r, "v", rows), of_state, dtype, (1, 1)) + r["gtotal"][...]
        r["gv"][rows, :] = dot(a.astype(dtype), of_state, dtype).astype(dtype)
        return (sums[0] + _store_norm_gradient(t, dtype, r, "k", rows, of_a, value, unit),)

    (weight,) = _walk(t, step, (_zeros(t)[1],))
    if t.eps is not None:
        r["gweight_k"][...] = weight
    else:
        r["unused"][...] = weight


# --------------------------------------------------------------------------------------------- the four passes


def _inverse_rms(t, x):
    """[B, N, D] -> 1 / rms, float32 [B, rows, 1]."""
    inverse = jax.lax.rsqrt(jnp.square(x.astype(jnp.float32)).mean(-1, keepdims=True) + t.eps)
    return jnp.pad(inverse, ((0, 0), (0, t.rows - t.tokens), (0, 0)))


def _inputs(t, name, x, weight):
    """What kernels read of q or k."""
    found = {name: ("tokens", t.tiled(x))}
    if t.eps is not None:
        found[f"inverse_{name}"] = ("column", _inverse_rms(t, x))
        found[f"weight_{name}"] = ("weight", t.row(weight, x.dtype))
    return found


def _moved_inputs(t, name, x, weight, dx, dweight):
    found = _inputs(t, name, x, weight) | {f"d{name}": ("tokens", t.tiled(dx))}
    if t.eps is not None:
        inverse = found[f"inverse_{name}"][1]
        along = (x.astype(jnp.float32) * dx.astype(jnp.float32)).mean(-1, keepdims=True)
        along = jnp.pad(along, ((0, 0), (0, t.rows - t.tokens), (0, 0)))
        found[f"dinverse_{name}"] = ("column", -(inverse**3) * along)
        if dweight is not None:
            found[f"dweight_{name}"] = ("weight", t.row(dweight, x.dtype))
    return found


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(t, q, k, v, norm_q, norm_k):
    """(out [B, N, D], S [B, G, C, C], z [B, G, 1, C]); the last two for the derivative, which they have none of."""
    run = functools.partial(_run, t, batch=q.shape[0], dtype=q.dtype)
    sums = run(
        "linear_attention_state", _sum_state, _inputs(t, "k", k, norm_k) | {"v": ("tokens", t.tiled(v))},
        {"state": "states", "total": "totals"},
    )  # fmt: skip
    sums = {"state": ("state", sums["state"]), "total": ("total", sums["total"])}
    out = run("linear_attention_out", _divide, _inputs(t, "q", q, norm_q) | sums, {"out": "tokens"})["out"]
    return t.untiled(out), sums["state"][1], sums["total"][1]


def _attend_jvp(t, primals, tangents):
    # By the function itself, so that a derivative around this one finds its rule.
    out, state, total = _attend(t, *primals)
    if t.eps is None or all(map(is_zero, tangents[3:])):
        tangents = tangents[:3]
    dout = jnp.zeros_like(out)
    if not all(map(is_zero, tangents)):
        transpose = functools.partial(_transpose, t, len(tangents) > 3)
        residuals = (*primals, *jax.lax.stop_gradient((state, total)))
        dout = linear_map(functools.partial(_tangent, t), transpose, residuals, tangents)
    return (out, state, total), (dout, jnp.zeros_like(state), jnp.zeros_like(total))


_attend.defjvp(_attend_jvp, symbolic_zeros=True)


def _tangent(t, residuals, tangents):
    q, k, v, norm_q, norm_k, state, total = residuals
    dq, dk, dv, *dnorms = tangents
    dnorm_q, dnorm_k = dnorms or (None, None)
    run = functools.partial(_run, t, batch=q.shape[0], dtype=q.dtype)
    moved = run(
        "linear_attention_state_tangent", _sum_state_tangent,
        _moved_inputs(t, "k", k, norm_k, dk, dnorm_k) | {"v": ("tokens", t.tiled(v)), "dv": ("tokens", t.tiled(dv))},
        {"dstate": "states", "dtotal": "totals"},
    )  # fmt: skip
    sums = {
        "state": ("state", state), "total": ("total", total),
        "dstate": ("state", moved["dstate"]), "dtotal": ("total", moved["dtotal"]),
    }  # fmt: skip
    ins = _moved_inputs(t, "q", q, norm_q, dq, dnorm_q) | sums
    return t.untiled(run("linear_attention_out_tangent", _divide_tangent, ins, {"dout": "tokens"})["dout"])


def _transpose(t, with_norms, residuals, g):
    q, k, v, norm_q, norm_k, state, total = residuals
    run = functools.partial(_run, t, batch=q.shape[0], dtype=q.dtype)
    normed = t.eps is not None
    of_norm = lambda x: {f"along_{x}": "columns", f"gweight_{x}": "totals"} if normed else {}
    ins_q, ins_k = _inputs(t, "q", q, norm_q), _inputs(t, "k", k, norm_k)
    by_q = run(
        "linear_attention_query_gradient", _query_gradient,
        ins_q | {"g": ("tokens", t.tiled(g)), "state": ("state", state), "total": ("total", total)},
        {"gq": "tokens", "gstate": "states", "gtotal": "totals"} | of_norm("q"),
    )  # fmt: skip
    by_k = run(
        "linear_attention_key_gradient", _key_gradient,
        ins_k | {"v": ("tokens", t.tiled(v)), "gstate": ("state", by_q["gstate"]), "gtotal": ("total", by_q["gtotal"])},
        {"gk": "tokens", "gv": "tokens"} | (of_norm("k") if normed else {"unused": "totals"}),
    )  # fmt: skip
    found = []
    for name, x, ins, by in (("q", q, ins_q, by_q), ("k", k, ins_k, by_k)):
        of_unit = t.untiled(by[f"g{name}"])
        found.append(_through_rms(t, x, ins[f"inverse_{name}"][1], of_unit, by[f"along_{name}"]) if normed else of_unit)
    found.append(t.untiled(by_k["gv"]))
    if with_norms:
        for name, by, norm in (("q", by_q, norm_q), ("k", by_k, norm_k)):
            of_weight = by[f"gweight_{name}"].sum(0).reshape(1, 1, -1)
            found.append(dataclasses.replace(t, tokens=1).untiled(of_weight)[0, 0].astype(norm.dtype))
    return tuple(found)


def _through_rms(t, x, inverse, of_unit, along):
    """Cotangent of x from that of u = x / rms. along: its products with x, summed by blocks of channels [B, G, rows, 1]."""
    inverse, along = inverse[:, : t.tokens], along.sum(1)[:, : t.tokens]
    x32 = x.astype(jnp.float32)
    return (inverse * of_unit.astype(jnp.float32) - x32 * (inverse**3 * along / t.width)).astype(x.dtype)
