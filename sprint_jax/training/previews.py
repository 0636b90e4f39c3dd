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
) -> Callable[[Any], np.ndarray] | None:
    """Return a function parameters of `model` -> uint8 [H, W, 3]; None where the data cannot be
    decoded.

    sampler: of `objectives.base.Objective`.
    """
    if data.pixels is None:
        return None
    e, shape = c.evaluation, build.latent_shape(c)
    count, guidance = min(COUNT, e.prompts), _guidance(c, sampler)

    @functools.cache
    def prepared():
        """Prepare once, for the first preview: what is drawn, and the program that draws it."""
        if sampler == "renoise":
            times = samplers.scm_times(1, e.schedule)
            draw = programs.student_sampler(model, data.pixels, shape, times)
        else:
            times = samplers.trig_times(e.teacher_steps)
            draw = programs.teacher_sampler(model, data.pixels, shape, times)
        return data.heldout(count, 1), draw

    def preview(params):
        heldout, draw = prepared()
        # A teacher that is trained before its ControlNet does not see the condition.
        cond = heldout.cond
        if not isinstance(model, Controlled):
            cond = {name: cond[name] for name in ("text", "mask")}
        images = programs.run(
            draw,
            {"transformer": params, "pixels": data.pixels_params},
            programs.null_of(data.frozen),
            cond,
            guidance=guidance,
            seed=c.data.eval_seed,
            batch=min(count, e.batch),
        )
        side = min(_LARGEST, c.data.size)
        zoom = max(1, 96 // side)
        grid = image_files.grid(crops.fit_bilinear(images, side, side), columns=count)
        return np.repeat(np.repeat(grid, zoom, 0), zoom, 1)

    return preview


def _guidance(c: config_lib.Config, sampler: str) -> float:
    e = c.evaluation
    return e.student_guidance if sampler == "renoise" else e.teacher_guidance
