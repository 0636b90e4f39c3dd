"""Lower bounds of the time of a computation, by arithmetic from the shapes of the models.

A multiply-add is two FLOP. Bytes are those of a perfectly fused program. It moves weights once. It
writes each activation between products once, and each consumer reads it once. Norms, activations,
gates and residual sums cost nothing extra.

Shape letters: N image tokens, L text tokens, D width, M pixels, C channels.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from sprint_jax.models.dc_ae import DCAE, EFFICIENT_VIT
from sprint_jax.models.discriminator import KERNEL
from sprint_jax.models.gemma2 import Gemma2
from sprint_jax.models.linear_dit import LinearDiT
from sprint_jax.storage import weights

# Passes over N x D values of one transformer block: 11 of the self-attention, 7 of the
# cross-attention, 18 of the Mix-FFN, and 4 of norms over the whole width, which read their input
# before they can write.
_BLOCK_PASSES = 40
# Passes over M x C values of an EfficientViT block: qkv 4, its smoothed copies 6, attention over
# both 8, projection and residual 4, Mix-FFN of 8 C channels 27. Of a residual block: read, write,
# read, residual, write.
_EFFICIENT_VIT_PASSES, _RESIDUAL_PASSES = 49, 5


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of a computation."""

    flop: float  # of products and convolutions
    bytes: float  # moved to and from memory

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flop + other.flop, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Work":
        return Work(times * self.flop, times * self.bytes)


@dataclasses.dataclass(frozen=True)
class Rates:
    """The best rates of a device."""

    flop: float  # FLOP/s of large products
    bytes: float  # bytes/s of a large copy, read and written


# Measured with large bfloat16 products and copies. The data sheet says 989.5 TFLOP/s and 4.8 TB/s.
H200_BFLOAT16 = Rates(790e12, 4.3e12)


def seconds(work: Work, rates: Rates) -> float:
    """Return max(FLOP / peak, bytes / bandwidth)."""
    return max(work.flop / rates.flop, work.bytes / rates.bytes)


def parameters(model: Any, part: str | None = None) -> int:
    """Return the number of a model's parameters, or of one part of them ("decoder")."""
    tree = weights.abstract(model)
    return sum(
        math.prod(leaf.shape) for leaf in jax.tree.leaves(tree if part is None else tree[part])
    )


def _block_macs(m: LinearDiT, N: int, L: int) -> int:
    D, hidden = m.width, int(m.mlp_ratio * m.width)
    head = D // m.heads
    return (
        4 * N * D * D  # q, k, v and the projection of the self-attention
        + 2 * N * (head + 1) * D  # keys times values (and their sum), then times queries
        + 2 * N * D * D
        + 2 * L * D * D  # q and projection, k and v of the cross-attention
        + 2 * N * L * D
        + 3 * hidden * N * D
        + 9 * 2 * hidden * N  # expand, project and the depthwise taps between
    )


def _around_macs(m: LinearDiT, N: int, L: int) -> int:
    D, channels = m.width, m.in_channels * m.patch_size**2
    embeddings = (256 + D) * D * (2 if m.guidance_embed else 1) + 6 * D * D
    return 2 * N * channels * D + L * (m.text_dim + D) * D + embeddings


def transformer(
    m: LinearDiT, N: int, L: int, *, batch: int = 1, itemsize: int, blocks: int | None = None
) -> Work:
    """Return the work of a forward pass over N image and L text tokens.

    blocks: number of blocks that run; None for all.
    """
    blocks = m.depth if blocks is None else blocks
    macs = blocks * _block_macs(m, N, L) + _around_macs(m, N, L)
    weights = parameters(m) * blocks / m.depth
    return Work(
        2 * batch * macs, itemsize * (weights + batch * blocks * _BLOCK_PASSES * N * m.width)
    )


def gemma(m: Gemma2, T: int, *, prefix: int = 0, batch: int = 1, itemsize: int) -> Work:
    """Return the work of encoding T tokens after `prefix` cached ones."""
    queries, keys = m.heads * m.head_dim, m.kv_heads * m.head_dim
    layer = m.width * (2 * queries + 2 * keys) + 3 * m.width * m.hidden
    macs = m.depth * (T * layer + 2 * T * (prefix + T) * queries)
    passes = m.depth * T * (6 * m.width + 2 * queries + 2 * keys + 3 * m.hidden)
    return Work(2 * batch * macs, itemsize * (m.depth * layer + batch * passes))


def decoder(
    m: DCAE, height: int, width: int, *, batch: int = 1, itemsize: int, subpixel: bool = True
) -> Work:
    """Return the work of decoding height x width latent cells.

    subpixel: count the convolutions after each nearest-neighbor upsampling at 4/9 of their
      products, which is exact.
    """
    stages, M = m.decoder, height * width
    last = stages[-1].channels
    macs, moved = 9 * M * m.latent_channels * last, M * (m.latent_channels + last)
    for i in reversed(range(len(stages))):
        stage, C = stages[i], stages[i].channels
        if i + 1 < len(stages):
            before, M = stages[i + 1].channels, 4 * M
            macs += (4 if subpixel else 9) * M * before * C
            moved += M // 4 * before + M * C
        if stage.block == EFFICIENT_VIT:
            copies = 1 + len(stage.scales)
            smoothing = sum((size * size + m.head_dim) * 3 * C for size in stage.scales)
            attention = 2 * (m.head_dim + 1) * copies * C
            macs += stage.layers * M * ((3 + copies + 12) * C * C + smoothing + attention + 72 * C)
            moved += stage.layers * _EFFICIENT_VIT_PASSES * M * C
        else:
            macs += stage.layers * 18 * M * C * C
            moved += stage.layers * _RESIDUAL_PASSES * M * C
    first = stages[0].channels
    macs, moved = macs + 9 * M * first * m.in_channels, moved + M * (first + m.in_channels)
    return Work(2 * batch * macs, itemsize * (parameters(m, "decoder") + batch * moved))


def picture(
    text: Gemma2,
    m: LinearDiT,
    autoencoder: DCAE,
    cells: int,
    tokens: int,
    steps: int,
    *,
    prefix: int,
    batch: int = 1,
    itemsize: int,
) -> Work:
    """Return the work from prompt tokens after a cached prefix to pixels of cells x cells latents.

    steps: calls of the transformer.
    """
    one = transformer(m, cells * cells, tokens + 1, batch=batch, itemsize=itemsize)
    encoded = gemma(text, tokens, prefix=prefix, batch=batch, itemsize=itemsize)
    return (
        encoded + one * steps + decoder(autoencoder, cells, cells, batch=batch, itemsize=itemsize)
    )


def heads(m: LinearDiT, N: int, count: int, *, batch: int = 1) -> Work:
    """Return the work of the discriminator's heads, forward, without their few bytes."""
    return Work(2 * batch * count * N * ((1 + KERNEL) * m.width**2 + m.width), 0.0)


def generator_step(
    m: LinearDiT, N: int, L: int, head_blocks: Sequence[int], *, batch: int, itemsize: int
) -> Work:
    """Return the work of a generator step without recomputation.

    It runs the teacher twice, the student with its tangent and backward, the student again forward
    and backward, and the teacher's features and the heads forward and backward to their inputs.
    Bytes are parameters, gradients and AdamW's two moments, read and written once in float32.
    """
    F = transformer(m, N, L, batch=batch, itemsize=itemsize).flop
    features = transformer(
        m, N, L, batch=batch, itemsize=itemsize, blocks=max(head_blocks) + 1
    ).flop
    H = heads(m, N, len(head_blocks), batch=batch).flop
    return Work((2 + 2 + 2 + 3) * F + 2 * features + 2 * H, 32.0 * parameters(m))


def discriminator_step(
    m: LinearDiT,
    N: int,
    L: int,
    head_blocks: Sequence[int],
    *,
    batch: int,
    itemsize: int,
    misaligned: bool = True,
) -> Work:
    """Return the work of a discriminator step.

    It runs the student once, the teacher's features of fake, real and misaligned samples, and the
    heads forward and backward on each. The backward pass stops before the frozen teacher's
    features.
    """
    F = transformer(m, N, L, batch=batch, itemsize=itemsize).flop
    features = transformer(
        m, N, L, batch=batch, itemsize=itemsize, blocks=max(head_blocks) + 1
    ).flop
    H, sides = heads(m, N, len(head_blocks), batch=batch).flop, 3 if misaligned else 2
    to_features = 2 * batch * len(head_blocks) * N * m.width**2
    trained = 32.0 * len(head_blocks) * (1 + KERNEL) * m.width**2
    return Work(F + sides * features + sides * (3 * H - to_features), trained)


def linear_attention(N: int, D: int, head: int, *, batch: int = 1, itemsize: int) -> Work:
    """Return the work of linear attention of q, k, v [B, N, D] with heads of `head` channels."""
    return Work(2 * batch * 2 * N * (head + 1) * D, itemsize * batch * 4 * N * D)


def cross_attention(N: int, L: int, D: int, *, batch: int = 1, itemsize: int) -> Work:
    """Return the work of cross-attention of q [B, N, D] to k and v [B, L, D]."""
    return Work(2 * batch * 2 * N * L * D, itemsize * batch * (2 * N * D + 2 * L * D))
