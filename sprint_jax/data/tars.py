"""WebDataset tars as a source of captioned images or latents."""

import io
import pathlib
import posixpath
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np

from sprint_jax.data import captioned, tar_members
from sprint_jax.data.captioned import BadExample, Example
from sprint_jax.data.tar_members import Damage, Member
from sprint_jax.errors import UserError
from sprint_jax.storage import files, image_files, json_files, signatures

LISTING = "wids-meta.json"

# {ending: (offset, bytes, why it cannot be read or "")} of the files of a sample.
_Files: TypeAlias = dict[str, tuple[int, int, str]]

_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".zip", ".7z",
    ".rar")  # fmt: skip


class _Entry(NamedTuple):
    """An example of a tar. reason: why it cannot be used, or "" where that is not known yet."""

    shard: int
    key: str
    files: _Files
    reason: str = ""


class TarSource:
    """The samples of the tars in one folder.

    Opening a source reads the headers of every tar. Examples are then read by offset. Each damaged
    part of a tar is an example that cannot be used.
    """

    def __init__(self, root: pathlib.Path, caption_field: str):
        """Index the tars.

        Raises UserError if one is no tar, if they hold no samples, or if the listing has other
        numbers of samples.
        """
        self._root, self._caption_field = root, caption_field
        self._shards, counts = _shards(root)
        self._sizes = [(root / name).stat().st_size for name in self._shards]
        self._entries: list[_Entry] = []
        for number, (name, count) in enumerate(zip(self._shards, counts, strict=True)):
            self._entries += _index(root / name, number, count)
        if not any(entry.files for entry in self._entries):
            raise UserError(
                f"the tars in {root} hold no images or latents: samples are NAME.png or .npy with "
                ".json"
            )

    def __len__(self) -> int:
        return len(self._entries)

    def key(self, index: int) -> str:
        """Return "SHARD:SAMPLE", for a damaged part "SHARD:byte OFFSET"."""
        entry = self._entries[index]
        return f"{self._shards[entry.shard]}:{entry.key}"

    def __getitem__(self, index: int) -> Example:
        captioned.check_index(index, self)
        entry = self._entries[index]
        if entry.reason:
            raise BadExample(entry.reason)
        try:
            with open(self._root / self._shards[entry.shard], "rb") as file:
                parts = {ending: _read(file, *place) for ending, place in entry.files.items()}
        except OSError:
            raise BadExample("unreadable file") from None
        image = next((parts[ending] for ending in image_files.endings() if ending in parts), None)
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
    return name.lower().endswith(".tar")


def is_archive(name: str) -> bool:
    """Return whether a file name is that of a tar or of a packed archive, which is not read."""
    return name.lower().endswith((".tar", *_PACKED))


def _shards(root: pathlib.Path) -> tuple[list[str], list[int | None]]:
    """Return the names of the tars, relative to `root`, and how many samples they should have.

    They are those of a listing, or all, sorted; only a listing may know numbers of samples.
    """
    listing = root / LISTING
    if not listing.exists():
        found = [path.name for path in files.children(root) if is_tar(path.name)]
        return found, [None] * len(found)
    try:
        entries = json_files.read(listing)["shardlist"]
        names = [entry["url"] for entry in entries]
        counts = [_count(entry.get("nsamples")) for entry in entries]
        # A listing from another machine holds its paths. Use the tar next to the listing.
        names = [n if (root / n).is_file() else _beside(root, posixpath.basename(n)) for n in names]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise UserError(
            f'{listing} is not {{"shardlist": [{{"url": ...}}]}}: repair or remove it'
        ) from None
    for number, name in enumerate(names):
        if not (root / name).is_file():
            raise UserError(
                f"{listing} lists {name}, which does not exist: add it or remove {LISTING}"
            )
        if name in names[:number]:
            raise UserError(f"{listing} lists {name} twice: remove one")
    if not names:
        raise UserError(f"{listing} lists no tars: repair or remove it")
    return names, counts


def _beside(root: pathlib.Path, name: str) -> str:
    """Return the name of a file in the folder that differs in case at most, else the name."""
    alike = [p.name for p in files.children(root) if files.fold(p.name) == files.fold(name)]
    return name if name in alike or len(alike) != 1 else alike[0]


def _count(value: Any) -> int | None:
    """Return a number of samples, None if it is missing. Raises ValueError for anything else."""
    if value is not None and (type(value) is not int or value < 0):
        raise ValueError("not a number of samples")
    return value


def _index(path: pathlib.Path, shard: int, count: int | None) -> list[_Entry]:
    """Return the examples of a tar and its damaged parts, in its order.

    count: of the samples that a listing says. Raises UserError for another number, and for a file
    from which nothing can be read.
    """
    try:
        found = tar_members.read(path)
    except OSError as error:
        raise UserError(f"cannot read the tar {path} ({error.strerror}): copy it again") from None
    damaged = [part for part in found if isinstance(part, Damage)]
    if len(damaged) == len(found) and (damaged or not path.stat().st_size):
        why = damaged[0].reason if damaged else "it is empty"
        other = signatures.describe(path)
        if other and not other.startswith("a tar"):
            raise UserError(f"{path} is no tar but {other}")
        raise UserError(f"cannot read the tar {path} ({why}): make it again or remove it")
    entries = _grouped(found, shard, path.stat().st_size)
    if count is not None:
        entries = _compared(entries, path, count)
    return entries


def _grouped(found: list[Member | Damage], shard: int, size: int) -> list[_Entry]:
    """Group the files of a tar, of `size` bytes, to samples; drop what belongs to none.

    A name is split at its last dot. A file that a sample has already begins another sample of the
    same name. Samples whose names differ in case alone are one if each lacks what the other has.
    """
    entries: list[_Entry] = []
    samples: dict[str, _Entry] = {}
    seen: dict[str, int] = {}
    reported = False  # whether a sample has the file at which the tar is cut
    for part in found:
        if isinstance(part, Damage):
            if not (part.reason == tar_members.CUT and reported):
                entries.append(_Entry(shard, f"byte {part.offset}", {}, part.reason))
            continue
        name = tar_members.clean(part.name)
        base, ending = posixpath.splitext(name)
        ending = ending.lower()
        if _is_hidden(name):
            continue
        if is_archive(name):
            entries.append(_Entry(shard, name, {}, "archive in the tar, which is not read"))
            continue
        if not _is_known(name, ending):
            continue
        reported = part.offset + part.size > size
        sample = samples.get(base)
        if sample is None or ending in sample.files:
            seen[base] = seen.get(base, 0) + 1
            key = base if seen[base] == 1 else f"{base}#{seen[base]}"
            sample = samples[base] = _Entry(shard, key, {})
            entries.append(sample)
        sample.files[ending] = part.offset, part.size, part.problem
    return [row for entry in _paired(entries) for row in _listed(entry)]


def _is_known(name: str, ending: str) -> bool:
    data = ending in (".npy", ".json", ".txt") or ending in image_files.endings()
    return data or image_files.resembles_image(name)


def _is_hidden(name: str) -> bool:
    return any(part != ".." and files.is_hidden(part) for part in name.split("/"))


def _paired(entries: list[_Entry]) -> list[_Entry]:
    """Join captions to the samples without one whose names differ from theirs in case alone."""
    lone = {}
    for entry in entries:
        if entry.files and not entry.files.keys() - {".json", ".txt"}:
            lone.setdefault(files.fold(entry.key), []).append(entry)
    used = set()
    for entry in entries if lone else ():
        captions = lone.get(files.fold(entry.key), [])
        if entry.files and not entry.files.keys() & {".json", ".txt"} and len(captions) == 1:
            entry.files.update(captions[0].files)
            used.add(id(captions[0]))
    return [entry for entry in entries if id(entry) not in used]


def _listed(entry: _Entry) -> list[_Entry]:
    """Return a sample and, as examples that cannot be used, its images that are not read."""
    if entry.reason:
        return [entry]
    images = [ending for ending in image_files.endings() if ending in entry.files]
    others = entry.files.keys() - {*images, ".npy", ".json", ".txt"}
    if others and not images and ".npy" not in entry.files:
        return [entry._replace(reason=f"{min(others)} files are not read")]
    used = {ending: entry.files[ending] for ending in entry.files if ending not in others}
    more = [entry._replace(key=entry.key + ending, files={}) for ending in images[1:]]
    for ending in images[1:]:
        del used[ending]
    return [
        entry._replace(files=used),
        *(row._replace(reason="another image of its sample") for row in more),
    ]


def _compared(entries: list[_Entry], path: pathlib.Path, count: int) -> list[_Entry]:
    """Return the entries of a tar that should have `count` samples. Raises UserError otherwise.

    Each damaged part may hide one sample. Listings may count names that agree up to their first
    dot as one sample. A full tar that only lacks its end is not damaged.
    """
    samples = [entry for entry in entries if entry.files]
    damaged = [entry for entry in entries if entry.reason in tar_members.REASONS]
    ends_early = damaged and entries[-1].reason in (tar_members.CUT, tar_members.HOLE)
    if len(samples) == count and ends_early:
        return entries[:-1]
    bases = [posixpath.split(entry.key) for entry in samples]
    short = [(folder, name.partition(".")[0]) for folder, name in bases]
    groups = sum(name != before for name, before in zip(short, [None, *short], strict=False))
    if any(found <= count <= found + len(damaged) for found in (len(samples), groups)):
        return entries
    raise UserError(
        f"{path} has {len(samples)} samples and {len(damaged)} damaged parts, {LISTING} says "
        f"nsamples {count}: copy the tar again, or correct the number"
    )


def _read(file: BinaryIO, offset: int, size: int, problem: str) -> bytes:
    if problem:
        raise BadExample(problem)
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
