"""Encoding pictures into data sets with the embedded encoders."""

import dataclasses

from sprint_jax.commands import encode
from sprint_jax.data import encoded, sources
from sprint_jax.encoders import parts, patches, words

CODEC, TEXT = patches.SpaceToDepth(4, 1.28), words.ShapesText()
SIZES = ((32, 32), (16, 48))


def tiny():
    """The embedded encoders, which need no weights."""
    params = {"pixels": {}, "text": {}}
    return encode.Encoders(
        parts.EmbeddedPixels(CODEC), parts.EmbeddedText(TEXT), params, "tiny", 32
    )


def settings(source, **changes):
    fields = dict(
        source=source.identity(),
        encoder="tiny",
        examples=len(source),
        text="features",
        caption_field="prompt",
        sizes=SIZES,
        heldout=8,
        shard_records=10,
        condition="none",
    )
    return encode.Settings(**fields | changes)


def make(pictures, out, said=None, encoders=None, lines=None, **options):
    source = sources.open_source(pictures)
    changes = {
        k: options.pop(k)
        for k in list(options)
        if k in {f.name for f in dataclasses.fields(encode.Settings)}
    }
    say = (lambda message: None) if said is None else said.append
    options = dict(batch=4, max_bad=0.2, say=say) | options
    encode.encode(
        source, encoders or tiny(), out, settings(source, **changes), condition=lines, **options
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def records(folder, split):
    """{caption: record} of a split."""
    data = encoded.Encoded(folder, split)
    read = [data.read(i) for i in range(len(data))]
    return {r["caption"].tobytes().decode(): r for r in read}


class Stop(Exception):
    pass
