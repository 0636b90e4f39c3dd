"""The embedded pixel codec: space-to-depth, in the place where DC-AE stands for the published models."""

import dataclasses

import einops
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class SpaceToDepth:
    """Exact, invertible `encode`/`decode` between pixels and latents.

    block: pixels per latent cell along each side.
    scaling_factor: multiplies latents so that their root mean square is near one.
    """

    block: int
    scaling_factor: float

    @property
    def channels(self) -> int:
        return 3 * self.block**2

    def encode(self, images):
        """uint8 [B, H, W, 3] -> float32 [B, H/block, W/block, channels]. NumPy, for the data thread."""
        x = images.astype(np.float32) / 127.5 - 1
        x = einops.rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=self.block, q=self.block)
        return x * np.float32(self.scaling_factor)

    def decode(self, latents):
        """float [B, h, w, channels] -> uint8 [B, h*block, w*block, 3]. JAX, for compiled sampling."""
        x = latents.astype(jnp.float32) / self.scaling_factor
        x = einops.rearrange(x, "b h w (p q c) -> b (h p) (w q) c", p=self.block, q=self.block, c=3)
        return jnp.round(jnp.clip(127.5 * x + 127.5, 0, 255)).astype(jnp.uint8)
