"""Pictures from a model: python -m sprint_jax.sample --model=DIR --prompt="…" --steps=2 --out=DIR

DIR is a SANA-Sprint folder in the diffusers layout, one made by sprint_jax.convert, the --workdir of a run of
sprint_jax.main, or a file made by sprint_jax.export.
"""

import json
import os
import pathlib
import sys
import time

from absl import app, flags

from sprint_jax import cli, compile_cache, files
from sprint_jax.errors import UserError

_MODEL = flags.DEFINE_string("model", None, "Diffusers folder, converted folder, run directory, or exported file.")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "What to draw; may be repeated.")
_PROMPTS = flags.DEFINE_string("prompts", None, "Text file with one prompt a line.")
_STEPS = flags.DEFINE_integer("steps", 2, "Network calls per picture, 1 or more.")
_SEED = flags.DEFINE_integer("seed", 0, "Names the noise.")
_OUT = flags.DEFINE_string("out", "pictures", "Directory for the pictures and manifest.jsonl.")
_GUIDANCE = flags.DEFINE_float("guidance_scale", None, "Embedded guidance scale; default: the model's.")
_SCHEDULE = flags.DEFINE_enum("schedule", None, ["code", "paper"], "Time list; default: the model's.")
_TIMESTEPS = flags.DEFINE_list("timesteps", None, "Angles from about 1.57 to 0, steps + 1 of them, instead of a schedule.")
_HEIGHT = flags.DEFINE_integer("height", None, "Pixels, a multiple of 32; default: the model's.")
_WIDTH = flags.DEFINE_integer("width", None, "Pixels, a multiple of 32; default: the model's.")
_BINNING = flags.DEFINE_bool(
    "resolution_binning", False, "Make the nearest size the published models were trained at, then resize."
)
_IMAGE = flags.DEFINE_string("image", None, "Picture to start from.")
_STRENGTH = flags.DEFINE_float("strength", 0.6, "With --image: how much may change, more than 0 and at most 1.")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["bfloat16", "float32"], "Of weights and arithmetic; default: bfloat16, on a CPU float32."
)
_ATTENTION = flags.DEFINE_enum(
    "attention", "plain", ["plain", "pallas"], "Compiled by XLA, or kernels where the device has them."
)
_PER_PROMPT = flags.DEFINE_integer("images_per_prompt", 1, "Pictures of each prompt.")
_BATCH = flags.DEFINE_integer("batch_size", None, "Pictures made at a time; default: the model's.")
_TILE = flags.DEFINE_bool("tile", False, "Decode in overlapping tiles of 1024 px: less memory for large pictures.")
_INSTRUCTION = flags.DEFINE_string(
    "instruction_file", None, "Text before each prompt of a published model; '' for none; default: see README."
)


def main(argv):
    with cli.user_errors():
        cli.no_arguments(argv)
        if not _MODEL.value:
            raise UserError("--model is missing: give a diffusers folder, a converted one, or the --workdir of a run")
        if not 0 <= _SEED.value < 2**31:
            raise UserError(f"--seed={_SEED.value}: use 0 to {2**31 - 1}")
        if _PER_PROMPT.value < 1 or (_BATCH.value is not None and _BATCH.value < 1):
            raise UserError("--images_per_prompt and --batch_size: use 1 or more")
        prompts = _read_prompts()
        out = _output_directory()
        begin = time.perf_counter()
        images = _generate(prompts)
        drawn = [prompt for prompt in prompts for _ in range(_PER_PROMPT.value)]
        from sprint_jax import pictures

        rows = []
        for i, (prompt, image) in enumerate(zip(drawn, images, strict=True)):
            name = f"{i:05d}.png"
            pictures.save(out / name, image)
            rows.append({"file": name, "prompt": prompt, "seed": _SEED.value, "steps": _STEPS.value})
        _write_manifest(out, rows)
        seconds = time.perf_counter() - begin
        print(f"{len(rows)} pictures and manifest.jsonl in {out} ({seconds:.1f} s)")


def _generate(prompts):
    import tqdm

    from sprint_jax import drawing, pictures, resolutions

    compile_cache.start()

    say = lambda message: print(message, file=sys.stderr, flush=True)
    pipe = _exported(say) if pathlib.Path(_MODEL.value).is_file() else _loaded(say)
    height, width = _HEIGHT.value or pipe.height, _WIDTH.value or pipe.width
    made_at = resolutions.nearest(height, width) if _BINNING.value else (height, width)
    drawing.latent_shape(pipe, *made_at)  # refuses a bad size before the picture is read
    image = pictures.load(_IMAGE.value, *made_at) if _IMAGE.value else None
    with tqdm.tqdm(total=len(prompts) * _PER_PROMPT.value, unit="picture", desc="sample", delay=5) as bar:
        images = drawing.generate(
            pipe, prompts, steps=_STEPS.value, guidance_scale=_GUIDANCE.value, seed=_SEED.value,
            schedule=_SCHEDULE.value, timesteps=_angles(), height=made_at[0], width=made_at[1], image=image,
            strength=_STRENGTH.value, images_per_prompt=_PER_PROMPT.value,
            batch_size=_BATCH.value, say=lambda done: bar.update(done - bar.n),
        )  # fmt: skip
    return resolutions.fit(images, height, width)


def _loaded(say):
    """The model of a folder."""
    import jax

    from sprint_jax import pipeline

    dtype = _DTYPE.value or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return pipeline.load(
        _MODEL.value, dtype=dtype, attention=_ATTENTION.value, instruction=_INSTRUCTION.value, tile=_TILE.value, say=say
    )


def _exported(say):
    """The programs of a file, which nothing can be changed about any more."""
    for flag in (_DTYPE, _ATTENTION, _INSTRUCTION, _TILE):
        if flag.present:
            raise UserError(f"--{flag.name} is settled in an exported file: give it to sprint_jax.export")
    from sprint_jax import exported

    return exported.load(_MODEL.value, say=say)


def _angles():
    if _TIMESTEPS.value is None:
        return None
    try:
        return [float(angle) for angle in _TIMESTEPS.value]
    except ValueError:
        raise UserError(f"--timesteps={','.join(_TIMESTEPS.value)}: give numbers, for example 1.57,1.0,0") from None


def _read_prompts():
    if bool(_PROMPT.value) == bool(_PROMPTS.value):
        raise UserError("give either --prompt=TEXT (repeatable) or --prompts=FILE")
    if _PROMPT.value:
        return _PROMPT.value
    try:
        lines = pathlib.Path(_PROMPTS.value).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --prompts={_PROMPTS.value} ({error}): give a UTF-8 text file") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts={_PROMPTS.value} holds no prompt: write one a line")
    return prompts


def _output_directory():
    out = pathlib.Path(_OUT.value)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write in --out={out} ({error.strerror}): choose another") from None
    if not os.access(out, os.W_OK):
        raise UserError(f"cannot write in --out={out}: choose another")
    return out


def _write_manifest(out, rows):
    with files.whole(out / "manifest.jsonl") as partial:
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags, argv=sys.argv)
