"""Prompts of the published models to Gemma tokens: the instruction, the window and its odd
arithmetic.

The published pipeline tokenizes instruction + prompt, pads on the right to n + 300 - 2 tokens,
where n is the length of the instruction alone, and keeps position 0 and the last 299 of the hidden
states. The instruction ends in a space that merges with the prompt's first word, so of its n
tokens n - 1 are the same for every prompt: that is the prefix whose keys and values are computed
once.
"""

import unicodedata
import warnings
from collections.abc import Iterator, Sequence

import numpy as np

from sprint_jax.errors import UserError

WINDOW = 300
BOS = 2
# Prompts are padded to the next of these lengths, so that a few programs serve all. WINDOW - 1
# with the instruction (the first token's state comes with the prefix), WINDOW without.
_BUCKETS = (15, 31, 63, 127, WINDOW - 1, WINDOW)


# Letters and symbols without ink: joiners, fillers of Hangul and Khmer, the blank of Braille.
_NO_INK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")


def is_blank(text: str) -> bool:
    """Return whether a text shows nothing.

    It is empty, or holds only spaces, characters of zero width, and variation selectors.
    """
    return all(
        character.isspace()
        or unicodedata.category(character) in ("Cf", "Zs", "Zl", "Zp")
        or character in _NO_INK
        or unicodedata.name(character, "").startswith("VARIATION SELECTOR")
        for character in text
    )


class CutWarning(UserWarning):
    """Warns of a prompt that is longer than the model reads."""


class EmptyWarning(UserWarning):
    """Says that an empty prompt draws the unconditional image."""


class GemmaPrompts:
    """The tokens of prompts under one instruction.

    instruction: the text. prefix: int32 [P], the tokens that all prompts share; empty without an
    instruction. truncation_side: "right" or "left", where a prompt that is too long is cut.
    takes_empty: an empty prompt is the unconditional one, as in diffusers.
    """

    takes_empty = True

    def __init__(self, tokenizer, instruction: str):
        """Prepare prompts with a transformers fast tokenizer that puts <bos> first.

        instruction: the text before each prompt, "" for none. Raises UserError for a tokenizer that
        adds other tokens than <bos>.
        """
        self._tokenizer, self.instruction = tokenizer, instruction
        self.truncation_side = getattr(tokenizer, "truncation_side", "right")
        start = self._ids(instruction)
        if not start or start[0] != BOS:
            raise UserError(
                f"the tokenizer begins a text with token {start[:1]}, not with <bos> ({BOS}): this "
                "is not Gemma's tokenizer as SANA uses it (add_bos_token must be true)"
            )
        if self._ids("a")[1:] != tokenizer("a", add_special_tokens=False)["input_ids"]:
            raise UserError(
                "the tokenizer puts tokens behind a text: this is not Gemma's tokenizer as SANA "
                "uses it (add_eos_token must be false)"
            )
        self.prefix = np.array(start[:-1] if instruction else [], np.int32)

    def tokenizer_json(self) -> str:
        """Return the tokenizer as the tokenizers package reads it, with transformers' settings."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(
                "the model's tokenizer has no tokenizer.json form: download the folder's "
                "tokenizer.json"
            )
        return backend.to_str()

    @property
    def room(self) -> int:
        """Most tokens of a prompt that are read, after the prefix."""
        return WINDOW - 1 if len(self.prefix) else WINDOW

    def prepare(self, prompts: Sequence[str]) -> list[tuple[int, dict[str, np.ndarray]]]:
        """Return one (padded length, {"tokens" int32 [length], "mask" float32 [length]}) per
        prompt.
        """
        rows = []
        for ids in self.tokens(prompts):
            length = bucket(len(ids))
            tokens, mask = pad([ids], length)
            rows.append((length, {"tokens": tokens[0], "mask": mask[0]}))
        return rows

    def _ids(self, text):
        return self._tokenizer(text, add_special_tokens=True)["input_ids"]

    def tokens(self, prompts: Sequence[str]) -> list[np.ndarray]:
        """Return an int32 array per prompt: its tokens after the prefix, cut to the window.

        Prompts are lower-cased and stripped, as the published pipeline does. One that is too long
        is cut, with a warning that shows what was lost. An empty one draws a warning.

        Raises UserError for a prompt that cannot be tokenized, or is too long for a tokenizer that
        would cut the instruction.
        """
        return [self._one(i, prompt) for i, prompt in enumerate(prompts)]

    def _one(self, index, prompt):
        text = "" if is_blank(prompt) else prompt.lower().strip()
        if any(0xD800 <= ord(character) < 0xE000 for character in text):
            raise UserError(
                f"prompt {index} holds half of a surrogate pair, which is no character: give it in "
                f"UTF-8"
            )
        if not text:
            warnings.warn(
                f"prompt {index} is empty: it draws the unconditional image, as in diffusers",
                EmptyWarning,
                stacklevel=3,
            )
        ids = self._ids(self.instruction + text)
        start = len(self.prefix)
        if ids[:start] != self.prefix.tolist():
            raise UserError(
                f"prompt {index} begins with characters that merge with the instruction: begin "
                f"with a letter"
            )
        return np.array(self._cut(index, ids[start:]), np.int32)

    def _cut(self, index, ids):
        """Return the tokens after the prefix, without those that the model does not read."""
        room = self.room
        if len(ids) <= room:
            return ids
        if self.truncation_side == "right":
            kept, lost = ids[:room], ids[room:]
        elif len(self.prefix):
            raise UserError(
                f"prompt {index} has {len(ids)} tokens and the model reads {room}: its tokenizer "
                "cuts on the left (truncation_side=left), where the instruction is: shorten the "
                "prompt"
            )
        else:
            end = len(ids) - (room - 1)  # <bos> stays
            kept, lost = ids[:1] + ids[end:], ids[1:end]
        text = self._tokenizer.decode(lost)
        shown = text if len(text) <= 80 else text[:77] + "..."
        warnings.warn(
            f"prompt {index} has {len(ids)} tokens and the model reads {room}: cut off {shown!r}",
            CutWarning,
            stacklevel=4,
        )
        return kept


def buckets(longest: int) -> list[int]:
    """Return all padded lengths of prompts of 0 to `longest` tokens."""
    return sorted({bucket(length) for length in range(longest + 1)})


def bucket(length: int) -> int:
    """Return the padded length of a prompt of `length` tokens."""
    return next(b for b in _BUCKETS if length <= b)


def pad(ids: Sequence[Sequence[int] | np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Pad B rows of tokens with 0: int32 [B, length], and their mask float32 [B, length]."""
    tokens, mask = np.zeros((len(ids), length), np.int32), np.zeros((len(ids), length), np.float32)
    for row, one in enumerate(ids):
        tokens[row, : len(one)] = one
        mask[row, : len(one)] = 1
    return tokens, mask


def batches(
    rows: Sequence[tuple[int, dict[str, np.ndarray]]], size: int
) -> Iterator[tuple[int, list[int], list[int], dict[str, np.ndarray]]]:
    """Group prepared prompts of equal shape, `size` at a time.

    rows: [(key, arrays)]. Yields (key, indices, the same padded to `size`, arrays stacked in that
    order). A prompt's company never changes its shapes, so it never changes its image.
    """
    by_key = {}
    for i, (key, _) in enumerate(rows):
        by_key.setdefault(key, []).append(i)
    for key, indices in by_key.items():
        for start in range(0, len(indices), size):
            part = indices[start : start + size]
            padded = part + [part[-1]] * (size - len(part))
            arrays = [rows[i][1] for i in padded]
            yield (
                key,
                part,
                padded,
                {name: np.stack([a[name] for a in arrays]) for name in arrays[0]},
            )
