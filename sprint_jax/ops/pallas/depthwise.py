"""Kernels of depthwise convolution with zero padding, bias and SiLU gate, in one pass over memory.

`ops/depthwise.py` has the formula and the derivative rules. A library's convolution writes what
the gate reads again. Tangent and gradient of a gate recompute the convolution, which costs less
than reading a stored one. A program computes a few rows of a few channels. For each horizontal tap
it reads each input row once, nearly always from a cache.

Shape letters: B batch, H x W positions, C channels in, D channels out (C, or C / 2 with a gate),
k side of the stencil.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from sprint_jax.ops import backend as backends
from sprint_jax.ops.pallas import kernel
from sprint_jax.ops.pallas.kernel import Operand, round_to

# What one program computes: positions down and across, and a choice of channels.
ROWS, COLUMNS, CHANNELS = 4, 16, (64, 32, 16)


def tile(shape: tuple[int, ...], dtype: Any, gated: bool) -> int | None:
    """Return the channels of a program for an input [B, H, W, C], or None if no kernel takes it."""
    batch, height, width, channels = shape
    out = channels // 2 if gated else channels
    size = next((n for n in CHANNELS if out % n == 0), None)
    # Offsets have 32 bits. `models/dc_ae.py` splits batches before they reach this size.
    small = kernel.local_batch(batch) * height * width * channels < 2**31
    fits = (
        small and height >= ROWS and width >= COLUMNS and jnp.dtype(dtype).name in backends.DTYPES
    )
    return size if fits else None


# Jitted and inlined, so that blocks of one shape are traced once.
@functools.partial(jax.jit, static_argnames=("gated", "backend"), inline=True)
def conv(x: Array, w: Array, bias: Array, *, gated: bool, backend: str) -> Array:
    """Return the depthwise k x k convolution, zero-padded to the same size, with stride 1.

    It is a cross-correlation, as in PyTorch. Sums are float32. The convolution with its bias is
    rounded once, and so are the SiLU and the product.

    Args:
      x: [B, H, W, C], of a shape and dtype that `tile` takes.
      w: [k, k, C], k odd, of x's dtype.
      bias: [C].
      gated: whether the second half of the channels gates the first: value * SiLU(gate).
      backend: "interpret" or "triton".

    Returns:
      [B, H, W, D] in x's dtype.

    Raises:
      ValueError: for another backend, or an input that no kernel takes.
    """
    body = _forward_gated if gated else _forward
    return _run(body, {"x": x}, w, bias, label="", gated=gated, backend=backend)


@functools.partial(jax.jit, static_argnames="backend", inline=True)
def gated_tangent(x: Array, dx: Array, w: Array, bias: Array, *, backend: str) -> Array:
    """Return the tangent of the gated `conv` along dx, [B, H, W, C / 2], rounded once.

    It is linear in dx, which has x's shape and dtype.
    """
    arrays = {"x": x, "dx": dx}
    return _run(_tangent, arrays, w, bias, label="_tangent", gated=True, backend=backend)


@functools.partial(jax.jit, static_argnames="backend", inline=True)
def gate_gradient(x: Array, g: Array, w: Array, bias: Array, *, backend: str) -> Array:
    """Return the cotangent of the convolution with its bias inside the gated `conv`.

    g [B, H, W, C / 2] -> [B, H, W, C], rounded once.
    """
    arrays = {"x": x, "g": g}
    return _run(_gate_gradient, arrays, w, bias, label="_gradient", gated=True, backend=backend)


def _run(
    body: Callable[["_Program"], None],
    arrays: Mapping[str, Array],
    w: Array,
    bias: Array,
    *,
    label: str,
    gated: bool,
    backend: str,
) -> Array:
    """Run a kernel on {name: [B, H, W, C]}, "g" having D channels. Returns [B, H, W, C or D].

    The output of a kernel that reads "g" has all C channels.
    """
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
    ins = _inputs(arrays, w, bias, out=out, size=size, gated=gated)
    if "g" in arrays:
        shape, block = (batch, height, width, 2, out), (None, height, width, 2, size)
        index = lambda b, g, i, j: (b, 0, 0, 0, g)
    else:
        shape, block = (batch, height, width, out), (None, height, width, size)
        index = lambda b, g, i, j: (b, 0, 0, g)
    found = kernel.launch(
        lambda refs: body(_Program(k, (height, width), x.dtype, backend, refs)),
        (out // size, pl.cdiv(height, ROWS), pl.cdiv(width, COLUMNS)),
        ins,
        {"out": Operand(jax.ShapeDtypeStruct(shape, x.dtype), block, index)},
        backend=backend,
        name=f"depthwise_{k}x{k}" + "_gated" * gated + label,
    )
    return found["out"].reshape(batch, height, width, -1)


def _inputs(
    arrays: Mapping[str, Array], w: Array, bias: Array, *, out: int, size: int, gated: bool
) -> dict[Any, Operand]:
    """Return the operands of a kernel, by (name, half of the channels), "g" by its name."""
    k, (_, height, width, channels) = w.shape[0], arrays["x"].shape
    block = (None, height, width, size)
    ins: dict[Any, Operand] = {}
    for half in range(1 + gated):
        first = half * (out // size)
        of_sample = lambda b, g, i, j, first=first: (b, 0, 0, first + g)
        of_all = lambda b, g, i, j, first=first: (0, first + g)
        for key, array in arrays.items():
            if key != "g":
                ins[key, half] = Operand(array, block, of_sample)
        stencil = w.reshape(k * k, channels)
        ins["w", half] = Operand(stencil, (k * k, size), of_all, shared=True)
        ins["b", half] = Operand(bias[None], (1, size), of_all, shared=True)
    if "g" in arrays:
        ins["g"] = Operand(arrays["g"], block, lambda b, g, i, j: (b, 0, 0, g))
    return ins


class _Program:
    """One program of a kernel: `ROWS` x `COLUMNS` positions of some channels."""

    def __init__(
        self, k: int, size: tuple[int, int], dtype: Any, backend: str, refs: kernel.Refs
    ) -> None:
        """Locate the program in an image of `size` (H, W)."""
        self.k, (self.height, self.width), self.dtype, self.refs = k, size, dtype, refs
        self.compiled = backend == "triton"
        # The last tiles move back to end with the image. Overlapping tiles write equal values.
        self.top = jnp.minimum(pl.program_id(2) * ROWS, self.height - ROWS)
        self.left = jnp.minimum(pl.program_id(3) * COLUMNS, self.width - COLUMNS)

    def rows(self, name: str) -> list[Array]:
        """Return the program's rows of an array, float32 [COLUMNS, channels] each."""
        return [
            self.refs[name][self.top + i, pl.ds(self.left, COLUMNS), :].astype(jnp.float32)
            for i in range(ROWS)
        ]

    def sums(self, name: str, half: int) -> list[Array]:
        """Return rows of the convolution, float32 [COLUMNS, channels] each."""
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

    def _shifted(self, x: Any, down: int, right: int) -> Array:
        """Return the row `down` below the first, shifted by `right` columns.

        float32 [COLUMNS, channels], zeros outside the image.
        """
        from jax.experimental.pallas import triton  # its masks work in the interpreter too

        shape = COLUMNS, x.shape[-1]
        row = jnp.full(shape, self.top + down, jnp.int32)
        column = self.left + right + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        inside = (column >= 0) & (column < self.width) & (row >= 0) & (row < self.height)
        place = (
            jnp.clip(row, 0, self.height - 1),
            jnp.clip(column, 0, self.width - 1),
            jax.lax.broadcasted_iota(jnp.int32, shape, 1),
        )
        return self._wide(triton.load(x.at[place], mask=inside, other=0.0))

    def _wide(self, a: Array) -> Array:
        """Return a in float32."""
        if not self.compiled or a.dtype != jnp.bfloat16:
            return a.astype(jnp.float32)
        # Two instructions for two values, where Triton emits three.
        asm = (
            "{ .reg .b32 low, high; shl.b32 low, $2, 16; and.b32 high, $2, 0xffff0000; "
            "mov.b32 $0, low; mov.b32 $1, high; }"
        )
        return _inline(asm, "=f,=f,r", 2, a.shape, a)

    def _multiply_add(self, a: Array, b: Array, c: Array) -> Array:
        """Return a b + c in one instruction; XLA's Triton makes two of a product and a sum."""
        if not self.compiled:
            return a * b + c
        return _inline("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", 1, c.shape, a, b, c)

    def conv(self, half: int) -> list[Array]:
        """Return rows of the convolution of x with its bias, rounded to `dtype`."""
        bias = self.refs["b", half][0, :].astype(jnp.float32)[None]
        return [round_to(row + bias, self.dtype) for row in self.sums("x", half)]

    def store(self, rows: Sequence[Array], *half: int) -> None:
        """Store rows of the output. half: which of its channels, if it has all of them."""
        for i, row in enumerate(rows):
            place = (self.top + i, pl.ds(self.left, COLUMNS), *half, slice(None))
            self.refs["out"][place] = row.astype(self.dtype)


def _forward(program: _Program) -> None:
    program.store(program.conv(0))


def _forward_gated(program: _Program) -> None:
    gated = lambda value, gate: value * round_to(gate * jax.nn.sigmoid(gate), program.dtype)
    program.store(list(map(gated, program.conv(0), program.conv(1))))


def _silu(gate: Array) -> tuple[Array, Array]:
    """Return (SiLU, its slope)."""
    share = jax.nn.sigmoid(gate)
    return gate * share, share * (1 + gate * (1 - share))


def _tangent(program: _Program) -> None:
    rows = zip(
        program.conv(0), program.conv(1), program.sums("dx", 0), program.sums("dx", 1), strict=True
    )

    def moved(value, gate, dvalue, dgate):
        silu, slope = _silu(gate)
        return dvalue * silu + value * slope * dgate

    program.store([moved(*row) for row in rows])


def _gate_gradient(program: _Program) -> None:
    both = []
    for value, gate, g in zip(program.conv(0), program.conv(1), program.rows("g"), strict=True):
        silu, slope = _silu(gate)
        both.append((g * silu, g * value * slope))
    for half, rows in enumerate(zip(*both, strict=True)):
        program.store(rows, half)


def _inline(asm: str, constraints: str, pack: int, shape: tuple[int, ...], *arrays: Array) -> Array:
    """Run NVIDIA instructions on `pack` elements of each array at a time. Returns float32."""
    from jax.experimental.pallas import triton

    out = [jax.ShapeDtypeStruct(shape, jnp.float32)]
    return triton.elementwise_inline_asm(
        asm, args=arrays, constraints=constraints, pack=pack, result_shape_dtypes=out
    )[0]
