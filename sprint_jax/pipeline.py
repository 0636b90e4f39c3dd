"""Loading a model and generating pictures, apart: `load(path) -> Pipeline`, `generate(pipe, prompts)`."""

import dataclasses
import json
import pathlib
from typing import Any

import jax

from sprint_jax import build, generation, weights
from sprint_jax import config as config_lib
from sprint_jax.diffusion import samplers
from sprint_jax.errors import UserError
from sprint_jax.models.linear_dit import LinearDiT
from sprint_jax.run import CONFIG_FILE, STUDENT_FILE

# Pictures are always made in batches of this size, so that a picture never depends on its company.
BATCH = 16


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A student ready to generate.

    text_encoder: prompts -> features and mask. codec: latents -> pixels. latent_shape: (h, w, c).
    guidance_scale, schedule: what `generate` uses when it is not told.
    """

    model: LinearDiT
    params: Any
    text_encoder: Any
    codec: Any
    latent_shape: tuple[int, int, int]
    guidance_scale: float
    schedule: str


def load(path) -> Pipeline:
    """The student of a run directory. Raises UserError for anything that is not one."""
    path = pathlib.Path(path)
    if not path.is_dir():
        raise UserError(f"no directory {path}: give the --workdir of a finished run")
    if not (path / CONFIG_FILE).is_file():
        raise UserError(f"{path} has no {CONFIG_FILE}: give the --workdir of a run of sprint_jax.main")
    if not (path / STUDENT_FILE).is_file():
        raise UserError(f"{path} has no {STUDENT_FILE} yet: let its run finish (same sprint_jax.main command)")
    try:
        config = config_lib.parse(json.loads((path / CONFIG_FILE).read_text()))
    except json.JSONDecodeError as error:
        raise UserError(f"{path / CONFIG_FILE} is not JSON ({error}): restore it from the run") from None
    model = build.student(config)
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.device_put(weights.load(path / STUDENT_FILE, abstract))
    return Pipeline(
        model, params, build.text_encoder(config), build.codec(config), build.latent_shape(config),
        config.evaluation.student_guidance, config.evaluation.schedule,
    )  # fmt: skip


def generate(pipe, prompts, *, steps=2, guidance_scale=None, seed=0, schedule=None, say=lambda done: None):
    """Pictures of prompts in few steps.

    Args:
      pipe: from `load`. prompts: list of str; an empty one is refused.
      steps: network calls per picture, 1 or more. schedule: time list, "code" or "paper".
      guidance_scale: embedded scale; None takes the model's own.
      seed: picture i depends on (seed, i, prompt i) alone.
      say: called with the number of pictures done.
    Returns:
      uint8 [len(prompts), H, W, 3].
    """
    if not prompts:
        raise UserError("no prompts: give at least one")
    for i, prompt in enumerate(prompts):
        if not prompt.strip():
            raise UserError(f"prompt {i} is empty: say what to draw, for example 'a red circle'")
    pipe.text_encoder.encode(prompts)  # every prompt is checked before the first picture is made
    times = samplers.scm_times(steps, schedule or pipe.schedule)
    sampler = generation.student_sampler(pipe.model, pipe.codec, pipe.latent_shape, times)
    scale = pipe.guidance_scale if guidance_scale is None else guidance_scale
    return generation.run(
        sampler, pipe.params, pipe.text_encoder, prompts, guidance=scale, seed=seed, batch=BATCH, say=say
    )
