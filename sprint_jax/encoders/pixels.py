"""Pixel codecs: latents to images and back. Parameters are arguments everywhere."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from sprint_jax.models.dc_ae import DCAE, tiled

# Latent cells of a tile and between tiles, where an image is decoded in tiles (diffusers: 16 and
# 14, with seams on flat areas that its users report at 4K; 32 cells are 1024 px).
TILE, TILE_STRIDE = 32, 28


class PixelCodec(Protocol):
    """A pixel codec of a pipeline."""

    @property
    def factor(self) -> int:
        """Pixels per latent cell along each side."""
        ...

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        ...

    def decode(self, params: Any, latents: jax.Array) -> jax.Array:
        """Decode latents at unit scale float32 [B, h, w, c] to uint8 [B, H, W, 3]. Traced."""
        ...

    def checked(self, params: Any, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Decode as `decode` does; also return, bool [B], whether all numbers are finite."""
        ...

    def encode(self, params: Any, images: Any) -> jax.Array:
        """Encode uint8 [B, H, W, 3] to latents at unit scale float32 [B, h, w, c]."""
        ...


def finite(arrays: jax.Array) -> jax.Array:
    """Return, bool [B], whether all numbers of each of [B, ...] are finite."""
    return jnp.isfinite(arrays).all(axis=tuple(range(1, arrays.ndim)))


@dataclasses.dataclass(frozen=True, eq=False)
class EmbeddedPixels:
    """A linear patch codec of `encoders.patches`, without parameters of its own."""

    codec: Any

    @property
    def factor(self) -> int:
        """The codec's block."""
        return self.codec.block

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return self.codec.channels

    def decode(self, params: Any, latents: jax.Array) -> jax.Array:
        """Decode latents at unit scale to uint8 [B, H, W, 3]."""
        return self.codec.decode(latents)

    def checked(self, params: Any, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Decode; also return, bool [B], whether all latents are finite, as then all pixels are."""
        return self.codec.decode(latents), finite(latents)

    def encode(self, params: Any, images: Any) -> jax.Array:
        """Encode uint8 [B, H, W, 3] to latents at unit scale."""
        return self.codec.encode(images)


@dataclasses.dataclass(frozen=True, eq=False)
class AutoencoderPixels:
    """DC-AE.

    model: its description. tile: decode in tiles any image larger than one. over_devices: batches
    are sharded over devices; elsewhere a batch whose arrays would be too large is processed in
    parts.
    """

    model: DCAE
    tile: bool
    over_devices: bool = False

    @property
    def factor(self) -> int:
        """Pixels per latent cell along each side."""
        return self.model.factor

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return self.model.latent_channels

    def decode(self, params: Any, latents: jax.Array) -> jax.Array:
        """Decode latents at unit scale float32 [B, h, w, c] to uint8 [B, H, W, 3].

        The division happens in the dtype of the parameters, as in the published pipeline.
        """
        return self.checked(params, latents)[0]

    def checked(self, params: Any, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Decode; also return, bool [B], whether all numbers of each decoded image are finite."""
        z = latents.astype(jax.tree.leaves(params)[0].dtype)
        z = z / jnp.asarray(self.model.scaling_factor, z.dtype)
        function = self.model.decode if self.over_devices else self.model.decode_in_parts
        decode = functools.partial(function, params)
        if self.tile and max(z.shape[1:3]) > TILE:
            images = tiled(decode, z, tile=TILE, stride=TILE_STRIDE, scale=self.factor)
        else:
            images = decode(z)
        whole = finite(images)  # before clipping, which makes numbers of infinities
        images = jnp.clip(images * 0.5 + 0.5, 0, 1).astype(jnp.float32)
        return jnp.round(255 * images).astype(jnp.uint8), whole

    def encode(self, params: Any, images: Any) -> jax.Array:
        """Encode uint8 [B, H, W, 3] to latents at unit scale float32 [B, h, w, c]."""
        dtype = jax.tree.leaves(params)[0].dtype
        x = (jnp.asarray(images, jnp.float32) / 127.5 - 1).astype(dtype)
        latents: jax.Array = self._encode(params, x)
        return latents.astype(jnp.float32) * self.model.scaling_factor

    @functools.cached_property
    def _encode(self) -> Callable[..., jax.Array]:
        return jax.jit(self.model.encode if self.over_devices else self.model.encode_in_parts)
