"""Prompt to pixels as one file; `exported` has its format and reads it."""

import contextlib
import dataclasses
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export as jax_export

from sprint_jax.diffusion import limits
from sprint_jax.encoders import words
from sprint_jax.encoders.text import GemmaText
from sprint_jax.errors import UserError
from sprint_jax.sampling import exported, generation, loading, pipeline
from sprint_jax.sampling.options import ExportOptions, say
from sprint_jax.storage import files, revision, safetensors_files


def export_model(options: ExportOptions) -> exported.Header:
    """Load a model and write it to --out. Return the file's header.

    Raises UserError for bad options, before the model is loaded.
    """
    import tqdm

    steps, batch_sizes = check(options)
    platforms = options.platforms or (jax_export.default_export_platform(),)
    pipe = loading.load(
        options.model,
        dtype=options.dtype or ("float32" if platforms == ("cpu",) else "bfloat16"),
        instruction=options.instruction_file,
        tile=options.tile,
        platform=platforms[0] if len(platforms) == 1 else "",
        say=say,
    )
    return export(
        pipe,
        options.out,
        steps=steps,
        batch_sizes=batch_sizes,
        height=options.height,
        width=options.width,
        platforms=platforms,
        schedule=options.schedule,
        longest=options.longest_prompt,
        progress=lambda programs: tqdm.tqdm(programs, unit="program", desc="export", delay=5),
    )


def check(options: ExportOptions) -> tuple[list[int], list[int] | None]:
    """Return (numbers of steps, batch sizes or None). Raises UserError for bad options."""
    if not options.model or not options.out:
        raise UserError(
            f"--{'out' if options.model else 'model'} is missing: name the model's folder and the "
            "file to make"
        )
    if not pathlib.Path(options.model).is_dir():
        raise UserError(
            f"--model={options.model} is no folder: give a diffusers folder, a converted one or a "
            "run directory; an exported file cannot be exported again"
        )
    steps = _numbers("steps", options.steps)
    sizes = options.batch_sizes
    batch_sizes = None if sizes is None else _numbers("batch_sizes", sizes)
    asked = {"steps": steps[-1], "batch_size": batch_sizes[-1] if batch_sizes else None}
    sides = {"height": options.height, "width": options.width}
    large = {name: side for name, side in sides.items() if side and side > limits.SIDE}
    limits.check(asked | large, "--{name}={value}")
    if options.longest_prompt is not None and options.longest_prompt < 1:
        raise UserError(f"--longest_prompt={options.longest_prompt}: use 1 or more")
    out = pathlib.Path(options.out)
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"--out={out}: name a file in a folder that exists")
    return steps, batch_sizes


def _numbers(name: str, given: Sequence[int]) -> list[int]:
    """Return the counts of an option, sorted, each once."""
    numbers = sorted(set(given))
    if not numbers or numbers[0] < 1:
        text = ",".join(map(str, given))
        raise UserError(f"--{name}={text}: give numbers of 1 or more, for example 1,2,4")
    return numbers


def export(
    pipe: pipeline.Pipeline,
    path: str | pathlib.Path,
    *,
    steps: Sequence[int],
    batch_sizes: Sequence[int] | None = None,
    height: int | None = None,
    width: int | None = None,
    platforms: Sequence[str] = ("cpu",),
    schedule: str | None = None,
    longest: int | None = None,
    progress: Callable[[list], Iterable] = iter,
) -> exported.Header:
    """Write a loaded model to a file and return its header.

    The file has a program for every number of steps, batch size and padded length of prompts.

    Args:
      pipe: from `loading.load`.
      path: the file, which appears whole or not at all.
      steps: numbers of network calls.
      batch_sizes: None is the model's own. The first is the file's default.
      height, width: pixels; None takes the model's own.
      platforms: some of "cpu", "cuda", "rocm", "tpu".
      schedule: list of times used by default; None takes the model's own.
      longest: tokens of the longest prompt; None is all that the model reads.
      progress: wraps the list of programs.

    Raises UserError for a size that does not fit, and if the file cannot be written.
    """
    height = pipe.height if height is None else height
    width = pipe.width if width is None else width
    batch_sizes = batch_sizes or [pipe.batch_size]
    shape = generation.latent_shape(pipe, height, width)
    lengths = pipe.text.shapes(longest)
    programs = [
        exported.Program(steps=count, length=length, batch_size=batch, height=height, width=width)
        for count in steps
        for length in lengths
        for batch in batch_sizes
    ]
    text, tokenizer = _text(pipe.text)
    header = exported.Header(
        jax=jax.__version__,
        commit=revision.commit(),
        platforms=tuple(platforms),
        dtype=pipe.dtype,
        text=text,
        factor=pipe.pixels.factor,
        channels=pipe.pixels.channels,
        height=height,
        width=width,
        guidance_scale=pipe.guidance_scale,
        schedule=schedule or pipe.schedule,
        batch_size=batch_sizes[0],
        programs=tuple(programs),
    )
    held = _Held.of(pipe.params)

    def lower(program: exported.Program, held: _Held) -> jax_export.Exported:
        return _lowered(pipe, held, program, lengths[program.length], shape, platforms)

    held = held.only(_read(lower(programs[0], held)))
    bodies = ((program.member, lower(program, held).serialize()) for program in progress(programs))
    try:
        _write(pathlib.Path(path), header, bodies, tokenizer, held.arrays)
    except OSError as error:
        raise UserError(
            f"writing {path} failed ({error.strerror or error}): free some space, or choose "
            "another --out"
        ) from None
    return header


def _write(
    path: pathlib.Path,
    header: exported.Header,
    bodies: Iterable[tuple[str, bytes | bytearray]],
    tokenizer: str | None,
    arrays: dict[str, Any],
) -> None:
    """Write the archive, whole or not at all.

    bodies: (member, program) of each program, lowered one by one as it is asked for.
    """
    with (
        _without_places(),
        files.whole(path) as partial,
        zipfile.ZipFile(partial, "w") as archive,
    ):
        archive.writestr(_member(exported.HEADER), header.to_json())
        for member, body in bodies:
            archive.writestr(_member(member), body)
        if tokenizer is not None:
            archive.writestr(_member(exported.TOKENIZER), tokenizer)
        with archive.open(_member(exported.WEIGHTS), "w", force_zip64=True) as stream:
            safetensors_files.write_stream(stream, arrays)


@contextlib.contextmanager
def _without_places() -> Iterator[None]:
    """Lower programs without the lines and folders of their code: equal code, equal bytes."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _member(name: str) -> zipfile.ZipInfo:
    """Return a member with a fixed date, so that equal contents are equal files."""
    return zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))


def _text(text: Any) -> tuple[dict[str, Any], str | None]:
    """Return (the header's description of a text part, its tokenizer's file or None)."""
    if isinstance(text, GemmaText):
        described = {"kind": "gemma", "instruction": text.prompts.instruction}
        if text.prompts.truncation_side != "right":
            described["truncation_side"] = text.prompts.truncation_side
        return described, text.prompts.tokenizer_json()
    if isinstance(text.encoder, words.WordsText):
        return {"kind": "words", "length": text.encoder.length}, None
    return {"kind": "shapes"}, None


@dataclasses.dataclass(frozen=True)
class _Held:
    """Parameters by flat names, perhaps without some that no program reads.

    arrays: {name: array} in the order of the names.
    tree: the structure of all parameters.
    all: abstract arrays of all parameters by name, in the order of the tree.
    """

    arrays: dict[str, Any]
    tree: Any
    all: dict[str, jax.ShapeDtypeStruct]

    @classmethod
    def of(cls, params: Any) -> "_Held":
        leaves, tree = jax.tree_util.tree_flatten_with_path(params)
        named = {
            jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves
        }
        abstract = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in named.items()
        }
        return cls(dict(sorted(named.items())), tree, abstract)

    def only(self, names: set[str]) -> "_Held":
        kept = {name: array for name, array in self.arrays.items() if name in names}
        return dataclasses.replace(self, arrays=kept)

    def unflatten(self, arrays: dict[str, Any]) -> Any:
        """Return the tree of traced arrays.

        What was left out, because nothing reads it, is zero.
        """
        leaves = [
            arrays[name] if name in arrays else jnp.zeros(a.shape, a.dtype)
            for name, a in self.all.items()
        ]
        return jax.tree.unflatten(self.tree, leaves)


def _lowered(
    pipe: pipeline.Pipeline,
    held: _Held,
    program: exported.Program,
    arrays: Mapping[str, Any],
    shape: tuple[int, int, int],
    platforms: Sequence[str],
) -> jax_export.Exported:
    """Return `jax.export` of one program. arrays: abstract, of one prompt."""

    def draw(weights, arrays, guidance, times, seed, indices):
        return pipeline.sample(
            pipe.model,
            pipe.text,
            pipe.pixels,
            held.unflatten(weights),
            arrays,
            guidance,
            times,
            seed,
            indices,
            None,
            None,
            output="pixels",
            shape=shape,
        )

    batch = program.batch_size
    abstract = lambda dtype, *dims: jax.ShapeDtypeStruct(dims, dtype)
    return jax_export.export(jax.jit(draw), platforms=tuple(platforms))(
        {name: held.all[name] for name in held.arrays},
        {name: abstract(a.dtype, batch, *a.shape) for name, a in arrays.items()},
        abstract(jnp.float32),
        abstract(jnp.float32, program.steps + 1),
        abstract(jnp.int32),
        abstract(jnp.int32, batch),
    )


def _read(lowered: jax_export.Exported) -> set[str]:
    """Return the names of the weights that a program reads, which are the same for all programs."""
    (weights, *_), _ = jax.tree.unflatten(lowered.in_tree, range(len(lowered.in_avals)))
    return {name for name, place in weights.items() if place in lowered.module_kept_var_idx}
