"""Images on disk that are scored: finding, checking and reading them."""

import collections
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError

from sprint_jax.errors import UserError
from sprint_jax.evaluation.prompt_sets import Prompt
from sprint_jax.storage import files, image_files, json_files, json_lines

_UNREADABLE = (
    OSError,
    UnidentifiedImageError,
    Image.DecompressionBombError,
    SyntaxError,
    ValueError,
)


def found(folder: str | os.PathLike) -> list[pathlib.Path]:
    """Return all images below a folder, sorted by name. Raises UserError if there is none."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"no directory {folder}: give a folder of images")
    paths = sorted(p for p in files.below(folder) if image_files.is_image(p.name))
    if not paths:
        raise UserError(f"{folder} holds no images ({', '.join(image_files.endings())})")
    return paths


def with_prompts(
    folder: str | os.PathLike, prompts: Sequence[Prompt] | None
) -> tuple[list[pathlib.Path], list[str]]:
    """Return the paths of the images of a folder, and the prompt of each.

    The image of a prompt is its file ID.png. prompts: None to read manifest.jsonl, in the folder or
    beside it. Raises UserError for prompts without an image, with their count, and for prompts
    beside a folder of several commands, whose images their ids do not tell apart.
    """
    folder = pathlib.Path(folder)
    if prompts is None:
        return _by_manifest(folder)
    _check_one_command(folder)
    by_name: dict[str, list[pathlib.Path]] = collections.defaultdict(list)
    for path in found(folder):
        by_name[path.relative_to(folder).with_suffix("").as_posix()].append(path)
    folded = collections.Counter(map(files.fold, by_name))
    for name in list(by_name):  # an id may differ in case from the only file that it can mean
        if folded[files.fold(name)] == 1:
            by_name.setdefault(files.fold(name), by_name[name])
    own = {p.id: p.id if p.id in by_name else files.fold(p.id) for p in prompts}
    absent = [p.id for p in prompts if own[p.id] not in by_name]
    if absent:
        raise UserError(
            f"{len(absent)} of {len(prompts)} prompts have no image in {folder}, first {absent[0]}"
        )
    for prompt in prompts:
        if len(paths := by_name[own[prompt.id]]) > 1:
            several = " and ".join(map(str, paths))
            raise UserError(f"{several} would both be the image of {prompt.id}: remove one")
    return [by_name[own[p.id]][0] for p in prompts], [p.text for p in prompts]


def _check_one_command(folder):
    rows = json_lines.rows(folder / "manifest.jsonl", ("file", "index"))
    commands = sum(row["index"] == 0 for row in rows)
    if commands > 1:
        raise UserError(
            f"{folder} holds images of {commands} commands: leave --prompts out, which scores all "
            "by manifest.jsonl, or draw into a folder of their own"
        )


def _by_manifest(folder):
    manifest = next(
        (m for m in (folder / "manifest.jsonl", folder.parent / "manifest.jsonl") if m.is_file()),
        None,
    )
    if manifest is None:
        raise UserError(
            f"{folder} has no manifest.jsonl: give the prompts of its images by --prompts=FILE"
        )
    try:
        rows = [json_files.parse(line) for line in files.read_lines(manifest) if line.strip()]
        pairs = [(folder / row["file"], row["prompt"]) for row in rows]
        if not all(isinstance(prompt, str) for _, prompt in pairs):
            raise TypeError("a prompt is no text")
        absent = [path for path, _ in pairs if not path.is_file()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{manifest} is not a manifest ({error}): give the prompts by --prompts=FILE"
        ) from None
    if absent or not pairs:
        raise UserError(
            f"{len(absent)} of {len(pairs)} images of {manifest} are missing, first "
            f"{absent[0] if absent else ''}"
        )
    return [path for path, _ in pairs], [prompt for _, prompt in pairs]


def inspected(
    paths: Sequence[pathlib.Path],
) -> tuple[collections.Counter[tuple[int, int]], list[str]]:
    """Return ({(height, width): count}, sorted file formats) of images, from their headers.

    Raises UserError for files that are no images, with their count.
    """
    sizes: collections.Counter[tuple[int, int]] = collections.Counter()
    formats, bad = set(), []
    for path in paths:
        try:
            with Image.open(path) as image:
                sizes[image.height, image.width] += 1
                formats.add((image.format or "").lower())
        except _UNREADABLE as error:
            bad.append((path, error))
    if bad:
        raise UserError(
            f"{len(bad)} of {len(paths)} images cannot be read, first {bad[0][0]} ({bad[0][1]}): "
            "generate them again"
        )
    return sizes, sorted(formats)


def one_size(sizes: collections.Counter[tuple[int, int]], remedy: str) -> None:
    """Raise UserError if images differ in size. sizes: of `inspected`. remedy: what to do."""
    if len(sizes) > 1:
        most = ", ".join(f"{count} of {h} x {w}" for (h, w), count in sizes.most_common(3))
        raise UserError(f"images have {len(sizes)} sizes ({most}): {remedy}")


def read(path: str | os.PathLike) -> np.ndarray:
    """Return an image, uint8 [H, W, 3].

    Color profiles, EXIF rotation and transparency are ignored, as the metrics' own tools do.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image_files.eight_bits(image).convert("RGB"))
    except _UNREADABLE as error:
        raise UserError(f"cannot read the image {path} ({error}): generate it again") from None
