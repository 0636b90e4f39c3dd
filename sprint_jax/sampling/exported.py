"""Exported files: programs from prompt to pixels, traced and lowered in advance, with everything
they need.

    exported.load(path) -> Exported, which `generation.generate` takes like a loaded model

`sprint-jax export` writes such a file. Reading it traces nothing and knows no network. The file is
a zip archive, stored and not compressed, so every member has a checksum and a truncated file has
no directory. Its members:

  header.json                  everything that is not an array; see `Header`
  programs/STEPS_LENGTH_BATCH_HEIGHT_WIDTH.bin
                               `jax.export` of one program, (weights, arrays, guidance, times,
                               seed, indices) -> (uint8 [B, H, W, 3], bool [B], whether all
                               numbers behind each image are finite). weights: {name: array}.
                               arrays: of `prepare`, stacked
  tokenizer.json               Gemma's, as the tokenizers package writes it; absent for the embedded
                               encoders
  weights.safetensors          {name: array}, once for all programs, in the dtype that they take;
                               read tensor by tensor, without arrays that no program reads

Times, guidance, seed and indices are arguments, so any schedule and any guidance scale can be
requested. The number of steps, padded length, batch size and image size are fixed: each needs a
program of its own. jax.export promises that a program can be run for six months after the release
of the JAX that wrote it. Load trusted files only: like any program, they can do harm.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import struct
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax import export as jax_export

from sprint_jax.diffusion import samplers
from sprint_jax.encoders import prompts as prompts_lib
from sprint_jax.encoders import words as text_lib
from sprint_jax.errors import UserError
from sprint_jax.sampling import generation
from sprint_jax.storage import fields as fields_lib
from sprint_jax.storage import files, json_files, safetensors_files, signatures

FORMAT = "sprint_jax exported 2"
_OLDER = "sprint_jax exported 1"  # its programs return images alone
HEADER, TOKENIZER, WEIGHTS = "header.json", "tokenizer.json", "weights.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """The key of one program: network calls, tokens that a prompt is padded to, images, their
    height and width.
    """

    steps: int
    length: int
    batch_size: int
    height: int
    width: int

    @property
    def member(self) -> str:
        """The name of the program's file in the archive."""
        return "programs/" + "_".join(map(str, dataclasses.astuple(self))) + ".bin"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """The content of header.json.

    jax, commit: versions that wrote it. platforms: of "cpu", "cuda", "rocm" and "tpu". dtype: of
    weights and most arithmetic. text: {"kind": "gemma", "instruction"}, perhaps with
    "truncation_side"; {"kind": "words", "length"}; or {"kind": "shapes"}. factor, channels: pixels
    per latent cell, and channels of a latent. height, width, guidance_scale, schedule, batch_size:
    defaults of `generate`. programs: all programs of the file.
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
        """Return the text of header.json."""
        fields = {"format": FORMAT} | dataclasses.asdict(self)
        return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"


_SIZE, _FIELD_TEXT = fields_lib.SIZE, fields_lib.TEXT
_HEADER_KINDS = {
    "jax": _FIELD_TEXT,
    "commit": _FIELD_TEXT,
    "platforms": _FIELD_TEXT.many(),
    "dtype": fields_lib.only("float32", "bfloat16"),
    "text": fields_lib.OBJECT,
    "factor": _SIZE,
    "channels": _SIZE,
    "height": _SIZE,
    "width": _SIZE,
    "guidance_scale": fields_lib.NUMBER,
    "schedule": fields_lib.only(*samplers.SCHEDULES),
    "batch_size": _SIZE,
    "programs": fields_lib.OBJECT.many(),
}
_PROGRAM_KINDS = {field.name: _SIZE for field in dataclasses.fields(Program)}
_TEXT_KINDS = {
    "kind": fields_lib.only("gemma", "words", "shapes"),
    "instruction": _FIELD_TEXT,
    "truncation_side": fields_lib.only("right", "left"),
    "length": _SIZE,
}


@dataclasses.dataclass(frozen=True)
class _Pixels:
    """Sizes of latents: pixels per cell, and channels."""

    factor: int
    channels: int


@dataclasses.dataclass(frozen=True)
class _Embedded:
    """Prompts of an embedded encoder of `encoders.words`."""

    encoder: Any
    takes_empty = False

    def prepare(self, prompts: Sequence[str]) -> list[tuple[int, dict[str, np.ndarray]]]:
        """Return one (length, arrays) per prompt."""
        return text_lib.prepare(self.encoder, prompts)


@dataclasses.dataclass(frozen=True)
class _Tokenizer:
    """A tokenizer of the tokenizers package with the interface of transformers'."""

    inner: Any
    truncation_side: str

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": self.inner.encode(text, add_special_tokens=add_special_tokens).ids}

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens."""
        return self.inner.decode(list(map(int, ids)), skip_special_tokens=False)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Exported:
    """An exported file in memory, a back end of `generation.generate`.

    path: where its programs are read from, each when it is first needed. header: of the file.
    text, pixels: the host's part of the encoders. params: {name: array}, on the device.
    """

    path: pathlib.Path
    header: Header
    text: Any
    pixels: _Pixels
    params: dict[str, jax.Array]

    @property
    def cell(self) -> int:
        """Pixels that sides are multiples of."""
        return self.header.factor

    @property
    def height(self) -> int:
        """Default height in pixels."""
        return self.header.height

    @property
    def width(self) -> int:
        """Default width in pixels."""
        return self.header.width

    @property
    def guidance_scale(self) -> float:
        """Default guidance scale."""
        return self.header.guidance_scale

    @property
    def schedule(self) -> str:
        """Default time list."""
        return self.header.schedule

    @property
    def batch_size(self) -> int:
        """Default images per program run."""
        return self.header.batch_size

    @property
    def dtype(self) -> str:
        """The dtype of most arithmetic."""
        return self.header.dtype

    @property
    def control(self) -> bool:
        """Whether a condition can be given: no exported file takes one."""
        return False

    def program(self, kind: generation.Kind) -> Callable[..., Any]:
        """Return the program of a kind of batch.

        Raises UserError that lists what the file has instead.
        """
        if kind.output != "pixels" or kind.draws:
            raise UserError(
                f"{self.path} draws pixels from a seed: for latents or given noise sample from the "
                "model it was exported from"
            )
        height, width = (cells * self.header.factor for cells in kind.shape[:2])
        wanted = Program(
            steps=kind.steps,
            length=kind.length,
            batch_size=kind.batch_size,
            height=height,
            width=width,
        )
        if wanted not in self.header.programs:
            raise UserError(_absent(self.path, wanted, self.header.programs))
        run = self._programs(wanted)

        # Noise, start and condition are never given here.
        def draw(params, arrays, guidance, times, seed, indices, *_):
            drawn = run(params, arrays, guidance, times, seed, indices)
            return (drawn, np.ones(len(indices), bool)) if isinstance(drawn, jax.Array) else drawn

        return draw

    @functools.cached_property
    def _programs(self) -> Callable[[Program], Callable[..., Any]]:
        shapes = {name: (a.shape, a.dtype) for name, a in self.params.items()}
        return functools.cache(functools.partial(_compiled, self.path, shapes))

    def encode(self, images: Any) -> NoReturn:
        """Raise UserError: no exported program starts from an image."""
        raise UserError(
            f"{self.path} has no program that starts from an image: sample from the model it was "
            "exported from"
        )


def _absent(path, wanted, programs):
    """Say which program is missing, and what the file has instead."""
    with_size = [p for p in programs if (p.height, p.width) == (wanted.height, wanted.width)]
    if not with_size:
        sizes = sorted({(p.height, p.width) for p in programs})
        return (
            f"{path} has no program for {wanted.height} x {wanted.width} pixels: it has "
            f"{', '.join(f'{h} x {w}' for h, w in sizes)}"
        )
    listed = lambda name, some: ", ".join(map(str, sorted({getattr(p, name) for p in some})))
    with_steps = [p for p in with_size if p.steps == wanted.steps]
    if not with_steps:
        return (
            f"{path} has no program for --steps={wanted.steps}: it has {listed('steps', with_size)}"
        )
    with_batch = [p for p in with_steps if p.batch_size == wanted.batch_size]
    if not with_batch:
        return (
            f"{path} has no program for --batch_size={wanted.batch_size}: it has "
            f"{listed('batch_size', with_steps)}"
        )
    longest = max(p.length for p in with_batch)
    return (
        f"{path} has no program for a prompt that is padded to {wanted.length} tokens: it takes "
        f"prompts of at most {longest}; shorten it, or export again with a larger --longest_prompt"
    )


def load(path: pathlib.Path | str, say: Callable[[str], None] = lambda message: None) -> Exported:
    """Load an exported file.

    say: called with a line before the weights are read. Raises UserError for a file that is not a
    whole exported one, is of another format, or is for another platform.
    """
    path = files.local(path, "path")
    with _opened(path) as archive:
        header = _header(path, json_files.parse(archive.read(HEADER)))
        here = jax_export.default_export_platform()
        if here not in header.platforms:
            raise UserError(
                f"{path} was exported for {', '.join(header.platforms)} and this is {here}: export "
                f"it again with --platforms={here}"
            )
        text = _text(header, archive)
        say(f"reading {path}")
        with archive.open(WEIGHTS) as member:
            arrays = safetensors_files.read_stream(member)
            params = {name: jax.device_put(_finite(path, name, array)) for name, array in arrays}
    pixels = _Pixels(header.factor, header.channels)
    return Exported(path=path, header=header, text=text, pixels=pixels, params=params)


def _finite(path, name, array):
    if array.dtype != np.int32:
        safetensors_files.check_finite(array, name, path)
    return array


def _header(path, given):
    if not isinstance(given, dict):
        raise ValueError(f"{HEADER} is {fields_lib.shown(given)}, not an object")
    found = given.pop("format")
    if found not in (FORMAT, _OLDER):
        raise UserError(
            f"{path} has format {fields_lib.shown(found)}, this version reads {FORMAT!r}: export "
            "it again"
        )
    try:
        fields_lib.check(given, _HEADER_KINDS, HEADER)
        fields_lib.check(given["text"], _TEXT_KINDS, f"{HEADER}: text")
        for program in given["programs"]:
            fields_lib.check(program, _PROGRAM_KINDS, f"{HEADER}: programs")
    except UserError as error:
        raise UserError(f"{path}: {error}: export it again") from None
    programs = tuple(Program(**program) for program in given["programs"])
    if not programs:
        raise ValueError(f"{HEADER} lists no program")
    return Header(**given | {"programs": programs, "platforms": tuple(given["platforms"])})


def _text(header, archive):
    kind = header.text["kind"]
    if kind == "shapes":
        return _Embedded(text_lib.ShapesText())
    if kind == "words":
        return _Embedded(text_lib.WordsText(header.text["length"]))
    import tokenizers

    text = archive.read(TOKENIZER).decode()
    try:
        inner = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more precise
        raise ValueError(f"{TOKENIZER}: {' '.join(str(error).split())[:120]}") from None
    tokenizer = _Tokenizer(inner, header.text.get("truncation_side", "right"))
    return prompts_lib.GemmaPrompts(tokenizer, header.text["instruction"])


def _compiled(path, shapes, program):
    """Compile a program of the file for this device.

    shapes: {name: (shape, dtype)} of the file's weights.
    """
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
        taken = {name: (a.shape, a.dtype) for name, a in arguments[0].items()}
        wrong = sorted(
            name for name in taken.keys() | shapes if taken.get(name) != shapes.get(name)
        )
        if wrong:
            raise ValueError(f"its programs and its weights differ in {wrong[0]}")
        lowered = jax.jit(found.call).lower(*arguments)
    except (
        ValueError,
        NotImplementedError,
        RuntimeError,
    ) as error:  # of JAX or of its compiler, about their versions
        raise UserError(
            f"{path} cannot be run by jax {jax.__version__} ({error}): export it again with this "
            f"version"
        ) from None
    return lowered.compile()


@contextlib.contextmanager
def _opened(path):
    """Open the archive; any format error becomes a one-line UserError."""
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
        kind = signatures.describe(path)
        if kind is not None and "sprint-jax export" not in kind:
            raise UserError(
                f"{path} is not a whole file of sprint-jax export: it is {kind}"
            ) from None
        raise UserError(
            f"{path} is not a whole file of sprint-jax export ({error}): copy it again, or export "
            "again"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror or error}): give an existing file of sprint-jax "
            f"export"
        ) from None
