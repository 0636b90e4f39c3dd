"""The encoders and the settings of an encoded data set."""

import dataclasses
import json
from typing import Any

from sprint_jax.data import encoded
from sprint_jax.storage import digests, json_files


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Encoders:
    """The encoders that turn an example into a record."""

    pixels: Any  # `encoders.pixels.PixelCodec`
    text: Any  # `encoders.text.TextEncoder`
    params: dict[str, Any]  # their parameters, {"pixels", "text"}
    identity: str  # names both encoders and the values of their parameters
    side: int  # of the square images that are made without --sizes, in pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings that determine the bytes of a data set. A folder never changes its settings."""

    source: str  # identity of the source
    encoder: str  # identity of the encoders
    examples: int  # number of examples of the source
    text: str  # "features" or "tokens"
    caption_field: str  # field of the source that holds captions
    sizes: tuple[tuple[int, int], ...]  # (height, width) of images
    heldout: int  # approximate number of held-out examples
    shard_records: int  # number of examples in a chunk
    condition: str  # identity of the `detector.Lines`, or "none"

    def plain(self) -> dict[str, Any]:
        """Return the fields as JSON values.

        The condition "none" is omitted, so that folders without this field still resume.
        """
        fields = json_files.plain(dataclasses.asdict(self))
        return {
            name: value
            for name, value in fields.items()
            if (name, value) != ("condition", encoded.NO_CONDITION)
        }

    def digest(self) -> str:
        """Return a hash of all settings, 64 hex digits."""
        return digests.hash_text(json.dumps(self.plain(), sort_keys=True))

    @property
    def chunks(self) -> int:
        """The number of chunks of the source."""
        return -(-self.examples // self.shard_records)

    def indices(self, chunk: int) -> range:
        """Return the indices of a chunk's examples."""
        first = chunk * self.shard_records
        return range(first, min(self.examples, first + self.shard_records))

    def split(self, key: str) -> str:
        """Draw the split of an example from its key.

        The result depends only on the key, `heldout` and the number of examples.
        """
        drawn = digests.draw_integer(key) / 2**64
        return "heldout" if drawn < self.heldout / self.examples else "train"
