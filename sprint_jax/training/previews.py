"""Pictures on the way: a few held-out prompts, always the same noise, by the parameters of the moment.

The prompts and seeds are the first ones of the evaluation, so the last strip and the first row of its sheets
show the same pictures. A student draws in one step, a teacher as it is evaluated.
"""

import functools

import numpy as np

from sprint_jax import build
from sprint_jax import config as config_lib
from sprint_jax.data import aspect_ratios
from sprint_jax.diffusion import samplers
from sprint_jax.models.controlnet import Controlled
from sprint_jax.sampling import programs
from sprint_jax.storage import image_files

COUNT = 8  # as many as a row of the sheets
_LARGEST = 256  # pixels of a side; larger pictures are shown smaller


def student(c: config_lib.Config, data):
    """parameters -> uint8 [H, W, 3], for `loop.Stage.strip`; None where the data have no way to pictures."""
    times = samplers.scm_times(1, c.evaluation.schedule)
    model = build.student(c)
    make = lambda: programs.student_sampler(model, data.pixels, build.latent_shape(c), times)
    return _strip(c, data, model, make, c.evaluation.student_guidance)


def teacher(c: config_lib.Config, data, model):
    """As `student`, for a stage that trains `model`: the teacher before or after its fine-tune, or with its ControlNet."""
    times = samplers.trig_times(c.evaluation.teacher_steps)
    make = lambda: programs.teacher_sampler(model, data.pixels, build.latent_shape(c), times)
    return _strip(c, data, model, make, c.evaluation.teacher_guidance)


def _strip(c, data, model, make_sampler, guidance):
    if data.pixels is None:
        return None
    count = min(COUNT, c.evaluation.prompts)

    @functools.cache
    def prepared():
        """Once, with the first strip: what is drawn, and the program that draws it."""
        return data.heldout(count, 1), make_sampler()

    def draw(params):
        heldout, sampler = prepared()
        # A teacher that is trained before its ControlNet is not told the condition.
        told = (
            heldout.cond
            if isinstance(model, Controlled)
            else {name: heldout.cond[name] for name in ("text", "mask")}
        )
        null = {"text": data.frozen["null_text"], "mask": data.frozen["null_mask"]}
        images = programs.run(
            sampler,
            {"transformer": params, "pixels": data.pixels_params},
            null,
            told,
            guidance=guidance,
            seed=c.data.eval_seed,
            batch=min(count, c.evaluation.batch),
        )
        side = min(_LARGEST, c.data.size)
        zoom = max(1, 96 // side)
        sheet = image_files.grid(aspect_ratios.fit(images, side, side), columns=count)
        return np.repeat(np.repeat(sheet, zoom, 0), zoom, 1)

    return draw
