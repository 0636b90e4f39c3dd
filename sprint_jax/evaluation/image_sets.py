"""Pictures on disk, to be scored: finding, checking and reading them."""

import collections
import json
import pathlib

import numpy as np
from PIL import Image, UnidentifiedImageError

from sprint_jax.errors import UserError
from sprint_jax.storage import files

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_UNREADABLE = (
    OSError,
    UnidentifiedImageError,
    Image.DecompressionBombError,
    SyntaxError,
    ValueError,
)


def found(folder) -> list[pathlib.Path]:
    """All pictures under a folder, by name. Raises UserError where there is none."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"no directory {folder}: give a folder of pictures")
    paths = sorted(p for p in files.below(folder) if p.suffix.lower() in _ENDINGS)
    if not paths:
        raise UserError(f"{folder} holds no pictures ({', '.join(_ENDINGS)})")
    return paths


def with_prompts(folder, prompts):
    """([path], [prompt text]) of a folder: file ID.png of each prompt, or what the folder's manifest.jsonl says.

    prompts: of `prompt_sets`, or None for the manifest, which is looked for in the folder and beside it. Raises
    UserError for prompts without a picture, with their count.
    """
    folder = pathlib.Path(folder)
    if prompts is None:
        return _by_manifest(folder)
    by_name = {path.relative_to(folder).with_suffix("").as_posix(): path for path in found(folder)}
    absent = [p.id for p in prompts if p.id not in by_name]
    if absent:
        raise UserError(
            f"{len(absent)} of {len(prompts)} prompts have no picture in {folder}, first {absent[0]}"
        )
    return [by_name[p.id] for p in prompts], [p.text for p in prompts]


def _by_manifest(folder):
    manifest = next(
        (m for m in (folder / "manifest.jsonl", folder.parent / "manifest.jsonl") if m.is_file()),
        None,
    )
    if manifest is None:
        raise UserError(
            f"{folder} has no manifest.jsonl: say with --prompts=FILE what its pictures show"
        )
    try:
        rows = [json.loads(line) for line in files.read_lines(manifest) if line.strip()]
        pairs = [(folder / row["file"], row["prompt"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{manifest} is not a manifest ({error}): say with --prompts=FILE what the pictures show"
        ) from None
    absent = [path for path, _ in pairs if not path.is_file()]
    if absent or not pairs:
        raise UserError(
            f"{len(absent)} of {len(pairs)} pictures of {manifest} are missing, first {absent[0] if absent else ''}"
        )
    return [path for path, _ in pairs], [prompt for _, prompt in pairs]


def inspected(paths):
    """({(height, width): how many}, sorted file formats) from the headers.

    Raises UserError for pictures that are no pictures, with their count.
    """
    sizes, formats, bad = collections.Counter(), set(), []
    for path in paths:
        try:
            with Image.open(path) as image:
                sizes[image.height, image.width] += 1
                formats.add(image.format.lower())
        except _UNREADABLE as error:
            bad.append((path, error))
    if bad:
        raise UserError(
            f"{len(bad)} of {len(paths)} pictures cannot be read, first {bad[0][0]} ({bad[0][1]}): make them again"
        )
    return sizes, sorted(formats)


def one_size(sizes, remedy):
    """Raises UserError where pictures differ in size. remedy: what to do about it."""
    if len(sizes) > 1:
        most = ", ".join(f"{count} of {h} x {w}" for (h, w), count in sizes.most_common(3))
        raise UserError(f"pictures have {len(sizes)} sizes ({most}): {remedy}")


def read(path):
    """uint8 [H, W, 3]: as stored, without a profile or a turn, as the metrics' own tools read them."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except _UNREADABLE as error:
        raise UserError(f"cannot read the picture {path} ({error}): make it again") from None
