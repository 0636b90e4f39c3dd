"""Folders of `shapes` images, and the data sets that the config encodes them to."""

import pathlib
from typing import Any

from PIL import Image

from sprint_jax import config
from sprint_jax.data import encode
from sprint_jax.toy import shapes
from sprint_jax.training import datasets


def write_images(folder: pathlib.Path, count: int, size: int = 32) -> pathlib.Path:
    """Write `count` images of `shapes` and their captions to a folder and return the folder."""
    for i in range(count):
        example = shapes.example(3, i, size=size)
        Image.fromarray(example.image).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(example.text)
    return folder


def encode_shapes(
    c: config.Config, source: Any, out: pathlib.Path, heldout: int = 24, condition: Any = None
) -> pathlib.Path:
    """Encode a source with the embedded encoders of a config and return the folder `out`."""
    pixels, words, name = datasets.embedded(c)
    encoders = encode.Encoders(
        pixels=pixels,
        text=words,
        params={"pixels": {}, "text": {}},
        identity=name,
        side=c.data.size,
    )
    settings = encode.Settings(
        source=source.identity(),
        encoder=name,
        examples=len(source),
        text="features",
        caption_field="prompt",
        sizes=((c.data.size, c.data.size),),
        heldout=heldout,
        shard_records=64,
        condition=condition.identity if condition else "none",
    )
    encode.encode(source, encoders, out, settings, condition=condition)
    return out
