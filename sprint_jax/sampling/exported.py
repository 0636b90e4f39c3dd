"""One file that draws: the programs of prompt to pixels, traced and lowered before, with all that they need.

    exported.load(path) -> Exported, which `generation.generate` takes like a loaded model

`sprint-jax export` writes it. Reading it traces nothing and knows no network: only this module, the host's side of
drawing and the tokens of prompts are imported. The file is a zip archive, stored and not compressed, so every
member has a checksum and what is cut off has no directory. Its members:

  header.json                  all that is not an array; see `Header`
  programs/STEPS_LENGTH_BATCH_HEIGHT_WIDTH.bin
                               `jax.export` of one program, (weights, arrays, guidance, times, seed, indices) ->
                               uint8 [B, H, W, 3]. weights: {name: array}. arrays: of `prepare`, stacked
  tokenizer.json               Gemma's, as the tokenizers package writes it; absent for the embedded encoders
  weights.safetensors          {name: array}, once for all programs, in the dtype that they take; read tensor by
                               tensor. What no program reads is left out

Times, guidance, seed and indices are arguments: any schedule and any guidance scale can be asked for. The number of
steps, padded length, batch size and size of the picture are not: a program is there for each or it is refused.
jax.export promises that a program can be run for six months after the release of the JAX that wrote it, and asks for
programs one trusts: like any program, they can do harm.
"""

import contextlib
import dataclasses
import json
import pathlib
import struct
import zipfile
from typing import Any

import jax
from jax import export as jax_export

from sprint_jax.encoders import prompts as prompts_lib
from sprint_jax.encoders import words as text_lib
from sprint_jax.errors import UserError
from sprint_jax.sampling import generation
from sprint_jax.storage import weights

FORMAT = "sprint_jax exported 1"
HEADER, TOKENIZER, WEIGHTS = "header.json", "tokenizer.json", "weights.safetensors"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


@dataclasses.dataclass(frozen=True)
class Program:
    """What one program is for: network calls, tokens a prompt is padded to, pictures, their height and width."""

    steps: int
    length: int
    batch_size: int
    height: int
    width: int

    @property
    def member(self) -> str:
        return "programs/" + "_".join(map(str, dataclasses.astuple(self))) + ".bin"


@dataclasses.dataclass(frozen=True)
class Header:
    """header.json.

    jax, commit: versions of what wrote it. platforms: of PLATFORMS. dtype: of weights and most arithmetic.
    text: {"kind": "gemma", "instruction"}, {"kind": "words", "length"} or {"kind": "shapes"}.
    factor, channels: pixels per latent cell, and channels of a latent. height, width, guidance_scale,
    schedule, batch_size: what is used unless told. programs: all there are.
    """

    jax: str
    commit: str
    platforms: tuple[str, ...]
    dtype: str
    text: dict[str, Any]
    factor: int
    channels: int
    height: int
    width: int
    guidance_scale: float
    schedule: str
    batch_size: int
    programs: tuple[Program, ...]

    def to_json(self) -> str:
        return (
            json.dumps({"format": FORMAT} | dataclasses.asdict(self), indent=2, ensure_ascii=False)
            + "\n"
        )


@dataclasses.dataclass(frozen=True)
class _Pixels:
    """Sizes of latents. factor: pixels per cell. channels."""

    factor: int
    channels: int


@dataclasses.dataclass(frozen=True)
class _Embedded:
    """Prompts of an embedded encoder. encoder: of `data.text`."""

    encoder: Any

    def prepare(self, prompts):
        return text_lib.prepare(self.encoder, prompts)


@dataclasses.dataclass(frozen=True)
class _Tokenizer:
    """A tokenizer of the tokenizers package, called as one of transformers. inner: that one."""

    inner: Any

    def __call__(self, text, add_special_tokens):
        return {"input_ids": self.inner.encode(text, add_special_tokens=add_special_tokens).ids}

    def decode(self, ids):
        return self.inner.decode(list(map(int, ids)), skip_special_tokens=False)


@dataclasses.dataclass(frozen=True, eq=False)
class Exported:
    """An exported file in memory, for `generation.generate`.

    path: where its programs are read from, each when it is first asked for. header: of the file. text, pixels:
    the host's part of the seams (`parts.py`). params: {name: array}, on the device. programs: those read so far.
    """

    path: pathlib.Path
    header: Header
    text: Any
    pixels: _Pixels
    params: dict[str, jax.Array]
    programs: dict = dataclasses.field(default_factory=dict, repr=False)

    cell = property(lambda self: self.header.factor)
    height = property(lambda self: self.header.height)
    width = property(lambda self: self.header.width)
    guidance_scale = property(lambda self: self.header.guidance_scale)
    schedule = property(lambda self: self.header.schedule)
    batch_size = property(lambda self: self.header.batch_size)
    dtype = property(lambda self: self.header.dtype)
    control = property(lambda self: False)

    def program(self, kind: generation.Kind):
        """The program of this kind. Raises UserError that names what the file has, where it has none."""
        if kind.output != "pixels" or kind.draws:
            raise UserError(
                f"{self.path} draws pixels from a seed: for latents or given noise sample from the model it was made of"
            )
        if kind.start or kind.control:
            self.encode(None)
        height, width = (cells * self.header.factor for cells in kind.shape[:2])
        wanted = Program(kind.steps, kind.length, kind.batch_size, height, width)
        if wanted not in self.header.programs:
            raise UserError(_absent(self.path, wanted, self.header.programs))
        if wanted not in self.programs:
            self.programs[wanted] = _compiled(self.path, wanted)
        run = self.programs[wanted]
        return (
            lambda params, arrays, guidance, times, seed, indices, draws, start, control, control_scale: (
                run(params, arrays, guidance, times, seed, indices)
            )
        )

    def encode(self, images):
        raise UserError(
            f"{self.path} has no program that starts from a picture: sample from the model it was made of"
        )


def _absent(path, wanted, programs):
    """Names what is wanted and not there, and what is there in its place."""
    with_size = [p for p in programs if (p.height, p.width) == (wanted.height, wanted.width)]
    if not with_size:
        sizes = sorted({(p.height, p.width) for p in programs})
        return f"{path} has no program for {wanted.height} x {wanted.width} pixels: it has {', '.join(f'{h} x {w}' for h, w in sizes)}"
    listed = lambda name, some: ", ".join(map(str, sorted({getattr(p, name) for p in some})))
    with_steps = [p for p in with_size if p.steps == wanted.steps]
    if not with_steps:
        return (
            f"{path} has no program for --steps={wanted.steps}: it has {listed('steps', with_size)}"
        )
    with_batch = [p for p in with_steps if p.batch_size == wanted.batch_size]
    if not with_batch:
        return f"{path} has no program for --batch_size={wanted.batch_size}: it has {listed('batch_size', with_steps)}"
    longest = max(p.length for p in with_batch)
    return (
        f"{path} has no program for a prompt that is padded to {wanted.length} tokens: it takes prompts of at most {longest}; "
        "shorten it, or export again with a larger --longest_prompt"
    )


def load(path, say=lambda message: None) -> Exported:
    """An exported file, ready to draw.

    say: called with a line before the weights are read. Raises UserError for a file that is no whole exported
    one, of another format, or for another platform.
    """
    path = pathlib.Path(path)
    with _opened(path) as archive:
        header = _header(path, json.loads(archive.read(HEADER)))
        here = jax_export.default_export_platform()
        if here not in header.platforms:
            raise UserError(
                f"{path} was exported for {', '.join(header.platforms)} and this is {here}: export it again with --platforms={here}"
            )
        text = _text(header, archive)
        say(f"reading {path}")
        with archive.open(WEIGHTS) as member:
            params = {name: jax.device_put(array) for name, array in weights.read_stream(member)}
    return Exported(path, header, text, _Pixels(header.factor, header.channels), params)


def _header(path, fields):
    found = fields.pop("format")
    if found != FORMAT:
        raise UserError(
            f"{path} has format {found!r}, this version reads {FORMAT!r}: export it again"
        )
    fields["programs"] = tuple(Program(**program) for program in fields["programs"])
    fields["platforms"] = tuple(fields["platforms"])
    return Header(**fields)


def _text(header, archive):
    kind = header.text["kind"]
    if kind == "shapes":
        return _Embedded(text_lib.ShapesText())
    if kind == "words":
        return _Embedded(text_lib.WordsText(header.text["length"]))
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(archive.read(TOKENIZER).decode())
    return prompts_lib.GemmaPrompts(_Tokenizer(tokenizer), header.text["instruction"])


def _compiled(path, program):
    """A program of the file, compiled for this device."""
    with _opened(path) as archive:
        blob = bytearray(archive.read(program.member))
    try:
        found = jax_export.deserialize(blob)
        version, newest = (
            found.calling_convention_version,
            jax_export.maximum_supported_calling_convention_version,
        )
        if not jax_export.minimum_supported_calling_convention_version <= version <= newest:
            raise ValueError(f"calling convention {version}, known up to {newest}")
        arguments, _ = jax.tree.unflatten(
            found.in_tree, [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in found.in_avals]
        )
        lowered = jax.jit(found.call).lower(*arguments)
    except (
        ValueError,
        NotImplementedError,
        RuntimeError,
    ) as error:  # of JAX or of its compiler, about their versions
        raise UserError(
            f"{path} cannot be run by jax {jax.__version__} ({error}): export it again with this version"
        ) from None
    return lowered.compile()


@contextlib.contextmanager
def _opened(path):
    """The archive; whatever is wrong with its bytes is one line."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [
                info.filename
                for info in archive.infolist()
                if info.compress_type != zipfile.ZIP_STORED
            ]
            if packed:
                raise zipfile.BadZipFile(f"{packed[0]} is compressed")
            yield archive
    except (
        UserError,
        jax.errors.JaxRuntimeError,
    ):  # of the device, such as too little memory, not of the file
        raise
    # Bad offsets, lengths and texts fail in as many ways.
    except (
        zipfile.BadZipFile,
        EOFError,
        KeyError,
        TypeError,
        ValueError,
        NotImplementedError,
        RuntimeError,
        struct.error,
    ) as error:
        raise UserError(
            f"{path} is not a whole file of sprint-jax export ({error}): copy it again, or export again"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror or error}): give an existing file of sprint-jax export"
        ) from None
