"""The recipe of the shipped pixel codec: python -m sprint_jax.fit_codec --file=FILE.safetensors"""

import sys

import numpy as np
from absl import app, flags

from sprint_jax import cli, weights
from sprint_jax.data import pixels, shapes
from sprint_jax.errors import UserError

_FILE = flags.DEFINE_string("file", None, "File to write.")
_SIZE = flags.DEFINE_integer("size", 32, "Side of the pictures in pixels.")
_BLOCK = flags.DEFINE_integer("block", 8, "Side of a patch in pixels.")
_CHANNELS = flags.DEFINE_integer("channels", 32, "Components kept.")
_PICTURES = flags.DEFINE_integer("pictures", 4000, "Training pictures that it is fitted to.")


def main(argv):
    with cli.user_errors():
        cli.no_arguments(argv)
        if not _FILE.value:
            raise UserError("--file is missing: name the .safetensors file to write")
        images = np.stack([shapes.example(0, i, size=_SIZE.value).image for i in range(_PICTURES.value)])
        fitted = pixels.fit_pca(images, _BLOCK.value, _CHANNELS.value)
        weights.save(_FILE.value, fitted)
        latents = pixels.PatchPCA(block=_BLOCK.value, scale=1.0, **fitted).encode(images)
        scale = 1 / np.sqrt(np.square(latents).mean())
        print(f"wrote {_FILE.value}; config.codec.scale for unit root mean square: {scale:.3f}")


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags, argv=sys.argv)
