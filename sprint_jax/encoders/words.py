"""The embedded text encoders: frozen, seeded, no download.

Like Gemma-2 for the published models they turn prompts into features [B, L, D] and a mask [B, L].
A token's feature holds its own word and the six words on either side, each by a fixed random
vector of that word at that distance (so a noun carries its adjective and the relation it stands
in), and its position. `ShapesText` knows the words of `shapes` and refuses others; `WordsText`
takes any, by a hash.
"""

import re
import zlib
from collections.abc import Sequence

import numpy as np

from sprint_jax.encoders import prompts as prompts_lib
from sprint_jax.errors import UserError
from sprint_jax.toy import shapes

WORDS = (
    "<pad>",
    "<bos>",
    "a",
    "of",
    "on",
    "background",
    "left",
    "right",
    "above",
    "below",
    *shapes.NUMBERS,
    *shapes.COLORS,
    *shapes.SHAPES,
    *(s + "s" for s in shapes.SHAPES),
)
LENGTH = 16
_REACH = 6
_WORD_DIM, _POSITION_DIM = 16, 16
DIM = (2 * _REACH + 1) * _WORD_DIM + _POSITION_DIM
_SEED = 20251


class Window:
    """Features of tokens 0 .. words - 1, where 0 is padding."""

    def __init__(self, words: int, length: int):
        # RandomState: the one NumPy generator whose streams are frozen for good.
        rng = np.random.RandomState(_SEED)
        self.words = rng.randn(2 * _REACH + 1, words, _WORD_DIM)
        self.positions = rng.randn(length, _POSITION_DIM)
        self.length = length

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Return the features of tokens: int32 [B, L] -> float32 [B, L, DIM]."""
        words = np.zeros((*tokens.shape, 2 * _REACH + 1, _WORD_DIM))
        for k, distance in enumerate(range(-_REACH, _REACH + 1)):
            here = slice(max(0, -distance), self.length - max(0, distance))
            there = slice(max(0, distance), self.length - max(0, -distance))
            seen = tokens[:, there]
            words[:, here, k] = self.words[k][seen] * (seen != 0)[..., None]  # padding says nothing
        positions = np.broadcast_to(self.positions, (len(tokens), *self.positions.shape))
        features = np.concatenate([words.reshape(*tokens.shape, -1), positions], -1)
        return features.astype(np.float32)


class ShapesText:
    """The encoder of captions of shapes. length, dim: L and D of the features."""

    length = LENGTH
    dim = DIM

    def __init__(self):
        self.window = Window(len(WORDS), LENGTH)
        self._index = {word: i for i, word in enumerate(WORDS)}

    def encode(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode B prompts to features float32 [B, L, D] and a mask float32 [B, L].

        The empty string is the null prompt. Raises UserError for a word outside the vocabulary and
        for a prompt of more than L - 1 words.
        """
        tokens, mask = prompts_lib.pad([self._ids(prompt) for prompt in prompts], LENGTH)
        return self.window(tokens), mask

    def _ids(self, prompt):
        ids = [self._index["<bos>"]] + [
            self._lookup(word, prompt) for word in prompt.lower().split()
        ]
        if len(ids) > LENGTH:
            raise UserError(
                f"prompt of {len(ids) - 1} words is too long for this model: use at most "
                f"{LENGTH - 1}: {prompt!r}"
            )
        return ids

    def _lookup(self, word, prompt):
        if word not in self._index or word.startswith("<"):
            known = ", ".join(w for w in WORDS if not w.startswith("<"))
            raise UserError(
                f"word {word!r} in prompt {prompt!r} is unknown to this model; it knows: {known}"
            )
        return self._index[word]


class WordsText:
    """The encoder of any caption: each word of letters and digits is hashed to one of 8190 tokens.

    length, dim: L and D of the features. Words after the first L - 1 are not read.
    """

    dim = DIM
    _TOKENS = 8192
    _FIRST = 2  # after padding and <bos>

    def __init__(self, length: int):
        self.length = length
        self.window = Window(self._TOKENS, length)

    def encode(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode B prompts to features float32 [B, L, D] and a mask float32 [B, L].

        The empty string is the null prompt.
        """
        tokens, mask = prompts_lib.pad([self._ids(prompt) for prompt in prompts], self.length)
        return self.window(tokens), mask

    def _ids(self, prompt):
        words = re.findall(r"\w+", prompt.lower())[: self.length - 1]
        return [1] + [
            self._FIRST + zlib.crc32(w.encode()) % (self._TOKENS - self._FIRST) for w in words
        ]


def prepare(
    encoder: ShapesText | WordsText, prompts: Sequence[str]
) -> list[tuple[int, dict[str, np.ndarray]]]:
    """Return one (length, {"text" [L, D], "mask" [L]}) per prompt.

    Raises UserError for an empty prompt.
    """
    for i, prompt in enumerate(prompts):
        if prompts_lib.is_blank(prompt):
            raise UserError(f"prompt {i} is empty: say what to draw, for example 'a red circle'")
    text, mask = encoder.encode(prompts)
    return [(encoder.length, {"text": text[i], "mask": mask[i]}) for i in range(len(prompts))]
