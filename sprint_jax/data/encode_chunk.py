"""The way of one chunk of examples from the source to records."""

import collections
import concurrent.futures
import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from sprint_jax.conditioning.detector import Lines
from sprint_jax.data import aspect_ratios, captioned
from sprint_jax.data.encode_settings import Encoders, Settings
from sprint_jax.encoders import prompts
from sprint_jax.errors import UserError
from sprint_jax.storage import crops

_TOLERATED = 3  # unusable examples that never stop the work, however few there are
_SHOWN = 10  # captions that were cut, warned about one by one


class Tally:
    """Counts unusable examples, and stops the work when they are too many.

    A chunk's examples count from its beginning, so that a few bad ones at its head do not stop it.
    share: of the examples, that may be unusable.
    """

    def __init__(self, share: float) -> None:
        self._share, self.bad, self._seen = share, 0, 0

    def begin(self, indices: Sequence[int]) -> None:
        """Count a chunk's examples as seen."""
        self._seen += len(indices)

    def count(self, key: str, reason: str) -> None:
        """Count an unusable example. Raises UserError if it is one too many."""
        self.bad += 1
        if self.bad > max(_TOLERATED, self._share * self._seen):
            raise UserError(
                f"{self.bad} of {self._seen} examples cannot be used, more than "
                f"--max_bad_share={self._share}; the last is {key}: {reason}. "
                "Repair the source or allow a larger share"
            )


@dataclasses.dataclass(kw_only=True)
class Chunk:
    """What has become of a chunk so far.

    keys, captions, rows, latents, controls: {index: value} of its examples, rows as the text
      encoder's `prepare` gives them.
    records: [(key, record)] in the order of the source.
    skipped: {index: (key, reason)}.
    cut: captions that were cut.
    """

    keys: dict[int, str] = dataclasses.field(default_factory=dict)
    captions: dict[int, str] = dataclasses.field(default_factory=dict)
    rows: dict[int, Any] = dataclasses.field(default_factory=dict)
    latents: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    controls: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    records: list[tuple[str, dict[str, np.ndarray]]] = dataclasses.field(default_factory=list)
    skipped: dict[int, tuple[str, str]] = dataclasses.field(default_factory=dict)
    cut: int = 0


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ChunkEncoder:
    """Encodes chunks.

    source: of `data.sources`. encoders, settings: see `data.encode_settings`.
    condition: lines for a ControlNet, None for none.
    batch: images, or captions, of a program run.
    pool: threads that read images ahead. tally: counts unusable examples.
    step: called as each example is read.
    """

    source: Any
    encoders: Encoders
    settings: Settings
    condition: Lines | None
    batch: int
    pool: concurrent.futures.Executor
    tally: Tally
    step: Callable[[], object]

    def run(self, indices: Sequence[int]) -> Chunk:
        """Return the records of the examples, and which were skipped.

        Raises UserError if too many are.
        """
        self.tally.begin(indices)
        made, waiting = Chunk(), {}
        for index, (example, ready) in zip(indices, self._ahead(indices), strict=True):
            self.step()
            if isinstance(ready, Exception):
                self._skip(made, index, self.source.key(index), str(ready))
                continue
            made.keys[index], made.captions[index] = example.key, example.caption
            if not self.prepare(made, index):
                continue
            if self._is_ready(example):
                self._keep(made.latents, made, index, ready, "latent")
                continue
            group = waiting.setdefault(ready.shape, {})
            group[index] = ready
            if len(group) == self.batch:
                self._encode(made, waiting.pop(ready.shape))
        for group in waiting.values():
            self._encode(made, group)
        self._record(made)
        return made

    def _record(self, made: Chunk) -> None:
        """Fill made.records with the examples that have both latents and text."""
        name = "text" if self.settings.text == "features" else "tokens"
        for index, text in sorted(self._texts(made).items()):
            caption = np.frombuffer(
                made.captions[index].encode("utf-8", "surrogateescape"), np.uint8
            )
            record = {"latent": made.latents[index], "caption": caption, name: text}
            if self.condition:
                record["control"] = made.controls[index]
            made.records.append((made.keys[index], record))

    def _ahead(self, indices: Sequence[int]) -> Iterator[tuple[Any, Any]]:
        """Yield `_load` of each index in order, read ahead in threads."""
        most, running = 2 * max(self.batch, os.cpu_count() or 1), collections.deque()
        for index in indices:
            running.append(self.pool.submit(self._load, index))
            if len(running) > most:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()

    def _load(self, index: int) -> tuple[Any, Any]:
        """Return (example or None, what is encoded next).

        That is an image uint8 [H, W, 3] of a bucket's size, a latent float16 [h, w, c] that the
        source brings, or a BadExample.
        """
        example, channels = None, self.encoders.pixels.channels
        try:
            example = self.source[index]
            if self._is_ready(example):
                if len(example.latent) != channels:
                    have = len(example.latent)
                    raise captioned.BadExample(
                        f"its latent has {have} channels, the encoder's have {channels}"
                    )
                return example, _half(example.latent.transpose(1, 2, 0))
            if example.image is None:
                raise captioned.BadExample("it has a latent and no image to make a condition of")
            image = captioned.decode_image(example.image)
            height, width = image.shape[:2]
            bucket = aspect_ratios.nearest_bucket(height, width, self.settings.sizes)
            return example, crops.fit_bicubic(image, *bucket)
        except captioned.BadExample as error:
            return example, error

    def _is_ready(self, example: Any) -> bool:
        """Return whether its own latent is taken.

        Not with a condition: both are then made of one cut of its image.
        """
        return example.latent is not None and not self.condition

    def _skip(self, made: Chunk, index: int, key: str, reason: str) -> None:
        made.skipped[index] = key, reason
        self.tally.count(key, reason)

    def _keep(
        self,
        kept: dict[int, np.ndarray],
        made: Chunk,
        index: int,
        array: np.ndarray,
        name: str,
    ) -> bool:
        """Set kept[index] to an array that is finite; return whether it is."""
        if np.isfinite(array).all():
            kept[index] = array
            return True
        self._skip(made, index, made.keys[index], f"its {name} is not finite in float16")
        return False

    def prepare(self, made: Chunk, index: int) -> bool:
        """Fill made.rows with what the text encoder makes of a caption; return whether it takes
        it.
        """
        key = made.keys[index]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                made.rows[index] = self.encoders.text.prepare([made.captions[index]])[0]
            except UserError as error:
                self._skip(made, index, key, str(error))
                return False
        # Of all threads: those that read images ahead have warnings of their own.
        cut = [
            warning.message
            for warning in caught
            if issubclass(warning.category, prompts.CutWarning)
        ]
        if cut:
            made.cut += 1
            if made.cut <= _SHOWN:
                warnings.warn(f"{key}: {cut[0]}", stacklevel=1)
        return True

    def _encode(self, made: Chunk, group: dict[int, np.ndarray]) -> None:
        """Encode waiting images of one size, and their lines if a condition is asked for."""
        images, controls = np.stack(list(group.values())), {}
        if self.condition:
            keys = [made.keys[index] for index in group]
            drawn = self.condition.draw(images, keys, self.pool.map)
            controls = dict(zip(group, self._latents(drawn), strict=True))
        for index, latent in zip(group, self._latents(images), strict=True):
            # The condition first: `latents` says which examples are whole.
            if index in controls and not self._keep(
                made.controls, made, index, controls[index], "condition"
            ):
                continue
            self._keep(made.latents, made, index, latent, "latent")

    def _latents(self, images: np.ndarray) -> np.ndarray:
        """Encode uint8 [B, H, W, 3] to float16 [B, h, w, c].

        The batch is filled up, so that one program serves all.
        """
        count = len(images)
        images = np.concatenate([images, np.repeat(images[-1:], self.batch - count, 0)])
        latents = self.encoders.pixels.encode(self.encoders.params["pixels"], images)
        return _half(np.asarray(latents)[:count])

    def _texts(self, made: Chunk) -> dict[int, np.ndarray]:
        """Return {index: text without padding} of the examples that have latents.

        A text is float16 [L, D] or, for tokens, int32 [L].
        """
        indices, texts = sorted(made.latents), {}
        rows = [made.rows[index] for index in indices]
        if self.settings.text == "tokens":
            return {
                i: arrays["tokens"][arrays["mask"] > 0]
                for i, (_, arrays) in zip(indices, rows, strict=True)
            }
        for _, chosen, _, arrays in prompts.batches(rows, self.batch):
            features, mask = map(np.asarray, self._features(self.encoders.params["text"], arrays))
            for row, place in enumerate(chosen):
                self._keep(texts, made, indices[place], _half(features[row][mask[row] > 0]), "text")
        return texts

    @functools.cached_property
    def _features(self) -> Callable[..., Any]:
        return jax.jit(self.encoders.text.features)


def _half(array: np.ndarray) -> np.ndarray:
    """Return float16; what is too large becomes infinite and is then refused."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, np.float16)
