"""What a file is by its first bytes, for the error line of a reader that wants another kind."""

import os
import pathlib
import re
import zipfile

_HEAD = 512  # bytes that decide
_MOST_HEADER = 100 * 2**20  # bytes of a safetensors header, the library's own limit
_SHOWN = 40  # letters of a text that an error line quotes
_UNPACK = "unpack it, and give the file in it"
_PICKLED = (
    "a pickled PyTorch file, which is opened nowhere but for the published Inception (evaluate "
    "--weights) and HED (condition --weights): save its tensors as safetensors "
    "(safetensors.torch.save_file) and give that file; convert --from takes SANA's own names"
)
_EXPORTED = "a file of sprint-jax export: give it as --model of sample or serve"
_NUMPY = "NumPy arrays, which no command takes as weights: save them as safetensors"
# First bytes, what they mean and what to do.
_STARTS = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file: run git lfs pull"),
    (b"GGUF", "a GGUF file, which no command reads: get the weights as safetensors"),
    (b"\x89HDF", "an HDF5 file, which no command reads: get the weights as safetensors"),
    (b"\x93NUMPY", _NUMPY),
    (b"\x80\x02", _PICKLED),
    (b"\x80\x03", _PICKLED),
    (b"\x80\x04", _PICKLED),
    (b"\x80\x05", _PICKLED),
    (b"\x1f\x8b", f"a gzip archive: {_UNPACK}"),
    (b"\x28\xb5\x2f\xfd", f"a zstd archive: {_UNPACK}"),
    (b"\xfd7zXZ", f"an xz archive: {_UNPACK}"),
    (b"BZh", f"a bzip2 archive: {_UNPACK}"),
    (b"7z\xbc\xaf", f"a 7z archive: {_UNPACK}"),
    (b"Rar!", f"a rar archive: {_UNPACK}"),
    (b"\x89PNG", "an image"),
    (b"\xff\xd8\xff", "an image"),
)


def describe(path: str | os.PathLike[str]) -> str | None:
    """Return what a file is, with what to do about it: "a GGUF file, which no command reads: ...".

    Returns None for an empty file, for one that cannot be read and for unknown bytes.
    """
    path = pathlib.Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except (OSError, ValueError):
        return None
    for start, meaning in _STARTS:
        if head.startswith(start):
            return meaning
    if head.startswith(b"PK"):
        return _of_zip(path)
    if head[257:262] == b"ustar":
        return f"a tar archive: {_UNPACK}"
    if is_safetensors(head):
        return (
            "a safetensors file: convert --from takes one with SANA's own names, and config.teacher"
            ".pretrained that of a teacher"
        )
    return _of_text(head)


def is_safetensors(head: bytes) -> bool:
    """Return whether a file that begins with these bytes is meant to be a safetensors file."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < _MOST_HEADER


def _of_zip(path: pathlib.Path) -> str | None:
    """Return what a zip archive holds: programs, a state dict, arrays or something else.

    Returns None for one that is cut off or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return None
    if {"header.json", "weights.safetensors"} & set(names):
        return _EXPORTED
    if any(name.endswith("data.pkl") for name in names):
        return _PICKLED
    if names and all(name.endswith(".npy") for name in names):
        return _NUMPY
    return f"a zip archive: {_UNPACK}"


def _of_text(head: bytes) -> str | None:
    """Return what a file of text is; None for anything else."""
    text = head.decode("utf-8", errors="ignore").removeprefix("\ufeff").strip()
    lowered = text[:20].lower()
    if lowered.startswith(("<!doctype html", "<html", "<head", "<?xml", "<!--")):
        return "a web page, not the file: download the file itself"
    if re.match(r"[{\[]\s*[\"{\[}\]]", text):
        return "a JSON file: give the file that it names or describes"
    words = text.split()
    if len(words) < 2 or not (text.replace("\n", "").replace("\r", "").replace("\t", "")).isascii():
        return None
    if not all(letter.isprintable() or letter.isspace() for letter in text):
        return None
    return f"a text file (it begins {text[:_SHOWN]!r}): download the file itself"
