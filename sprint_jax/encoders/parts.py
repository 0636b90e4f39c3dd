"""The two seams of a pipeline: prompts to text features, and latents to pixels and back.

A text part has `prepare(prompts)`, which runs on the host (its code is in `data/`) and gives each prompt's padded
length and arrays, `shapes(longest)`, which says what those can be, and `features(params, arrays)`, which is traced. A pixel part has `decode(params, latents)`, traced, and
`encode(params, images)`. Parameters are arguments everywhere.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from sprint_jax.encoders import prompts as prompts_lib
from sprint_jax.encoders import words as text_lib
from sprint_jax.models.dc_ae import DCAE, tiled
from sprint_jax.models.gemma2 import Gemma2

# Latent cells of a tile and between tiles, where a picture is decoded in tiles (diffusers: 16 and 14, with
# seams on flat areas that its users report at 4K; 32 cells are 1024 px).
TILE, TILE_STRIDE = 32, 28

_ON_GPU = ("transformer", "controlnet", "text_encoder")
_BLOCK_BY_BLOCK = {"cpu": ("transformer", "controlnet"), "gpu": _ON_GPU, "cuda": _ON_GPU}


def block_by_block(platform) -> tuple[str, ...]:
    """Names of the published networks that run without a loop over blocks, which copies the weights of each block.

    platform: as `jax.default_backend()` names it, None for that one, "" for several, where all keep their loops. Of the
    text encoder a CPU would compile 26 layers for every padded length, for little.
    """
    return _BLOCK_BY_BLOCK.get(jax.default_backend() if platform is None else platform, ())


@dataclasses.dataclass(frozen=True, eq=False)
class EmbeddedText:
    """The seeded encoder of `shapes` prompts. encoder: `data.text.ShapesText`."""

    encoder: Any

    def prepare(self, prompts):
        """One (length, arrays) per prompt; prompts of equal length may share a batch."""
        return text_lib.prepare(self.encoder, prompts)

    def shapes(self, longest=None):
        """{length: arrays of one prompt, abstract}. Prompts of any length are padded to one."""
        length, dim = self.encoder.length, self.encoder.dim
        f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
        return {length: {"text": f32(length, dim), "mask": f32(length)}}

    def features(self, params, arrays):
        return arrays["text"], arrays["mask"]


@dataclasses.dataclass(frozen=True, eq=False)
class GemmaText:
    """Gemma-2 behind a fixed instruction.

    model: its description. prompts: tokens of prompts. params hold {"model", "prefix"}; see `gemma_params`.
    """

    model: Gemma2
    prompts: prompts_lib.GemmaPrompts

    def prepare(self, prompts):
        return self.prompts.prepare(prompts)

    def shapes(self, longest=None):
        """{padded length: arrays of one prompt, abstract} for prompts of at most `longest` tokens; None for all."""
        room = self.prompts.room
        lengths = prompts_lib.buckets(room if longest is None else min(longest, room))
        one = lambda n, dtype: jax.ShapeDtypeStruct((n,), dtype)
        return {n: {"tokens": one(n, jnp.int32), "mask": one(n, jnp.float32)} for n in lengths}

    def features(self, params, arrays):
        """[B, L, D] and [B, L]: the first token's state, then those of the prompt."""
        tokens, mask, prefix = arrays["tokens"], arrays["mask"], params["prefix"]
        states = self.model.apply(params["model"], tokens, mask, prefix)
        if prefix is None:
            return states, mask
        first = jnp.broadcast_to(prefix.first, (len(tokens), 1, self.model.width))
        return jnp.concatenate([first, states], 1), jnp.concatenate(
            [jnp.ones_like(mask[:, :1]), mask], 1
        )


def gemma_params(text: GemmaText, params):
    """Parameters of `GemmaText.features`: the model's, and its keys and values of the instruction."""
    tokens = text.prompts.prefix
    prefix = jax.jit(text.model.prefix)(params, tokens) if len(tokens) else None
    return {"model": params, "prefix": prefix}


@dataclasses.dataclass(frozen=True, eq=False)
class EmbeddedPixels:
    """A linear patch codec without parameters of its own. codec: of `data.pixels`."""

    codec: Any

    @property
    def factor(self) -> int:
        return self.codec.block

    @property
    def channels(self) -> int:
        return self.codec.channels

    def decode(self, params, latents):
        return self.codec.decode(latents)

    def encode(self, params, images):
        return self.codec.encode(images)


@dataclasses.dataclass(frozen=True, eq=False)
class AutoencoderPixels:
    """DC-AE. model: its description. tile: decode in tiles any picture larger than one.

    spread: batches lie cut over devices. Elsewhere a batch that makes too large arrays goes through in parts.
    """

    model: DCAE
    tile: bool
    spread: bool = False

    @property
    def factor(self) -> int:
        return self.model.factor

    @property
    def channels(self) -> int:
        return self.model.latent_channels

    def decode(self, params, latents):
        """Latents at unit scale float32 [B, h, w, c] -> uint8 [B, H, W, 3].

        The division happens in the dtype of the parameters, as in the published pipeline.
        """
        z = latents.astype(jax.tree.leaves(params)[0].dtype)
        z = z / jnp.asarray(self.model.scaling_factor, z.dtype)
        decode = functools.partial(
            self.model.decode if self.spread else self.model.decode_in_parts, params
        )
        if self.tile and max(z.shape[1:3]) > TILE:
            images = tiled(decode, z, tile=TILE, stride=TILE_STRIDE, scale=self.factor)
        else:
            images = decode(z)
        images = jnp.clip(images * 0.5 + 0.5, 0, 1).astype(jnp.float32)
        return jnp.round(255 * images).astype(jnp.uint8)

    def encode(self, params, images):
        """uint8 [B, H, W, 3] -> latents at unit scale float32 [B, h, w, c]."""
        dtype = jax.tree.leaves(params)[0].dtype
        x = (jnp.asarray(images, jnp.float32) / 127.5 - 1).astype(dtype)
        return self._encode(params, x).astype(jnp.float32) * self.model.scaling_factor

    @functools.cached_property
    def _encode(self):
        return jax.jit(self.model.encode if self.spread else self.model.encode_in_parts)
