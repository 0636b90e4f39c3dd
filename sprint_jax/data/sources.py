"""Captioned pictures on disk, read by index: WebDataset tars, a TFDS data set, or a plain folder.

`open_source` recognises the three by what lies in the folder. Whichever it is, index -> example depends on
names alone, never on the order in which a file system lists them. Nothing is decoded here but captions and
latents; `load_picture`, `fit` and `nearest_bucket` are the way from an encoded picture to pixels of one size.
"""

import dataclasses
import hashlib
import io
import json
import math
import os
import pathlib
import posixpath
import tarfile

import numpy as np
from PIL import Image

from sprint_jax.errors import UserError
from sprint_jax.storage import files, image_files

_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclasses.dataclass(frozen=True)
class Example:
    """One captioned picture.

    key: a name that no other example of its source has, the same each time the source is opened.
    image: the bytes of a picture file, not yet known to decode; None where there is a latent only.
    latent: float32 [C, h, w], finite, already scaled; None where there is a picture only.
    caption: not empty, without space at its ends.
    """

    key: str
    image: bytes | None
    latent: np.ndarray | None
    caption: str


class BadExample(Exception):
    """One example cannot be used. The message is a short reason, the same for all examples of that kind."""


def open_source(path, caption_field="prompt"):
    """The captioned pictures in a folder, as an object with

        len(source)         how many there are, usable or not
        source.key(i)       the name of example i, usable or not: nothing is read
        source[i]           an `Example`; raises BadExample where it cannot be used, IndexError beyond the end
        source.identity()   a hash of the names and sizes of the files, not of what is in them

    It can be pickled, and reads from several threads at once.

    Args:
      path: a folder. With `dataset_info.json` and `features.json` it is a TFDS data set in array_record form,
        with *.tar (or `wids-meta.json` that lists them) a WebDataset, otherwise a folder of pictures.
      caption_field: where captions have fields (json of a tar, `metadata.jsonl`, TFDS features), the one to
        take. A folder's metadata and a TFDS set may also use one of the usual names.
    """
    root = pathlib.Path(path)
    if not root.exists():
        raise UserError(
            f"no folder {path}: give one with tars, a TFDS data set or captioned pictures"
        )
    if not root.is_dir():
        raise UserError(f"{path} is a file: give the folder that holds it")
    names = set(os.listdir(root))
    if not names:
        raise UserError(
            f"the folder {path} is empty: give one with tars, a TFDS data set or captioned pictures"
        )
    if {"dataset_info.json", "features.json"} <= names:
        return _Tfds(root, caption_field)
    if "wids-meta.json" in names or any(_is_tar(name) for name in names):
        return _Tars(root, caption_field)
    return _Folder(root, caption_field)


# --- tars ---


class _Tars:
    """Samples of the tars in one folder. Every tar is indexed once, by its headers, and then read by offset."""

    def __init__(self, root, caption_field):
        self._root, self._caption_field = root, caption_field
        self._shards = _shards(root)
        self._sizes = [(root / name).stat().st_size for name in self._shards]
        self._samples = []  # (shard number, name, {suffix: (offset, bytes)})
        for number, name in enumerate(self._shards):
            self._samples += [
                (number, sample, parts) for sample, parts in _index(root / name).items()
            ]
        if not self._samples:
            raise UserError(
                f"the tars in {root} hold no pictures or latents: samples are NAME.png or .npy with .json"
            )

    def __len__(self):
        return len(self._samples)

    def key(self, index):
        number, sample, _ = self._samples[index]
        return f"{self._shards[number]}:{sample}"

    def __getitem__(self, index):
        _check_index(index, self)
        number, _, spans = self._samples[index]
        shard = self._shards[number]
        try:
            with open(self._root / shard, "rb") as file:
                parts = {suffix: _span(file, *span) for suffix, span in spans.items()}
        except OSError:
            raise BadExample("unreadable file") from None
        image = next((parts[suffix] for suffix in _PICTURES if suffix in parts), None)
        latent = _latent(parts[".npy"]) if ".npy" in parts else None
        if image is None and latent is None:
            raise BadExample("missing picture")
        return Example(self.key(index), image, latent, self._caption(parts))

    def _caption(self, parts):
        if ".json" in parts:
            caption = _first_text(_fields(parts[".json"]), (self._caption_field,))
            if caption:
                return _text(caption.encode("utf-8", "surrogatepass"))
        return _text(parts.get(".txt", b""))

    def identity(self):
        return _digest("tars", zip(self._shards, self._sizes, strict=True))


def _is_tar(name):
    return name.endswith(".tar") and not name.startswith(".")


def _shards(root):
    """Names of the tars, relative to `root`: as `wids-meta.json` lists them, otherwise all, sorted."""
    listing = root / "wids-meta.json"
    if not listing.exists():
        return sorted(name for name in os.listdir(root) if _is_tar(name))
    try:
        names = [entry["url"] for entry in json.loads(listing.read_text())["shardlist"]]
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(
            f'{listing} is not {{"shardlist": [{{"url": ...}}]}}: repair or remove it'
        ) from None
    # Lists made elsewhere name tars by where they were then; the tar beside the list is the one meant.
    names = [name if (root / name).is_file() else posixpath.basename(name) for name in names]
    for name in names:
        if not (root / name).is_file():
            raise UserError(
                f"{listing} lists {name}, which is not there: bring it or remove wids-meta.json"
            )
    if not names:
        raise UserError(f"{listing} lists no tars: repair or remove it")
    return names


def _index(path):
    """{sample: {suffix: (offset, bytes)}} of a tar, in its order.

    A tar that ends early gives what it has. Its last member may reach beyond the end; reading shows that.
    """
    samples = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                base, _, suffix = name.partition(".")
                suffix = "." + suffix.lower()
                if member.isfile() and base and suffix in (*_PICTURES, ".npy", ".json", ".txt"):
                    spans = samples.setdefault(posixpath.join(folder, base), {})
                    spans[suffix] = (member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        if not samples:
            raise UserError(
                f"cannot read the tar {path} ({error}): make it again or remove it"
            ) from None
    return samples


def _span(file, offset, size):
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise BadExample("corrupt record")
    return data


def _latent(data):
    """The bytes of a .npy file -> float32 [C, h, w]."""
    try:
        array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception:  # a broken header can raise almost anything, MemoryError included
        raise BadExample("corrupt record") from None
    if array.ndim != 3 or not np.issubdtype(array.dtype, np.floating):
        raise BadExample("latent is not a float array [C, h, w]")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise BadExample("latent is not finite")
    return array


# --- TFDS ---


class _Tfds:
    """The train split of a data set that tensorflow_datasets wrote as array_record, read without TensorFlow."""

    def __init__(self, root, caption_field):
        self._root = root
        self._files = sorted(
            (path.name, path.stat().st_size) for path in root.iterdir() if path.is_file()
        )
        self._open = None
        import tensorflow_datasets as tfds

        try:
            info = tfds.builder_from_directory(root).info
            self._name, splits, features = info.name, dict(info.splits), dict(info.features)
        except Exception as error:  # whatever its parsers raise
            raise UserError(
                f"cannot read the TFDS data set {root} ({error}): build it again"
            ) from None
        if "train" not in splits:
            raise UserError(
                f"the TFDS data set {root} has no split train but {sorted(splits)}: give one that has"
            )
        names = (caption_field, "caption", "prompt", "text")
        self._caption_name = next(
            (n for n in names if isinstance(features.get(n), tfds.features.Text)), None
        )
        if not isinstance(features.get("image"), tfds.features.Image) or not self._caption_name:
            raise UserError(
                f"the TFDS data set {root} has the features {sorted(features)}: it needs image and one of {names[1:]}"
            )
        if info.file_format.value != "array_record":
            raise UserError(
                f"the records of {root} are {info.file_format.value}: build it as array_record"
            )
        absent = [path.name for path in splits["train"].filepaths if not path.exists()]
        if absent:
            raise UserError(
                f"{absent[0]} is missing from {root}: bring it or build the data set again"
            )
        self._length = splits["train"].num_examples

    def _data(self):
        if self._open is None:
            import tensorflow_datasets as tfds

            builder = tfds.builder_from_directory(self._root)
            self._open = builder.as_data_source(
                split="train", decoders={"image": tfds.decode.SkipDecoding()}
            )
        return self._open

    def __len__(self):
        return self._length

    def key(self, index):
        return f"{self._name}:{index:09d}"

    def __getitem__(self, index):
        _check_index(index, self)
        try:
            record = self._data()[index]
            image, caption = record["image"], record[self._caption_name]
        except Exception:  # readers of records and of protocol buffers have errors of their own
            raise BadExample("corrupt record") from None
        return Example(self.key(index), image, None, _text(caption))

    def identity(self):
        return _digest("tfds", self._files)


# --- folders ---


class _Folder:
    """Pictures below a folder, each with NAME.txt beside it or a line of `metadata.jsonl` at the top.

    The official `meta_data.json` ({"img_names": [...]}) restricts them to those that it lists.
    """

    def __init__(self, root, caption_field):
        self._root = root
        found = _walk(root)
        told = _metadata(root / "metadata.jsonl", caption_field)
        listed = _listed(root / "meta_data.json", found)
        if listed is None:
            listed = [name for name in found if _suffix(name) in _PICTURES] + list(told)
        # (picture, its caption or "", file with its caption or "")
        self._pictures = [
            (
                name,
                told.get(name, ""),
                beside if (beside := posixpath.splitext(name)[0] + ".txt") in found else "",
            )
            for name in sorted(set(listed))
        ]
        if not any(caption or beside for _, caption, beside in self._pictures):
            raise UserError(_not_understood(root, found))
        kept = (*_PICTURES, ".txt", ".json", ".jsonl")
        self._files = sorted((name, size) for name, size in found.items() if _suffix(name) in kept)

    def __len__(self):
        return len(self._pictures)

    def key(self, index):
        return self._pictures[index][0]

    def __getitem__(self, index):
        _check_index(index, self)
        name, caption, beside = self._pictures[index]
        try:
            image = (self._root / name).read_bytes()
            text = caption.encode("utf-8", "surrogatepass") or (
                (self._root / beside).read_bytes() if beside else b""
            )
        except FileNotFoundError:
            raise BadExample("missing picture") from None
        except OSError:
            raise BadExample("unreadable file") from None
        return Example(name, image, None, _text(text))

    def identity(self):
        return _digest("folder", self._files)


def _walk(root):
    """{name relative to root, with "/": bytes} of all files below it that are not hidden."""
    below = (path for path in files.below(root) if not path.name.startswith("."))
    return {path.relative_to(root).as_posix(): path.stat().st_size for path in below}


def _suffix(name):
    return posixpath.splitext(name)[1].lower()


def _metadata(path, caption_field):
    """{picture: caption, or "" if its line has none} of a `metadata.jsonl`; {} without one."""
    told = {}
    if path.is_file():
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                fields = json.loads(line) if line.strip() else None
                if fields is not None:
                    name = posixpath.normpath(fields["file_name"])
                    told[name] = _first_text(fields, (caption_field, "text", "caption"))
            except (ValueError, TypeError, KeyError, AttributeError):
                raise UserError(
                    f'{path} line {number} is not {{"file_name": ..., "{caption_field}": ...}}: repair it'
                ) from None
    return told


def _listed(path, found):
    """Pictures that `meta_data.json` lists, with or without suffix; None without one."""
    if not path.is_file():
        return None
    try:
        names = [posixpath.normpath(name) for name in json.loads(path.read_bytes())["img_names"]]
    except (ValueError, TypeError, KeyError):
        raise UserError(f'{path} is not {{"img_names": [...]}}: repair or remove it') from None
    listed = []
    for name in names:
        possible = [name] if _suffix(name) in _PICTURES else [name + suffix for suffix in _PICTURES]
        listed.append(next((p for p in possible if p in found), possible[0]))
    return listed


def _not_understood(root, found):
    """Why a folder without a single captioned picture is refused."""
    split = [posixpath.split(name) for name in found]
    below = [folder for folder, name in split if name == "dataset_info.json" or _is_tar(name)]
    if below:
        return f"{root} is not itself a data set, but {root / min(below)} is: give that"
    if any(_suffix(name) in _PICTURES for name in found):
        return f"no picture in {root} has a caption: put NAME.txt beside each NAME.png, or a metadata.jsonl at the top"
    return (
        f"nothing in {root} is understood: give a folder with *.tar, a TFDS data set (dataset_info.json), "
        f"or pictures ({', '.join(_PICTURES)}) with NAME.txt beside each"
    )


# --- what they share ---


def _check_index(index, source):
    if not 0 <= index < len(source):
        raise IndexError(f"example {index} of {len(source)}")


def _digest(kind, files):
    """files: (name, bytes) pairs in a fixed order."""
    lines = [kind, *(f"{size} {name}" for name, size in files)]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _fields(data):
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise BadExample("corrupt record") from None


def _first_text(fields, names):
    """The first of the named fields that is text and not blank, stripped; "" if none is."""
    if isinstance(fields, dict):
        for name in names:
            value = fields.get(name)
            if isinstance(value, str) and value.strip():
                return value.strip()
    return ""


def _text(data):
    """The bytes of a caption -> text. Half a surrogate pair, as JSON can hold, is no text."""
    try:
        caption = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise BadExample("corrupt record") from None
    if not caption:
        raise BadExample("missing caption")
    return caption


# --- pixels ---


def load_picture(image_bytes):
    """A picture file's bytes -> uint8 [H, W, 3], turned as EXIF says, transparency on white, first frame.

    Raises BadExample for whatever does not decode, and for more than 100 million pixels.
    """
    try:
        with Image.open(io.BytesIO(image_bytes)) as image:
            if image.width * image.height > image_files.MOST_PIXELS:
                raise ValueError("a decompression bomb")
            return np.array(image_files.opaque(image))
    except Exception:  # decoders of hostile bytes raise far more than OSError
        raise BadExample("undecodable image") from None


def fit(picture, height, width):
    """Scales a picture to cover height x width and cuts out the middle. uint8 [H, W, 3] -> [height, width, 3].

    Bicubic and antialiased. The cut is taken from the original, in fractions of a pixel, as part of the scaling:
    a very long picture never exists at its scaled size.
    """
    have_height, have_width = picture.shape[:2]
    if (have_height, have_width) == (height, width):
        return picture
    scale = max(height / have_height, width / have_width)
    seen_height, seen_width = min(height / scale, have_height), min(width / scale, have_width)
    top, left = (have_height - seen_height) / 2, (have_width - seen_width) / 2
    box = (left, top, left + seen_width, top + seen_height)
    return np.array(
        Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC, box=box)
    )


def nearest_bucket(height, width, buckets):
    """The bucket (h, w) that loses least of a picture of height x width to the cut.

    Ratios are compared by their quotient, so that a picture on its side gets the bucket on its side. Of several
    buckets with one ratio, the one nearest in area; the order of the list does not matter.
    """

    def distance(bucket):
        h, w = bucket
        return abs(math.log(h * width / (w * height))), abs(math.log(h * w / (height * width))), h

    return tuple(min(buckets, key=distance))
