"""What a model can draw, as the server needs it: an artist, its limits, and what to compile."""

import pathlib
import warnings
from collections.abc import Callable, Sequence

import numpy as np

from sprint_jax.errors import UserError
from sprint_jax.sampling import generation
from sprint_jax.sampling.exported import Exported
from sprint_jax.sampling.pipeline import Pipeline
from sprint_jax.serving.schema import Limits, Request

Artist = Callable[[Request], np.ndarray]

_SHAPES = (
    "a red circle left of a blue square",
    "a green triangle on a yellow background",
    "three purple circles",
    "a white square above a red triangle",
    "two blue triangles",
)
_SCENES = (
    "a lighthouse at dusk, oil on canvas",
    "a fox in the snow, early morning light",
    "a bowl of ripe figs, still life",
    "a small wooden boat on a calm lake",
    "an old library full of plants",
)


def make_artist(pipe: Pipeline | Exported, path: str | pathlib.Path) -> Artist:
    """Return draw(request) -> uint8 [height, width, 3], equal to `generation.generate` alone.

    path: of the model. Strangers do not see it: messages say "the model" instead.
    """
    # One size always, or the last bits of an image would depend on its company.
    batch_size = _batch_size(pipe)

    def draw(request: Request) -> np.ndarray:
        control = {}
        if request.control is not None:
            control = {"control": request.control, "control_scale": request.control_scale}
        try:
            images = generation.generate(
                pipe,
                [request.prompt],
                steps=request.steps,
                guidance_scale=request.guidance_scale,
                height=request.height,
                width=request.width,
                seed=request.seed,
                image=request.image,
                strength=request.strength,
                schedule=request.schedule,
                batch_size=batch_size,
                **control,
            )
        except UserError as error:
            raise type(error)(str(error).replace(str(path), "the model")) from None
        return images[0]

    return draw


def limits_of(
    pipe: Pipeline | Exported,
    sizes: Sequence[tuple[int, int]] | None = None,
    max_steps: int = 4,
    max_prompt: int = 2000,
) -> Limits:
    """Return what a server with this model offers.

    sizes: (height, width) tuples, None for the model's own. Raises UserError for a size that does
    not fit the model, and for sizes and steps that an exported file has no program for.
    """
    steps = range(1, max_steps + 1)
    if isinstance(pipe, Exported):
        sizes, steps = _programs(pipe, sizes, max_steps)
    sizes = tuple(sizes or [(pipe.height, pipe.width)])
    for height, width in sizes:
        generation.latent_shape(pipe, height, width)
    return Limits(
        steps=tuple(steps),
        sizes=sizes,
        guidance_scale=float(pipe.guidance_scale),
        fixed_guidance=getattr(pipe, "fixed_guidance", False),
        schedule=pipe.schedule,
        takes_image=not isinstance(pipe, Exported),
        takes_control=pipe.control,
        takes_empty=pipe.text.takes_empty,
        max_prompt=max_prompt,
    )


def _programs(
    pipe: Exported, sizes: Sequence[tuple[int, int]] | None, max_steps: int
) -> tuple[Sequence[tuple[int, int]], list[int]]:
    """Return (sizes, numbers of steps) such that a file has every combination."""
    size = _batch_size(pipe)
    programs = [
        program
        for program in pipe.header.programs
        if program.batch_size == size and program.steps <= max_steps
    ]
    if sizes is None:  # its own first
        own = (pipe.height, pipe.width)
        sizes = sorted(
            {(p.height, p.width) for p in programs}, key=lambda size: (size != own, size)
        )
    sizes_of = {
        count: {(p.height, p.width) for p in programs if p.steps == count}
        for count in sorted({p.steps for p in programs})
    }
    steps = [count for count, there in sizes_of.items() if there >= set(sizes)]
    if not steps:
        listed = sorted({(p.steps, p.height, p.width) for p in pipe.header.programs})
        raise UserError(
            f"--sizes and --max_steps leave no program of {pipe.path}: it has (steps, height, "
            f"width) {listed}"
        )
    return sizes, steps


def rehearsals(
    pipe: Pipeline | Exported, limits: Limits, ready_tokens: int | None = None
) -> list[Request]:
    """Return requests that together need every program on offer.

    They vary size, padded prompt length, number of steps, and the presence of an image and of a
    control. ready_tokens: only prompts of at most this length, and the shortest; None for all.
    """

    def gray(present: bool, height: int, width: int) -> np.ndarray | None:
        return np.full((height, width, 3), 128, np.uint8) if present else None

    return [
        Request(
            prompt=prompt,
            steps=steps,
            seed=0,
            guidance_scale=limits.guidance_scale,
            height=height,
            width=width,
            schedule="code",
            image=gray(image, height, width),
            strength=1.0,  # drops no step: these are all numbers of steps that an image can leave
            control=gray(control, height, width),
            control_scale=1.0,
        )
        for height, width in limits.sizes
        for prompt in prompts_by_length(pipe, ready_tokens)
        for control in ((False, True) if limits.takes_control else (False,))
        for image in ((False, True) if limits.takes_image else (False,))
        for steps in limits.steps
    ]


def prompts_by_length(pipe: Pipeline | Exported, ready_tokens: int | None = None) -> list[str]:
    """Return one prompt for each padded length that the model has a program for."""
    found, words = {}, 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the longest are cut
        while words < 600:
            prompt = " ".join(["a"] * words)
            try:
                found.setdefault(pipe.text.prepare([prompt])[0][0], prompt)
            except UserError:  # too long for this model
                break
            words = words + 1 + words // 8
    least = min(found)
    if isinstance(pipe, Exported):
        exist = {program.length for program in pipe.header.programs}
        found = {length: prompt for length, prompt in found.items() if length in exist}
    return [
        prompt
        for length, prompt in found.items()
        if length == least or ready_tokens is None or length <= ready_tokens
    ]


def examples(pipe: Pipeline | Exported) -> tuple[str, ...]:
    """Return prompts in words that the model knows."""
    try:
        pipe.text.prepare(list(_SCENES))
    except UserError:
        return _SHAPES
    return _SCENES


def _batch_size(pipe: Pipeline | Exported) -> int:
    """Return the images per program run: one, or the least that an exported file can do."""
    if isinstance(pipe, Exported):
        return min(program.batch_size for program in pipe.header.programs)
    return 1
