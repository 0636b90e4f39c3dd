"""Images of prompts, written to a folder with a manifest."""

import os
import pathlib
import re
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from sprint_jax.data import aspect_ratios
from sprint_jax.diffusion import limits
from sprint_jax.errors import UserError
from sprint_jax.sampling import generation, prompt_files
from sprint_jax.sampling.opening import open_model
from sprint_jax.sampling.options import SampleOptions, model_or_shipped
from sprint_jax.storage import crops, files, image_files, json_lines
from sprint_jax.storage.settings import Keeper

_MANIFEST = "manifest.jsonl"
_EVALUATION = "protocol.json"  # of `evaluation.gallery`, whose folders hold another manifest
_KEEPER = Keeper(file=_MANIFEST, flag="out")
_NUMBERED = re.compile(r"(\d{5,18})\.\w+")  # any ending: an image may have been converted


def sample(options: SampleOptions) -> pathlib.Path:
    """Generate images and write them with manifest.jsonl. Return their folder.

    Raises UserError for options that do not belong together, before a model is loaded.
    """
    check(options)
    prompts = read_prompts(options)
    out = _make_folder(options.out)
    begin = time.perf_counter()
    images = _generate(options, prompts)
    names = write(out, images, [prompt.text for prompt in prompts], options)
    kept = f" ({names[0]} to {names[-1]})" if names[0] != _name(0) else ""
    seconds = time.perf_counter() - begin
    print(f"{len(names)} images{kept} and {_MANIFEST} in {out} ({seconds:.1f} s)")
    return out


def check(options: SampleOptions) -> None:
    """Raise UserError for a value out of range, or an option without the one that it belongs to."""
    names = (*limits.RANGES, "strength")
    limits.check({name: getattr(options, name) for name in names}, "--{name}={value}")
    for name, value, other, given in (
        ("strength", options.strength, "image", options.image),
        ("control_scale", options.control_scale, "control", options.control),
    ):
        if value is not None and not given:
            raise UserError(f"--{name} belongs to --{other}: give an image there, or leave it out")


def read_prompts(options: SampleOptions) -> list[prompt_files.Prompt]:
    """Return the prompts of --prompt, or of the file --prompts. Raises UserError without any."""
    if bool(options.prompt) == bool(options.prompts):
        raise UserError("give either --prompt=TEXT (repeatable) or --prompts=FILE")
    if options.prompts:
        return prompt_files.read(options.prompts)
    place = lambda i: "--prompt" if len(options.prompt) == 1 else f"--prompt number {i + 1}"
    return [
        prompt_files.Prompt(f"{i:05d}", text, {}, place(i)) for i, text in enumerate(options.prompt)
    ]


def write(
    out: pathlib.Path, images: np.ndarray, prompts: Sequence[str], options: SampleOptions
) -> list[str]:
    """Write images, uint8 [N, H, W, 3], and their rows of the manifest. Return the names.

    The numbers in the names continue after those of images that the folder has. With --overwrite
    they begin at 0, and images that the old manifest lists are removed. Two commands that write to
    one folder at once take turns, so no number is taken twice.
    """
    drawn = [prompt for prompt in prompts for _ in range(options.images_per_prompt or 1)]
    with _KEEPER.hold(out):
        with _KEEPER.writing(out):
            if options.overwrite:
                _remove(out)
            rows = listed(out)
            first = _next_number(out, rows) if not options.overwrite else 0
            names = [_name(first + i) for i in range(len(images))]
            for i, (name, prompt, image) in enumerate(zip(names, drawn, images, strict=True)):
                image_files.save(out / name, image)
                row = {"file": name, "prompt": prompt, "seed": options.seed}
                rows.append(row | {"index": i, "steps": options.steps})
            json_lines.write(out / _MANIFEST, rows)
    return names


def _remove(out: pathlib.Path) -> None:
    """Remove a folder's manifest, then the images that it lists."""
    rows = listed(out)
    (out / _MANIFEST).unlink(missing_ok=True)  # first: no image is ever listed by another's row
    for row in rows:
        if _NUMBERED.fullmatch(str(row["file"])):
            (out / row["file"]).unlink(missing_ok=True)


def listed(out: pathlib.Path) -> list[dict[str, Any]]:
    """Return the rows of a folder's manifest, none without one.

    Raises UserError for a manifest that another program wrote, or that is damaged before its end.
    """
    path = out / _MANIFEST
    rows = json_lines.rows(path, ("file", "prompt", "seed"), kind="an image's")
    if not rows and path.exists() and path.stat().st_size:
        raise UserError(f"{path} was not written by sprint-jax sample: choose another --out")
    return rows


def _name(number: int) -> str:
    return f"{number:05d}.png"


def _next_number(out: pathlib.Path, rows: Sequence[dict[str, Any]]) -> int:
    """Return the number after the largest of the folder's images and the manifest's rows."""
    names = [path.name for path in files.children(out)] + [str(row["file"]) for row in rows]
    found = filter(None, map(_NUMBERED.fullmatch, names))
    return max((int(match[1]) + 1 for match in found), default=0)


def _generate(options: SampleOptions, prompts: list[prompt_files.Prompt]) -> np.ndarray:
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
    texts = [prompt.text for prompt in prompts]
    with (
        generation.checked(pipe, texts, [prompt.place for prompt in prompts]),
        tqdm.tqdm(total=len(prompts) * each, unit="image", desc="sample", delay=5) as bar,
    ):

        def show(done: int) -> None:
            bar.update(done - bar.n)

        images = generation.generate(
            pipe,
            texts,
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
    if options.resolution_binning and (pipe.height, pipe.width) != (1024, 1024):
        raise UserError(
            f"--resolution_binning is of models for 1024 x 1024, this one is for {pipe.height} x "
            f"{pipe.width}: leave it out"
        )
    return height, width


def _make_folder(path: str) -> pathlib.Path:
    """Make the folder of the images. Raises UserError for one that belongs to another command."""
    out = pathlib.Path(path)
    if (out / _EVALUATION).exists():
        raise UserError(f"--out={out} holds images of sprint-jax evaluate: choose another")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write in --out={out} ({error.strerror}): choose another") from None
    if not os.access(out, os.W_OK):
        raise UserError(f"cannot write in --out={out}: choose another")
    listed(out)  # a manifest of another program is refused before a model is read
    return out
