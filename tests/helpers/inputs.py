"""Folders of captioned pictures, and what the `smoke` preset encodes them to."""

import dataclasses

from PIL import Image

from helpers.configs import card
from sprint_jax import config
from sprint_jax.commands import encode
from sprint_jax.toy import shapes
from sprint_jax.training import datasets


def pictures(folder, count, size=32):
    for i in range(count):
        example = shapes.example(3, i, size=size)
        Image.fromarray(example.image).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(example.text)
    return folder


def encoded_by(c, source, out, heldout=24, condition=None):
    pixels, words, name = datasets.embedded(c)
    encoders = encode.Encoders(pixels, words, {"pixels": {}, "text": {}}, name, c.data.size)
    kept = encode.Settings(
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
    encode.encode(source, encoders, out, kept, condition=condition)
    return out


def smoke(**data):
    c = config.parse(card(preset="smoke"))
    return dataclasses.replace(c, data=dataclasses.replace(c.data, **data))
