"""Images of prompts, written to a folder with a manifest."""

import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from sprint_jax.data import aspect_ratios
from sprint_jax.errors import UserError
from sprint_jax.sampling import generation
from sprint_jax.sampling.opening import open_model
from sprint_jax.sampling.options import SampleOptions, model_or_shipped
from sprint_jax.storage import crops, files, image_files, json_lines


def sample(options: SampleOptions) -> pathlib.Path:
    """Generate images and write them with manifest.jsonl. Return their folder.

    Raises UserError for options that do not belong together, before a model is loaded.
    """
    check(options)
    prompts = read_prompts(options)
    out = _make_folder(options.out)
    begin = time.perf_counter()
    images = _generate(options, prompts)
    count = write(out, images, prompts, options)
    print(f"{count} images and manifest.jsonl in {out} ({time.perf_counter() - begin:.1f} s)")
    return out


def check(options: SampleOptions) -> None:
    """Raise UserError for a value out of range, or an option without the one that it belongs to."""
    if not 0 <= options.seed < 2**31:
        raise UserError(f"--seed={options.seed}: use 0 to {2**31 - 1}")
    for name, value in (
        ("images_per_prompt", options.images_per_prompt),
        ("batch_size", options.batch_size),
    ):
        if value is not None and value < 1:
            raise UserError(f"--{name}={value}: use 1 or more")
    for name, value, other, given in (
        ("strength", options.strength, "image", options.image),
        ("control_scale", options.control_scale, "control", options.control),
    ):
        if value is not None and not given:
            raise UserError(f"--{name} belongs to --{other}: give an image there, or leave it out")


def read_prompts(options: SampleOptions) -> list[str]:
    """Return the prompts of --prompt, or of the file --prompts. Raises UserError without any."""
    path = options.prompts
    if bool(options.prompt) == bool(path):
        raise UserError("give either --prompt=TEXT (repeatable) or --prompts=FILE")
    if not path:
        return options.prompt
    try:
        lines = files.read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --prompts={path} ({error}): give a UTF-8 text file") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts={path} holds no prompt: write one a line")
    return prompts


def write(
    out: pathlib.Path, images: np.ndarray, prompts: Sequence[str], options: SampleOptions
) -> int:
    """Write images, uint8 [N, H, W, 3], as 00000.png and so on, then manifest.jsonl. Return N."""
    drawn = [prompt for prompt in prompts for _ in range(options.images_per_prompt or 1)]
    rows = []
    for i, (prompt, image) in enumerate(zip(drawn, images, strict=True)):
        name = f"{i:05d}.png"
        image_files.save(out / name, image)
        rows.append({"file": name, "prompt": prompt, "seed": options.seed, "steps": options.steps})
    json_lines.write(out / "manifest.jsonl", rows)
    return len(rows)


def _generate(options: SampleOptions, prompts: list[str]) -> np.ndarray:
    """Return uint8 [N, height, width, 3]."""
    import tqdm

    pipe = open_model(
        model_or_shipped(options.model),
        dtype=options.dtype,
        attention=options.attention,
        controlnet=options.controlnet,
        instruction=options.instruction_file,
        tile=options.tile,
    )
    height, width = _size(options, pipe)
    made_at = (
        aspect_ratios.nearest_bin(height, width) if options.resolution_binning else (height, width)
    )
    generation.latent_shape(pipe, *made_at)  # refuses a bad size before an image is read
    image, control = (
        image_files.load(path, *made_at, ground) if path else None
        for path, ground in (
            (options.image, image_files.WHITE),
            (options.control, image_files.BLACK),
        )
    )
    each = options.images_per_prompt or 1
    scale = options.control_scale
    with tqdm.tqdm(total=len(prompts) * each, unit="image", desc="sample", delay=5) as bar:

        def show(done: int) -> None:
            bar.update(done - bar.n)

        images = generation.generate(
            pipe,
            prompts,
            steps=options.steps,
            guidance_scale=options.guidance_scale,
            seed=options.seed,
            schedule=options.schedule,
            timesteps=options.timesteps,
            height=made_at[0],
            width=made_at[1],
            image=image,
            strength=generation.STRENGTH if options.strength is None else options.strength,
            control=control,
            control_scale=1.0 if scale is None else scale,
            images_per_prompt=each,
            batch_size=options.batch_size,
            say=show,
        )
    return crops.fit_bilinear(images, height, width)


def _size(options: SampleOptions, pipe: Any) -> tuple[int, int]:
    """Return (height, width) in pixels. Raises UserError for bins of a model that has none."""
    height = pipe.height if options.height is None else options.height
    width = pipe.width if options.width is None else options.width
    for name, side in (("height", height), ("width", width)):
        if side < 1:
            raise UserError(f"--{name}={side}: use 1 or more")
    if options.resolution_binning and (pipe.height, pipe.width) != (1024, 1024):
        raise UserError(
            f"--resolution_binning is of models for 1024 x 1024, this one is for {pipe.height} x "
            f"{pipe.width}: leave it out"
        )
    return height, width


def _make_folder(path: str) -> pathlib.Path:
    out = pathlib.Path(path)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write in --out={out} ({error.strerror}): choose another") from None
    if not os.access(out, os.W_OK):
        raise UserError(f"cannot write in --out={out}: choose another")
    return out
