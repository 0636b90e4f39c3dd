"""The recipe of the shipped pixel codecs: python -m experiments.fit_codec --file=FILE.safetensors [--of=PICTURES]

--of=""             drawn `shapes` (shapes_codec; shapes_64_codec: --size=64 --block=16 --channels=48)
--of=emoji/1.0.0    pictures of a folder, tars or TFDS set (emoji_codec: --size=64 --channels=64)
"""

import sys

import numpy as np
from absl import app, flags

from sprint_jax.data import sources
from sprint_jax.encoders import patches
from sprint_jax.errors import UserError
from sprint_jax.runtime import cli
from sprint_jax.storage import weights
from sprint_jax.toy import shapes

_FILE = flags.DEFINE_string("file", None, "File to write.")
_OF = flags.DEFINE_string(
    "of", "", "Pictures to fit it to, as sprint-jax encode reads them; '' draws shapes."
)
_SIZE = flags.DEFINE_integer("size", 32, "Side of the pictures in pixels.")
_BLOCK = flags.DEFINE_integer("block", 8, "Side of a patch in pixels.")
_CHANNELS = flags.DEFINE_integer("channels", 32, "Components kept.")
_PICTURES = flags.DEFINE_integer("pictures", 4000, "Training pictures that it is fitted to.")


def main(argv):
    with cli.user_errors():
        cli.no_arguments(argv)
        if not _FILE.value:
            raise UserError("--file is missing: name the .safetensors file to write")
        _check_flags()
        images = _pictures()
        fitted = patches.fit_pca(images, _BLOCK.value, _CHANNELS.value)
        if not (fitted["spread"] > 0).all():
            raise UserError(
                f"--channels={_CHANNELS.value}: these pictures vary in {int((fitted['spread'] > 0).sum())} components alone, keep fewer"
            )
        weights.save(_FILE.value, fitted)
        latents = patches.PatchPCA(block=_BLOCK.value, scale=1.0, **fitted).encode(images)
        scale = 1 / np.sqrt(np.square(latents).mean())
        codec = patches.PatchPCA(block=_BLOCK.value, scale=scale, **fitted)
        error = np.abs(
            np.asarray(codec.decode(codec.encode(images[:256]))).astype(int) - images[:256]
        ).mean()
        print(
            f"wrote {_FILE.value}; config.codec.scale for unit root mean square: {scale:.3f}; mean error {error:.2f} of 255"
        )


def _check_flags():
    for flag in (_SIZE, _BLOCK, _CHANNELS, _PICTURES):
        if flag.value < 1:
            raise UserError(f"--{flag.name}={flag.value}: use 1 or more")
    if _SIZE.value % _BLOCK.value:
        raise UserError(f"--block={_BLOCK.value}: use a divisor of --size={_SIZE.value}")
    if _CHANNELS.value > 3 * _BLOCK.value**2:
        raise UserError(f"--channels={_CHANNELS.value}: a patch has {3 * _BLOCK.value**2} values")
    cli.folder_of(_FILE)


def _pictures():
    """uint8 [N, size, size, 3]."""
    size = _SIZE.value
    if not _OF.value:
        return np.stack([shapes.example(0, i, size=size).image for i in range(_PICTURES.value)])
    source = sources.open_source(_OF.value)
    count = min(_PICTURES.value, len(source))
    try:
        return np.stack(
            [sources.fit(sources.load_picture(source[i].image), size, size) for i in range(count)]
        )
    except sources.BadExample as error:
        raise UserError(
            f"--of={_OF.value} holds an example that cannot be used ({error}): remove it, sprint-jax encode names such"
        ) from None


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags, argv=sys.argv)
