"""Prompt to pixels as one file: python -m sprint_jax export --model=DIR --out=FILE [--steps=1,2,4]

DIR is a folder that sprint-jax sample takes; an exported file cannot be exported again. The file holds the traced and lowered
programs, the weights and the tokenizer (`sprint_jax/sampling/exported.py` has the format), and `python -m sprint_jax sample --model=FILE` draws from it without the
networks' code: exported for a CPU and drawn on it, the same pictures as from DIR, bit by bit, at equal steps, batch size
and seed. It may also be exported for platforms that are not here; compiling is left to them.
"""

import contextlib
import pathlib
import sys

from absl import app, flags

from sprint_jax.errors import UserError
from sprint_jax.runtime import cli
from sprint_jax.storage import files

# Named as in sprint-jax sample, for the same things; one process runs one of the two commands.
_MODEL = flags.DEFINE_string(
    "model", None, "Diffusers folder, converted folder, or run directory.", allow_override=True
)
_OUT = flags.DEFINE_string("out", None, "File to make.", allow_override=True)
_STEPS = flags.DEFINE_list(
    "steps", ["1", "2", "4"], "Network calls per picture, a program for each.", allow_override=True
)
_HEIGHT = flags.DEFINE_integer(
    "height", None, "Pixels, a multiple of 32; default: the model's.", allow_override=True
)
_WIDTH = flags.DEFINE_integer(
    "width", None, "Pixels, a multiple of 32; default: the model's.", allow_override=True
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["bfloat16", "float32"],
    "Of weights and arithmetic; default: bfloat16, for CPUs alone float32.",
    allow_override=True,
)
_SCHEDULE = flags.DEFINE_enum(
    "schedule",
    None,
    ["code", "paper"],
    "Time list that is used unless told; default: the model's.",
    allow_override=True,
)
_TILE = flags.DEFINE_bool(
    "tile", False, "Decode in overlapping tiles of 1024 px.", allow_override=True
)
_INSTRUCTION = flags.DEFINE_string(
    "instruction_file",
    None,
    "Text before each prompt of a published model; '' for none; default: see README.",
    allow_override=True,
)
_BATCHES = flags.DEFINE_list(
    "batch_sizes", None, "Pictures made at a time, a program for each; default: the model's."
)
_LONGEST = flags.DEFINE_integer(
    "longest_prompt", None, "Tokens of the longest prompt; default: all that the model reads."
)
_PLATFORMS = flags.DEFINE_list("platforms", None, "Of cpu, cuda, rocm, tpu; default: this one.")


def main(argv):
    with cli.user_errors():
        cli.no_arguments(argv)
        if not _MODEL.value or not _OUT.value:
            raise UserError(
                f"--{'out' if _MODEL.value else 'model'} is missing: name the model's folder and the file to make"
            )
        if not pathlib.Path(_MODEL.value).is_dir():
            raise UserError(
                f"--model={_MODEL.value} is no folder: give a diffusers folder, a converted one or a run directory; an exported file "
                "cannot be exported again"
            )
        steps = _numbers("steps", _STEPS.value)
        batch_sizes = (
            _numbers("batch_sizes", _BATCHES.value) if _BATCHES.value is not None else None
        )
        if _LONGEST.value is not None and _LONGEST.value < 1:
            raise UserError(f"--longest_prompt={_LONGEST.value}: use 1 or more")
        out = pathlib.Path(_OUT.value)
        if out.is_dir() or not out.parent.is_dir():
            raise UserError(f"--out={out}: name a file in a folder that exists")
        import tqdm
        from jax import export as jax_export

        from sprint_jax.sampling import exported, loading

        platforms = tuple(_PLATFORMS.value or [jax_export.default_export_platform()])
        unknown = [name for name in platforms if name not in exported.PLATFORMS]
        if unknown:
            raise UserError(
                f"--platforms={','.join(platforms)}: use some of {', '.join(exported.PLATFORMS)}"
            )
        alone = platforms == ("cpu",)
        say = lambda message: print(message, file=sys.stderr, flush=True)
        pipe = loading.load(
            _MODEL.value,
            dtype=_DTYPE.value or ("float32" if alone else "bfloat16"),
            instruction=_INSTRUCTION.value,
            tile=_TILE.value,
            platform=platforms[0] if len(platforms) == 1 else "",
            say=say,
        )
        bar = lambda programs: tqdm.tqdm(programs, unit="program", desc="export", delay=5)
        header = export(
            pipe,
            out,
            steps=steps,
            batch_sizes=batch_sizes,
            height=_HEIGHT.value,
            width=_WIDTH.value,
            platforms=platforms,
            schedule=_SCHEDULE.value,
            longest=_LONGEST.value,
            progress=bar,
        )
        print(
            f"wrote {out}: {len(header.programs)} programs for {', '.join(platforms)}, {out.stat().st_size / 1e6:.1f} MB"
        )


def _numbers(name, texts):
    """Counts of a flag, sorted, each once."""
    try:
        numbers = sorted({int(text) for text in texts})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        raise UserError(f"--{name}={','.join(texts)}: give numbers of 1 or more, for example 1,2,4")
    return numbers


def export(
    pipe,
    path,
    *,
    steps,
    batch_sizes=None,
    height=None,
    width=None,
    platforms=("cpu",),
    schedule=None,
    longest=None,
    progress=iter,
):
    """Writes a loaded model to a file, a program for every number of steps, batch size and padded prompt length.

    Args:
      pipe: from `loading.load`. path: the file, which appears whole or not at all.
      steps, batch_sizes: lists; None is the model's own batch size, and the first is used unless told.
      height, width: pixels; None takes the model's own. platforms: of `exported.PLATFORMS`.
      schedule: time list used unless told; None takes the model's own. longest: tokens of the longest prompt.
      progress: wraps the list of programs.
    Returns the `exported.Header`.
    """
    import zipfile

    import jax

    from sprint_jax.sampling import exported, generation
    from sprint_jax.storage import revision, weights

    height, width = (
        pipe.height if height is None else height,
        pipe.width if width is None else width,
    )
    batch_sizes = batch_sizes or [pipe.batch_size]
    shape, schedule = generation.latent_shape(pipe, height, width), schedule or pipe.schedule
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
        schedule=schedule,
        batch_size=batch_sizes[0],
        programs=tuple(programs),
    )
    held = _Held.of(pipe.params)
    lower = lambda program, held: _lowered(
        pipe, held, program, lengths[program.length], shape, platforms
    )
    held = held.only(_read(lower(programs[0], held)))
    try:
        with (
            _without_places(),
            files.whole(path) as partial,
            zipfile.ZipFile(partial, "w") as archive,
        ):
            archive.writestr(_member(exported.HEADER), header.to_json())
            for program in progress(programs):
                archive.writestr(_member(program.member), lower(program, held).serialize())
            if tokenizer is not None:
                archive.writestr(_member(exported.TOKENIZER), tokenizer)
            with archive.open(_member(exported.WEIGHTS), "w", force_zip64=True) as member:
                weights.write_stream(member, held.arrays)
    except OSError as error:
        raise UserError(
            f"writing {path} failed ({error.strerror or error}): free some space, or choose another --out"
        ) from None
    return header


@contextlib.contextmanager
def _without_places():
    """Programs that do not name the lines and folders of the code they come from: equal code, equal bytes."""
    import jax

    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _member(name):
    """A member with a fixed date, so that equal contents are equal files."""
    import zipfile

    return zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))


def _text(text):
    """(header's description of a text part, the tokenizer's file or None)."""
    from sprint_jax.encoders import text as text_encoders
    from sprint_jax.encoders import words as text_lib

    if isinstance(text, text_encoders.GemmaText):
        return {
            "kind": "gemma",
            "instruction": text.prompts.instruction,
        }, text.prompts.tokenizer_json()
    if isinstance(text.encoder, text_lib.WordsText):
        return {"kind": "words", "length": text.encoder.length}, None
    return {"kind": "shapes"}, None


class _Held:
    """Parameters by flat names, some of them perhaps left out of what programs take.

    arrays: {name: array} in the order of the names. tree: the structure of all of them. all: abstract arrays of
    all of them, by name, in the order of the tree.
    """

    def __init__(self, arrays, tree, all):
        self.arrays, self.tree, self.all = arrays, tree, all

    @classmethod
    def of(cls, params):
        import jax

        leaves, tree = jax.tree_util.tree_flatten_with_path(params)
        named = {
            jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves
        }
        abstract = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in named.items()
        }
        return cls(dict(sorted(named.items())), tree, abstract)

    def only(self, names):
        return _Held(
            {name: array for name, array in self.arrays.items() if name in names},
            self.tree,
            self.all,
        )

    def unflatten(self, arrays):
        """Traced: the tree again. What was left out, because nothing reads it, is zero."""
        import jax
        import jax.numpy as jnp

        leaves = [
            arrays[name] if name in arrays else jnp.zeros(a.shape, a.dtype)
            for name, a in self.all.items()
        ]
        return jax.tree.unflatten(self.tree, leaves)


def _lowered(pipe, held, program, arrays, shape, platforms):
    """`jax.export` of one program. arrays: of one prompt, abstract."""
    import jax
    import jax.numpy as jnp
    from jax import export as jax_export

    from sprint_jax.sampling import pipeline

    def draw(weights, arrays, guidance, times, seed, indices):
        params = held.unflatten(weights)
        return pipeline.sample(
            pipe.model,
            pipe.text,
            pipe.pixels,
            params,
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
    return jax_export.export(jax.jit(draw), platforms=platforms)(
        {name: held.all[name] for name in held.arrays},
        {name: abstract(a.dtype, batch, *a.shape) for name, a in arrays.items()},
        abstract(jnp.float32),
        abstract(jnp.float32, program.steps + 1),
        abstract(jnp.int32),
        abstract(jnp.int32, batch),
    )


def _read(lowered):
    """Names of the weights that a program reads; programs differ in shapes, not in that."""
    import jax

    (weights, *_), _ = jax.tree.unflatten(lowered.in_tree, range(len(lowered.in_avals)))
    return {name for name, place in weights.items() if place in lowered.module_kept_var_idx}


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags, argv=sys.argv)
