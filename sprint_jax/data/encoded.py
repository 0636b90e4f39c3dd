"""Encoded data sets: folders with latents and text in array_record shards.

    DIR/manifest.json
    DIR/train-00000.array_record …
    DIR/heldout-00000.array_record …
    DIR/null.safetensors

A record is a safetensors blob of
    latent   float16 [h, w, c] at unit scale
    caption  uint8, its UTF-8 bytes
    text     float16 [L, D], features without padding; or instead tokens, int32 [L]
    control  float16 [h, w, c], the encoded condition image, if the manifest names a "condition"

null.safetensors holds the features of the null prompt at full length: text float32 [L, D] and mask
float32 [L]. It includes padding, because the published trainer reads it under the mask of another
prompt.

A bucket is one latent size. The records of a shard are sorted by bucket. The counts in the manifest
therefore give the place of every record, and an epoch can be planned without opening records.
"""

import collections
import os
import pathlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import safetensors
import safetensors.numpy

from sprint_jax.conditioning import sketches
from sprint_jax.errors import UserError
from sprint_jax.storage import digests, files, json_files

MANIFEST = "manifest.json"
NULL = "null.safetensors"
FORMAT = 1
SPLITS = ("train", "heldout")
# {kind of text in the manifest: its name in a record}
KINDS = {"features": "text", "tokens": "tokens"}
SUFFIX = ".array_record"
NO_CONDITION = "none"  # a manifest without "condition" means the same

Manifest: TypeAlias = dict[str, Any]  # as in manifest.json, with "condition" always present
Record: TypeAlias = dict[str, np.ndarray]

_SKIPPED_LISTED = 1000  # maximum number of skipped examples in a manifest
# Latents do not compress; uncompressed records read more than twice as fast.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0"  # records are read one by one, in random order
_READER_BUFFER = 32768  # bytes read from the file at once
# Maximum number of open readers. Each has a file handle, and many systems allow 1024 of them.
# Opening a reader again takes 0.1 ms.
_OPEN = 256

_FIELDS = {
    "model": str,
    "source": str,
    "text": str,
    "text_dim": int,
    "text_length": int,
    "channels": int,
    "factor": int,
    "shards": list,
    "counts": dict,
    "skipped": list,
}
_SHARD_FIELDS = {
    "file": str,
    "split": str,
    "records": int,
    "bytes": int,
    "sha256": str,
    "buckets": dict,
}


class BadRecord(Exception):
    """A record that cannot be used. The message is the reason."""


def bucket_name(shape: Sequence[int]) -> str:
    """Return the name of a latent size in manifests: "32x24" for (32, 24) or (32, 24, c)."""
    return f"{shape[0]}x{shape[1]}"


def write_shard(path: str | os.PathLike[str], records: Iterable[Mapping[str, np.ndarray]]) -> dict:
    """Write a shard atomically. Equal records give equal bytes.

    path: DIR/SPLIT-NUMBER.array_record. records: as described in this module, in any order. Records
    of one bucket keep their order.
    Returns the entry of the shard in the manifest.
    """
    from array_record.python import (
        array_record_module,  # pyright: ignore[reportAttributeAccessIssue]
    )

    path = pathlib.Path(path)
    records = sorted(records, key=lambda record: record["latent"].shape)
    with files.whole(path) as partial:
        writer = array_record_module.ArrayRecordWriter(str(partial), _WRITER_OPTIONS)
        try:
            for record in records:
                writer.write(
                    safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in record.items()})
                )
        finally:
            writer.close()
        digest = digests.hash_file(partial)
        size = partial.stat().st_size
    buckets = collections.Counter(bucket_name(record["latent"].shape) for record in records)
    return {
        "file": path.name,
        "split": path.name.split("-")[0],
        "records": len(records),
        "bytes": size,
        "sha256": digest,
        "buckets": dict(buckets),
    }


def write_manifest(
    path: str | os.PathLike[str],
    described: Mapping[str, Any],
    shards: Sequence[Mapping[str, Any]],
    skipped: Sequence[Mapping[str, Any]] = (),
    skipped_count: int | None = None,
) -> None:
    """Write a manifest atomically.

    Args:
      path: the file.
      described: {"model", "source", "text", "text_dim", "text_length", "channels", "factor"}, and
        "condition", one of `sketches.KINDS`, if records hold one.
      shards: entries from `write_shard`.
      skipped: [{"key", "reason"}] of examples that could not be used.
      skipped_count: their number, if `skipped` does not list all.
    """
    counts = {split: sum(s["records"] for s in shards if s["split"] == split) for split in SPLITS}
    counts["skipped"] = len(skipped) if skipped_count is None else skipped_count
    manifest = {"format": FORMAT, **described, "counts": counts, "shards": list(shards)}
    manifest["skipped"] = list(skipped)[:_SKIPPED_LISTED]
    json_files.write(path, manifest, indent=1)


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of a folder, and check that every shard is complete.

    "condition" is always present: "none" if records hold none. Raises UserError if the manifest is
    missing or damaged, or a shard is missing or of another size.
    """
    folder = pathlib.Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(
            f"no {path}: give a folder made by sprint-jax encode; if that command was interrupted, "
            "run it again to finish"
        )
    try:
        manifest = json_files.read(path)
        if manifest["format"] != FORMAT:
            raise UserError(
                f"{path} has format {manifest['format']!r}, this version reads {FORMAT}: encode "
                "again with this version"
            )
        manifest.setdefault("condition", NO_CONDITION)
        _check(manifest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}): run its sprint-jax encode "
            "command again"
        ) from None
    again = (
        "copy the folder again, or run its sprint-jax encode command again, which writes missing "
        "shards"
    )
    for shard in manifest["shards"]:
        file = folder / shard["file"]
        try:
            size = file.stat().st_size
        except OSError as error:
            raise UserError(f"cannot find the shard {file} ({error.strerror}): {again}") from None
        if size != shard["bytes"]:
            raise UserError(
                f"the shard {file} has {size} bytes, {MANIFEST} says {shard['bytes']}: {again}"
            )
    return manifest


def _check(manifest: Manifest) -> None:
    """Raise ValueError, KeyError or TypeError for a damaged manifest."""
    for fields, tree in [
        (_FIELDS, manifest),
        *((_SHARD_FIELDS, shard) for shard in manifest["shards"]),
    ]:
        for name, kind in fields.items():
            if type(tree[name]) is not kind:
                raise ValueError(f"{name} is {tree[name]!r}, not of type {kind.__name__}")
    if manifest["text"] not in KINDS:
        raise ValueError(f"text is {manifest['text']!r}, not one of {', '.join(KINDS)}")
    if manifest["condition"] not in (NO_CONDITION, *sketches.KINDS):
        raise ValueError(
            f"condition is {manifest['condition']!r}, not one of {', '.join(sketches.KINDS)}"
        )
    for shard in manifest["shards"]:
        if sum(shard["buckets"].values()) != shard["records"]:
            raise ValueError(
                f"{shard['file']} has {shard['records']} records and buckets {shard['buckets']}"
            )
        for name in shard["buckets"]:
            _parse_bucket(name)


def _parse_bucket(name: str) -> tuple[int, int]:
    """Return (h, w); the inverse of `bucket_name`."""
    height, width = map(int, name.split("x"))
    return height, width


class Encoded:
    """One split of an encoded data set, for random access from any number of threads.

    It pickles as its path and split, so that worker processes open their own files.

    manifest: as `read_manifest` returns it.
    buckets: the latent sizes [(h, w)], sorted.
    bucket_of: int16 [N], the position in `buckets` of each example.
    """

    def __init__(self, path: str | os.PathLike[str], split: str):
        """Open a split, "train" or "heldout". Raises UserError unless the data set is complete."""
        if split not in SPLITS:
            raise UserError(f"split {split!r}: use one of {', '.join(SPLITS)}")
        self.path, self.split = pathlib.Path(path), split
        self.manifest = read_manifest(self.path)
        shards = [shard for shard in self.manifest["shards"] if shard["split"] == split]
        names = [name for shard in shards for name in shard["buckets"]]
        self.buckets = sorted({_parse_bucket(name) for name in names})
        ids = [self.buckets.index(_parse_bucket(name)) for name in names]
        counts = [count for shard in shards for count in shard["buckets"].values()]
        self.bucket_of = np.repeat(np.array(ids, np.int16), np.array(counts, np.int64))
        self._files = [shard["file"] for shard in shards]
        self._starts = np.cumsum([0] + [shard["records"] for shard in shards])
        self._kind = KINDS[self.manifest["text"]]
        controlled = self.manifest["condition"] != NO_CONDITION
        self._latents = ("latent", "control") if controlled else ("latent",)
        self._readers: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self):
        return Encoded, (self.path, self.split)

    def __len__(self) -> int:
        return len(self.bucket_of)

    def read(self, index: int) -> Record:
        """Read example `index`.

        Returns {"latent" float32 [h, w, c], "caption" uint8 [n], and "text" float16 [L, D] or
        "tokens" int32 [L]}. If the manifest names a condition, "control" is like "latent".
        Raises BadRecord if the record is damaged, not finite, or not as the manifest says.
        """
        shard = int(np.searchsorted(self._starts, index, "right")) - 1
        try:
            blob = self._reader(shard).read([int(index - self._starts[shard])])[0]
            record = safetensors.numpy.load(blob)
        except (RuntimeError, ValueError, OSError, KeyError, safetensors.SafetensorError) as error:
            raise BadRecord(f"cannot be read ({error})") from None
        bucket = self.buckets[self.bucket_of[index]]
        self._check_record(record, (*bucket, self.manifest["channels"]))
        return record | {name: record[name].astype(np.float32) for name in self._latents}

    def describe(self, index: int) -> str:
        """Return the shard of an example and its place in it, for messages."""
        shard = int(np.searchsorted(self._starts, index, "right")) - 1
        return f"record {index - self._starts[shard]} of {self.path / self._files[shard]}"

    def _check_record(self, record: Record, shape: tuple[int, ...]) -> None:
        """Raise BadRecord unless a record is as the manifest says. shape: of its latent."""
        if record.keys() != {*self._latents, "caption", self._kind}:
            raise BadRecord(
                f"holds {sorted(record)}, not {', '.join(self._latents)}, caption and {self._kind}"
            )
        for name in self._latents:
            latent = record[name]
            if latent.dtype != np.float16 or latent.shape != shape:
                raise BadRecord(f"has a {name} {latent.dtype} {latent.shape}, not float16 {shape}")
        text = record[self._kind]
        has_features = self._kind == "text"
        width = (self.manifest["text_dim"],) if has_features else ()
        dtype = np.dtype(np.float16 if has_features else np.int32)
        length = self.manifest["text_length"]
        if text.dtype != dtype or text.shape[1:] != width or len(text) > length:
            raise BadRecord(
                f"has {self._kind} {text.dtype} {text.shape}, not {dtype} of at most "
                f"{(length, *width)}"
            )
        numbers = [record[name] for name in self._latents]
        if not all(map(is_finite, [*numbers, text] if has_features else numbers)):
            raise BadRecord("is not finite")

    def _reader(self, shard: int) -> Any:
        """Return an open reader of a shard.

        The reader that was unused for longest leaves the cache, and closes when no thread uses it.
        """
        from array_record.python import (
            array_record_module,  # pyright: ignore[reportAttributeAccessIssue]
        )

        with self._lock:
            if shard in self._readers:
                self._readers.move_to_end(shard)
                return self._readers[shard]
        reader = array_record_module.ArrayRecordReader(
            str(self.path / self._files[shard]),
            options=_READER_OPTIONS,
            file_reader_buffer_size=_READER_BUFFER,
        )
        with self._lock:
            self._readers[shard] = reader
            while len(self._readers) > _OPEN:
                self._readers.popitem(last=False)
        return reader


def is_finite(array: np.ndarray) -> bool:
    """Return whether all elements of a float16 array are finite.

    It checks the exponent bits, which is many times faster than np.isfinite.
    """
    return not ((array.view(np.uint16) & 0x7C00) == 0x7C00).any()
