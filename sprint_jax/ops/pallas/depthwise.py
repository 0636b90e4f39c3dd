"""Depthwise convolution with its zero padding, bias and SiLU gate inside, in one pass over memory.

`ops/depthwise.py` has the published arithmetic, and puts the kernels together for derivatives. Of one 1024 px picture on an H200
they take 1.7 ms, where cuDNN's depthwise convolutions take 2.3 and write what the gate then reads again (`docs/results/speed.md`).
Tangent and gradient of a gate make the convolution anew, which costs less than to read what it wrote.
A program makes a few rows of a few channels; for each horizontal tap it reads each input row once, nearly always from a cache.

Shape letters: B batch, H x W positions, C channels in, D channels out (C, or C / 2 with a gate), k the stencil's side.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sprint_jax.ops import backend as backends
from sprint_jax.ops.backend import Operand, rounded

# What one program makes: positions down and across, of so many channels.
ROWS, COLUMNS, CHANNELS = 4, 16, (64, 32, 16)


def tile(shape, dtype, gated):
    """Channels of a program for an input of this shape; None where the kernel does not take it."""
    batch, height, width, channels = shape
    out = channels // 2 if gated else channels
    size = next((n for n in CHANNELS if out % n == 0), None)
    # Offsets in 32 bits; larger arrays have not been tried. `models/dc_ae.py` cuts batches before they get there.
    small = backends.local_batch(batch) * height * width * channels < 2**31
    fits = (
        small and height >= ROWS and width >= COLUMNS and jnp.dtype(dtype).name in backends.DTYPES
    )
    return size if fits else None


@functools.partial(
    jax.jit, static_argnames=("gated", "backend"), inline=True
)  # blocks of one shape are traced once
def conv(x, w, bias, *, gated, backend):
    """Depthwise k x k convolution, zero-padded to the same size, stride 1 (cross-correlation, as in PyTorch).

    Args:
      x: [B, H, W, C], of a shape and dtype that `tile` takes.
      w: [k, k, C], k odd, of x's dtype.
      bias: [C].
      gated: whether the second half of the channels gates the first: value * SiLU(gate).
      backend: "interpret" or "triton".
    Returns:
      [B, H, W, D] in x's dtype. Sums are float32; the convolution with its bias is rounded once, so are the SiLU and the product.
    """
    body = _forward_gated if gated else _forward
    return _run("", body, {"x": x}, w, bias, {"out": False}, gated=gated, backend=backend)["out"]


@functools.partial(jax.jit, static_argnames="backend", inline=True)
def gated_tangent(x, dx, w, bias, *, backend):
    """Tangent of the gated `conv` along dx, of x's shape and dtype: [B, H, W, C / 2], rounded once. Linear in dx."""
    return _run(
        "_tangent",
        _tangent,
        {"x": x, "dx": dx},
        w,
        bias,
        {"out": False},
        gated=True,
        backend=backend,
    )["out"]


@functools.partial(jax.jit, static_argnames="backend", inline=True)
def gate_gradient(x, g, w, bias, *, backend):
    """Cotangent of the convolution with its bias inside the gated `conv`: g [B, H, W, C / 2] -> [B, H, W, C], rounded once."""
    return _run(
        "_gradient",
        _gate_gradient,
        {"x": x, "g": g},
        w,
        bias,
        {"out": True},
        gated=True,
        backend=backend,
    )["out"]


def _run(name, body, arrays, w, bias, outs, *, gated, backend):
    """arrays: {name: [B, H, W, C or D]}, "g" having D channels. outs: {name: whether it has all C channels}."""
    if backend not in backends.DEPTHWISE[1:]:
        raise ValueError(f"depthwise kernel for {backend!r}: use interpret or triton")
    x = arrays["x"]
    batch, height, width, channels = x.shape
    size = tile(x.shape, x.dtype, gated)
    if size is None:
        raise ValueError(f"no depthwise kernel for {x.shape} {x.dtype}")
    if len(arrays) > 1:
        size = max(CHANNELS[-1], size // 2)  # twice as many sums at a time
    k, out = w.shape[0], channels // 2 if gated else channels
    whole = (None, height, width, size)
    ins = {}
    for half in range(1 + gated):
        first = half * (out // size)
        everywhere = dict(index=lambda b, g, i, j, first=first: (0, first + g), shared=True)
        for key, array in arrays.items():
            if key != "g":
                ins[key, half] = Operand(
                    array, whole, lambda b, g, i, j, first=first: (b, 0, 0, first + g)
                )
        ins["w", half] = Operand(w.reshape(k * k, channels), (k * k, size), **everywhere)
        ins["b", half] = Operand(bias[None], (1, size), **everywhere)
    one_half = lambda array: Operand(array, whole, lambda b, g, i, j: (b, 0, 0, g))
    if "g" in arrays:
        ins["g"] = one_half(arrays["g"])
    made = {}
    for key, both in outs.items():
        if both:
            array = jax.ShapeDtypeStruct((batch, height, width, 2, out), x.dtype)
            made[key] = Operand(
                array, (None, height, width, 2, size), lambda b, g, i, j: (b, 0, 0, 0, g)
            )
        else:
            made[key] = one_half(jax.ShapeDtypeStruct((batch, height, width, out), x.dtype))
    grid = None, out // size, pl.cdiv(height, ROWS), pl.cdiv(width, COLUMNS)
    label = f"depthwise_{k}x{k}" + "_gated" * gated + name
    found = backends.launch(
        lambda refs: body(_Program(k, height, width, x.dtype, backend, refs)),
        grid,
        ins,
        made,
        backend=backend,
        name=label,
    )
    return {key: a.reshape(batch, height, width, -1) for key, a in found.items()}


class _Program:
    """One program of a kernel: `ROWS` x `COLUMNS` positions of some channels."""

    def __init__(self, k, height, width, dtype, backend, refs):
        self.k, self.height, self.width, self.dtype, self.refs = k, height, width, dtype, refs
        self.compiled = backend == "triton"
        # The last tiles are moved back to end with the picture: what two of them cover, both write, equal.
        self.top = jnp.minimum(pl.program_id(2) * ROWS, height - ROWS)
        self.left = jnp.minimum(pl.program_id(3) * COLUMNS, width - COLUMNS)

    def rows(self, name):
        """A list of its rows, float32 [COLUMNS, channels]."""
        return [
            self.refs[name][self.top + i, pl.ds(self.left, COLUMNS), :].astype(jnp.float32)
            for i in range(ROWS)
        ]

    def sums(self, name, half):
        """Rows of the convolution, float32 [COLUMNS, channels] each."""
        x, w, k = self.refs[name, half], self.refs["w", half], self.k
        out = [jnp.zeros((COLUMNS, w.shape[-1]), jnp.float32)] * ROWS
        for j in range(k):
            taps = [
                self._wide(jnp.broadcast_to(w[i * k + j, :][None], out[0].shape)) for i in range(k)
            ]
            for r in range(ROWS + k - 1):
                values = self._shifted(x, r - k // 2, j - k // 2)
                for i in range(max(0, r - ROWS + 1), min(k, r + 1)):
                    out[r - i] = self._multiply_add(values, taps[i], out[r - i])
        return out

    def _shifted(self, x, down, right):
        """The row that lies `down` from the first, its columns moved to the right: float32 [COLUMNS, channels], zeros outside."""
        from jax.experimental.pallas import triton  # its masks are the interpreter's too

        shape = COLUMNS, x.shape[-1]
        row = jnp.full(shape, self.top + down, jnp.int32)
        column = self.left + right + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        there = (column >= 0) & (column < self.width) & (row >= 0) & (row < self.height)
        place = (
            jnp.clip(row, 0, self.height - 1),
            jnp.clip(column, 0, self.width - 1),
            jax.lax.broadcasted_iota(jnp.int32, shape, 1),
        )
        return self._wide(triton.load(x.at[place], mask=there, other=0.0))

    def _wide(self, a):
        """In float32."""
        if not self.compiled or a.dtype != jnp.bfloat16:
            return a.astype(jnp.float32)
        # Two instructions for two values, of which Triton makes three.
        asm = "{ .reg .b32 low, high; shl.b32 low, $2, 16; and.b32 high, $2, 0xffff0000; mov.b32 $0, low; mov.b32 $1, high; }"
        return _inline(asm, "=f,=f,r", 2, a.shape, a)

    def _multiply_add(self, a, b, c):
        """a b + c, in one instruction, which XLA's Triton does not make of a product and a sum."""
        if not self.compiled:
            return a * b + c
        return _inline("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", 1, c.shape, a, b, c)

    def conv(self, half):
        """Rows of the convolution of x with its bias, as `dtype` holds them."""
        bias = self.refs["b", half][0, :].astype(jnp.float32)[None]
        return [rounded(row + bias, self.dtype) for row in self.sums("x", half)]

    def store(self, rows, *half):
        """Rows of the output; half: which of its channels, where it has all."""
        for i, row in enumerate(rows):
            self.refs["out"][(self.top + i, pl.ds(self.left, COLUMNS), *half, slice(None))] = (
                row.astype(self.dtype)
            )


def _forward(program):
    program.store(program.conv(0))


def _forward_gated(program):
    gated = lambda value, gate: value * rounded(gate * jax.nn.sigmoid(gate), program.dtype)
    program.store(list(map(gated, program.conv(0), program.conv(1))))


def _silu(gate):
    """(SiLU, its slope)."""
    share = jax.nn.sigmoid(gate)
    return gate * share, share * (1 + gate * (1 - share))


def _tangent(program):
    rows = zip(
        program.conv(0), program.conv(1), program.sums("dx", 0), program.sums("dx", 1), strict=True
    )

    def moved(value, gate, dvalue, dgate):
        silu, slope = _silu(gate)
        return dvalue * silu + value * slope * dgate

    program.store([moved(*row) for row in rows])


def _gate_gradient(program):
    both = []
    for value, gate, g in zip(program.conv(0), program.conv(1), program.rows("g"), strict=True):
        silu, slope = _silu(gate)
        both.append((g * silu, g * value * slope))
    for half, rows in enumerate(zip(*both, strict=True)):
        program.store(rows, half)


def _inline(asm, constraints, pack, shape, *arrays):
    """Instructions of an NVIDIA GPU on `pack` elements of each array at a time -> float32."""
    from jax.experimental.pallas import triton

    out = [jax.ShapeDtypeStruct(shape, jnp.float32)]
    return triton.elementwise_inline_asm(
        asm, args=arrays, constraints=constraints, pack=pack, result_shape_dtypes=out
    )[0]
