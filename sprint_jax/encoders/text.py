"""Text encoders: prompts to features.

`prepare` runs on the host and gives each prompt's padded length and arrays; `features` is traced.
Parameters are arguments everywhere.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from sprint_jax.encoders import prompts as prompts_lib
from sprint_jax.encoders import words
from sprint_jax.models.gemma2 import Gemma2

Arrays = Mapping[str, Any]
Prepared = list[tuple[int, dict[str, np.ndarray]]]


class TextEncoder(Protocol):
    """A text encoder of a pipeline."""

    @property
    def takes_empty(self) -> bool:
        """Whether a prompt may be empty."""
        ...

    def prepare(self, prompts: Sequence[str]) -> Prepared:
        """Return one (length, arrays) per prompt; prompts of equal length may share a batch."""
        ...

    def shapes(self, longest: int | None = None) -> dict[int, Arrays]:
        """Return {length: arrays of one prompt, abstract} for prompts of at most `longest` tokens,
        None for all.
        """
        ...

    def features(self, params: Any, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
        """Return features [B, L, D] and their mask [B, L]. Traced."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class EmbeddedText:
    """The seeded encoder of embedded data, a `words.ShapesText` or `words.WordsText`."""

    encoder: Any
    takes_empty = False

    def prepare(self, prompts: Sequence[str]) -> Prepared:
        """Return one (length, arrays) per prompt; all have one length."""
        return words.prepare(self.encoder, prompts)

    def shapes(self, longest: int | None = None) -> dict[int, Arrays]:
        """Return {length: arrays of one prompt, abstract}; prompts of any length are padded to
        one.
        """
        length, dim = self.encoder.length, self.encoder.dim
        f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
        return {length: {"text": f32(length, dim), "mask": f32(length)}}

    def features(self, params: Any, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
        """Return the features that the host made."""
        return arrays["text"], arrays["mask"]


@dataclasses.dataclass(frozen=True, eq=False)
class GemmaText:
    """Gemma-2 behind a fixed instruction.

    model: its description. prompts: tokens of prompts. Parameters are those of `gemma_params`.
    """

    model: Gemma2
    prompts: prompts_lib.GemmaPrompts
    takes_empty = True  # the unconditional image, as in diffusers

    def prepare(self, prompts: Sequence[str]) -> Prepared:
        """Return one (padded length, {"tokens", "mask"}) per prompt."""
        return self.prompts.prepare(prompts)

    def shapes(self, longest: int | None = None) -> dict[int, Arrays]:
        """Return {padded length: arrays of one prompt, abstract} for prompts of at most `longest`
        tokens.
        """
        room = self.prompts.room
        lengths = prompts_lib.buckets(room if longest is None else min(longest, room))
        one = lambda n, dtype: jax.ShapeDtypeStruct((n,), dtype)
        return {n: {"tokens": one(n, jnp.int32), "mask": one(n, jnp.float32)} for n in lengths}

    def features(self, params: Any, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
        """Return [B, L, D] and [B, L]: the first token's state, then those of the prompt."""
        tokens, mask, prefix = arrays["tokens"], arrays["mask"], params["prefix"]
        states = self.model.apply(params["model"], tokens, mask, prefix)
        if prefix is None:
            return states, mask
        first = jnp.broadcast_to(prefix.first, (len(tokens), 1, self.model.width))
        return (
            jnp.concatenate([first, states], 1),
            jnp.concatenate([jnp.ones_like(mask[:, :1]), mask], 1),
        )


def gemma_params(text: GemmaText, params: Any) -> dict[str, Any]:
    """Return the parameters of `GemmaText.features`: the model's, and its keys and values of the
    instruction.
    """
    tokens = text.prompts.prefix
    prefix = jax.jit(text.model.prefix)(params, tokens) if len(tokens) else None
    return {"model": params, "prefix": prefix}
