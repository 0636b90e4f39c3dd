"""Folders of image files with captions in text files or a metadata file."""

import collections
import pathlib
import posixpath
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from sprint_jax.data import captioned, tars
from sprint_jax.data.captioned import BadExample, Example
from sprint_jax.errors import UserError
from sprint_jax.storage import files, image_files, json_files

_METADATA, _LISTING = "metadata.jsonl", "meta_data.json"


class _Image(NamedTuple):
    """An image of a folder. text_file: with its caption. reason: why it cannot be used, or ""."""

    name: str
    caption: str = ""
    text_file: str = ""
    reason: str = ""


class FolderSource:
    """The images below a folder, each with NAME.txt or a line of `metadata.jsonl` at the top.

    The official `meta_data.json` ({"img_names": [...]}), if present, selects the images. Names may
    differ from those of the files in case.
    """

    def __init__(self, root: pathlib.Path, caption_field: str):
        """List the images.

        Raises UserError if none has a caption, or if the folder holds archives as well.
        """
        self._root = root
        sizes = _file_sizes(root)
        names = _Names(sizes)
        captions = _metadata(root, names, caption_field)
        listed = _listed(root, names)
        if listed is None:
            listed = dict.fromkeys([*filter(image_files.is_image, sizes), *captions], "")
            listed |= _not_read(sizes, names)
        self._images = [
            _image(name, reason, captions.get(name, []), names)
            for name, reason in sorted(listed.items())
        ]
        if not any(image.caption or image.text_file for image in self._images):
            raise UserError(_describe_failure(root, sizes))
        if others := archives(sizes):
            raise UserError(describe_mixture(root, "captioned images", others))
        self._files = sorted((name, size) for name, size in sizes.items() if _counts(name))

    def __len__(self) -> int:
        return len(self._images)

    def key(self, index: int) -> str:
        """Return the path of the image relative to the folder."""
        return self._images[index].name

    def __getitem__(self, index: int) -> Example:
        captioned.check_index(index, self)
        name, caption, text_file, reason = self._images[index]
        if reason:
            raise BadExample(reason)
        try:
            image = (self._root / name).read_bytes()
            text = captioned.encode_text(caption)
            if text_file:
                text = _only(text, (self._root / text_file).read_bytes())
        except FileNotFoundError:
            raise BadExample("missing picture") from None
        except OSError:
            raise BadExample("unreadable file") from None
        return Example(name, image, None, captioned.decode_caption(text))

    def identity(self) -> str:
        """Return a hash of the names and sizes of the files."""
        return captioned.hash_files("folder", self._files)


class _Names:
    """The names of the files of a folder, found by names that may differ in case."""

    def __init__(self, names: Iterable[str]):
        self.exact = frozenset(names)
        self._folded: dict[str, list[str]] = collections.defaultdict(list)
        self._texts: dict[str, list[str]] = collections.defaultdict(list)
        for name in sorted(self.exact):
            self._folded[files.fold(name)].append(name)
            if _suffix(name) == ".txt":
                self._texts[files.fold(posixpath.splitext(name)[0])].append(name)

    def find(self, name: str) -> list[str]:
        """Return the file of a name: itself, else those that differ from it in case."""
        name = posixpath.normpath(name)
        if name in self.exact:
            return [name]
        return self._folded.get(files.fold(name.replace("\\", "/")), [])

    def texts(self, name: str) -> list[str]:
        """Return the text files of an image: those of its very name, else of one in other case."""
        base = posixpath.splitext(name)[0]
        found = self._texts.get(files.fold(base), [])
        return [text for text in found if posixpath.splitext(text)[0] == base] or found


def _image(name: str, reason: str, captions: list[str], names: _Names) -> _Image:
    """Return an image with what is known of its caption. captions: of the metadata file."""
    texts = names.texts(name)
    seen = name in names.exact  # which are not hidden
    if not seen and any(files.is_hidden(part) for part in name.split("/") if part != ".."):
        reason = "hidden file"
    elif not reason and (len(set(captions)) > 1 or len(texts) > 1):
        reason = "two captions"
    if reason:
        return _Image(name, reason=reason)
    return _Image(name, captions[0] if captions else "", texts[0] if texts else "")


def _only(caption: bytes, text: bytes) -> bytes:
    """Return the caption of the metadata file or of the text file.

    Raises BadExample if both have one and they differ.
    """
    if not caption or not text.strip():
        return caption or text
    if captioned.decode_caption(caption) != captioned.decode_caption(text):
        raise BadExample(f"two captions: that of {_METADATA} is not that of its .txt")
    return caption


def _not_read(sizes: Mapping[str, int], names: _Names) -> dict[str, str]:
    """Return {file: reason} of files that look like images, or have captions, and are not read."""
    images = set(filter(image_files.is_image, sizes))
    paired = {text for name in images for text in names.texts(name)}
    found = {}
    for name in sizes:
        alike = image_files.resembles_image(name)
        if name in images or (_counts(name) and not alike):
            continue
        if alike or any(text not in paired for text in names.texts(name)):
            found[name] = f"{_suffix(name) or 'unknown'} files are not read"
    return found


def _counts(name: str) -> bool:
    """Return whether a file decides about the examples."""
    known = _suffix(name) in (".txt", ".json", ".jsonl")
    return known or image_files.is_image(name) or image_files.resembles_image(name)


def archives(names: Iterable[str]) -> list[str]:
    """Return the names of tars, compressed archives and TFDS sets among those of files, sorted."""
    return sorted(
        name
        for name in names
        if tars.is_archive(name) or posixpath.basename(name) == "dataset_info.json"
    )


def describe_mixture(root: pathlib.Path, kind: str, others: list[str]) -> str:
    """Return the error line for a folder of one kind that holds others as well."""
    return (
        f"{root} holds {kind} and also {others[0]} ({len(others)} of other kinds): it is not clear "
        "what to read; keep one kind in the folder"
    )


def _file_sizes(root: pathlib.Path) -> dict[str, int]:
    """Return {path relative to root, with "/": bytes} of the files below it that are not hidden.

    A link that leads nowhere has no bytes.
    """
    return {path.relative_to(root).as_posix(): _size(path) for path in files.below(root, True)}


def _size(path: pathlib.Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _top(names: _Names, root: pathlib.Path, wanted: str) -> pathlib.Path | None:
    """Return the file at the top of the folder with a name, in any case; None without one."""
    found = names.find(wanted)
    if len(found) > 1:
        raise UserError(f"{root} holds {' and '.join(found)}: keep one of them")
    return root / found[0] if found else None


def _metadata(root: pathlib.Path, names: _Names, caption_field: str) -> dict[str, list[str]]:
    """Return {image: its captions that are not blank} of a metadata file, or {} without one."""
    captions: dict[str, list[str]] = {}
    path = _top(names, root, _METADATA)
    if path is None:
        return captions
    try:
        lines = captioned.decode_text(path.read_bytes()).split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8: save it as UTF-8") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json_files.parse(line)
            name = posixpath.normpath(fields["file_name"])
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(
                f"{path} line {number} is not "
                f'{{"file_name": ..., "{caption_field}": ...}}: repair it'
            ) from None
        found = names.find(name)
        if len(found) > 1:
            raise UserError(
                f"{path} line {number}: {name} may be {' or '.join(found)}: write the name of one"
            )
        caption = captioned.first_text(fields, (caption_field, "text", "caption"))
        captions.setdefault(found[0] if found else name, []).extend([caption] * bool(caption))
    return captions


def _listed(root: pathlib.Path, names: _Names) -> dict[str, str] | None:
    """Return {image: reason or ""} of those that a `meta_data.json` lists, or None without one.

    Listed names may lack their suffix.
    """
    path = _top(names, root, _LISTING)
    if path is None:
        return None
    try:
        wanted = [posixpath.normpath(name) for name in json_files.read(path)["img_names"]]
    except (ValueError, TypeError, KeyError):
        raise UserError(f'{path} is not {{"img_names": [...]}}: repair or remove it') from None
    listed = {}
    for name in wanted:
        possible = [name] if image_files.is_image(name) else []
        possible += [name + suffix for suffix in image_files.endings()]
        found = names.find(name) if image_files.is_image(name) else []
        found = found or [file for each in possible for file in names.find(each)]
        reason = "two images of that name" if len(found) > 1 else ""
        listed[found[0] if found else possible[0]] = reason
    return listed


def _describe_failure(root: pathlib.Path, sizes: Mapping[str, int]) -> str:
    """Return the error line for a folder without a captioned image."""
    split = [posixpath.split(name) for name in sizes]
    below = [folder for folder, name in split if name == "dataset_info.json" or tars.is_tar(name)]
    if below:
        return f"{root} is not itself a data set, but {root / min(below)} is: give that"
    if any(image_files.is_image(name) for name in sizes):
        return (
            f"no image in {root} has a caption: put NAME.txt beside each NAME.png, or a "
            "metadata.jsonl at the top"
        )
    if packed := archives(sizes):
        return f"{root / packed[0]} is packed: unpack it, and give the folder with what it holds"
    return (
        f"{root} holds no known data: give a folder with *.tar, a TFDS data set "
        f"(dataset_info.json), or images ({', '.join(image_files.endings()[:4])} and others) with "
        "NAME.txt beside each"
    )
