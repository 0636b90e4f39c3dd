"""Loading a model and generating pictures, apart: `load(path) -> Pipeline`, `generate(pipe, prompts)`."""

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sprint_jax import build, generation, parts, weights, workdir
from sprint_jax import config as config_lib
from sprint_jax.conversion import folder, instruction as instruction_lib
from sprint_jax.data import prompts as prompts_lib
from sprint_jax.diffusion import samplers, trigflow
from sprint_jax.errors import UserError
from sprint_jax.models.linear_dit import LinearDiT

DTYPES = ("bfloat16", "float32")
# Img2img never starts nearer to noise than this unless strength is 1: at the published t_max nothing is
# left of the picture. It is the second time of the published two-step list.
IMAGE_T_MAX = 1.3


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """A student ready to generate.

    model: the transformer. text, pixels: the seams (`parts.py`). params: {"transformer", "text", "pixels"}.
    height, width, guidance_scale, schedule: what `generate` uses when it is not told.
    batch_size: pictures per program run when `generate` is not told.
    dtype: of parameters and of most arithmetic.
    rows: how the pictures of a batch are cut over devices (`over_devices`); None: one device makes all.
    """

    model: LinearDiT
    text: Any
    pixels: Any
    params: Any
    height: int
    width: int
    guidance_scale: float
    schedule: str
    batch_size: int
    dtype: str
    rows: jax.sharding.NamedSharding | None = None
    programs: dict = dataclasses.field(default_factory=dict, repr=False)


def load(path, *, dtype="bfloat16", instruction=None, tile=False, say=lambda message: None) -> Pipeline:
    """A pipeline from a diffusers folder, a folder converted by `sprint_jax.convert`, or a run directory.

    Args:
      dtype: "bfloat16" or "float32", of the parameters and of the computation. Latents, times and
        normalisations are float32 in both.
      instruction: text file with the instruction before each prompt, "" for none; None takes the one
        stored with a converted model, or that of the installed diffusers package. Run directories have none.
      tile: decode pictures in overlapping tiles of 1024 px, to bound memory.
      say: called with a line for each part that is read.
    Raises UserError for anything that is not a whole model of one of the three kinds.
    """
    path = pathlib.Path(path)
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    if not path.is_dir():
        raise UserError(f"no directory {path}: give a diffusers folder, a converted model or the --workdir of a run")
    if folder.is_diffusers(path):
        wording = instruction_lib.published(instruction)
        checkpoint = folder.read_diffusers(path, dtype=dtype, instruction=wording, place=_place, say=say)
        return _published(checkpoint, dtype, tile)
    if folder.is_ours(path):
        checkpoint = folder.read_ours(path, dtype=dtype, place=_place, say=say)
        if instruction is not None:
            checkpoint = dataclasses.replace(checkpoint, instruction=instruction_lib.published(instruction))
        return _published(checkpoint, dtype, tile)
    return _run(path, dtype, instruction=instruction, tile=tile, say=say)


def _published(checkpoint, dtype, tile):
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.tokenizer, local_files_only=True)
    except Exception as error:  # the library raises many kinds for a damaged folder
        raise UserError(f"cannot read the tokenizer in {checkpoint.tokenizer} ({error}): download it again") from None
    text = parts.GemmaText(checkpoint.text_encoder, prompts_lib.GemmaPrompts(tokenizer, checkpoint.instruction))
    pixels = parts.AutoencoderPixels(checkpoint.autoencoder, tile)
    trees = dict(checkpoint.params)
    if _loopless():
        trees["transformer"] = checkpoint.transformer.unstack(trees["transformer"])
    params = {
        "transformer": trees["transformer"],
        "text": parts.gemma_params(text, trees["text_encoder"]),
        "pixels": trees["autoencoder"],
    }
    side = 32 * pixels.factor
    return Pipeline(checkpoint.transformer, text, pixels, params, side, side, 4.5, "code", 1, dtype)


def _loopless():
    """Whether blocks run one by one instead of in a loop: what a CPU gains by it, compilation can afford."""
    return jax.default_backend() == "cpu"


def _place(part, path, array):
    """Moves one array to the device as soon as it is read, layer by layer where blocks run one by one."""
    if part == "transformer" and path.startswith("blocks.") and _loopless():
        return [jax.device_put(layer) for layer in array]
    return jax.device_put(array)


def read_config(path) -> config_lib.Config:
    """The config of a run directory. Raises UserError for anything that is not one."""
    if not (path / workdir.CONFIG).is_file():
        raise UserError(
            f"{path} has no {workdir.CONFIG}, {folder.MODEL} or {folder.INDEX}: give the --workdir of a run, a converted "
            "model or a diffusers folder"
        )
    if not (path / workdir.STUDENT).is_file():
        raise UserError(f"{path} has no {workdir.STUDENT} yet: let its run finish (same sprint_jax.main command)")
    try:
        return config_lib.parse(json.loads((path / workdir.CONFIG).read_text()))
    except json.JSONDecodeError as error:
        raise UserError(f"{path / workdir.CONFIG} is not JSON ({error}): restore it from the run") from None


def read_student(path):
    """(model, parameters as NumPy float32, config) of a finished run directory."""
    path = pathlib.Path(path)
    config = read_config(path)
    model = build.student(config)
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    return model, weights.load(path / workdir.STUDENT, abstract), config


def _run(path, dtype, **options):
    model, params, config = read_student(path)
    model = dataclasses.replace(model, dtype=dtype)
    params = jax.device_put(jax.tree.map(lambda a: a.astype(jnp.dtype(dtype)), params))
    e = config.evaluation
    if config.text.vocabulary == "gemma":
        if not config.data.model:
            raise UserError(f"{path} was distilled from features alone: name a folder with its text encoder and autoencoder as data.model in {workdir.CONFIG}")
        pipe = load(config.data.model, dtype=dtype, **options)
        return dataclasses.replace(
            pipe, model=model, params=pipe.params | {"transformer": params}, height=config.data.size,
            width=config.data.size, guidance_scale=e.student_guidance, schedule=e.schedule, programs={},
        )  # fmt: skip
    pixels = parts.EmbeddedPixels(build.codec(config))
    return Pipeline(
        model, parts.EmbeddedText(build.text_encoder(config)), pixels,
        {"transformer": params, "text": {}, "pixels": {}}, config.data.size, config.data.size,
        e.student_guidance, e.schedule, 16, dtype,
    )  # fmt: skip


def over_devices(pipe, devices):
    """The pipeline with its parameters on all of `devices` and the pictures of a batch cut over them.

    Batches must then be multiples of their number.
    """
    mesh = jax.sharding.Mesh(np.array(devices), ("rows",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    return dataclasses.replace(pipe, params=jax.device_put(pipe.params, whole), rows=rows, programs={})


def generate(
    pipe, prompts, *, steps=2, guidance_scale=None, height=None, width=None, seed=0, timesteps=None,
    latents=None, step_noise=None, image=None, strength=0.6, output="pixels", schedule=None,
    images_per_prompt=1, batch_size=None, indices=None, say=lambda done: None,
):  # fmt: skip
    """Pictures of prompts in few steps.

    Args:
      pipe: from `load`. prompts: list of str. A published model takes an empty one; the embedded one not.
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
      say: called with the number of pictures done.
    Returns:
      "pixels": uint8 [B, H, W, 3]. "latent": float32 [B, h, w, c] at unit scale, before the
      autoencoder's scaling is undone.
    """
    if isinstance(prompts, str):
        raise UserError("prompts must be a list of texts: put brackets around the one")
    if not prompts:
        raise UserError("no prompts: give at least one")
    if output not in ("pixels", "latent"):
        raise UserError(f"output {output!r}: use 'pixels' or 'latent'")
    if images_per_prompt < 1:
        raise UserError(f"images_per_prompt {images_per_prompt}: use 1 or more")
    prompts = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    height, width = height or pipe.height, width or pipe.width
    shape = latent_shape(pipe, height, width)
    times = _times(pipe, steps, timesteps, schedule)
    if image is not None:
        times = image_times(times, strength)
    draws = _draws(latents, step_noise, len(prompts), shape, len(times) - 1)
    start = None if image is None else _encode(pipe, image, len(prompts), height, width)
    rows = pipe.text.prepare(prompts)  # every prompt is checked before the first picture is made
    scale = pipe.guidance_scale if guidance_scale is None else guidance_scale
    program = _program(pipe, output)
    numbers = np.arange(len(prompts)) if indices is None else np.asarray(indices)
    if numbers.shape != (len(prompts),):
        raise UserError(f"{numbers.size} indices for {len(prompts)} pictures: give one each")
    result, done = [None] * len(prompts), 0
    for members, padded, arrays in parts.batches(rows, batch_size or pipe.batch_size):
        pick = lambda a, axis: None if a is None else np.take(a, padded, axis)
        arrays, numbered, begun = _spread(pipe, (arrays, numbers[padded].astype(np.int32), pick(start, 0)))
        made = program(
            pipe.params, arrays, np.float32(_rounded(scale, pipe.dtype)), times, np.int32(seed), numbered,
            pick(draws, 1), begun, shape=shape,
        )  # fmt: skip
        made = np.asarray(made)
        for row, index in enumerate(members):
            result[index] = made[row]
        done += len(members)
        say(done)
    return np.stack(result)


def _spread(pipe, rows):
    """Arrays [B, ...] of a batch where `over_devices` wants them; as they are without it."""
    if pipe.rows is None:
        return rows
    devices, count = pipe.rows.mesh.size, len(jax.tree.leaves(rows)[0])
    if count % devices:
        raise UserError(f"batches of {count} pictures on {devices} devices: use a multiple of {devices}")
    return jax.device_put(rows, pipe.rows)


def latent_shape(pipe, height, width):
    """(h, w, c) of a picture's latents. Raises UserError for sides that do not fit."""
    factor = pipe.pixels.factor
    for name, side in (("height", height), ("width", width)):
        if side <= 0 or side % factor:
            nearest = max(factor, round(side / factor) * factor)
            raise UserError(f"{name} {side} is not a multiple of {factor}: use {nearest}")
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
        kept[0] = min(kept[0], IMAGE_T_MAX)
        if len(kept) > 2 and kept[1] >= kept[0]:
            kept = kept[1:]
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
            raise UserError(f"{name} has shape {a.shape}: these prompts and this size need {(count, *shape)}")
    return np.stack(draws)


def _encode(pipe, image, count, height, width):
    """Latents [B, h, w, c] at unit scale of the picture or pictures to start from."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim not in (3, 4) or image.shape[-1] != 3:
        raise UserError(f"image is {image.dtype} {image.shape}: give uint8 [H, W, 3] or one for each prompt")
    image = image if image.ndim == 4 else image[None]
    if len(image) not in (1, count) or image.shape[1:3] != (height, width):
        raise UserError(
            f"image has shape {image.shape}: give one, or {count}, of {height} x {width} (resize first)"
        )
    encoded = np.concatenate([np.asarray(pipe.pixels.encode(pipe.params["pixels"], one[None])) for one in image])
    return np.broadcast_to(encoded, (count, *encoded.shape[1:])).astype(np.float32)


def _rounded(scale, dtype):
    """The guidance scale as the published pipeline rounds it when it runs in bfloat16."""
    return float(jnp.asarray(scale, jnp.dtype(dtype)))


def _program(pipe, output):
    """The compiled way from tokens to pixels: one program per shape of its arguments, kept with `pipe`."""
    if output not in pipe.programs:
        pipe.programs[output] = jax.jit(functools.partial(_sample, pipe, output), static_argnames="shape")
    return pipe.programs[output]


def _sample(pipe, output, params, arrays, guidance, times, seed, indices, draws, start, *, shape):
    """Traced: text features, the few steps, pixels. draws, start: arrays or None."""
    text, mask = pipe.text.features(params["text"], arrays)
    if draws is None:
        draws = generation.noises(seed, indices, shape, times.shape[0] - 1)
    w = jnp.full(indices.shape, guidance) if pipe.model.guidance_embed else None
    v = lambda x, t: pipe.model.apply(params["transformer"], x, t, text, mask, w).velocity
    latents = samplers.scm(trigflow.from_flow(v), draws[0], draws[1:], times, start=start)
    return latents if output == "latent" else pipe.pixels.decode(params["pixels"], latents)
