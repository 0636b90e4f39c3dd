"""A data set of captioned emoji: python -m experiments.emoji --to_dir=DIR [--side=64] [--count=20000]

Pictures, captions and their grammar: experiments/emoji/dataset.py. Needs the font Noto Color Emoji (Debian:
fonts-noto-color-emoji). Makes DIR/emoji/1.0.0 (TFDS, array_record) and DIR/preview.png; same flags, same pictures.
"""

import contextlib
import io
import pathlib
import sys
import tempfile

from absl import app, flags

from sprint_jax.errors import UserError
from sprint_jax.runtime import cli
from sprint_jax.storage.settings import Keeper

_TO_DIR = flags.DEFINE_string("to_dir", None, "Folder to make the data set in.")
_SIDE = flags.DEFINE_integer("side", 64, "Side of the emoji pictures in pixels, 64 to 128.")
_COUNT = flags.DEFINE_integer("count", 20000, "Emoji pictures to make.")
_DATA_SEED = flags.DEFINE_integer(
    "data_seed", 0, "Names the emoji pictures; another number makes others."
)
_FONT = flags.DEFINE_string(
    "font", None, "NotoColorEmoji.ttf; default: where Debian's fonts-noto-color-emoji puts it."
)

_KEEPER = Keeper(
    file="metadata.json",  # which TFDS writes
    flag="to_dir",
    refusal="{folder} was made with {key} {old}, not {new}: give another --{flag}, or remove it",
    foreign="{folder} was not made by this command: give another --{flag}",
    unreadable="{folder} was not made by this command: give another --{flag}",
)
_PREVIEWED = 64


def main(argv):
    with cli.user_errors():
        cli.no_arguments(argv)
        if not _TO_DIR.value:
            raise UserError("--to_dir is missing: name the folder to make the data set in")
        if _COUNT.value < 1:
            raise UserError(f"--count={_COUNT.value}: make at least one picture")
        if _DATA_SEED.value < 0:
            raise UserError(f"--data_seed={_DATA_SEED.value}: give 0 or more")
        root = pathlib.Path(_TO_DIR.value)
        nearest = next(path for path in (root, *root.parents) if path.exists())
        if not nearest.is_dir():
            raise UserError(f"--to_dir={root}: {nearest} is a file, name a folder")
        from experiments.emoji import dataset

        if not dataset.SIZES[0] <= _SIDE.value <= dataset.SIZES[1]:
            raise UserError(
                f"--side={_SIDE.value}: give {dataset.SIZES[0]} to {dataset.SIZES[1]} pixels"
            )
        _make(root, dataset.Glyphs(_FONT.value or dataset.FONT))


def _make(root, font):
    from experiments.emoji import dataset

    made = root / dataset.Emoji.name / str(dataset.Emoji.VERSION)
    settings = dict(seed=_DATA_SEED.value, size=_SIDE.value, count=_COUNT.value)
    if (made / "dataset_info.json").exists():
        _KEEPER.check(made, settings | {"font_sha256": font.digest})
        print(f"{made} is there already, nothing to do")
    else:
        (root / "preview.png").unlink(missing_ok=True)
        _build(root, font, settings)
        print(
            f"made {made}: {_COUNT.value} captioned pictures of {_SIDE.value} px from {len(font.names)} emoji"
        )
    if not (root / "preview.png").exists():  # of a killed command as well
        _preview(root / "preview.png", font, **settings)
        print(f"look at {root / 'preview.png'}")
    print(f"next: python -m sprint_jax encode --source={made}")


def _build(root, font, settings):
    import tensorflow_datasets as tfds
    import tqdm

    from experiments.emoji import dataset

    def bar(ids):
        return tqdm.tqdm(ids, unit="picture", desc="emoji", delay=5, mininterval=1.0)

    # TFDS's bars count shards where ours shows the time left, and its prints speak of downloads.
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as unused:
            builder = dataset.Emoji(font=font, each=bar, data_dir=root, **settings)
            builder.download_and_prepare(download_dir=unused)
    except OSError as error:
        raise UserError(
            f"cannot write the data set to {root} ({error}): make room or give another --to_dir"
        ) from None


def _preview(path, font, *, seed, size, count):
    """Writes the first pictures as one sheet."""
    import numpy as np

    from experiments.emoji import dataset
    from sprint_jax.storage import image_files

    images = [dataset.example(font, seed, i, size)[0] for i in range(min(_PREVIEWED, count))]
    image_files.save(path, image_files.grid(np.stack(images), columns=8))


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags, argv=sys.argv)
