"""Encoders from a checkpoint folder: the text encoder and the autoencoder, without the
transformer.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from sprint_jax.conversion import folder
from sprint_jax.encoders import instruction as instructions
from sprint_jax.encoders import pixels, prompts, text, tokenizers
from sprint_jax.errors import UserError

PARTS = ("text_encoder", "autoencoder")
Say = Callable[[str], None]
# Parts of a tree whose arrays have a leading layer axis.
_STACKS = ("blocks.", "zero_out.", "layers.")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Encoders:
    """Both encoders of a folder, with their parameters {"text", "pixels"} on the device."""

    text: text.TextEncoder
    pixels: pixels.PixelCodec
    params: dict[str, Any]


def load(
    path: pathlib.Path | str,
    *,
    dtype: str,
    pixels_dtype: str,
    instruction: str | None = None,
    unrolled: Sequence[str] = (),
    say: Say = lambda message: None,
) -> Encoders:
    """Read the encoders of a diffusers or converted folder. Its transformer is described but not
    read.

    instruction: text file with the instruction before each prompt, "" for none, None for the
    folder's own or that of the installed diffusers package. unrolled: networks whose layers lie
    apart on the device. Raises UserError for a folder that is not a whole model.
    """
    return read(
        describe(path, dtype=dtype),
        dtype=dtype,
        pixels_dtype=pixels_dtype,
        instruction=instruction,
        unrolled=unrolled,
        tile=False,
        say=say,
    )


def read(
    described: folder.Description,
    *,
    dtype: str,
    pixels_dtype: str,
    instruction: str | None,
    unrolled: Sequence[str],
    tile: bool,
    say: Say,
) -> Encoders:
    """Read the encoders of a folder that is described; arguments as in `load`.

    tile: decode images in overlapping tiles.
    """
    wording = wording_of(described, instruction)
    params = described.read(
        PARTS, dtype=dtype, pixels_dtype=pixels_dtype, place=placing(unrolled), say=say
    )
    return assemble(described, params, wording, tile=tile, unrolled=unrolled)


def describe(path: pathlib.Path | str, *, dtype: str) -> folder.Description:
    """Describe a diffusers or converted folder. Raises UserError for any other."""
    if not (folder.is_diffusers(path) or folder.is_ours(path)):
        raise UserError(f"{path} is no diffusers folder and no converted model: give one of these")
    return folder.describe(path, dtype=dtype)


def wording_of(described: folder.Description, instruction: str | None) -> str:
    """Return the text that precedes each prompt."""
    if instruction is None and described.instruction is not None:
        return described.instruction
    return instructions.published(instruction)


def placing(unrolled: Sequence[str]) -> Callable[[str, str, np.ndarray], Any]:
    """Return what moves each array to the device as soon as it is read, layer by layer for
    unrolled networks.
    """

    def place(part, path, array):
        if part in unrolled and path.startswith(_STACKS):
            return [jax.device_put(layer) for layer in array]
        return jax.device_put(array)

    return place


def assemble(
    described: folder.Description,
    params: dict[str, Any],
    wording: str,
    *,
    tile: bool,
    unrolled: Sequence[str],
) -> Encoders:
    """Put the encoders of a folder together from their parameters as `placing` left them."""
    encoder, codec = described.models["text_encoder"], described.models["autoencoder"]
    tokenizer = tokenizers.load(described.tokenizer)
    gemma = text.GemmaText(encoder, prompts.GemmaPrompts(tokenizer, wording))
    tree = params["text_encoder"]
    tree = encoder.unstack(tree) if "text_encoder" in unrolled else tree
    return Encoders(
        text=gemma,
        pixels=pixels.AutoencoderPixels(codec, tile),
        params={"text": text.gemma_params(gemma, tree), "pixels": params["autoencoder"]},
    )
