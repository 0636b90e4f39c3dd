"""Folders of image files with captions in text files or a metadata file."""

import pathlib
import posixpath
from collections.abc import Mapping

from sprint_jax.data import captioned, tars
from sprint_jax.data.captioned import IMAGE_SUFFIXES, BadExample, Example
from sprint_jax.errors import UserError
from sprint_jax.storage import files, json_files


class FolderSource:
    """The images below a folder, each with NAME.txt or a line of `metadata.jsonl` at the top.

    The official `meta_data.json` ({"img_names": [...]}), if present, selects the images.
    """

    def __init__(self, root: pathlib.Path, caption_field: str):
        """List the images. Raises UserError if none has a caption."""
        self._root = root
        sizes = _file_sizes(root)
        captions = _metadata(root / "metadata.jsonl", caption_field)
        listed = _listed(root / "meta_data.json", sizes)
        if listed is None:
            listed = [name for name in sizes if _suffix(name) in IMAGE_SUFFIXES] + list(captions)
        # (image, caption or "", file with the caption or "")
        self._images: list[tuple[str, str, str]] = []
        for name in sorted(set(listed)):
            text_file = posixpath.splitext(name)[0] + ".txt"
            text_file = text_file if text_file in sizes else ""
            self._images.append((name, captions.get(name, ""), text_file))
        if not any(caption or text_file for _, caption, text_file in self._images):
            raise UserError(_describe_failure(root, sizes))
        known = (*IMAGE_SUFFIXES, ".txt", ".json", ".jsonl")
        self._files = sorted((name, size) for name, size in sizes.items() if _suffix(name) in known)

    def __len__(self) -> int:
        return len(self._images)

    def key(self, index: int) -> str:
        """Return the path of the image relative to the folder."""
        return self._images[index][0]

    def __getitem__(self, index: int) -> Example:
        captioned.check_index(index, self)
        name, caption, text_file = self._images[index]
        try:
            image = (self._root / name).read_bytes()
            text = captioned.encode_text(caption)
            if not text and text_file:
                text = (self._root / text_file).read_bytes()
        except FileNotFoundError:
            raise BadExample("missing picture") from None
        except OSError:
            raise BadExample("unreadable file") from None
        return Example(name, image, None, captioned.decode_caption(text))

    def identity(self) -> str:
        """Return a hash of the names and sizes of the files."""
        return captioned.hash_files("folder", self._files)


def _file_sizes(root: pathlib.Path) -> dict[str, int]:
    """Return {path relative to root, with "/": bytes} of the files below it that are not hidden."""
    return {path.relative_to(root).as_posix(): path.stat().st_size for path in files.below(root)}


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _metadata(path: pathlib.Path, caption_field: str) -> dict[str, str]:
    """Return {image: caption or ""} of a `metadata.jsonl`, or {} if there is none."""
    captions: dict[str, str] = {}
    if path.is_file():
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                fields = json_files.parse(line) if line.strip() else None
                if fields is not None:
                    name = posixpath.normpath(fields["file_name"])
                    captions[name] = captioned.first_text(
                        fields, (caption_field, "text", "caption")
                    )
            except (ValueError, TypeError, KeyError, AttributeError):
                raise UserError(
                    f"{path} line {number} is not "
                    f'{{"file_name": ..., "{caption_field}": ...}}: repair it'
                ) from None
    return captions


def _listed(path: pathlib.Path, sizes: Mapping[str, int]) -> list[str] | None:
    """Return the images that a `meta_data.json` lists, or None if there is none.

    Listed names may lack their suffix.
    """
    if not path.is_file():
        return None
    try:
        names = [posixpath.normpath(name) for name in json_files.read(path)["img_names"]]
    except (ValueError, TypeError, KeyError):
        raise UserError(f'{path} is not {{"img_names": [...]}}: repair or remove it') from None
    listed = []
    for name in names:
        complete = _suffix(name) in IMAGE_SUFFIXES
        possible = [name] if complete else [name + suffix for suffix in IMAGE_SUFFIXES]
        listed.append(next((p for p in possible if p in sizes), possible[0]))
    return listed


def _describe_failure(root: pathlib.Path, sizes: Mapping[str, int]) -> str:
    """Return the error line for a folder without a captioned image."""
    split = [posixpath.split(name) for name in sizes]
    below = [folder for folder, name in split if name == "dataset_info.json" or tars.is_tar(name)]
    if below:
        return f"{root} is not itself a data set, but {root / min(below)} is: give that"
    if any(_suffix(name) in IMAGE_SUFFIXES for name in sizes):
        return (
            f"no image in {root} has a caption: put NAME.txt beside each NAME.png, or a "
            "metadata.jsonl at the top"
        )
    return (
        f"{root} holds no known data: give a folder with *.tar, a TFDS data set "
        f"(dataset_info.json), or images ({', '.join(IMAGE_SUFFIXES)}) with NAME.txt beside each"
    )
