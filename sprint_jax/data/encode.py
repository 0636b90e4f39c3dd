"""Encoding captioned images as a data set, which several hosts can share and which can resume.

The module `encoded` describes the format. The source is cut into chunks. Each chunk becomes a train
shard, often a heldout shard, and at last a file part-NUMBER.json that records them. A killed job
resumes with the chunks that have no such file, and ends with the same bytes as an uninterrupted
one. Several hosts share the chunks. The one that finds all chunks complete writes the manifest.
"""

import concurrent.futures
import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sprint_jax.conditioning.detector import Lines
from sprint_jax.data import encode_chunk, encoded, prompts_data
from sprint_jax.data.captioned import Source
from sprint_jax.data.encode_options import Options, sizes
from sprint_jax.data.encode_settings import Encoders, Settings
from sprint_jax.encoders import prompts
from sprint_jax.encoders.text import GemmaText
from sprint_jax.errors import UserError
from sprint_jax.storage import json_files, weights
from sprint_jax.storage.settings import Keeper

SETTINGS = "settings.json"
_LISTED = 1000  # unusable examples listed in a part
_KEEPER = Keeper(
    file=SETTINGS,
    flag="encoded",
    refusal="--{flag}={folder} was begun with {key} {old!r}, this command has {new!r}: "
    "use the same, or another folder",
    foreign="--{flag}={folder} holds {found} and no encoded data set: choose another folder",
    unreadable="cannot use --{flag}={folder} ({why}): choose another folder",
    unwritable="cannot use --{flag}={folder} ({why}): choose another folder",
)


def settings(
    options: Options, source: Source, encoders: Encoders, condition: Lines | None
) -> Settings:
    """Return the settings for the options of the command.

    Raises UserError for sizes that the encoders do not support.
    """
    return Settings(
        source=source.identity(),
        encoder=encoders.identity,
        examples=len(source),
        text=options.text,
        caption_field=options.caption_field,
        sizes=sizes(options.sizes, encoders.pixels.factor, encoders.side),
        heldout=options.heldout,
        shard_records=options.shard_records,
        condition=condition.identity if condition else encoded.NO_CONDITION,
    )


def encode(
    source: Source,
    encoders: Encoders,
    out: str | pathlib.Path,
    settings: Settings,
    *,
    condition: Lines | None = None,
    batch: int = 16,
    hosts: int = 1,
    host: int = 0,
    max_bad: float = 0.05,
    say: Callable[[str], object] = lambda message: None,
) -> None:
    """Encode the missing chunks among host, host + hosts, …; write the manifest after the last.

    Args:
      source: the examples.
      encoders: the encoders of images and captions.
      out: the folder of the data set.
      settings: the settings of the folder.
      condition: the lines that settings.condition names; None for "none".
      batch: number of images, or captions, that are encoded at a time.
      hosts, host: number of jobs that share the work, and the index of this one.
      max_bad: fraction of this host's examples that may be unusable. Three are always tolerated.
      say: called with a line about the result.

    Raises UserError if the folder has other settings, more than `max_bad` examples are unusable, or
    no example is left to train on.
    """
    named = condition.identity if condition else encoded.NO_CONDITION
    if settings.condition != named:
        raise ValueError(f"the condition is {named}, settings say {settings.condition}")
    out = pathlib.Path(out)
    _text_size(encoders.text, settings.text)  # raises its error before the folder is claimed
    _claim(out, settings)
    mine, done = range(host, settings.chunks, hosts), _read_parts(out, settings)
    tally = _resume_tally(max_bad, settings, {c: done[c] for c in mine if c in done})
    missing = [chunk for chunk in mine if chunk not in done]
    with _bar(settings, mine, missing) as bar, _threads() as pool:
        encoder = encode_chunk.ChunkEncoder(
            source=source,
            encoders=encoders,
            settings=settings,
            condition=condition,
            batch=batch,
            pool=pool,
            tally=tally,
            step=bar.update,
        )
        for chunk in missing:
            _write_part(out, chunk, settings, encoder.run(settings.indices(chunk)))
    done = _read_parts(out, settings)  # of all hosts
    if left := settings.chunks - len(done):
        say(
            f"host {host} of {hosts} is done; {left} of {settings.chunks} chunks are still to "
            "come from others"
        )
        return
    ordered = [done[chunk] for chunk in range(settings.chunks)]
    say(_finish(out, encoders, settings, ordered, own=f".host{host}"))


def _resume_tally(
    max_bad: float, settings: Settings, done: Mapping[int, dict[str, Any]]
) -> encode_chunk.Tally:
    """Return a tally that has counted the chunks that this host completed before."""
    tally = encode_chunk.Tally(max_bad)
    for chunk, part in done.items():
        tally.begin(settings.indices(chunk))
        tally.bad += part["counts"]["skipped"]
    return tally


def _threads() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count())


def _bar(settings: Settings, mine: Sequence[int], missing: Sequence[int]) -> Any:
    import tqdm

    total, left = (
        sum(len(settings.indices(chunk)) for chunk in chunks) for chunks in (mine, missing)
    )
    return tqdm.tqdm(total=total, initial=total - left, unit="example", desc="encode")


def _claim(out: pathlib.Path, settings: Settings) -> None:
    """Claim the folder for the settings. Raises UserError with both values if it has others."""
    full = settings.plain() | {"condition": settings.condition}
    dataclasses.replace(_KEEPER, defaults={"condition": encoded.NO_CONDITION}).check(out, full)
    _KEEPER.claim(out, settings.plain())


def _read_parts(out: pathlib.Path, settings: Settings) -> dict[int, dict[str, Any]]:
    """Return {chunk: content of its part file} of the complete chunks."""
    parts = {chunk: _read_part(out, chunk, settings) for chunk in range(settings.chunks)}
    return {chunk: part for chunk, part in parts.items() if part is not None}


def _part_path(out: pathlib.Path, chunk: int) -> pathlib.Path:
    return out / f"part-{chunk:05d}.json"


def _read_part(out: pathlib.Path, chunk: int, settings: Settings) -> dict[str, Any] | None:
    """Return the content of the part file of a chunk. None if it or a shard is incomplete."""
    try:
        part = json_files.read(_part_path(out, chunk))
        sizes = [(out / shard["file"]).stat().st_size for shard in part["shards"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if part["settings"] != settings.digest():
        # Two hosts with different settings started at the same moment.
        raise UserError(
            f"{_part_path(out, chunk)} was made with other settings than {SETTINGS} says: remove "
            "the folder and start again"
        )
    return part if sizes == [shard["bytes"] for shard in part["shards"]] else None


def _write_part(
    out: pathlib.Path, chunk: int, settings: Settings, made: encode_chunk.Chunk
) -> None:
    """Write a chunk's shards, then its part file."""
    shards = []
    for split in encoded.SPLITS:
        chosen = [record for key, record in made.records if settings.split(key) == split]
        if chosen:
            shards.append(encoded.write_shard(out / f"{split}-{chunk:05d}{encoded.SUFFIX}", chosen))
    counts = {
        split: sum(s["records"] for s in shards if s["split"] == split) for split in encoded.SPLITS
    }
    counts |= {"skipped": len(made.skipped), "cut": made.cut}
    skipped = [
        {"key": key, "reason": reason}
        for _, (key, reason) in sorted(made.skipped.items())[:_LISTED]
    ]
    part = {"settings": settings.digest(), "counts": counts, "shards": shards, "skipped": skipped}
    json_files.write(_part_path(out, chunk), part, indent=1)


def _finish(
    out: pathlib.Path,
    encoders: Encoders,
    settings: Settings,
    ordered: Sequence[dict[str, Any]],
    own: str,
) -> str:
    """Write the null prompt and the manifest of all parts; return a line about the data set.

    own: suffix of this host's temporary files. Several hosts may get here at once, with equal
    bytes.

    Raises UserError if no example is left to train on.
    """
    shards = [shard for part in ordered for shard in part["shards"]]
    skipped = [entry for part in ordered for entry in part["skipped"]]
    names = ordered[0]["counts"]
    counts = {name: sum(part["counts"][name] for part in ordered) for name in names}
    if not counts["train"]:
        bad = f"; {skipped[0]['key']}: {skipped[0]['reason']}" if skipped else ""
        raise UserError(
            f"none of {settings.examples} examples is left to train on, {counts['skipped']} cannot "
            f"be used and {counts['heldout']} are held out{bad}. Repair the source, or hold out "
            "fewer, and use another --encoded"
        )
    described = _described(encoders, settings)
    null, manifest = out / (encoded.NULL + own), out / (encoded.MANIFEST + own)
    weights.save(null, null_prompt(encoders))
    os.replace(null, out / encoded.NULL)
    encoded.write_manifest(manifest, described, shards, skipped, counts["skipped"])
    os.replace(manifest, out / encoded.MANIFEST)
    return (
        f"{counts['train']} train and {counts['heldout']} heldout examples in {out}; "
        f"{counts['skipped']} skipped, {counts['cut']} captions cut to {described['text_length']} "
        "tokens"
    )


def _described(encoders: Encoders, settings: Settings) -> dict[str, Any]:
    """Return the manifest's description of the records."""
    dim, length = _text_size(encoders.text, settings.text)
    described = {
        "model": encoders.identity,
        "source": settings.source,
        "text": settings.text,
        "text_dim": dim,
        "text_length": length,
        "channels": encoders.pixels.channels,
        "factor": encoders.pixels.factor,
    }
    if settings.condition != encoded.NO_CONDITION:
        described["condition"] = settings.condition.partition(",")[0]
    return described


def _text_size(text: Any, kind: str) -> tuple[int, int]:
    """Return (width of features or 0, maximum length) of the stored text.

    Raises UserError for tokens if the encoder has none.
    """
    if isinstance(text, GemmaText):
        # With an instruction the first feature is that of <bos>, which is not a token of the
        # caption.
        first = 1 if kind == "tokens" and len(text.prompts.prefix) else 0
        return (text.model.width if kind == "features" else 0), prompts.WINDOW - first
    if kind == "tokens":
        raise UserError("--text=tokens: this text encoder has no tokens, use --text=features")
    return text.encoder.dim, text.encoder.length


def null_prompt(encoders: Encoders) -> dict[str, np.ndarray]:
    """Return {"text" float32 [L, D], "mask" float32 [L]} of the empty prompt, with padding.

    Published models encode it without the instruction, as <bos> and padding.
    """
    text, mask = prompts_data.null_features(encoders.text, encoders.params["text"])
    return {"text": text[0], "mask": mask[0]}
