"""Pictures and captions to an encoded data set: python -m sprint_jax encode --source=DIR --encoder=DIR --encoded=DIR

The encoder is a diffusers or converted folder, or FILE.py[:PRESET] for the embedded encoders of a config.

The source is cut into chunks of --shard_records examples. A chunk becomes a train shard, perhaps a heldout
shard, and last of all a part-NUMBER.json that says so. A command that is killed goes on with the chunks that
have none, and ends with the same bytes as one that never was. --hosts commands with --host=0, 1, … share the
chunks; whichever sees the last one done writes manifest.json (`sprint_jax/data/encoded.py` has the format).

Examples that cannot be used are skipped, counted and listed with the reason.

For a ControlNet --condition=edges|hed|scribble adds to each example what it is steered by: lines of its picture, encoded by
the same autoencoder (`sprint_jax/conditioning/detector.py`). hed and scribble need --hed_weights=ControlNetHED.pth.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import runpy
import sys
import warnings
from typing import Any

import numpy as np
from absl import app, flags

from sprint_jax.conditioning import sketches
from sprint_jax.data import encoded
from sprint_jax.errors import UserError
from sprint_jax.runtime import cli, compile_cache
from sprint_jax.storage import files

_SOURCE = flags.DEFINE_string(
    "source", None, "Folder of captioned pictures: WebDataset tars, TFDS, or plain files."
)
_ENCODER = flags.DEFINE_string(
    "encoder", None, "Diffusers or converted folder, or config file with :preset."
)
_ENCODED = flags.DEFINE_string("encoded", None, "Folder to make, or to go on with.")
_TEXT = flags.DEFINE_enum(
    "text", "features", ["features", "tokens"], "Store text features, or tokens (far smaller)."
)
_FIELD = flags.DEFINE_string(
    "caption_field", "prompt", "Field that holds captions, where the source has fields."
)
_INSTRUCTION = flags.DEFINE_string(
    "caption_instruction",
    None,
    "Text file with the instruction before each caption; '' for none; default: the model's.",
)
_DTYPE = flags.DEFINE_enum(
    "encode_dtype",
    None,
    ["bfloat16", "float32"],
    "Of the text encoder; default: bfloat16, on a CPU float32.",
)
_PIXELS_DTYPE = flags.DEFINE_enum(
    "pixels_dtype",
    "float32",
    ["bfloat16", "float32"],
    "Of the autoencoder; the published trainer's is float32.",
)
_SIZES = flags.DEFINE_string(
    "sizes",
    None,
    "HEIGHTxWIDTH,... to choose from by aspect ratio, or 'published' for the bins of the published models; "
    "default: the model's own square.",
)
_CONDITION = flags.DEFINE_enum(
    "condition",
    encoded.NO_CONDITION,
    (encoded.NO_CONDITION, *sketches.KINDS),
    "Lines to store for a ControlNet.",
)
_HED = flags.DEFINE_string("hed_weights", None, "hed, scribble: ControlNetHED.pth or .safetensors.")
# Named as in sprint-jax condition, for the same thing; one process runs one of the two commands.
_THICKNESS = flags.DEFINE_integer(
    "thickness",
    None,
    "scribble: of strokes, in pixels; default: drawn for each example from 0 to 24, as published.",
    allow_override=True,
)
_HELDOUT = flags.DEFINE_integer(
    "heldout", 256, "About how many examples to hold out. A hash of its name decides about each."
)
_SHARD_RECORDS = flags.DEFINE_integer("shard_records", 1024, "Examples of the source in a chunk.")
_HOSTS = flags.DEFINE_integer("hosts", 1, "How many of these commands share the work.")
_HOST = flags.DEFINE_integer("host", 0, "Which of them this is, from 0.")
_MAX_BAD = flags.DEFINE_float(
    "max_bad_share",
    0.05,
    "Stop when more than this share of the examples, 0 to 1, cannot be used; three never stop it.",
)
_BATCH = flags.DEFINE_integer("encode_batch", 16, "Pictures, and captions, encoded at a time.")

SETTINGS = "settings.json"
_FORGIVEN = 3  # unusable examples that never stop the work, however few there are
_LISTED = 1000  # unusable examples listed in a part
_SHOWN = 10  # captions that were cut, said one by one


@dataclasses.dataclass(frozen=True, eq=False)
class Encoders:
    """What makes a record of an example.

    pixels, text: the seams (`parts.py`). params: {"pixels", "text"}. identity: names them and what is in them.
    side: pixels of the square picture that is made where no sizes are asked for.
    """

    pixels: Any
    text: Any
    params: Any
    identity: str
    side: int


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides about the bytes; a folder keeps to its own.

    source, encoder: identities. examples: in the source. text: "features" or "tokens". sizes: of pictures,
    ((height, width), ...). heldout: about how many. shard_records: examples in a chunk. condition: identity of the
    `detector.Lines`, or "none".
    """

    source: str
    encoder: str
    examples: int
    text: str
    caption_field: str
    sizes: tuple[tuple[int, int], ...]
    heldout: int
    shard_records: int
    condition: str

    def plain(self):
        """As JSON gives it back. Without a condition it is what it was before there were any: old folders go on."""
        fields = json.loads(json.dumps(dataclasses.asdict(self)))
        return {
            name: value
            for name, value in fields.items()
            if (name, value) != ("condition", encoded.NO_CONDITION)
        }

    def digest(self):
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True).encode()).hexdigest()

    @property
    def chunks(self) -> int:
        return -(-self.examples // self.shard_records)

    def indices(self, chunk):
        return range(
            chunk * self.shard_records, min(self.examples, (chunk + 1) * self.shard_records)
        )

    def split(self, key):
        """The split of an example. Neither order nor hosts nor other examples matter, only how many there are."""
        drawn = (
            int.from_bytes(
                hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8], "big"
            )
            / 2**64
        )
        return "heldout" if drawn < self.heldout / self.examples else "train"


def main(argv):
    with cli.user_errors():
        cli.no_arguments(argv)
        for name, flag in (("source", _SOURCE), ("encoder", _ENCODER), ("encoded", _ENCODED)):
            if not flag.value:
                raise UserError(f"--{name} is missing: give a folder")
        for name, flag in (
            ("shard_records", _SHARD_RECORDS),
            ("hosts", _HOSTS),
            ("encode_batch", _BATCH),
        ):
            if flag.value < 1:
                raise UserError(f"--{name}={flag.value}: use 1 or more")
        if (
            pathlib.Path(_ENCODED.value)
            .resolve()
            .is_relative_to(pathlib.Path(_SOURCE.value).resolve())
        ):
            raise UserError(
                f"--encoded={_ENCODED.value} lies in --source={_SOURCE.value}, whose files are read: choose another"
            )
        if not 0 <= _MAX_BAD.value <= 1:
            raise UserError(f"--max_bad_share={_MAX_BAD.value}: use a share from 0 to 1")
        if not 0 <= _HOST.value < _HOSTS.value:
            raise UserError(
                f"--host={_HOST.value} of --hosts={_HOSTS.value}: use 0 to {_HOSTS.value - 1}"
            )
        _check_condition()
        from sprint_jax.data import (
            sources,  # libraries start here, after the flags are known to be right
        )

        compile_cache.start()
        source = sources.open_source(_SOURCE.value, _FIELD.value)
        if not 0 <= _HELDOUT.value < len(source):
            raise UserError(
                f"--heldout={_HELDOUT.value} of the {len(source)} examples of --source={_SOURCE.value}: hold out fewer"
            )
        condition, encoders = _condition(), _encoders(_ENCODER.value)
        settings = Settings(
            source.identity(),
            encoders.identity,
            len(source),
            _TEXT.value,
            _FIELD.value,
            _sizes(encoders),
            _HELDOUT.value,
            _SHARD_RECORDS.value,
            condition.identity if condition else encoded.NO_CONDITION,
        )
        say = lambda message: print(message, flush=True)
        encode(
            source,
            encoders,
            _ENCODED.value,
            settings,
            condition=condition,
            batch=_BATCH.value,
            hosts=_HOSTS.value,
            host=_HOST.value,
            max_bad=_MAX_BAD.value,
            say=say,
        )


def _check_condition():
    """Raises UserError for flags of a condition that do not belong together."""
    kind, detected = _CONDITION.value, _CONDITION.value in ("hed", "scribble")
    if detected and not _HED.value:
        raise UserError(
            f"--condition={kind} needs --hed_weights=ControlNetHED.pth of the detector; --condition=edges needs none"
        )
    for flag, belongs in ((_HED, detected), (_THICKNESS, kind == "scribble")):
        if flag.value is not None and not belongs:
            raise UserError(f"--{flag.name} does not belong to --condition={kind}: leave it out")
    if _THICKNESS.value is not None and _THICKNESS.value < 0:
        raise UserError(f"--thickness={_THICKNESS.value}: use 0 or more")


def _condition():
    """The `detector.Lines` that flags ask for, or None."""
    if _CONDITION.value == encoded.NO_CONDITION:
        return None
    from sprint_jax.conditioning import detector

    given, thickness = _THICKNESS.value, None
    if _CONDITION.value == "scribble":
        thickness = sketches.PUBLISHED_THICKNESS if given is None else (given, given)
    return detector.Lines(
        _CONDITION.value, detector.load(_HED.value) if _HED.value else None, thickness
    )


def _sizes(encoders):
    """((height, width), ...) of --sizes, each once, sorted."""
    from sprint_jax.data import aspect_ratios

    if not _SIZES.value:
        return ((encoders.side, encoders.side),)
    if _SIZES.value == "published":
        sizes = aspect_ratios.BINS_1024
    else:
        try:
            sizes = [
                tuple(int(side) for side in size.split("x")) for size in _SIZES.value.split(",")
            ]
        except ValueError:
            sizes = [()]
    factor = encoders.pixels.factor
    for size in sizes:
        if len(size) != 2:
            raise UserError(
                f"--sizes={_SIZES.value}: give HEIGHTxWIDTH, several with commas, or 'published'"
            )
        if min(size) <= 0 or any(side % factor for side in size):
            name = f"{size[0]}x{size[1]}"
            raise UserError(
                f"--sizes={_SIZES.value}: {name} is not in multiples of this model's {factor} pixels"
            )
    return tuple(sorted(set(sizes)))


# --- encoders ---


def _encoders(path) -> Encoders:
    """The encoders that --encoder names."""
    if path.partition(":")[0].endswith(".py"):
        return _of_config(path)
    if not pathlib.Path(path).is_dir():
        raise UserError(
            f"no folder --encoder={path}: give a diffusers folder, one made by sprint-jax convert, or a config file"
        )
    return _of_folder(path)


def _of_config(path) -> Encoders:
    """The embedded encoders of a config, "FILE.py" or "FILE.py:PRESET"."""
    from sprint_jax import config
    from sprint_jax.training import datasets

    file, _, preset = path.partition(":")
    if not pathlib.Path(file).is_file():
        raise UserError(f"no config file --encoder={path}: use --encoder=configs/sprint.py:PRESET")
    get_config = runpy.run_path(file).get("get_config")
    if get_config is None:
        raise UserError(
            f"--encoder={path}: {file} has no get_config, it is no config file; use configs/sprint.py:PRESET"
        )
    c = config.parse(get_config(*filter(None, [preset])))
    pixels, text, name = datasets.embedded(c)
    return Encoders(pixels, text, {"pixels": {}, "text": {}}, name, c.data.size)


def _of_folder(path) -> Encoders:
    """The autoencoder and the text encoder of a diffusers folder or a converted one."""
    from sprint_jax.encoders import pixels as pixel_codecs
    from sprint_jax.sampling import loading

    dtype = _DTYPE.value or loading.default_dtype()
    say = lambda message: print(message, file=sys.stderr, flush=True)
    # Stacks on every platform, for the identity's sake.
    pipe = loading.load(
        path,
        dtype=dtype,
        pixels_dtype=_PIXELS_DTYPE.value,
        instruction=_INSTRUCTION.value,
        platform="",
        say=say,
    )
    if not isinstance(pipe.pixels, pixel_codecs.AutoencoderPixels):
        raise UserError(
            f"--encoder={path} is a run directory: give its config file, a diffusers folder, or one made by "
            "sprint_jax.commands.convert"
        )
    params = {name: pipe.params[name] for name in ("pixels", "text")}
    return Encoders(pipe.pixels, pipe.text, params, identity(pipe, path), pipe.height)


def identity(pipe, path):
    """Names the encoders of a published pipeline by what is in them, wherever and in whichever layout they lie.

    pipe: from `loading.load`. path: the folder it was loaded from.
    """
    import jax

    from sprint_jax.storage import weights

    digest = hashlib.sha256()
    for model, params in (
        (pipe.pixels.model, pipe.params["pixels"]),
        (pipe.text.model, pipe.params["text"]["model"]),
    ):
        digest.update(repr(model).encode())
        weights.feed(digest, params)
    for file in sorted((pathlib.Path(path) / "tokenizer").iterdir()):
        if file.is_file():
            digest.update(file.name.encode() + file.read_bytes())
    digest.update(pipe.text.prompts.prefix.tobytes())
    names = f"{type(pipe.pixels.model).__name__} and {type(pipe.text.model).__name__}"
    of_pixels = jax.tree.leaves(pipe.params["pixels"])[0].dtype.name
    dtypes = pipe.dtype if of_pixels == pipe.dtype else f"{of_pixels} and {pipe.dtype}"
    return f"{names}, {dtypes}, {digest.hexdigest()[:16]}"


def _text_size(text, kind):
    """(D or 0, longest row) of the text that is stored."""
    from sprint_jax.encoders import prompts
    from sprint_jax.encoders import text as text_encoders

    if isinstance(text, text_encoders.GemmaText):
        # With an instruction the first feature is that of <bos>, which is no token of the caption.
        first = 1 if kind == "tokens" and len(text.prompts.prefix) else 0
        return (text.model.width if kind == "features" else 0), prompts.WINDOW - first
    if kind == "tokens":
        raise UserError("--text=tokens: this text encoder has no tokens, use --text=features")
    return text.encoder.dim, text.encoder.length


def _null_prompt(encoders):
    """{"text" float32 [L, D], "mask" float32 [L]} of the empty prompt, padding included.

    Published models read it without the instruction: it is <bos> and padding.
    """
    import jax

    from sprint_jax.encoders import prompts
    from sprint_jax.encoders import text as text_encoders

    if isinstance(encoders.text, text_encoders.GemmaText):
        tokens, mask = prompts.pad([np.array([prompts.BOS], np.int32)], prompts.WINDOW)
        text = jax.jit(encoders.text.model.apply)(encoders.params["text"]["model"], tokens, mask)
    else:
        text, mask = encoders.text.encoder.encode([""])
    return {"text": np.asarray(text[0], np.float32), "mask": np.asarray(mask[0], np.float32)}


# --- the work ---


def encode(
    source,
    encoders,
    out,
    settings,
    *,
    condition=None,
    batch=16,
    hosts=1,
    host=0,
    max_bad=0.05,
    say=lambda message: None,
):
    """Encodes the chunks host, host + hosts, … that are not done, and writes the manifest when all are.

    Args:
      source: of `data.sources`. encoders: `Encoders`. out: the folder. settings: `Settings`.
      condition: the `detector.Lines` that settings.condition names; None for "none".
      batch: pictures, or captions, of a program run.
      max_bad: share of this host's examples that may be unusable; three are always forgiven.
      say: called with a line on what has been done.
    Raises UserError for a folder of other settings, past max_bad, and where no example is left to train on.
    """
    import tqdm

    from sprint_jax.storage import weights

    told = condition.identity if condition else encoded.NO_CONDITION
    if settings.condition != told:
        raise ValueError(f"the condition is {told}, settings say {settings.condition}")
    out = pathlib.Path(out)
    dim, length = _text_size(encoders.text, settings.text)
    _claim(out, settings, host)
    done = {
        chunk: part
        for chunk in range(settings.chunks)
        if (part := _read_part(out, chunk, settings)) is not None
    }
    mine = range(host, settings.chunks, hosts)
    count = lambda chunks: sum(len(settings.indices(chunk)) for chunk in chunks)
    tally = _Tally(max_bad)
    for chunk in mine:
        if chunk in done:
            tally.begin(settings.indices(chunk))
            tally.bad += done[chunk]["counts"]["skipped"]
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(os.cpu_count()))
        bar = stack.enter_context(
            tqdm.tqdm(
                total=count(mine),
                initial=count(c for c in mine if c in done),
                unit="example",
                desc="encode",
            )
        )
        work = _Work(
            source, encoders, settings, condition, batch, pool, tally, lambda: bar.update(1)
        )
        for chunk in mine:
            if chunk not in done:
                done[chunk] = _write_part(out, chunk, settings, work.run(chunk))
    # Those of other hosts may have come in the meantime.
    parts = [
        done.get(chunk) or _read_part(out, chunk, settings) for chunk in range(settings.chunks)
    ]
    missing = sum(part is None for part in parts)
    if missing:
        say(
            f"host {host} of {hosts} is done; {missing} of {settings.chunks} chunks are still to come from others"
        )
        return
    described = {
        "model": encoders.identity,
        "source": settings.source,
        "text": settings.text,
        "text_dim": dim,
        "text_length": length,
        "channels": encoders.pixels.channels,
        "factor": encoders.pixels.factor,
    }
    if condition:
        described["condition"] = condition.kind
    shards = [shard for part in parts for shard in part["shards"]]
    skipped = [entry for part in parts for entry in part["skipped"]]
    counts = {name: sum(part["counts"][name] for part in parts) for name in parts[0]["counts"]}
    if not counts["train"]:
        bad = f"; {skipped[0]['key']}: {skipped[0]['reason']}" if skipped else ""
        raise UserError(
            f"none of {settings.examples} examples is left to train on, {counts['skipped']} cannot be used and {counts['heldout']} are "
            f"held out{bad}. Repair the source, or hold out fewer, and use another --encoded"
        )
    # Several hosts may get here at once, with the same bytes: each writes under a name of its own.
    own = lambda name: out / f"{name}.host{host}"
    weights.save(own(encoded.NULL), _null_prompt(encoders))
    os.replace(own(encoded.NULL), out / encoded.NULL)
    encoded.write_manifest(own(encoded.MANIFEST), described, shards, skipped, counts["skipped"])
    os.replace(own(encoded.MANIFEST), out / encoded.MANIFEST)
    say(
        f"{counts['train']} train and {counts['heldout']} heldout examples in {out}; {counts['skipped']} skipped, "
        f"{counts['cut']} captions cut to {length} tokens"
    )


def _claim(out, settings, host):
    """Makes the folder this encoding's, or checks that it is. Raises UserError naming both values."""
    path = out / SETTINGS
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            # Another host may be writing the same file under a name of its own.
            if foreign := [p.name for p in out.iterdir() if not p.name.startswith(SETTINGS)]:
                raise UserError(
                    f"--encoded={out} holds {foreign[0]} and no encoded data set: choose another folder"
                )
            own = out / f"{SETTINGS}.host{host}"
            files.write_text(own, json.dumps(settings.plain(), indent=1) + "\n")
            os.replace(own, path)
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot use --encoded={out} ({error}): choose another folder") from None
    have, wanted = (
        {"condition": encoded.NO_CONDITION} | fields for fields in (found, settings.plain())
    )
    for name, value in wanted.items():
        if have.get(name) != value:
            raise UserError(
                f"--encoded={out} was begun with {name} {have.get(name)!r}, this command has {value!r}: use the "
                "same, or another folder"
            )


def _part_path(out, chunk):
    return out / f"part-{chunk:05d}.json"


def _read_part(out, chunk, settings):
    """What `_write_part` wrote about a chunk, or None where it or a shard of it is not there whole."""
    try:
        part = json.loads(_part_path(out, chunk).read_text(encoding="utf-8"))
        sizes = [(out / shard["file"]).stat().st_size for shard in part["shards"]]
    except (OSError, ValueError, KeyError):
        return None
    if part["settings"] != settings.digest():
        # Two hosts of different settings began at the same moment.
        raise UserError(
            f"{_part_path(out, chunk)} was made with other settings than {SETTINGS} says: begin again"
        )
    return part if sizes == [shard["bytes"] for shard in part["shards"]] else None


def _write_part(out, chunk, settings, made):
    """Writes a chunk's shards, then its part file. made: `_Made`. Returns what the part file says."""
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
    files.write_text(_part_path(out, chunk), json.dumps(part, indent=1, ensure_ascii=False) + "\n")
    return part


class _Tally:
    """Counts examples that cannot be used, and stops the work when they are too many.

    A chunk's examples count from its beginning, so that a few bad ones at its head do not stop it.
    """

    def __init__(self, share):
        self._share, self.bad, self._seen = share, 0, 0

    def begin(self, indices):
        self._seen += len(indices)

    def count(self, key, reason):
        self.bad += 1
        if self.bad > max(_FORGIVEN, self._share * self._seen):
            raise UserError(
                f"{self.bad} of {self._seen} examples cannot be used, more than --max_bad_share={self._share}; the "
                f"last is {key}: {reason}. Repair the source or allow a larger share"
            )


@dataclasses.dataclass
class _Made:
    """What has become of a chunk so far.

    keys, captions, rows, latents, controls: {index: ...} of its examples, rows as `text.prepare` gives them. records:
    [(key, record)] in the order of the source. skipped: {index: (key, reason)}. cut: captions that were cut.
    """

    keys: dict = dataclasses.field(default_factory=dict)
    captions: dict = dataclasses.field(default_factory=dict)
    rows: dict = dataclasses.field(default_factory=dict)
    latents: dict = dataclasses.field(default_factory=dict)
    controls: dict = dataclasses.field(default_factory=dict)
    records: list = dataclasses.field(default_factory=list)
    skipped: dict = dataclasses.field(default_factory=dict)
    cut: int = 0


class _Work:
    """The way of a chunk from the source to records. step: called as each example is read."""

    def __init__(self, source, encoders, settings, condition, batch, pool, tally, step):
        import jax

        self._source, self._encoders, self._settings, self._condition = (
            source,
            encoders,
            settings,
            condition,
        )
        self._batch, self._pool, self._tally, self._step = batch, pool, tally, step
        self._features = jax.jit(encoders.text.features)

    def run(self, chunk) -> _Made:
        indices = self._settings.indices(chunk)
        self._tally.begin(indices)
        made, waiting = _Made(), {}
        for index, (example, ready) in zip(indices, self._ahead(indices), strict=True):
            self._step()
            if isinstance(ready, Exception):
                self._skip(made, index, self._source.key(index), str(ready))
                continue
            made.keys[index], made.captions[index] = example.key, example.caption
            if not self._prepare(made, index):
                continue
            if self._is_ready(example):
                self._keep(made.latents, made, index, ready, "latent")
                continue
            group = waiting.setdefault(ready.shape, {})
            group[index] = ready
            if len(group) == self._batch:
                self._encode(made, waiting.pop(ready.shape))
        for group in waiting.values():
            self._encode(made, group)
        name = "text" if self._settings.text == "features" else "tokens"
        for index, text in sorted(self._texts(made).items()):
            caption = np.frombuffer(
                made.captions[index].encode("utf-8", "surrogateescape"), np.uint8
            )
            record = {"latent": made.latents[index], "caption": caption, name: text}
            if self._condition:
                record["control"] = made.controls[index]
            made.records.append((made.keys[index], record))
        return made

    def _ahead(self, indices):
        """Yields `_load` of each index in turn, made ahead in threads."""
        most, running = 2 * max(self._batch, os.cpu_count()), collections.deque()
        for index in indices:
            running.append(self._pool.submit(self._load, index))
            if len(running) > most:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()

    def _load(self, index):
        """(example or None, uint8 [H, W, 3] of a bucket, or float16 [h, w, c], or BadExample)."""
        from sprint_jax.data import sources

        example, channels = None, self._encoders.pixels.channels
        try:
            example = self._source[index]
            if self._is_ready(example):
                if len(example.latent) != channels:
                    have = len(example.latent)
                    raise sources.BadExample(
                        f"its latent has {have} channels, the encoder's have {channels}"
                    )
                return example, _half(example.latent.transpose(1, 2, 0))
            if example.image is None:
                raise sources.BadExample("it has a latent and no picture to make a condition of")
            picture = sources.load_picture(example.image)
            bucket = sources.nearest_bucket(*picture.shape[:2], self._settings.sizes)
            return example, sources.fit(picture, *bucket)
        except sources.BadExample as error:
            return example, error

    def _is_ready(self, example):
        """Whether its own latent is taken. Not with a condition: both are then made of one cut of its picture."""
        return example.latent is not None and not self._condition

    def _skip(self, made, index, key, reason):
        made.skipped[index] = key, reason
        self._tally.count(key, reason)

    def _keep(self, kept, made, index, array, name):
        """kept[index] = array, unless that is not finite. Whether it was kept."""
        if np.isfinite(array).all():
            kept[index] = array
            return True
        self._skip(made, index, made.keys[index], f"its {name} is not finite in float16")
        return False

    def _prepare(self, made, index):
        """Whether the text encoder takes the caption; if so, what it makes of it is in made.rows."""
        from sprint_jax.encoders import prompts

        key = made.keys[index]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                made.rows[index] = self._encoders.text.prepare([made.captions[index]])[0]
            except UserError as error:
                self._skip(made, index, key, str(error))
                return False
        # Of all threads: those that read pictures ahead have warnings of their own.
        cut = [
            warning.message
            for warning in caught
            if issubclass(warning.category, prompts.CutWarning)
        ]
        if cut:
            made.cut += 1
            if made.cut <= _SHOWN:
                warnings.warn(f"{key}: {cut[0]}", stacklevel=1)
        return True

    def _encode(self, made, group):
        """Latents of waiting pictures of one size, and of their lines where a condition is asked for."""
        pictures, controls = np.stack(list(group.values())), {}
        if self._condition:
            drawn = self._condition.draw(
                pictures, [made.keys[index] for index in group], self._pool.map
            )
            controls = dict(zip(group, self._latents(drawn), strict=True))
        for index, latent in zip(group, self._latents(pictures), strict=True):
            # The condition first: `latents` says which examples are whole.
            if index in controls and not self._keep(
                made.controls, made, index, controls[index], "condition"
            ):
                continue
            self._keep(made.latents, made, index, latent, "latent")

    def _latents(self, pictures):
        """uint8 [B, H, W, 3] -> float16 [B, h, w, c], filled up to a whole batch: one program serves all."""
        count = len(pictures)
        pictures = np.concatenate([pictures, np.repeat(pictures[-1:], self._batch - count, 0)])
        return _half(
            np.asarray(self._encoders.pixels.encode(self._encoders.params["pixels"], pictures))[
                :count
            ]
        )

    def _texts(self, made):
        """{index: float16 [L, D] or int32 [L], without padding} of the examples that have latents."""
        from sprint_jax.encoders import prompts

        indices, texts = sorted(made.latents), {}
        rows = [made.rows[index] for index in indices]
        if self._settings.text == "tokens":
            return {
                i: arrays["tokens"][arrays["mask"] > 0]
                for i, (_, arrays) in zip(indices, rows, strict=True)
            }
        for _, chosen, _, arrays in prompts.batches(rows, self._batch):
            features, mask = map(np.asarray, self._features(self._encoders.params["text"], arrays))
            for row, place in enumerate(chosen):
                self._keep(texts, made, indices[place], _half(features[row][mask[row] > 0]), "text")
        return texts


def _half(array):
    """float16; what is too large becomes infinite and is then refused."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, np.float16)


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags, argv=sys.argv)
