"""What a data set is encoded with, and the settings that its folder keeps to."""

import dataclasses
import hashlib
import json
from typing import Any

from sprint_jax.data import encoded


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Encoders:
    """What makes a record of an example.

    pixels, text: the autoencoder and the text encoder (`encoders.parts`).
    params: their parameters, {"pixels", "text"}.
    identity: names both and what is in them.
    side: pixels of the square image that is made unless sizes are given.
    """

    pixels: Any
    text: Any
    params: dict[str, Any]
    identity: str
    side: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides about the bytes of a data set; a folder keeps to its own.

    source, encoder: identities. examples: in the source.
    text: "features" or "tokens". caption_field: of the source.
    sizes: of images, ((height, width), ...).
    heldout: about how many examples are held out.
    shard_records: examples in a chunk.
    condition: identity of the `detector.Lines`, or "none".
    """

    source: str
    encoder: str
    examples: int
    text: str
    caption_field: str
    sizes: tuple[tuple[int, int], ...]
    heldout: int
    shard_records: int
    condition: str

    def plain(self) -> dict[str, Any]:
        """Return the fields as JSON gives them back.

        A condition "none" is left out, so that folders from before there were any still resume.
        """
        fields = json.loads(json.dumps(dataclasses.asdict(self)))
        return {
            name: value
            for name, value in fields.items()
            if (name, value) != ("condition", encoded.NO_CONDITION)
        }

    def digest(self) -> str:
        """Return a hash of all settings, 64 hex digits."""
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True).encode()).hexdigest()

    @property
    def chunks(self) -> int:
        """The number of chunks."""
        return -(-self.examples // self.shard_records)

    def indices(self, chunk: int) -> range:
        """Return the indices of a chunk's examples."""
        first = chunk * self.shard_records
        return range(first, min(self.examples, first + self.shard_records))

    def split(self, key: str) -> str:
        """Return the split of an example by its name.

        Neither order nor hosts nor other examples matter, only how many there are.
        """
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        drawn = int.from_bytes(digest[:8], "big") / 2**64
        return "heldout" if drawn < self.heldout / self.examples else "train"
