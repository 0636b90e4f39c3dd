"""Images of a run's networks on given conditions, as the run is scored."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sprint_jax import build
from sprint_jax import config as config_lib
from sprint_jax.diffusion import samplers
from sprint_jax.sampling import programs


def student(
    c: config_lib.Config, data: Any, params: Any, cond: Mapping[str, np.ndarray], *, steps: int
) -> np.ndarray:
    """Draw an image for each row of the conditions, uint8 [N, H, W, 3].

    data: the run's data set, with a codec. params: of the student.
    """
    return of_students(c, data, cond, steps=steps)(params)


def of_students(
    c: config_lib.Config, data: Any, cond: Mapping[str, np.ndarray], *, steps: int
) -> Callable[[Any], np.ndarray]:
    """Return `student` as a function of the parameters, for many students by one program."""
    times = samplers.scm_times(steps, c.evaluation.schedule)
    sampler = programs.student_sampler(build.student(c), data.pixels, build.latent_shape(c), times)
    return lambda params: _run(c, data, sampler, params, cond, c.evaluation.student_guidance)


def teacher(
    c: config_lib.Config, data: Any, params: Any, cond: Mapping[str, np.ndarray], *, steps: int
) -> np.ndarray:
    """Draw as `student` does, by the guided teacher without a ControlNet."""
    times = samplers.trig_times(steps)
    sampler = programs.teacher_sampler(build.teacher(c), data.pixels, build.latent_shape(c), times)
    return _run(c, data, sampler, params, cond, c.evaluation.teacher_guidance)


def _run(c, data, sampler, params, cond, guidance):
    return programs.run(
        sampler,
        {"transformer": params, "pixels": data.pixels_params},
        programs.null_of(data.frozen),
        cond,
        guidance=guidance,
        seed=c.data.eval_seed,
        batch=c.evaluation.batch,
    )
