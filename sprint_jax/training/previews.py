"""Previews: images of a few held-out prompts, always with the same noise, by the current
parameters.

The prompts and seeds are the first ones of the evaluation, so the last preview and the first row
of its grids show the same images. A student draws in one step, a teacher as it is evaluated.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from sprint_jax import build
from sprint_jax import config as config_lib
from sprint_jax.diffusion import samplers
from sprint_jax.models.controlnet import Controlled
from sprint_jax.sampling import programs
from sprint_jax.storage import crops, image_files

COUNT = 8  # as many as a row of the grids
_LARGEST = 256  # pixels of a side; larger images are shown smaller


def make(
    c: config_lib.Config, data: Any, model: Any, sampler: str
) -> Callable[[Any], np.ndarray | None] | None:
    """Return a function parameters of `model` -> uint8 [H, W, 3]; None where the data cannot be
    decoded.

    The function returns None where an image is not finite. sampler: of `objectives.base.Objective`.
    """
    if data.pixels is None:
        return None
    e, shape = c.evaluation, build.latent_shape(c)
    count = min(COUNT, e.prompts)

    @functools.cache
    def prepared():
        """Prepare what is drawn, the program that draws it, and its guidance, once."""
        if sampler == "renoise":
            guidance, times = e.student_guidance, samplers.scm_times(1, e.schedule)
            draw = programs.student_sampler(model, data.pixels, shape, times)
        else:
            guidance, times = e.teacher_guidance, samplers.trig_times(e.teacher_steps)
            draw = programs.teacher_sampler(model, data.pixels, shape, times)
        return data.heldout(count, 1), draw, guidance

    def preview(params):
        heldout, draw, guidance = prepared()
        # A teacher that is trained before its ControlNet does not see the condition.
        cond = heldout.cond
        if not isinstance(model, Controlled):
            cond = {name: cond[name] for name in ("text", "mask")}
        problems: list[str] = []
        images = programs.run(
            draw,
            {"transformer": params, "pixels": data.pixels_params},
            programs.null_of(data.frozen),
            cond,
            guidance=guidance,
            seed=c.data.eval_seed,
            batch=min(count, e.batch),
            warn=problems.append,
        )
        if problems:
            return None
        side = min(_LARGEST, c.data.size)
        zoom = max(1, 96 // side)
        grid = image_files.grid(crops.fit_bilinear(images, side, side), columns=count)
        return image_files.enlarge(grid, zoom)

    return preview
