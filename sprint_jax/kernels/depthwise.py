"""Depthwise convolution with its zero padding, bias and SiLU gate inside, in one pass over memory.

`models/depthwise.py` has the published arithmetic, and the derivatives: the kernel has none. Of one 1024 px picture on an H200
it takes 1.7 ms, where cuDNN's depthwise convolutions take 2.3 and write what the gate then reads again (`benchmarks/RESULTS.md`).
A program makes a few rows of a few channels; for each horizontal tap it reads each input row once, nearly always from a cache.

Shape letters: B batch, H x W positions, C channels in, D channels out (C, or C / 2 with a gate), k the stencil's side.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sprint_jax.kernels import backend as backends
from sprint_jax.kernels.backend import Operand, rounded

# What one program makes: positions down and across, of so many channels.
ROWS, COLUMNS, CHANNELS = 4, 16, (64, 32, 16)


def tile(shape, dtype, gated):
    """Channels of a program for an input of this shape; None where the kernel does not take it."""
    batch, height, width, channels = shape
    out = channels // 2 if gated else channels
    size = next((n for n in CHANNELS if out % n == 0), None)
    # Triton's offsets have 32 bits.
    small = backends.local_batch(batch) * height * width * channels < 2**31
    fits = small and height >= ROWS and width >= COLUMNS and jnp.dtype(dtype).name in backends.DTYPES
    return size if fits else None


@functools.partial(jax.jit, static_argnames=("gated", "backend"), inline=True)  # blocks of one shape are traced once
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
    if backend not in backends.DEPTHWISE[1:]:
        raise ValueError(f"depthwise kernel for {backend!r}: use interpret or triton")
    batch, height, width, channels = x.shape
    size = tile(x.shape, x.dtype, gated)
    if size is None:
        raise ValueError(f"no depthwise kernel for {x.shape} {x.dtype}")
    k, out = w.shape[0], channels // 2 if gated else channels
    whole = (None, height, width, size)
    ins = {}
    for half in range(1 + gated):
        first = half * (out // size)
        everywhere = dict(index=lambda b, g, i, j, first=first: (0, first + g), shared=True)
        ins["x", half] = Operand(x, whole, lambda b, g, i, j, first=first: (b, 0, 0, first + g))
        ins["w", half] = Operand(w.reshape(k * k, channels), (k * k, size), **everywhere)
        ins["b", half] = Operand(bias[None], (1, size), **everywhere)
    made = jax.ShapeDtypeStruct((batch, height, width, out), x.dtype)
    body = functools.partial(_body, k, height, width, gated)
    grid = None, out // size, pl.cdiv(height, ROWS), pl.cdiv(width, COLUMNS)
    outs = {"out": Operand(made, whole, lambda b, g, i, j: (b, 0, 0, g))}
    return backends.launch(body, grid, ins, outs, backend=backend, name=f"depthwise_{k}x{k}" + "_gated" * gated)["out"]


def _body(k, height, width, gated, refs):
    # The last tiles are moved back to end with the picture: what two of them cover, both write, equal.
    top = jnp.minimum(pl.program_id(2) * ROWS, height - ROWS)
    left = jnp.minimum(pl.program_id(3) * COLUMNS, width - COLUMNS)
    dtype = refs["out"].dtype
    halves = []
    for half in range(1 + gated):
        rows = _sums(k, height, width, top, left, refs["x", half], refs["w", half])
        halves.append([rounded(row + refs["b", half][0, :].astype(jnp.float32)[None], dtype) for row in rows])
    for i, out in enumerate(halves[0]):
        if gated:
            gate = halves[1][i]
            out = out * rounded(gate * jax.nn.sigmoid(gate), dtype)
        refs["out"][top + i, pl.ds(left, COLUMNS), :] = out.astype(dtype)


def _sums(k, height, width, top, left, x, w):
    """`ROWS` rows of the convolution, float32 [COLUMNS, channels] each."""
    out = [0.0] * ROWS
    for j in range(k):
        columns = left + j - k // 2 + jax.lax.iota(jnp.int32, COLUMNS)
        inside = (columns >= 0) & (columns < width)
        columns = jnp.clip(columns, 0, width - 1)
        taps = [w[i * k + j, :].astype(jnp.float32)[None] for i in range(k)]
        for r in range(ROWS + k - 1):
            row = top + r - k // 2
            there = (inside & (row >= 0) & (row < height))[:, None]
            values = jnp.where(there, x[jnp.clip(row, 0, height - 1), columns, :].astype(jnp.float32), 0.0)
            for i in range(max(0, r - ROWS + 1), min(k, r + 1)):
                out[r - i] += values * taps[i]
    return out
