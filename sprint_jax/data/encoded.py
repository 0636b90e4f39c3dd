"""Encoded data sets: array_record shards of latents and text in one folder, and what is in them.

    DIR/manifest.json   DIR/train-00000.array_record …   DIR/heldout-00000.array_record …   DIR/null.safetensors

A record is a safetensors blob of
    latent   float16 [h, w, c] at unit scale
    caption  uint8, its UTF-8 bytes
    text     float16 [L, D], features at their true length, or tokens int32 [L]
    control  float16 [h, w, c], the picture of its lines encoded alike, where the manifest names a "condition"

null.safetensors holds the null prompt, as the text encoder makes it at its full length: text float32 [L, D],
padding included (the published trainer reads it under the mask of another prompt), and its mask float32 [L].

A bucket is one latent size. Records of a shard are sorted by bucket, so that the manifest's counts say where
every record lies and no record has to be opened to plan an epoch.
"""

import collections
import hashlib
import json
import pathlib
import threading

import numpy as np
import safetensors
import safetensors.numpy

from sprint_jax.conditioning import sketches
from sprint_jax.errors import UserError
from sprint_jax.storage import files

MANIFEST = "manifest.json"
NULL = "null.safetensors"
FORMAT = 1
SPLITS = ("train", "heldout")
KINDS = {
    "features": "text",
    "tokens": "tokens",
}  # what the manifest calls the text: its name in a record
SUFFIX = ".array_record"
NO_CONDITION = (
    "none"  # in the place of a kind of `conditions`; what a manifest that says nothing means
)

_SKIPPED_LISTED = 1000
# Latents do not compress; reading them uncompressed is more than twice as fast.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0"  # records are read one by one, in random order
_READER_BUFFER = 32768  # bytes, of each read from the file
# Readers kept open. Each is a file handle, of which systems often grant 1024; opening again takes 0.1 ms.
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


def bucket_name(shape):
    """The manifest's name of a latent size: "32x24" of (32, 24) or (32, 24, c)."""
    return f"{shape[0]}x{shape[1]}"


def write_shard(path, records):
    """Writes one shard, whole or not at all; equal records make equal bytes.

    path: DIR/SPLIT-NUMBER.array_record. records: dicts as in the head of this file, in any order; those of
    one bucket keep theirs.
    Returns the shard's entry in the manifest.
    """
    from array_record.python import array_record_module

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
        with open(partial, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
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


def write_manifest(path, described, shards, skipped=(), skipped_count=None):
    """Writes a manifest, whole or not at all.

    path: the file. described: {"model", "source", "text", "text_dim", "text_length", "channels", "factor"}, and
      "condition", a kind of `conditions`, where records hold one.
    shards: entries from `write_shard`. skipped: [{"key", "reason"}]; skipped_count: how many there were if
    not all are listed.
    """
    counts = {split: sum(s["records"] for s in shards if s["split"] == split) for split in SPLITS}
    counts["skipped"] = len(skipped) if skipped_count is None else skipped_count
    manifest = {"format": FORMAT, **described, "counts": counts, "shards": list(shards)}
    manifest["skipped"] = list(skipped)[:_SKIPPED_LISTED]
    files.write_text(path, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def read_manifest(folder):
    """The manifest of a folder, with every shard in its place. Raises UserError for anything else.

    As `write_manifest` wrote it, and "condition" is there in any case: "none" without one.
    """
    folder = pathlib.Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(
            f"no {path}: give a folder made by sprint-jax encode; if its work was cut short, the same command ends it"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise UserError(
                f"{path} has format {manifest['format']!r}, this version reads {FORMAT}: encode again with this version"
            )
        manifest.setdefault("condition", NO_CONDITION)
        _check(manifest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error!r}): run its sprint-jax encode command again"
        ) from None
    for shard in manifest["shards"]:
        file = folder / shard["file"]
        try:
            size = file.stat().st_size
        except OSError as error:
            raise UserError(
                f"cannot find the shard {file} ({error.strerror}): copy the folder again, or run its sprint-jax encode "
                "command again, which makes what is missing"
            ) from None
        if size != shard["bytes"]:
            raise UserError(
                f"the shard {file} has {size} bytes, {MANIFEST} says {shard['bytes']}: copy the folder again, or run "
                "its sprint-jax encode command again, which makes what is missing"
            )
    return manifest


def _check(manifest):
    """Raises ValueError, KeyError or TypeError for a manifest that is not one."""
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
            _bucket(name)


def _bucket(name):
    """The inverse of `bucket_name`: (h, w)."""
    height, width = map(int, name.split("x"))
    return height, width


class Encoded:
    """One split of an encoded data set, read at random places, from any number of threads.

    Pickles as its path and split: worker processes open their own files.

    manifest: of `read_manifest`. buckets: the latent sizes [(h, w)], sorted. bucket_of: int16 [N], the position in
    `buckets` of each example.
    """

    def __init__(self, path, split):
        """Raises UserError for a folder without a whole data set."""
        if split not in SPLITS:
            raise UserError(f"split {split!r}: use one of {', '.join(SPLITS)}")
        self.path, self.split = pathlib.Path(path), split
        self.manifest = read_manifest(self.path)
        shards = [shard for shard in self.manifest["shards"] if shard["split"] == split]
        self.buckets = sorted({_bucket(name) for shard in shards for name in shard["buckets"]})
        ids = [self.buckets.index(_bucket(name)) for shard in shards for name in shard["buckets"]]
        counts = [count for shard in shards for count in shard["buckets"].values()]
        self.bucket_of = np.repeat(np.array(ids, np.int16), np.array(counts, np.int64))
        self._files = [shard["file"] for shard in shards]
        self._starts = np.cumsum([0] + [shard["records"] for shard in shards])
        self._kind = KINDS[self.manifest["text"]]
        steered = self.manifest["condition"] != NO_CONDITION
        self._latents = ("latent", "control") if steered else ("latent",)
        self._readers, self._lock = collections.OrderedDict(), threading.Lock()

    def __reduce__(self):
        return Encoded, (self.path, self.split)

    def __len__(self):
        return len(self.bucket_of)

    def read(self, index):
        """Example `index` as NumPy arrays.

        {"latent" float32 [h, w, c], "caption" uint8 [n], and "text" float16 [L, D] or "tokens" int32 [L]},
        and "control" as latent where the manifest names a condition.
        Raises BadRecord for one that is damaged, is not finite or is not what the manifest says.
        """
        shard = int(np.searchsorted(self._starts, index, "right")) - 1
        try:
            blob = self._reader(shard).read([int(index - self._starts[shard])])[0]
            record = safetensors.numpy.load(blob)
        except (RuntimeError, ValueError, OSError, KeyError, safetensors.SafetensorError) as error:
            raise BadRecord(f"cannot be read ({error})") from None
        self._check_record(
            record, (*self.buckets[self.bucket_of[index]], self.manifest["channels"])
        )
        return record | {name: record[name].astype(np.float32) for name in self._latents}

    def where(self, index):
        """Names an example for people: its shard and its place in it."""
        shard = int(np.searchsorted(self._starts, index, "right")) - 1
        return f"record {index - self._starts[shard]} of {self.path / self._files[shard]}"

    def _check_record(self, record, shape):
        if record.keys() != {*self._latents, "caption", self._kind}:
            raise BadRecord(
                f"holds {sorted(record)}, not {', '.join(self._latents)}, caption and {self._kind}"
            )
        for name in self._latents:
            latent = record[name]
            if latent.dtype != np.float16 or latent.shape != shape:
                raise BadRecord(f"has a {name} {latent.dtype} {latent.shape}, not float16 {shape}")
        text = record[self._kind]
        width, dtype = (
            ((self.manifest["text_dim"],), np.float16) if self._kind == "text" else ((), np.int32)
        )
        if (
            text.dtype != dtype
            or text.shape[1:] != width
            or len(text) > self.manifest["text_length"]
        ):
            at_most = (self.manifest["text_length"], *width)
            raise BadRecord(
                f"has {self._kind} {text.dtype} {text.shape}, not {np.dtype(dtype)} of at most {at_most}"
            )
        numbers = [record[name] for name in self._latents] + (
            [text] if self._kind == "text" else []
        )
        if not all(map(finite, numbers)):
            raise BadRecord("is not finite")

    def _reader(self, shard):
        """An open reader of a shard. Those longest unused are closed when nobody holds them any more."""
        from array_record.python import array_record_module

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


def finite(array):
    """Whether all of a float16 array is finite: its exponents as integers, many times as fast as isfinite."""
    return not ((array.view(np.uint16) & 0x7C00) == 0x7C00).any()
