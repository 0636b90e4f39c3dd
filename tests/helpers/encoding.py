"""Encoding folders of captioned images with the embedded encoders, which need no weights."""

import dataclasses
import pathlib
from typing import Any

from sprint_jax.data import encode, encoded, sources
from sprint_jax.encoders import patches, words
from sprint_jax.encoders import pixels as pixel_codecs
from sprint_jax.encoders import text as text_encoders

CODEC, TEXT = patches.SpaceToDepth(4, 1.28), words.ShapesText()
SIZES = ((32, 32), (16, 48))


def embedded_encoders() -> encode.Encoders:
    """Return the embedded codec and text encoder."""
    params = {"pixels": {}, "text": {}}
    pixels, text = pixel_codecs.EmbeddedPixels(CODEC), text_encoders.EmbeddedText(TEXT)
    return encode.Encoders(pixels=pixels, text=text, params=params, identity="tiny", side=32)


def encoders_of(pipe: Any) -> encode.Encoders:
    """Return the encoders of a loaded pipeline."""
    return encode.Encoders(
        pixels=pipe.pixels, text=pipe.text, params=pipe.params, identity="tiny", side=32
    )


def settings_of_names(examples: int, heldout: int) -> encode.Settings:
    """Return settings of no source: of use are the number of examples, and of those held out."""
    return encode.Settings(
        source="",
        encoder="",
        examples=examples,
        text="features",
        caption_field="",
        sizes=(),
        heldout=heldout,
        shard_records=1,
        condition="none",
    )


def encode_settings(source: Any, **changes: Any) -> encode.Settings:
    """Return the settings of an encoding of `source` in small shards."""
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


def encode_folder(
    images: pathlib.Path,
    out: pathlib.Path | str,
    said: list[str] | None = None,
    encoders: encode.Encoders | None = None,
    lines: Any = None,
    **options: Any,
) -> None:
    """Encode a folder of images and captions into the folder `out`.

    Messages are appended to `said`. `lines` is the condition. Further options are fields of
    encode.Settings or keywords of encode.encode.
    """
    source = sources.open_source(images)
    names = {f.name for f in dataclasses.fields(encode.Settings)}
    changes = {k: options.pop(k) for k in list(options) if k in names}
    say = (lambda message: None) if said is None else said.append
    options = dict(batch=4, max_bad=0.2, say=say) | options
    settings = encode_settings(source, **changes)
    encode.encode(
        source, encoders or embedded_encoders(), out, settings, condition=lines, **options
    )


def folder_contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Return {name: content} of the files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def records_by_caption(folder: pathlib.Path, split: str) -> dict[str, dict[str, Any]]:
    """Return {caption: record} of a split."""
    data = encoded.Encoded(folder, split)
    read = [data.read(i) for i in range(len(data))]
    return {r["caption"].tobytes().decode(): r for r in read}


class Interrupted(Exception):
    """Raised by tests in the middle of an encoding."""
