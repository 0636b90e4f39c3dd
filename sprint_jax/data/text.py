"""The embedded text encoder: frozen, seeded, a few kilobytes, no download.

It stands where Gemma-2 stands for the published models: prompts in, features [B, L, D] and a mask [B, L]
out. A token's feature is a fixed mixture of its own word, exponentially fading memories of the words before
and after it (so a noun carries its adjective and the relation it stands in) and its position.
"""

import numpy as np

from sprint_jax.data import shapes
from sprint_jax.errors import UserError

WORDS = (
    "<pad>", "<bos>", "a", "of", "on", "background", "left", "right", "above", "below",
    *shapes.NUMBERS, *shapes.COLOURS, *shapes.SHAPES, *(s + "s" for s in shapes.SHAPES),
)  # fmt: skip
LENGTH = 16
_WORD_DIM, _POSITION_DIM = 32, 16
DIM = 3 * _WORD_DIM + _POSITION_DIM
_MEMORY = 0.7
_SEED = 20251


def _tables():
    # RandomState: the one NumPy generator whose streams are frozen for good.
    rng = np.random.RandomState(_SEED)
    words = rng.randn(len(WORDS), _WORD_DIM)
    positions = rng.randn(LENGTH, _POSITION_DIM)
    mixing, _ = np.linalg.qr(rng.randn(DIM, DIM))
    return words, positions, mixing


class ShapesText:
    """Encoder of `shapes` captions.

    length, dim: L and D of the features.
    """

    length = LENGTH
    dim = DIM

    def __init__(self):
        self._words, self._positions, self._mixing = _tables()
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
        words = self._words[tokens]
        positions = np.broadcast_to(self._positions, (len(tokens), *self._positions.shape))
        real = (tokens != 0)[..., None]  # padding leaves no memory
        before = _memory(words * real)
        after = _memory((words * real)[:, ::-1])[:, ::-1]
        features = np.concatenate([words, before, after, positions], -1) @ self._mixing
        return features.astype(np.float32)


def _memory(words):
    """Fading sum over the words before each one, itself left out. [B, L, W] -> [B, L, W]."""
    memory = np.zeros_like(words)
    for i in range(1, words.shape[1]):
        memory[:, i] = _MEMORY * (memory[:, i - 1] + words[:, i - 1])
    return memory
