"""The embedded text encoder: frozen, seeded, a few kilobytes, no download.

It stands where Gemma-2 stands for the published models: prompts in, features [B, L, D] and a mask [B, L]
out. A token's feature holds its own word and the six words on either side, each by a fixed random vector of
that word at that distance (so a noun carries its adjective and the relation it stands in), and its position.
"""

import numpy as np

from sprint_jax.data import shapes
from sprint_jax.errors import UserError

WORDS = (
    "<pad>", "<bos>", "a", "of", "on", "background", "left", "right", "above", "below",
    *shapes.NUMBERS, *shapes.COLOURS, *shapes.SHAPES, *(s + "s" for s in shapes.SHAPES),
)  # fmt: skip
LENGTH = 16
_REACH = 6
_WORD_DIM, _POSITION_DIM = 16, 16
DIM = (2 * _REACH + 1) * _WORD_DIM + _POSITION_DIM
_SEED = 20251


def _tables():
    """Vectors of each word at each distance [2 REACH + 1, words, WORD_DIM], and of positions [L, POSITION_DIM]."""
    # RandomState: the one NumPy generator whose streams are frozen for good.
    rng = np.random.RandomState(_SEED)
    return rng.randn(2 * _REACH + 1, len(WORDS), _WORD_DIM), rng.randn(LENGTH, _POSITION_DIM)


class ShapesText:
    """Encoder of `shapes` captions.

    length, dim: L and D of the features.
    """

    length = LENGTH
    dim = DIM

    def __init__(self):
        self._words, self._positions = _tables()
        self._index = {word: i for i, word in enumerate(WORDS)}

    def encode(self, prompts):
        """list of B strings -> features float32 [B, L, D], mask float32 [B, L].

        The empty string is the null prompt. Raises UserError for a word outside the vocabulary and for a
        prompt of more than L - 1 words.
        """
        tokens = np.zeros((len(prompts), LENGTH), np.int32)
        mask = np.zeros((len(prompts), LENGTH), np.float32)
        for row, prompt in enumerate(prompts):
            ids = [self._index["<bos>"]] + [self._lookup(word, prompt) for word in prompt.lower().split()]
            if len(ids) > LENGTH:
                raise UserError(
                    f"prompt of {len(ids) - 1} words is too long for this model: use at most {LENGTH - 1}: {prompt!r}"
                )
            tokens[row, : len(ids)] = ids
            mask[row, : len(ids)] = 1
        return self._features(tokens), mask

    def _lookup(self, word, prompt):
        if word not in self._index or word.startswith("<"):
            known = ", ".join(w for w in WORDS if not w.startswith("<"))
            raise UserError(f"word {word!r} in prompt {prompt!r} is unknown to this model; it knows: {known}")
        return self._index[word]

    def _features(self, tokens):
        words = np.zeros((*tokens.shape, 2 * _REACH + 1, _WORD_DIM))
        for k, distance in enumerate(range(-_REACH, _REACH + 1)):
            here = slice(max(0, -distance), LENGTH - max(0, distance))
            there = slice(max(0, distance), LENGTH - max(0, -distance))
            seen = tokens[:, there]
            words[:, here, k] = self._words[k][seen] * (seen != 0)[..., None]  # padding says nothing
        positions = np.broadcast_to(self._positions, (len(tokens), *self._positions.shape))
        features = np.concatenate([words.reshape(*tokens.shape, -1), positions], -1)
        return features.astype(np.float32)
