"""DC-AE, the deep-compression autoencoder of SANA (f32c32), as pure functions of a parameter tree.

It has residual blocks at fine resolutions, EfficientViT blocks (multi-scale ReLU linear attention
and a gated depthwise convolution) at coarse ones, and parameter-free shortcuts around every change
of resolution. Arrays are NHWC. Names, order and epsilons follow diffusers' `AutoencoderDC`. The
encoder is deterministic.

Shape letters: B batch, H and W pixels, h and w latent cells, C channels.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from sprint_jax.models import layers
from sprint_jax.models.layers import Params
from sprint_jax.ops import backend, conv3x3, depthwise, linear_attention
from sprint_jax.ops.norms import rms_norm

NORM_EPS = 1e-5
RESIDUAL, EFFICIENT_VIT = "ResBlock", "EfficientViTBlock"  # diffusers' names
# cuDNN and our kernels index arrays with 32 bits; larger ones are slower or rejected.
MOST_ELEMENTS = 2**31


def space_to_channels(x: Float[Array, "b y x c"]) -> Float[Array, "b h w d"]:
    """Pixel-unshuffle by 2. [B, 2H, 2W, C] -> [B, H, W, 4C], channel order (c, dy, dx)."""
    return einops.rearrange(x, "b (h p) (w q) c -> b h w (c p q)", p=2, q=2)


def channels_to_space(x: Float[Array, "b h w d"]) -> Float[Array, "b y x c"]:
    """Pixel-shuffle by 2, the inverse of `space_to_channels`."""
    return einops.rearrange(x, "b h w (c p q) -> b (h p) (w q) c", p=2, q=2)


def group_mean(x: Float[Array, "*s c"], channels: int) -> Float[Array, "*s {channels}"]:
    """Average groups of consecutive channels."""
    return x.reshape(*x.shape[:-1], channels, -1).mean(-1)


def repeat_channels(x: Float[Array, "*s c"], channels: int) -> Float[Array, "*s {channels}"]:
    """Repeat each channel in place."""
    return jnp.repeat(x, channels // x.shape[-1], axis=-1)


class _Conv(nn.Module):
    """3x3 convolution; `stride` 2 halves the image, `upsample` doubles it first."""

    channels: int
    stride: int = 1
    upsample: bool = False
    bias: bool = True

    @nn.compact
    def __call__(self, x):
        shape = (3, 3, x.shape[-1], self.channels)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        if self.upsample:
            y = conv3x3.upsample_conv(x, kernel)
        else:
            y = conv3x3.conv(x, kernel, self.stride)
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.channels,)).astype(y.dtype)
        return y.astype(x.dtype)


class _Norm(nn.Module):
    """RMSNorm over channels with weight and bias."""

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        weight = self.param("weight", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        return rms_norm(x, weight, NORM_EPS) + bias.astype(x.dtype)


class _Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        y = layers.silu(_Conv(channels, name="conv1")(x))
        return x + _Norm(name="norm")(_Conv(channels, bias=False, name="conv2")(y))


class _MultiscaleAttention(nn.Module):
    """ReLU linear attention over q, k, v and over depthwise-smoothed copies of them.

    The concatenated projections are cut into groups of three heads' widths, and each group into
    the q, k and v of its head. What diffusers calls `to_q`, `to_k`, `to_v` are not the q, k and v
    of any head.
    """

    ae: "DCAE"
    scales: tuple[int, ...]

    @nn.compact
    def __call__(self, x):  # [B, H, W, C]
        batch, height, width, channels = x.shape
        group = self.ae.head_dim
        qkv = layers.Dense(3 * channels, use_bias=False, dtype=x.dtype, name="to_qkv")(x)
        copies = [qkv]
        init = nn.initializers.lecun_normal()
        for i, size in enumerate(self.scales):
            stencil = self.param(f"scale_{i}_depth", init, (size, size, 3 * channels))
            mixing = self.param(f"scale_{i}_point", init, (3 * channels // group, group, group))
            smooth = depthwise.conv(qkv, stencil.astype(x.dtype), backend=self.ae.depthwise)
            grouped = smooth.reshape(*smooth.shape[:3], -1, group)
            mixed = jnp.einsum("bhwgi,gio->bhwgo", grouped, mixing.astype(x.dtype))
            copies.append(mixed.reshape(qkv.shape))
        out = self._attend([a.reshape(batch, height * width, -1) for a in copies])
        out = layers.Dense(channels, use_bias=False, dtype=x.dtype, name="to_out")(
            out.reshape(batch, height, width, -1)
        )
        return x + _Norm(name="norm_out")(out)

    def _attend(self, copies: list[Array]) -> Array:
        """Return the attention of copies [B, N, 3 C], side by side."""
        group = 3 * self.ae.head_dim
        attend = lambda a: linear_attention.attend_interleaved(
            a, heads=a.shape[-1] // group, backend=self.ae.attention
        )
        # One call by XLA, but one kernel for each copy: they read arrays as they lie in memory.
        if self.ae.attention == "plain":
            return attend(jnp.concatenate(copies, -1))
        return jnp.concatenate([attend(a) for a in copies], -1)


class _EfficientViT(nn.Module):
    ae: "DCAE"
    scales: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        x = _MultiscaleAttention(self.ae, self.scales, name="attn")(x)
        y = layers.GLUMBConv(4 * x.shape[-1], x.dtype, self.ae.depthwise, name="ff")(x)
        return x + _Norm(name="ff_norm")(y)


@dataclasses.dataclass(frozen=True)
class Stage:
    """The blocks of one resolution."""

    channels: int
    layers: int
    block: str  # RESIDUAL or EFFICIENT_VIT
    scales: tuple[int, ...]  # depthwise sizes of its attention

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown block."""
        if self.block not in (RESIDUAL, EFFICIENT_VIT):
            raise ValueError(f"block {self.block!r}: use {RESIDUAL!r} or {EFFICIENT_VIT!r}")


def _blocks(stage: Stage, ae: "DCAE", x: Array) -> Array:
    for i in range(stage.layers):
        if stage.block == RESIDUAL:
            x = _Residual(name=f"block_{i}")(x)
        else:
            x = _EfficientViT(ae, stage.scales, name=f"block_{i}")(x)
    return x


class _DownStage(nn.Module):
    """Blocks, then half the resolution at `channels_out` channels unless that is None."""

    stage: Stage
    ae: "DCAE"
    channels_out: int | None

    @nn.compact
    def __call__(self, x):
        x = _blocks(self.stage, self.ae, x)
        if self.channels_out is None:
            return x
        shortcut = group_mean(space_to_channels(x), self.channels_out)
        return _Conv(self.channels_out, stride=2, name="down")(x) + shortcut


class _UpStage(nn.Module):
    """Twice the resolution at the stage's channels if `upsample`, then blocks."""

    stage: Stage
    ae: "DCAE"
    upsample: bool

    @nn.compact
    def __call__(self, x):
        if self.upsample:
            shortcut = channels_to_space(repeat_channels(x, 4 * self.stage.channels))
            x = _Conv(self.stage.channels, upsample=True, name="up")(x) + shortcut
        return _blocks(self.stage, self.ae, x)


class _Encoder(nn.Module):
    ae: "DCAE"

    @nn.compact
    def __call__(self, x):
        stages = self.ae.encoder
        x = _Conv(stages[0].channels, name="conv_in")(x)
        for i, stage in enumerate(stages):
            after = stages[i + 1].channels if i + 1 < len(stages) else None
            x = _DownStage(stage, self.ae, after, name=f"stage_{i}")(x)
        latent = self.ae.latent_channels
        return _Conv(latent, name="conv_out")(x) + group_mean(x, latent)


class _Decoder(nn.Module):
    ae: "DCAE"

    @nn.compact
    def __call__(self, z):
        stages = self.ae.decoder
        x = _Conv(stages[-1].channels, name="conv_in")(z) + repeat_channels(z, stages[-1].channels)
        for i in reversed(range(len(stages))):
            x = _UpStage(stages[i], self.ae, i + 1 < len(stages), name=f"stage_{i}")(x)
        x = jax.nn.relu(_Norm(name="norm_out")(x))
        return _Conv(self.ae.in_channels, name="conv_out")(x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DCAE:
    """Description of a DC-AE."""

    in_channels: int  # of images
    latent_channels: int
    head_dim: int  # of the attention
    encoder: tuple[Stage, ...]  # from the finest resolution to the coarsest
    decoder: tuple[Stage, ...]  # likewise
    scaling_factor: float  # multiplies encoded latents for the diffusion model
    depthwise: str = "plain"  # one of `ops.backend.DEPTHWISE`
    attention: str = "plain"  # one of `ops.backend.BACKENDS`

    def __post_init__(self) -> None:
        """Raise ValueError for unknown backends or another number of stages."""
        for name, choices in (("attention", backend.BACKENDS), ("depthwise", backend.DEPTHWISE)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r}: use one of {', '.join(choices)}")
        if len(self.encoder) != len(self.decoder):
            raise ValueError(
                f"{len(self.encoder)} encoder stages and {len(self.decoder)} decoder stages"
            )

    @property
    def factor(self) -> int:
        """Pixels per latent cell along each side."""
        return 2 ** (len(self.encoder) - 1)

    def init(self, key: PRNGKeyArray) -> Params:
        """Draw parameters {"encoder", "decoder"}, float32."""
        k_encoder, k_decoder = jax.random.split(key)
        plain = dataclasses.replace(self, attention="plain")  # parameters do not depend on it
        image = jnp.zeros((1, self.factor, self.factor, self.in_channels))
        latent = jnp.zeros((1, 1, 1, self.latent_channels))
        return {
            "encoder": _Encoder(plain).init(k_encoder, image)["params"],
            "decoder": _Decoder(plain).init(k_decoder, latent)["params"],
        }

    def encode(self, params: Params, x: Float[Array, "b y x 3"]) -> Float[Array, "b h w c"]:
        """Encode images in [-1, 1] to latents, not yet scaled.

        Raises:
          ValueError: if a side is not a multiple of `factor`.
        """
        if x.shape[1] % self.factor or x.shape[2] % self.factor:
            raise ValueError(
                f"image of {x.shape[1]} x {x.shape[2]}: sides must be multiples of {self.factor}"
            )
        return layers.run(_Encoder(self), params["encoder"], x)

    def decode(self, params: Params, z: Float[Array, "b h w c"]) -> Float[Array, "b y x 3"]:
        """Decode latents as `encode` returns them to images in about [-1, 1]."""
        return layers.run(_Decoder(self), params["decoder"], z)

    def encode_in_parts(
        self, params: Params, x: Float[Array, "b y x 3"]
    ) -> Float[Array, "b h w c"]:
        """Encode, splitting a batch whose arrays would exceed `MOST_ELEMENTS`."""
        most = images_at_once(self, x.shape[1] * x.shape[2])
        return map_in_parts(functools.partial(self.encode, params), x, most)

    def decode_in_parts(
        self, params: Params, z: Float[Array, "b h w c"]
    ) -> Float[Array, "b y x 3"]:
        """Decode, splitting a batch whose arrays would exceed `MOST_ELEMENTS`."""
        most = images_at_once(self, z.shape[1] * z.shape[2] * self.factor**2)
        return map_in_parts(functools.partial(self.decode, params), z, most)


def images_at_once(ae: DCAE, pixels: int) -> int:
    """Return how many images of `pixels` pixels fit, at least 1.

    Their largest array inside the encoder or decoder stays below `MOST_ELEMENTS`.
    """
    # Widths over a stage's channels; the second is inside the gated convolution.
    wide = {RESIDUAL: 1, EFFICIENT_VIT: 8}
    largest = max(
        pixels // 4**i * wide[s.block] * s.channels
        for stages in (ae.encoder, ae.decoder)
        for i, s in enumerate(stages)
    )
    return max(1, (MOST_ELEMENTS - 1) // largest)


ArrayFunction = Callable[[Array], Array]


def map_in_parts(
    function: ArrayFunction, x: Float[Array, "b ..."], most: int
) -> Float[Array, "b ..."]:
    """Apply a function of independent samples in equal parts of at most `most` samples each."""
    batch = x.shape[0]
    parts = 1
    if most < batch:
        parts = next(n for n in range(1, batch + 1) if batch % n == 0 and batch // n <= most)
    if parts == 1:
        return function(x)
    out = jax.lax.map(function, x.reshape(parts, -1, *x.shape[1:]))
    return out.reshape(batch, *out.shape[2:])


def tiled(
    function: ArrayFunction, x: Float[Array, "b h w c"], *, tile: int, stride: int, scale: float
) -> Float[Array, "b y x d"]:
    """Apply `function` (encode or decode) to overlapping tiles and blend them linearly.

    Memory then grows with the tile, not with the image. Attention is global, so the result is
    close to the untiled one, but not equal. The order of tiles and the blending are those of
    diffusers' `tiled_decode`.

    Args:
      function: maps a tile [B, h, w, C] to its output.
      x: the input.
      tile, stride: side and distance of tiles, in cells of x.
      scale: output cells per input cell: the factor when decoding, 1 / factor when encoding.
    """
    height, width = x.shape[1:3]
    out_stride, overlap = round(stride * scale), round((tile - stride) * scale)
    above, rows = None, []
    for top in range(0, height, stride):
        row, left = [], None
        for j, start in enumerate(range(0, width, stride)):
            piece = function(x[:, top : top + tile, start : start + tile])
            if above is not None:
                piece = _blend(above[j], piece, overlap, axis=1)
            if left is not None:
                piece = _blend(left, piece, overlap, axis=2)
            row.append(piece)
            left = piece
        above = row
        rows.append(jnp.concatenate([p[:, :out_stride, :out_stride] for p in row], 2))
    return jnp.concatenate(rows, 1)[:, : round(height * scale), : round(width * scale)]


def _blend(before: Array, after: Array, extent: int, axis: int) -> Array:
    """Return `after`, whose first `extent` lines fade in over the last ones of `before`."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    shape = [1] * after.ndim
    shape[axis] = extent
    fade = (jnp.arange(extent, dtype=after.dtype) / extent).reshape(shape)
    old = jax.lax.slice_in_dim(before, before.shape[axis] - extent, before.shape[axis], axis=axis)
    new = jax.lax.slice_in_dim(after, 0, extent, axis=axis)
    rest = jax.lax.slice_in_dim(after, extent, after.shape[axis], axis=axis)
    return jnp.concatenate([old * (1 - fade) + new * fade, rest], axis)


_WIDTHS = (128, 256, 512, 512, 1024, 1024)


def _published(depths: Sequence[int]) -> tuple[Stage, ...]:
    return tuple(
        Stage(c, n, RESIDUAL if i < 3 else EFFICIENT_VIT, () if i < 3 else (5,))
        for i, (c, n) in enumerate(zip(_WIDTHS, depths, strict=True))
    )


# dc-ae-f32c32-sana-1.1; sana-1.0 has the same shapes.
DCAE_F32C32 = DCAE(
    in_channels=3,
    latent_channels=32,
    head_dim=32,
    encoder=_published((2, 2, 2, 3, 3, 3)),
    decoder=_published((3, 3, 3, 3, 3, 3)),
    scaling_factor=0.41407,
)
