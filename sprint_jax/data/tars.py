"""WebDataset tars as a source of captioned images or latents."""

import io
import pathlib
import posixpath
import tarfile
from collections.abc import Mapping
from typing import BinaryIO, TypeAlias

import numpy as np

from sprint_jax.data import captioned
from sprint_jax.data.captioned import BadExample, Example
from sprint_jax.errors import UserError
from sprint_jax.storage import files, json_files

LISTING = "wids-meta.json"

_Spans: TypeAlias = dict[str, tuple[int, int]]  # {suffix: (offset, bytes)} of the files of a sample


class TarSource:
    """The samples of the tars in one folder.

    Opening a source reads the headers of every tar. Examples are then read by offset.
    """

    def __init__(self, root: pathlib.Path, caption_field: str):
        """Index the tars. Raises UserError if they are damaged or hold no samples."""
        self._root, self._caption_field = root, caption_field
        self._shards = _shards(root)
        self._sizes = [(root / name).stat().st_size for name in self._shards]
        self._samples: list[tuple[int, str, _Spans]] = []  # (index of the shard, name, spans)
        for number, name in enumerate(self._shards):
            self._samples += [
                (number, sample, spans) for sample, spans in _index(root / name).items()
            ]
        if not self._samples:
            raise UserError(
                f"the tars in {root} hold no images or latents: samples are NAME.png or .npy with "
                ".json"
            )

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, index: int) -> str:
        """Return "SHARD:SAMPLE"."""
        number, sample, _ = self._samples[index]
        return f"{self._shards[number]}:{sample}"

    def __getitem__(self, index: int) -> Example:
        captioned.check_index(index, self)
        number, _, spans = self._samples[index]
        try:
            with open(self._root / self._shards[number], "rb") as file:
                parts = {suffix: _read_span(file, *span) for suffix, span in spans.items()}
        except OSError:
            raise BadExample("unreadable file") from None
        suffixes = (suffix for suffix in captioned.IMAGE_SUFFIXES if suffix in parts)
        image = next((parts[suffix] for suffix in suffixes), None)
        latent = _parse_latent(parts[".npy"]) if ".npy" in parts else None
        if image is None and latent is None:
            raise BadExample("missing picture")
        return Example(self.key(index), image, latent, self._caption(parts))

    def _caption(self, parts: Mapping[str, bytes]) -> str:
        if ".json" in parts:
            fields = captioned.parse_json(parts[".json"])
            caption = captioned.first_text(fields, (self._caption_field,))
            if caption:
                return captioned.decode_caption(captioned.encode_text(caption))
        return captioned.decode_caption(parts.get(".txt", b""))

    def identity(self) -> str:
        """Return a hash of the names and sizes of the tars."""
        return captioned.hash_files("tars", zip(self._shards, self._sizes, strict=True))


def is_tar(name: str) -> bool:
    """Return whether a file name is that of a tar."""
    return name.endswith(".tar") and not name.startswith(".")


def _shards(root: pathlib.Path) -> list[str]:
    """Return the names of the tars, relative to `root`: those of a listing, or all, sorted."""
    listing = root / LISTING
    if not listing.exists():
        return [path.name for path in files.children(root) if is_tar(path.name)]
    try:
        names = [entry["url"] for entry in json_files.read(listing)["shardlist"]]
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(
            f'{listing} is not {{"shardlist": [{{"url": ...}}]}}: repair or remove it'
        ) from None
    # A listing from another machine holds paths of that machine. Use the tar next to the listing.
    names = [name if (root / name).is_file() else posixpath.basename(name) for name in names]
    for name in names:
        if not (root / name).is_file():
            raise UserError(
                f"{listing} lists {name}, which does not exist: add it or remove {LISTING}"
            )
    if not names:
        raise UserError(f"{listing} lists no tars: repair or remove it")
    return names


def _index(path: pathlib.Path) -> dict[str, _Spans]:
    """Return {sample: spans} of a tar, in the order of the tar.

    A truncated tar yields the samples up to its end. The last one may extend beyond it, which
    reading detects.
    """
    samples: dict[str, _Spans] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                base, _, suffix = name.partition(".")
                suffix = "." + suffix.lower()
                known = suffix in (*captioned.IMAGE_SUFFIXES, ".npy", ".json", ".txt")
                if member.isfile() and base and known:
                    spans = samples.setdefault(posixpath.join(folder, base), {})
                    spans[suffix] = (member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        if not samples:
            raise UserError(
                f"cannot read the tar {path} ({error}): make it again or remove it"
            ) from None
    return samples


def _read_span(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise BadExample("corrupt record")
    return data


def _parse_latent(data: bytes) -> np.ndarray:
    """Parse a .npy file as float32 [C, h, w]. Raises BadExample for anything else."""
    try:
        array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception:  # a damaged header raises many kinds of errors, even MemoryError
        raise BadExample("corrupt record") from None
    if array.ndim != 3 or not np.issubdtype(array.dtype, np.floating):
        raise BadExample("latent is not a float array [C, h, w]")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise BadExample("latent is not finite")
    return array
