"""3x3 convolutions, each computed in the way that is fastest on its platform.

Accelerators have a library that chooses its own algorithm. XLA's CPU backend has a direct
convolution at the speed of a matrix product. Wide convolutions on a CPU use Winograd's
F(2x2, 3x3) instead, with 16 products for four outputs instead of 36.
"""

import functools

import einops
import jax
import jax.numpy as jnp
from jax import Array

# From this many channels on the saved products outweigh the transforms on a CPU.
WINOGRAD_CHANNELS = 256
# Output rows that are transformed at a time, so that 16 transformed copies stay in the cache.
_ROWS = {256: 8, 512: 16}
_DEFAULT_ROWS = 16


def conv(x: Array, kernel: Array, stride: int = 1) -> Array:
    """Return the 3x3 convolution of x with padding 1, in float32.

    x [B, H, W, Cin], kernel [3, 3, Cin, Cout] -> [B, H', W', Cout]. `_library` says how bfloat16
    is rounded.
    """
    height, width, channels = x.shape[1:]
    even = height % 2 == 0 and width % 2 == 0
    if stride == 1 and even and x.dtype == jnp.float32 and channels >= WINOGRAD_CHANNELS:
        return jax.lax.platform_dependent(x, kernel, cpu=winograd, default=_conv)
    return _conv(x, kernel, stride)


def _conv(x: Array, kernel: Array, stride: int = 1) -> Array:
    return _library(x, kernel.astype(x.dtype), (stride, stride))


def _library(x: Array, kernel: Array, strides: tuple[int, int]) -> Array:
    """Return the library's convolution with padding 1, summed in float32, in float32.

    cuDNN has no convolution from bfloat16 to float32. XLA would convert both operands and convolve
    in TF32, at half the speed. So an NVIDIA GPU rounds the sums to bfloat16, as PyTorch does.
    """

    def convolve(out, x, kernel):
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            strides,
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            preferred_element_type=out,
        )
        return y.astype(jnp.float32)

    wide = functools.partial(convolve, jnp.float32)
    if x.dtype == jnp.float32:
        return wide(x, kernel)
    return jax.lax.platform_dependent(
        x, kernel, cuda=functools.partial(convolve, x.dtype), default=wide
    )


def winograd(x: Array, kernel: Array) -> Array:
    """Return `conv` of stride 1 by Winograd's F(2x2, 3x3) (Lavin and Gray, arXiv 1509.09308, 4.1).

    Y = A' [(G g G') * (B' d B)] A on tiles d of 4x4 inputs, each giving 2x2 outputs. The products
    over channels are 16 matrix products. The rounding error is a few times that of the direct sum.

    x [B, H, W, Cin] float32, H and W even, kernel [3, 3, Cin, Cout] -> [B, H, W, Cout] float32.
    """
    batch, height, width, channels = x.shape
    weights = jax.lax.optimization_barrier(_kernel_transform(kernel.astype(x.dtype)))
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = _ROWS.get(channels, _DEFAULT_ROWS)
    if height % rows:
        return _tiles(padded, weights)

    def strip(_, start):
        return None, _tiles(jax.lax.dynamic_slice_in_dim(padded, start, rows + 2, 1), weights)

    _, strips = jax.lax.scan(strip, None, jnp.arange(0, height, rows))
    return jnp.moveaxis(strips, 0, 1).reshape(batch, height, width, -1)


def _kernel_transform(g: Array) -> list[Array]:
    """Return G g G' of [3, 3, Cin, Cout] as 16 matrices [Cin, Cout], row by row."""
    once = lambda v: (v[0], 0.5 * (v[0] + v[1] + v[2]), 0.5 * (v[0] - v[1] + v[2]), v[2])
    return [u for row in once(g) for u in once(row)]


def _input_transform(d: list[Array]) -> tuple[Array, Array, Array, Array]:
    """Apply B' along a list of four."""
    return d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]


def _output_transform(m: list[Array]) -> tuple[Array, Array]:
    """Apply A' along a list of four."""
    return m[0] + m[1] + m[2], m[1] - m[2] - m[3]


def _tiles(padded: Array, weights: list[Array]) -> Array:
    """Convolve all tiles of [B, H + 2, W + 2, Cin], to [B, H, W, Cout].

    Barriers keep the transforms apart. Fused into one, each of the 16 results would read all its
    inputs again.
    """
    batch, height, width, channels = padded.shape
    height, width = height - 2, width - 2
    d = [[padded[:, i : i + height : 2, j : j + width : 2] for j in range(4)] for i in range(4)]
    columns = [_input_transform([d[i][j] for i in range(4)]) for j in range(4)]
    v = [
        t.reshape(-1, channels)
        for i in range(4)
        for t in _input_transform([columns[j][i] for j in range(4)])
    ]
    v = jax.lax.optimization_barrier(v)
    m = jax.lax.optimization_barrier([a @ u for a, u in zip(v, weights, strict=True)])
    columns = [_output_transform([m[4 * i + j] for i in range(4)]) for j in range(4)]
    y = [_output_transform([columns[j][p] for j in range(4)]) for p in range(2)]
    y = jax.lax.optimization_barrier(y)
    # [tiles, 2 Cout] is a row of outputs already, so both joins are plain copies.
    rows = [jnp.concatenate(row, -1).reshape(batch, height // 2, 1, -1) for row in y]
    return jnp.concatenate(rows, 2).reshape(batch, height, width, -1)


def upsample_conv(x: Array, kernel: Array) -> Array:
    """Return a nearest-neighbor upsampling by 2 followed by a 3x3 convolution, in float32.

    It is exact, at 4/9 of the multiplications. Of the 3x3 taps of an output pixel only 2x2 differ
    in the small image, so each of the four output phases is a 2x2 convolution by sums of taps. One
    VALID convolution computes all four.

    x [B, H, W, Cin], kernel [3, 3, Cin, Cout] -> [B, 2H, 2W, Cout].
    """
    height, width = x.shape[1:3]
    first, middle, last = kernel.astype(jnp.float32)
    # By phase, [2, 3, ...].
    rows = jnp.stack([first, middle + last]), jnp.stack([first + middle, last])
    phases = []
    for row in rows:
        left, center, right = row[:, 0], row[:, 1], row[:, 2]
        phases += [jnp.stack([left, center + right], 1), jnp.stack([left + center, right], 1)]
    taps = jnp.concatenate(phases, -1).astype(x.dtype)  # [2, 2, Cin, 4 Cout]
    # [B, H + 1, W + 1, 4 Cout]; phase (p, q) of cell (i, j) is at (i + p, j + q).
    y = _library(x, taps, (1, 1))
    y = y.reshape(*y.shape[:3], 2, 2, -1)
    shifted = [[y[:, p : p + height, q : q + width, p, q] for q in (0, 1)] for p in (0, 1)]
    y = jnp.stack([jnp.stack(row, 3) for row in shifted], 3)  # [B, H, W, 2, 2, Cout]
    return einops.rearrange(y, "b h w p q c -> b (h p) (w q) c")
