"""The embedded pixel codecs, which take the place of the published models' DC-AE.

Both cut an image into square patches. `SpaceToDepth` is exact; `PatchPCA` keeps the principal
components of a patch, a linear stand-in for a deeply compressing autoencoder: fewer tokens, fewer
channels. `encode` is NumPy, for the data thread; `decode` is JAX, for compiled sampling.
"""

import dataclasses

import einops
import jax
import jax.numpy as jnp
import numpy as np

_PATCHES = "b (h p) (w q) c -> b h w (p q c)"
_PIXELS = "b h w (p q c) -> b (h p) (w q) c"


def _patches(images, block):
    """Cut uint8 [B, H, W, 3] into float32 [B, H/block, W/block, 3 block^2] in [-1, 1]."""
    return einops.rearrange(images.astype(np.float32) / 127.5 - 1, _PATCHES, p=block, q=block)


def _pixels(patches, block):
    """Invert `_patches`, clipped. JAX."""
    x = einops.rearrange(patches, _PIXELS, p=block, q=block, c=3)
    return jnp.round(jnp.clip(127.5 * x + 127.5, 0, 255)).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class SpaceToDepth:
    """Patches as they are: exact and invertible.

    block: pixels per latent cell along each side.
    scale: multiplies latents so that their root mean square is near one.
    """

    block: int
    scale: float

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return 3 * self.block**2

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Encode uint8 [B, H, W, 3] to float32 [B, H/block, W/block, channels]."""
        return _patches(images, self.block) * np.float32(self.scale)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Decode float [B, h, w, channels] to uint8 [B, h*block, w*block, 3]."""
        return _pixels(latents.astype(jnp.float32) / self.scale, self.block)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class PatchPCA:
    """Principal components of a patch, partly whitened.

    block, scale: as in SpaceToDepth. mean: [3 block^2]. basis: [3 block^2, channels], orthonormal
    columns. spread: [channels], the component's standard deviation over the square root of itself:
    latents are (patch - mean) basis / spread, so that coarse components stay larger than fine
    ones, but less so.
    """

    block: int
    scale: float
    mean: np.ndarray
    basis: np.ndarray
    spread: np.ndarray

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return self.basis.shape[1]

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Encode uint8 [B, H, W, 3] to float32 [B, H/block, W/block, channels]."""
        return (_patches(images, self.block) - self.mean) @ self.basis * (self.scale / self.spread)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Decode float [B, h, w, channels] to uint8 [B, h*block, w*block, 3]."""
        components = latents.astype(jnp.float32) * (self.spread / self.scale)
        return _pixels(components @ self.basis.T + self.mean, self.block)


def fit_pca(images: np.ndarray, block: int, channels: int) -> dict[str, np.ndarray]:
    """Fit {"mean", "basis", "spread"} float32 of `PatchPCA` to images uint8 [B, S, S, 3]."""
    patches = _patches(images, block).reshape(-1, 3 * block**2).astype(np.float64)
    mean = patches.mean(0)
    variances, vectors = np.linalg.eigh(np.cov(patches - mean, rowvar=False))
    kept = np.argsort(variances)[::-1][:channels]
    fitted = {"mean": mean, "basis": vectors[:, kept], "spread": variances[kept] ** 0.25}
    return {name: np.ascontiguousarray(value, np.float32) for name, value in fitted.items()}
