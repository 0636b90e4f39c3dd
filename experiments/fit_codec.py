"""Fit a pixel codec, as the shipped ones were fitted.

--of=""             drawn shapes (shapes_codec; shapes_64_codec: --size=64 --block=16 --channels=48)
--of=emoji/1.0.0    images of a folder, tars or TFDS set (emoji_codec: --size=64 --channels=64)
"""

import dataclasses
import sys

import jax.numpy as jnp
import numpy as np

from sprint_jax.data import captioned, sources
from sprint_jax.encoders import patches
from sprint_jax.errors import UserError
from sprint_jax.runtime import cli
from sprint_jax.storage import crops, files, weights
from sprint_jax.toy import shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(files.Paths):
    """Options of `python -m experiments.fit_codec`."""

    file: files.LocalPath = ""
    """Safetensors file to write."""
    of: files.LocalPath = ""
    """Images to fit it to, as `sprint-jax encode` reads them; '' draws shapes."""
    size: int = 32
    """Side of the images in pixels."""
    block: int = 8
    """Side of a patch in pixels."""
    channels: int = 32
    """Number of components to keep."""
    pictures: int = 4000
    """Number of training images to fit it to."""


def run(options: Options) -> None:
    """Write the codec and print its scale. Raises UserError for options that do not fit."""
    cli.require("file", options.file, "name the .safetensors file to write")
    _check(options)
    images = _images(options)
    fitted = patches.fit_pca(images, options.block, options.channels)
    varying = int((fitted["spread"] > 0).sum())
    if varying < len(fitted["spread"]):
        raise UserError(
            f"--channels={options.channels}: these images vary in only {varying} components, "
            "keep fewer"
        )
    weights.save(options.file, fitted)
    latents = patches.PatchPCA(block=options.block, scale=1.0, **fitted).encode(images)
    scale = 1 / np.sqrt(np.square(latents).mean())
    codec = patches.PatchPCA(block=options.block, scale=scale, **fitted)
    decoded = np.asarray(codec.decode(jnp.asarray(codec.encode(images[:256])))).astype(int)
    print(
        f"wrote {options.file}; config.codec.scale for unit root mean square: {scale:.3f}; "
        f"mean error {np.abs(decoded - images[:256]).mean():.2f} of 255"
    )


def _check(options: Options) -> None:
    for name in ("size", "block", "channels", "pictures"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}={getattr(options, name)}: use 1 or more")
    if options.size % options.block:
        raise UserError(f"--block={options.block}: use a divisor of --size={options.size}")
    if options.channels > 3 * options.block**2:
        raise UserError(f"--channels={options.channels}: a patch has {3 * options.block**2} values")
    cli.check_output_file("file", options.file)


def _images(options: Options) -> np.ndarray:
    """Return the images to fit, uint8 [N, size, size, 3]."""
    size = options.size
    if not options.of:
        drawn = [shapes.example(0, i, size=size).image for i in range(options.pictures)]
        return np.stack(drawn)
    source = sources.open_source(options.of)
    count = min(options.pictures, len(source))
    try:
        return np.stack([_image(source[i], size) for i in range(count)])
    except captioned.BadExample as error:
        raise UserError(
            f"--of={options.of} holds an example that cannot be used ({error}): remove it; "
            "`sprint-jax encode` lists such examples"
        ) from None


def _image(example: captioned.Example, size: int) -> np.ndarray:
    if example.image is None:
        raise captioned.BadExample("missing picture")
    return crops.fit_bicubic(captioned.decode_image(example.image), size, size)


if __name__ == "__main__":
    cli.start(
        Options, run, sys.argv[1:], prog="python -m experiments.fit_codec", description=__doc__
    )
