"""The host's side of prompts to pictures, the same for a loaded model and for an exported file.

What is asked for becomes sizes, times, prepared prompts and batches; whoever computes is told apart by the
programs it hands out: `pipeline.Pipeline` compiles its networks, `exported.Exported` runs what its file holds.
No network is known here.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from sprint_jax.diffusion import samplers
from sprint_jax.encoders import prompts as prompts_lib
from sprint_jax.errors import UserError

# Img2img never starts nearer to noise than this unless strength is 1: at the published t_max nothing is
# left of the picture. It is the second time of the published two-step list.
IMAGE_T_MAX = 1.3


@dataclasses.dataclass(frozen=True)
class Kind:
    """All that decides about shapes, and so about the program, of one batch.

    output: "pixels" or "latent". steps: network calls. length: tokens that prompts are padded to.
    batch_size: pictures. shape: (h, w, c) of one latent. draws: whether noise is given. start: whether
    latents to start from are. control: whether a ControlNet's condition is.
    """

    output: str
    steps: int
    length: int
    batch_size: int
    shape: tuple[int, int, int]
    draws: bool
    start: bool
    control: bool


def generate(
    pipe,
    prompts,
    *,
    steps=2,
    guidance_scale=None,
    height=None,
    width=None,
    seed=0,
    timesteps=None,
    latents=None,
    step_noise=None,
    image=None,
    strength=0.6,
    output="pixels",
    schedule=None,
    images_per_prompt=1,
    batch_size=None,
    indices=None,
    control=None,
    control_scale=1.0,
    say=lambda done: None,
):
    """Pictures of prompts in few steps.

    Args:
      pipe: from `pipeline.load` or `exported.load`. prompts: list of str, none of them empty.
      steps: network calls per picture, 1 or more.
      guidance_scale: embedded scale; None takes the model's own (4.5 for published models).
      height, width: pixels, multiples of the autoencoder's factor (32); None takes the model's own.
      seed: picture i depends on (seed, i, prompt i) alone.
      timesteps: steps + 1 angles from noise (about pi/2) to 0, instead of a schedule.
      latents: [B, h, w, c] unit-variance start noise. step_noise: steps - 1 arrays of that shape, the
        draws between steps (a longer list, as of a scheduler that also draws at the end, is cut).
      image: uint8 [H, W, 3] or [B, H, W, 3] to start from (img2img) instead of noise alone.
      strength: in (0, 1], how much of the picture may change. Drops the first steps; see `image_times`.
      output: "pixels" or "latent".
      schedule: "code" or "paper" (`samplers.scm_times`); None takes the model's own.
      images_per_prompt: pictures of each prompt, side by side in the result.
      batch_size: pictures per run of the compiled program; pictures are bit-equal for any company of
        prompts at one batch size. None takes pipe.batch_size.
      indices: the i of each picture's noise, for a part of a longer list; None counts from 0.
      control: uint8 [H, W, 3] or [B, H, W, 3], the condition of a model with a ControlNet: a sketch, white lines on
        black. None leaves the ControlNet out.
      control_scale: finite; 1 follows the sketch as in training, 0 not at all.
      say: called with the number of pictures done.
    Returns:
      "pixels": uint8 [B, H, W, 3]. "latent": float32 [B, h, w, c] at unit scale, before the
      autoencoder's scaling is undone.
    """
    if isinstance(prompts, str):
        raise UserError("prompts must be a list of texts: put brackets around the one")
    if not prompts:
        raise UserError("no prompts: give at least one")
    for i, prompt in enumerate(prompts):
        if not prompt.strip():
            raise UserError(f"prompt {i} is empty: say what to draw, for example 'a red circle'")
    if output not in ("pixels", "latent"):
        raise UserError(f"output {output!r}: use 'pixels' or 'latent'")
    if images_per_prompt < 1:
        raise UserError(f"images_per_prompt {images_per_prompt}: use 1 or more")
    prompts = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    height, width = (
        pipe.height if height is None else height,
        pipe.width if width is None else width,
    )
    size = batch_size or pipe.batch_size
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise UserError(f"guidance_scale {guidance_scale}: use a finite number")
    if not 0 <= seed < 2**31:
        raise UserError(f"seed {seed}: use 0 to {2**31 - 1}")
    shape = latent_shape(pipe, height, width)
    times = _times(pipe, steps, timesteps, schedule)
    if image is not None:
        times = image_times(times, strength)
    draws = _draws(latents, step_noise, len(prompts), shape, len(times) - 1)
    start = None if image is None else _encode(pipe, "image", image, len(prompts), height, width)
    steered = (
        None
        if control is None
        else _condition(pipe, control, control_scale, len(prompts), height, width)
    )
    rows = pipe.text.prepare(prompts)  # every prompt is checked before the first picture is made
    given = dict(
        output=output,
        steps=len(times) - 1,
        batch_size=size,
        shape=shape,
        draws=draws is not None,
        start=start is not None,
        control=steered is not None,
    )
    programs = {
        length: pipe.program(Kind(length=length, **given))
        for length in sorted({length for length, _ in rows})
    }
    scale = rounded(pipe.guidance_scale if guidance_scale is None else guidance_scale, pipe.dtype)
    numbers = np.arange(len(prompts)) if indices is None else np.asarray(indices)
    if numbers.shape != (len(prompts),):
        raise UserError(f"{numbers.size} indices for {len(prompts)} pictures: give one each")
    pick = lambda a, padded, axis: None if a is None else np.take(a, padded, axis)
    result, waiting = [None] * len(prompts), None
    for length, members, padded, arrays in prompts_lib.batches(rows, size):
        made = programs[length](
            pipe.params,
            arrays,
            np.float32(scale),
            times,
            np.int32(seed),
            numbers[padded].astype(np.int32),
            pick(draws, padded, 1),
            pick(start, padded, 0),
            pick(steered, padded, 0),
            np.float32(control_scale),
        )
        # The device works on this batch while the one before it is copied.
        _keep(result, waiting, say)
        waiting = members, made
    _keep(result, waiting, say)
    return np.stack(result)


def _keep(result, waiting, say):
    """Copies a batch (indices, pictures on the device) into the list of all; None is no batch."""
    if waiting is None:
        return
    members, made = waiting
    for index, picture in zip(members, np.asarray(made)):  # what pads the batch is left
        result[index] = picture
    say(sum(picture is not None for picture in result))


def latent_shape(pipe, height, width):
    """(h, w, c) of a picture's latents. Raises UserError for sides that do not fit."""
    factor = pipe.pixels.factor
    for name, side in (("height", height), ("width", width)):
        if side <= 0 or side % pipe.cell:
            nearest = max(pipe.cell, round(side / pipe.cell) * pipe.cell)
            raise UserError(f"{name} {side} is not a multiple of {pipe.cell}: use {nearest}")
    return height // factor, width // factor, pipe.pixels.channels


def _times(pipe, steps, timesteps, schedule):
    if timesteps is None:
        return samplers.scm_times(steps, schedule or pipe.schedule)
    times = np.asarray(timesteps, np.float32)
    if times.shape != (steps + 1,):
        raise UserError(f"{times.size} timesteps for {steps} steps: give steps + 1, the last 0")
    if times[-1] != 0 or not (np.diff(times) < 0).all() or times[0] > 1.5709:
        raise UserError(f"timesteps {times.tolist()} must fall from at most pi/2 to 0")
    return times


def image_times(times, strength):
    """The times of img2img: of n steps about n * strength are run, at least one.

    The published pipeline rounds so that its default (2 steps, strength 0.6) starts at pi/2, where nothing
    is left of the picture. Here steps are rounded away from noise, and unless strength is 1 the first time
    is at most IMAGE_T_MAX.
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength {strength}: use more than 0 and at most 1")
    steps = len(times) - 1
    dropped = min(math.ceil(steps * (1 - strength) - 1e-6), steps - 1)
    kept = np.array(times[dropped:], np.float32)
    if strength < 1:
        while len(kept) > 2 and kept[1] >= IMAGE_T_MAX:
            kept = kept[1:]
        kept[0] = min(kept[0], IMAGE_T_MAX)
    return kept


def _draws(latents, step_noise, count, shape, steps):
    """[steps, B, h, w, c] of given noises, or None where all are drawn from the seed."""
    if latents is None and step_noise is None:
        return None
    if latents is None:
        raise UserError("step_noise is given without latents: give both, or a seed")
    step_noise = list(step_noise) if step_noise is not None else []
    if len(step_noise) < steps - 1:
        raise UserError(f"{len(step_noise)} step noises for {steps} steps: give {steps - 1}")
    draws = [np.asarray(a, np.float32) for a in (latents, *step_noise[: steps - 1])]
    for name, a in zip(["latents", *(f"step_noise[{i}]" for i in range(steps))], draws):
        if a.shape != (count, *shape):
            raise UserError(
                f"{name} has shape {a.shape}: these prompts and this size need {(count, *shape)}"
            )
    return np.stack(draws)


def _condition(pipe, control, scale, count, height, width):
    """Latents [B, h, w, c] of the condition, for a model that takes one."""
    if not pipe.control:
        raise UserError(
            "control is given and this model has no ControlNet: load a model with one, or leave it out"
        )
    if not math.isfinite(scale):
        raise UserError(
            f"control_scale {scale}: use a finite number, 1 for what the model was trained with"
        )
    return _encode(pipe, "control", control, count, height, width)


def _encode(pipe, name, image, count, height, width):
    """Latents [B, h, w, c] at unit scale of one picture, or one for each prompt. name: of the argument, for errors."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim not in (3, 4) or image.shape[-1] != 3:
        raise UserError(
            f"{name} is {image.dtype} {image.shape}: give uint8 [H, W, 3] or one for each prompt"
        )
    image = image if image.ndim == 4 else image[None]
    if len(image) not in (1, count) or image.shape[1:3] != (height, width):
        raise UserError(
            f"{name} has shape {image.shape}: give one, or {count}, of {height} x {width} (resize first)"
        )
    encoded = np.concatenate([np.asarray(pipe.encode(one[None])) for one in image])
    return np.broadcast_to(encoded, (count, *encoded.shape[1:])).astype(np.float32)


def rounded(scale, dtype):
    """The guidance scale as the published pipeline rounds it when it runs in bfloat16 (which rounds a tenth of it, as it enters, once more)."""
    return float(np.asarray(scale, jnp.dtype(dtype)))
