"""3x3 convolutions of the autoencoder, each the way its platform runs it fastest.

Accelerators have a library that chooses its own algorithm. XLA's CPU backend has one, a direct convolution at the
speed of a matrix product; there wide convolutions use Winograd's F(2x2, 3x3): 16 products for four outputs instead of 36
(`docs/results/speed.md` has the ratios).
"""

import functools

import einops
import jax
import jax.numpy as jnp

# Channels from which the saved products outweigh the transforms on a CPU: at 128 both cost the same.
WINOGRAD_CHANNELS = 256
# Output rows that are transformed at a time, so that 16 transformed copies stay in the cache.
_ROWS = {256: 8, 512: 16}
_DEFAULT_ROWS = 16


def conv3x3(x, kernel, stride=1):
    """3x3 convolution, padding 1. x [B, H, W, Cin], kernel [3, 3, Cin, Cout] -> [B, H', W', Cout] float32, see `_library`."""
    height, width, channels = x.shape[1:]
    whole = height % 2 == 0 and width % 2 == 0
    if stride == 1 and whole and x.dtype == jnp.float32 and channels >= WINOGRAD_CHANNELS:
        return jax.lax.platform_dependent(x, kernel, cpu=winograd, default=_conv)
    return _conv(x, kernel, stride)


def _conv(x, kernel, stride=1):
    return _library(x, kernel.astype(x.dtype), (stride, stride))


def _library(x, kernel, strides):
    """The library's convolution, padding 1, summed in float32 -> float32.

    cuDNN has none from bfloat16 to float32: asked for one, XLA converts both operands and convolves in TF32, at half the
    speed. So an NVIDIA GPU rounds the sums to bfloat16, as PyTorch does.
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


def winograd(x, kernel):
    """`conv3x3` of stride 1 by Winograd's F(2x2, 3x3) (Lavin and Gray, arXiv 1509.09308, section 4.1).

    Y = A' [(G g G') * (B' d B)] A on tiles d of 4x4 inputs, each giving 2x2 outputs; the products over channels are 16
    matrix products. Rounding is a few times that of the direct sum.

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


def _kernel_transform(g):
    """G g G': [3, 3, Cin, Cout] -> 16 matrices [Cin, Cout], row by row."""
    once = lambda v: (v[0], 0.5 * (v[0] + v[1] + v[2]), 0.5 * (v[0] - v[1] + v[2]), v[2])
    return [u for row in once(g) for u in once(row)]


def _input_transform(d):
    """B' along a list of four."""
    return d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]


def _output_transform(m):
    """A' along a list of four."""
    return m[0] + m[1] + m[2], m[1] - m[2] - m[3]


def _tiles(padded, weights):
    """All tiles of [B, H + 2, W + 2, Cin] -> [B, H, W, Cout].

    Barriers keep the transforms out of each other: fused into one, each of 16 results reads all its inputs again.
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


def upsample_conv3x3(x, kernel):
    """Nearest x2 then a 3x3 convolution, exactly, at 4/9 of its multiplications.

    Of the 3x3 taps of an output pixel only 2x2 differ in the small picture, so each of the four output
    phases is a 2x2 convolution by sums of taps. One VALID convolution makes all four.

    x [B, H, W, Cin], kernel [3, 3, Cin, Cout] -> [B, 2H, 2W, Cout] float32.
    """
    height, width = x.shape[1:3]
    first, middle, last = kernel.astype(jnp.float32)
    rows = (
        jnp.stack([first, middle + last]),
        jnp.stack([first + middle, last]),
    )  # by phase: [2, 3, ...]
    phases = []
    for row in rows:
        left, centre, right = row[:, 0], row[:, 1], row[:, 2]
        phases += [jnp.stack([left, centre + right], 1), jnp.stack([left + centre, right], 1)]
    taps = jnp.concatenate(phases, -1).astype(x.dtype)  # [2, 2, Cin, 4 Cout]
    y = _library(
        x, taps, (1, 1)
    )  # [B, H + 1, W + 1, 4 Cout]; phase (p, q) of cell (i, j) is at (i + p, j + q)
    y = y.reshape(*y.shape[:3], 2, 2, -1)
    shifted = [[y[:, p : p + height, q : q + width, p, q] for q in (0, 1)] for p in (0, 1)]
    y = jnp.stack([jnp.stack(row, 3) for row in shifted], 3)  # [B, H, W, 2, 2, Cout]
    return einops.rearrange(y, "b h w p q c -> b (h p) (w q) c")
