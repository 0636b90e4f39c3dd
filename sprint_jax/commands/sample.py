"""Pictures from a model: python -m sprint_jax sample --model=DIR --prompt="…" --steps=2 --out=DIR

DIR is a SANA-Sprint folder in the diffusers layout, one made by sprint-jax convert, the --workdir of a run of
sprint_jax.main, or a file made by sprint_jax.commands.export.
"""

import json
import os
import pathlib
import sys
import time

from absl import app, flags

from sprint_jax.commands import model_flags
from sprint_jax.errors import UserError
from sprint_jax.runtime import cli, compile_cache
from sprint_jax.storage import files

_PROMPT = flags.DEFINE_multi_string("prompt", [], "What to draw; may be repeated.")
_BINNING = flags.DEFINE_bool(
    "resolution_binning",
    False,
    "Make the nearest of diffusers' sizes for the published models, then resize.",
)
_IMAGE = flags.DEFINE_string("image", None, "Picture to start from.")
_CONTROL = flags.DEFINE_string(
    "control", None, "Sketch for a model with a ControlNet: a picture, white lines on black."
)
_CONTROL_SCALE = flags.DEFINE_float(
    "control_scale", 1.0, "With --control: how strongly it is followed; 1 as in training."
)
_STRENGTH = flags.DEFINE_float(
    "strength", 0.6, "With --image: how much may change, more than 0 and at most 1."
)
_CONTROLNET = flags.DEFINE_string(
    "controlnet", None, "Folder of a diffusers ControlNet to steer the model by."
)
_ATTENTION = flags.DEFINE_enum(
    "attention",
    None,
    ["plain", "pallas"],
    "Attention and depthwise convolutions compiled by XLA, or kernels where the device has them; default: kernels on an NVIDIA GPU.",
)
flags.adopt_module_key_flags(model_flags)  # --help shows them here


def main(argv):
    with cli.user_errors():
        cli.no_arguments(argv)
        if not model_flags.MODEL.value:
            raise UserError(
                "--model is missing: give a diffusers folder, a converted one, or the --workdir of a run"
            )
        if not 0 <= model_flags.SEED.value < 2**31:
            raise UserError(f"--seed={model_flags.SEED.value}: use 0 to {2**31 - 1}")
        if model_flags.PER_PROMPT.value < 1 or (
            model_flags.BATCH.value is not None and model_flags.BATCH.value < 1
        ):
            raise UserError("--images_per_prompt and --batch_size: use 1 or more")
        for flag, other in ((_STRENGTH, _IMAGE), (_CONTROL_SCALE, _CONTROL)):
            if flag.present and not other.value:
                raise UserError(
                    f"--{flag.name} belongs to --{other.name}: give a picture there, or leave it out"
                )
        prompts = _read_prompts()
        out = _output_directory()
        begin = time.perf_counter()
        images = _generate(prompts)
        drawn = [prompt for prompt in prompts for _ in range(model_flags.PER_PROMPT.value)]
        from sprint_jax.storage import image_files

        rows = []
        for i, (prompt, image) in enumerate(zip(drawn, images, strict=True)):
            name = f"{i:05d}.png"
            image_files.save(out / name, image)
            rows.append(
                {
                    "file": name,
                    "prompt": prompt,
                    "seed": model_flags.SEED.value,
                    "steps": model_flags.STEPS.value,
                }
            )
        _write_manifest(out, rows)
        seconds = time.perf_counter() - begin
        print(f"{len(rows)} pictures and manifest.jsonl in {out} ({seconds:.1f} s)")


def _generate(prompts):
    import tqdm

    from sprint_jax.data import aspect_ratios
    from sprint_jax.sampling import generation
    from sprint_jax.storage import image_files

    compile_cache.start()
    flag = model_flags
    say = lambda message: print(message, file=sys.stderr, flush=True)
    pipe = _exported(say) if pathlib.Path(flag.MODEL.value).is_file() else _loaded(say)
    height, width = (
        own if asked is None else asked
        for asked, own in ((flag.HEIGHT.value, pipe.height), (flag.WIDTH.value, pipe.width))
    )
    for name, side in (("height", height), ("width", width)):
        if side < 1:
            raise UserError(f"--{name}={side}: use 1 or more")
    if _BINNING.value and (pipe.height, pipe.width) != (1024, 1024):
        raise UserError(
            f"--resolution_binning is of models for 1024 x 1024, this one is for {pipe.height} x {pipe.width}: leave it out"
        )
    made_at = aspect_ratios.nearest(height, width) if _BINNING.value else (height, width)
    generation.latent_shape(pipe, *made_at)  # refuses a bad size before the picture is read
    given = ((_IMAGE.value, image_files.WHITE), (_CONTROL.value, image_files.BLACK))
    image, control = (
        image_files.load(path, *made_at, ground) if path else None for path, ground in given
    )
    with tqdm.tqdm(
        total=len(prompts) * flag.PER_PROMPT.value, unit="picture", desc="sample", delay=5
    ) as bar:
        images = generation.generate(
            pipe,
            prompts,
            steps=flag.STEPS.value,
            guidance_scale=flag.GUIDANCE.value,
            seed=flag.SEED.value,
            schedule=flag.SCHEDULE.value,
            timesteps=flag.angles(),
            height=made_at[0],
            width=made_at[1],
            image=image,
            strength=_STRENGTH.value,
            control=control,
            control_scale=_CONTROL_SCALE.value,
            images_per_prompt=flag.PER_PROMPT.value,
            batch_size=flag.BATCH.value,
            say=lambda done: bar.update(done - bar.n),
        )
    return aspect_ratios.fit(images, height, width)


def _loaded(say):
    """The model of a folder."""
    from sprint_jax.sampling import loading

    flag = model_flags
    return loading.load(
        flag.MODEL.value,
        dtype=flag.DTYPE.value or loading.default_dtype(),
        attention=_ATTENTION.value,
        controlnet=_CONTROLNET.value,
        instruction=flag.INSTRUCTION.value,
        tile=flag.TILE.value,
        say=say,
    )


def _exported(say):
    """The programs of a file, which nothing can be changed about any more."""
    for flag in (
        model_flags.DTYPE,
        _ATTENTION,
        _CONTROLNET,
        model_flags.INSTRUCTION,
        model_flags.TILE,
    ):
        if flag.present:
            raise UserError(
                f"--{flag.name} is settled in an exported file: give it to sprint-jax export"
            )
    from sprint_jax.sampling import exported

    return exported.load(model_flags.MODEL.value, say=say)


def _read_prompts():
    if bool(_PROMPT.value) == bool(model_flags.PROMPTS.value):
        raise UserError("give either --prompt=TEXT (repeatable) or --prompts=FILE")
    if _PROMPT.value:
        return _PROMPT.value
    try:
        lines = files.read_lines(model_flags.PROMPTS.value)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read --prompts={model_flags.PROMPTS.value} ({error}): give a UTF-8 text file"
        ) from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts={model_flags.PROMPTS.value} holds no prompt: write one a line")
    return prompts


def _output_directory():
    out = pathlib.Path(model_flags.OUT.value)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write in --out={out} ({error.strerror}): choose another") from None
    if not os.access(out, os.W_OK):
        raise UserError(f"cannot write in --out={out}: choose another")
    return out


def _write_manifest(out, rows):
    files.write_text(
        out / "manifest.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    )


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags, argv=sys.argv)
