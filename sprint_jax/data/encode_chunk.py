"""Encoding one chunk of examples as records."""

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
from sprint_jax.data.captioned import Example, Source
from sprint_jax.data.encode_settings import Encoders, Settings
from sprint_jax.encoders import prompts
from sprint_jax.errors import UserError
from sprint_jax.storage import crops

_TOLERATED = 3  # unusable examples that never stop the work, even among few
_SHOWN = 10  # maximum number of warnings about truncated captions


class Tally:
    """A count of unusable examples, which stops the work when there are too many.

    All examples of a chunk count when it starts. A few bad ones at its beginning therefore do not
    stop the work.

    bad: number of unusable examples.
    """

    def __init__(self, share: float) -> None:
        """Start counting. share: fraction of the examples that may be unusable."""
        self._share, self.bad, self._seen = share, 0, 0

    def begin(self, indices: Sequence[int]) -> None:
        """Count a chunk's examples as seen."""
        self._seen += len(indices)

    def count(self, key: str, reason: str) -> None:
        """Count an unusable example. Raises UserError if there are too many."""
        self.bad += 1
        if self.bad > max(_TOLERATED, self._share * self._seen):
            raise UserError(
                f"{self.bad} of {self._seen} examples cannot be used, more than "
                f"--max_bad_share={self._share}; the last is {key}: {reason}. Repair the source or "
                "allow a larger share"
            )


@dataclasses.dataclass(kw_only=True)
class Chunk:
    """The state of a chunk in work. Dicts have the indices of examples as keys."""

    keys: dict[int, str] = dataclasses.field(default_factory=dict)
    captions: dict[int, str] = dataclasses.field(default_factory=dict)
    # The captions as the text encoder's `prepare` returns them.
    rows: dict[int, Any] = dataclasses.field(default_factory=dict)
    latents: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    controls: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    # (key, record), in the order of the source.
    records: list[tuple[str, dict[str, np.ndarray]]] = dataclasses.field(default_factory=list)
    skipped: dict[int, tuple[str, str]] = dataclasses.field(default_factory=dict)  # (key, reason)
    cut: int = 0  # number of truncated captions


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ChunkEncoder:
    """An encoder of chunks."""

    source: Source
    encoders: Encoders
    settings: Settings
    condition: Lines | None  # the lines for a ControlNet
    batch: int  # number of images, or captions, that are encoded at a time
    pool: concurrent.futures.Executor  # threads that read images ahead
    tally: Tally
    step: Callable[[], object]  # called when an example was read

    def run(self, indices: Sequence[int]) -> Chunk:
        """Encode examples. Returns their records, and which examples were skipped.

        Raises UserError if too many are skipped.
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
            if self._own_latent(example) is not None:
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
        limit, running = 2 * max(self.batch, os.cpu_count() or 1), collections.deque()
        for index in indices:
            running.append(self.pool.submit(self._load, index))
            if len(running) > limit:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()

    def _load(self, index: int) -> tuple[Any, Any]:
        """Read an example. Returns (example or None, image or latent or error).

        The second is an image of the size of a bucket, uint8 [H, W, 3]; a latent of the source,
        float16 [h, w, c]; or a BadExample.
        """
        example, channels = None, self.encoders.pixels.channels
        try:
            example = self.source[index]
            latent = self._own_latent(example)
            if latent is not None:
                if len(latent) != channels:
                    raise captioned.BadExample(
                        f"its latent has {len(latent)} channels, the encoder's have {channels}"
                    )
                return example, _half(latent.transpose(1, 2, 0))
            if example.image is None:
                raise captioned.BadExample("it has a latent and no image to make a condition of")
            image = captioned.decode_image(example.image)
            height, width = image.shape[:2]
            bucket = aspect_ratios.nearest_bucket(height, width, self.settings.sizes)
            return example, crops.fit_bicubic(image, *bucket)
        except captioned.BadExample as error:
            return example, error

    def _own_latent(self, example: Example) -> np.ndarray | None:
        """Return the latent of the example itself, or None if its image is to be encoded.

        With a condition the image is encoded, because latent and condition must come from the same
        crop of it.
        """
        return None if self.condition else example.latent

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
        """Set kept[index] to an array if it is finite, else skip the example.

        Returns whether it is finite. name: of the array, for the reason.
        """
        if np.isfinite(array).all():
            kept[index] = array
            return True
        self._skip(made, index, made.keys[index], f"its {name} is not finite in float16")
        return False

    def prepare(self, made: Chunk, index: int) -> bool:
        """Prepare a caption for the text encoder, in made.rows. Returns False if it is skipped."""
        key = made.keys[index]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                made.rows[index] = self.encoders.text.prepare([made.captions[index]])[0]
            except UserError as error:
                self._skip(made, index, key, str(error))
                return False
        # Warnings of all threads arrive here. Those that read images ahead have other categories.
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
        """Encode images of one size, and with a condition also their lines."""
        images, controls = np.stack(list(group.values())), {}
        if self.condition:
            keys = [made.keys[index] for index in group]
            drawn = self.condition.draw(images, keys, self.pool.map)
            controls = dict(zip(group, self._latents(drawn), strict=True))
        for index, latent in zip(group, self._latents(images), strict=True):
            # The condition comes first, because `latents` tells which examples are complete.
            if index in controls and not self._keep(
                made.controls, made, index, controls[index], "condition"
            ):
                continue
            self._keep(made.latents, made, index, latent, "latent")

    def _latents(self, images: np.ndarray) -> np.ndarray:
        """Encode images, uint8 [B, H, W, 3], as float16 [B, h, w, c].

        The batch is padded to its full size, so that one program serves all batches.
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
    """Convert to float16. Values that are too large become infinite, and `_keep` rejects them."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, np.float16)
