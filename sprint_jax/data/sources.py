"""Captioned images on disk, read by index: WebDataset tars, a TFDS data set or a plain folder.

`open_source` recognizes the three by the names in the folder. In each, the example of an index
depends only on file names, never on the order in which a file system lists them. A source decodes
captions and latents. `crops` turns the image files into pixels of one size.
"""

import os
import pathlib

from sprint_jax.data import image_folders, tars, tfds_sets
from sprint_jax.data.captioned import Source
from sprint_jax.errors import UserError
from sprint_jax.storage import files, image_files


def open_source(path: str | os.PathLike[str], caption_field: str = "prompt") -> Source:
    """Open the captioned images of a folder.

    Args:
      path: a folder. With `dataset_info.json` and `features.json` it is a TFDS data set in
        array_record form. With *.tar, or a `wids-meta.json` that lists tars, it is a WebDataset.
        Otherwise it is a folder of image files.
      caption_field: the field with the caption in the JSON of a tar, in `metadata.jsonl` or in the
        TFDS features. The latter two may also use one of the usual names.

    Raises UserError for a folder that is none of these, or several.
    """
    root = pathlib.Path(path)
    wanted = "give one with tars, a TFDS data set or captioned images"
    if not root.exists():
        raise UserError(f"no folder {path}: {wanted}")
    if not root.is_dir():
        raise UserError(f"{path} is a file: give the folder that holds it")
    names = {path.name for path in files.children(root)}
    if not names:
        raise UserError(f"the folder {path} is empty: {wanted}")
    if names >= tfds_sets.FILES:
        _check_alone(root, "a TFDS data set", {"dataset_info.json"})
        return tfds_sets.TfdsSource(root, caption_field)
    if tars.LISTING in names:
        return tars.TarSource(root, caption_field)
    if found := {name for name in names if tars.is_tar(name)}:
        _check_alone(root, f"tars ({min(found)})", found)
        return tars.TarSource(root, caption_field)
    return image_folders.FolderSource(root, caption_field)


def _check_alone(root: pathlib.Path, kind: str, own: set[str]) -> None:
    """Raise UserError if a folder of one kind also holds images, or archives beside its `own`."""
    names = [path.relative_to(root).as_posix() for path in files.below(root)]
    images = [name for name in names if image_files.is_image(name)]
    others = [name for name in image_folders.archives(names) if name not in own] + sorted(images)
    if others:
        raise UserError(image_folders.describe_mixture(root, kind, others))
