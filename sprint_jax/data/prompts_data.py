"""Prompts as rows of a batch: token ids for Gemma-2, features for the embedded encoders."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sprint_jax.data.protocols import Batch
from sprint_jax.encoders import prompts
from sprint_jax.encoders.text import GemmaText
from sprint_jax.errors import UserError

_CHECKED = 1000  # prompts at a time


def arrays(text: Any, captions: Sequence[str]) -> Batch:
    """Return {"tokens" or "text", "mask"} of captions, all of one length.

    text: a `GemmaText` or `EmbeddedText`.
    """
    if not isinstance(text, GemmaText):
        features, mask = text.encoder.encode(captions)
        return {"text": features, "mask": mask}
    tokens, mask = prompts.pad(text.prompts.tokens(captions), text.prompts.room)
    return {"tokens": tokens, "mask": mask}


def check(text: Any, captions: Sequence[str], path: pathlib.Path) -> None:
    """Raise UserError for the first caption that the encoder does not know, naming the file."""
    for first in range(0, len(captions), _CHECKED):
        try:
            arrays(text, captions[first : first + _CHECKED])
        except UserError as error:
            raise UserError(f"config.data.prompts={path}: {error}") from None


def null_features(text: Any, params: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the features [1, L, D] and mask [1, L] of the empty prompt, float32, with padding.

    Published models encode it without the instruction, as <bos> and padding. params: of the text
    encoder; None for an embedded one.
    """
    if isinstance(text, GemmaText):
        tokens, mask = prompts.pad([np.array([prompts.BOS], np.int32)], prompts.WINDOW)
        features = jax.jit(text.model.apply)(params["model"], tokens, mask)
    else:
        features, mask = text.encoder.encode([""])
    return np.asarray(features, np.float32), np.asarray(mask, np.float32)
