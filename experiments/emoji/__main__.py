"""Make a data set of captioned emoji.

experiments/emoji/dataset.py describes the images and captions. This needs the font Noto Color Emoji
(Debian: fonts-noto-color-emoji). It writes DIR/emoji/1.0.0 (TFDS, array_record) and
DIR/preview.png. The same options give the same images.
"""

import contextlib
import dataclasses
import io
import pathlib
import sys
import tempfile
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sprint_jax.errors import UserError
from sprint_jax.runtime import cli
from sprint_jax.storage import files
from sprint_jax.storage.settings import Keeper

if TYPE_CHECKING:
    from experiments.emoji.dataset import Glyphs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(files.Paths):
    """Options of `python -m experiments.emoji`."""

    to_dir: files.LocalPath = ""
    """Folder to make the data set in."""
    side: int = 64
    """Side of the images in pixels, 64 to 128."""
    count: int = 20000
    """Images to make."""
    data_seed: int = 0
    """Selects the images; another number makes others."""
    font: files.LocalPath | None = None
    """NotoColorEmoji.ttf; default: where Debian's fonts-noto-color-emoji puts it."""


_KEEPER = Keeper(
    file="metadata.json",  # written by TFDS
    flag="to_dir",
    refusal="{folder} was made with {key} {old}, not {new}: give another --{flag}, or remove it",
    foreign="{folder} was not made by this command: give another --{flag}",
    unreadable="{folder} was not made by this command: give another --{flag}",
)
_PREVIEWED = 64


def run(options: Options) -> None:
    """Make the data set and its preview. Raises UserError for a folder of other options."""
    cli.require("to_dir", options.to_dir, "name the folder to make the data set in")
    if options.count < 1:
        raise UserError(f"--count={options.count}: make at least one image")
    if options.data_seed < 0:
        raise UserError(f"--data_seed={options.data_seed}: give 0 or more")
    root = pathlib.Path(options.to_dir)
    nearest = next(path for path in (root, *root.parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"--to_dir={root}: {nearest} is a file, name a folder")
    from experiments.emoji import dataset

    smallest, largest = dataset.SIZES
    if not smallest <= options.side <= largest:
        raise UserError(f"--side={options.side}: give {smallest} to {largest} pixels")
    settings = dict(seed=options.data_seed, size=options.side, count=options.count)
    _make(root, dataset.Glyphs(options.font or dataset.FONT), settings)


def _make(root: pathlib.Path, font: "Glyphs", settings: dict[str, int]) -> None:
    from experiments.emoji import dataset

    made = root / dataset.Emoji.name / str(dataset.Emoji.VERSION)
    if (made / "dataset_info.json").exists():
        _KEEPER.check(made, settings | {"font_sha256": font.digest})
        print(f"{made} is there already, nothing to do")
    else:
        (root / "preview.png").unlink(missing_ok=True)
        _build(root, font, settings)
        print(
            f"made {made}: {settings['count']} captioned images of {settings['size']} px "
            f"from {len(font.names)} emoji"
        )
    if not (root / "preview.png").exists():  # also after a killed command
        _preview(root / "preview.png", font, **settings)
        print(f"look at {root / 'preview.png'}")
    print(f"next: python -m sprint_jax encode --source={made}")


def _build(root: pathlib.Path, font: "Glyphs", settings: dict[str, int]) -> None:
    import tensorflow_datasets as tfds
    import tqdm

    from experiments.emoji import dataset

    def show_progress(ids: Iterable[int]) -> Any:
        return tqdm.tqdm(ids, unit="image", desc="emoji", delay=5, mininterval=1.0)

    # The progress bars of TFDS count shards, and its prints are about downloads. Ours shows the
    # time that is left.
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as unused:
            builder = dataset.Emoji(font=font, each=show_progress, data_dir=root, **settings)
            builder.download_and_prepare(download_dir=unused)
    except OSError as error:
        raise UserError(
            f"cannot write the data set to {root} ({error}): make room or give another --to_dir"
        ) from None


def _preview(path: pathlib.Path, font: "Glyphs", *, seed: int, size: int, count: int) -> None:
    """Write the first images as one grid."""
    import numpy as np

    from experiments.emoji import dataset
    from sprint_jax.storage import image_files

    images = [dataset.example(font, seed, i, size)[0] for i in range(min(_PREVIEWED, count))]
    image_files.save(path, image_files.grid(np.stack(images), columns=8))


if __name__ == "__main__":
    cli.start(Options, run, sys.argv[1:], prog="python -m experiments.emoji", description=__doc__)
