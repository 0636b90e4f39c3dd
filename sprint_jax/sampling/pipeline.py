"""Loading a model and generating pictures, apart: `load(path) -> Pipeline`, `generate(pipe, prompts)`."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sprint_jax import build
from sprint_jax import config as config_lib
from sprint_jax.conversion import folder
from sprint_jax.diffusion import samplers, trigflow
from sprint_jax.encoders import instruction as instruction_lib
from sprint_jax.encoders import parts
from sprint_jax.encoders import prompts as prompts_lib
from sprint_jax.errors import UserError
from sprint_jax.models.controlnet import Controlled
from sprint_jax.models.linear_dit import LinearDiT
from sprint_jax.ops import backend
from sprint_jax.sampling import generation, programs
from sprint_jax.storage import run_files, weights

DTYPES = ("bfloat16", "float32")


def default_dtype() -> str:
    """Of weights and arithmetic where a command is not told: float32 on a CPU, which has no faster bfloat16; else bfloat16."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """A student ready to generate.

    model: the transformer, perhaps with a ControlNet. text, pixels: the seams (`parts.py`). params: {"transformer", "text", "pixels"}.
    height, width, guidance_scale, schedule: what `generate` uses when it is not told.
    batch_size: pictures per program run when `generate` is not told.
    dtype: of parameters and of most arithmetic.
    rows: how the pictures of a batch are cut over devices (`over_devices`); None: one device makes all.
    in_turn: whether text encoder, transformer and decoder are three programs instead of one: a GPU starts with the first while the
      host prepares the launches of the others.
    """

    model: LinearDiT | Controlled
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
    in_turn: bool = False
    programs: dict = dataclasses.field(default_factory=dict, repr=False)

    @property
    def cell(self) -> int:
        """Pixels that sides are multiples of: those of a patch of latents."""
        return self.pixels.factor * (self.model.trunk if self.control else self.model).patch_size

    @property
    def control(self) -> bool:
        """Whether `generate` takes a condition."""
        return isinstance(self.model, Controlled)

    def program(self, kind: generation.Kind):
        """The compiled way from tokens to pixels: one program per shape of its arguments, kept here; three where they run in turn."""
        if kind.output not in self.programs:
            networks = self.model, self.text, self.pixels
            if self.in_turn:
                read, paint, decode = _stages(*networks, kind.output)
                way = _joined(
                    jax.jit(read), jax.jit(paint, static_argnames="shape"), jax.jit(decode)
                )
            else:
                way = jax.jit(
                    functools.partial(sample, *networks, output=kind.output),
                    static_argnames="shape",
                )
            self.programs[kind.output] = way
        run = functools.partial(self.programs[kind.output], shape=kind.shape)
        return run if self.rows is None else functools.partial(_spread, run, self.rows)

    def encode(self, images):
        """uint8 [B, H, W, 3] -> latents at unit scale, to start from."""
        return self.pixels.encode(self.params["pixels"], images)


def load(
    path,
    *,
    dtype="bfloat16",
    pixels_dtype=None,
    attention=None,
    controlnet=None,
    instruction=None,
    tile=False,
    platform=None,
    say=lambda message: None,
) -> Pipeline:
    """A pipeline from a diffusers folder, a folder converted by `sprint-jax convert`, or a run directory.

    Args:
      dtype: "bfloat16" or "float32", of the parameters and of the computation. Latents, times and
        normalisations are float32 in both.
      pixels_dtype: the same for the autoencoder of a published model; None is dtype.
      attention: "plain" for no kernels at all, or "pallas" for those of attention and of depthwise convolutions where the device has
        them; `say` is told where it has none of attention. None takes them on an NVIDIA GPU. What a run directory was trained with does not matter.
      controlnet: folder with a diffusers ControlNet to steer the model by. A run directory trained with one has its own,
        and so has a folder with a controlnet/.
      instruction: text file with the instruction before each prompt, "" for none; None takes the one
        stored with a converted model, or that of the installed diffusers package. Run directories have none.
      tile: decode pictures in overlapping tiles of 1024 px, to bound memory.
      platform: what the programs are for, as `jax.default_backend()` names it, None for that one, "" for several. It decides
        which published networks run their blocks one by one instead of in a loop (`parts.block_by_block`); where it is not
        None, for programs that run elsewhere, none holds a kernel that was not asked for.
      say: called with a line for each part that is read.
    Raises UserError for anything that is not a whole model of one of the three kinds.
    """
    path = pathlib.Path(path)
    for name, value in (("dtype", dtype), ("pixels_dtype", pixels_dtype or dtype)):
        if value not in DTYPES:
            raise UserError(f"{name} {value!r}: use one of {', '.join(DTYPES)}")
    if attention is not None and attention not in backend.WANTED:
        raise UserError(f"attention {attention!r}: use one of {', '.join(backend.WANTED)}")
    pipe = _load(
        path,
        dtype=dtype,
        pixels_dtype=pixels_dtype or dtype,
        instruction=instruction,
        tile=tile,
        platform=platform,
        say=say,
    )
    if controlnet is not None:
        say(f"reading {controlnet}")
        pipe = _with_controlnet(pipe, controlnet, "controlnet" in parts.block_by_block(platform))
    here = jax.default_backend()
    wanted = attention or (backend.fastest(here) if platform is None else "plain")
    m = pipe.model.trunk if pipe.control else pipe.model
    chosen, sentence = backend.resolve(
        wanted, here, m.width // m.heads, m.width // m.cross_heads, dtype
    )
    if sentence and attention:
        say(sentence)
    depthwise = backend.depthwise(here, wanted if platform is None else "plain")
    pipe = _by(pipe, attention=chosen, depthwise=depthwise)
    if not isinstance(pipe.pixels, parts.AutoencoderPixels):
        return pipe
    # A TPU's kernel would fill heads of 32 up to 128 lanes.
    of_heads, _ = backend.resolve(
        wanted, here, pipe.pixels.model.head_dim, None, pixels_dtype or dtype
    )
    of_heads = of_heads if of_heads != "tpu" else "plain"
    in_turn = platform is None and backend.launches_cost(here)
    return dataclasses.replace(
        pipe, pixels=_pixels(pipe.pixels, attention=of_heads), in_turn=in_turn
    )


def _by(pipe, **changes):
    """The pipeline with attention or depthwise convolutions, of all its networks, by a backend."""
    return dataclasses.replace(
        pipe,
        model=_computed(pipe.model, **changes),
        pixels=_pixels(pipe.pixels, **changes),
        programs={},
    )


def _pixels(pixels, **changes):
    """The pixels, of an autoencoder computed otherwise: attention or depthwise."""
    if not isinstance(pixels, parts.AutoencoderPixels):
        return pixels
    return dataclasses.replace(pixels, model=dataclasses.replace(pixels.model, **changes))


def _computed(model, **changes):
    """The model, computed otherwise: dtypes, attention or depthwise."""
    if not isinstance(model, Controlled):
        return dataclasses.replace(model, **changes)
    net = dataclasses.replace(model.control.net, **changes)
    return Controlled(
        trunk=dataclasses.replace(model.trunk, **changes),
        control=dataclasses.replace(model.control, net=net),
    )


def _with_controlnet(pipe, path, unrolled):
    """The pipeline around a ControlNet from a folder. Raises UserError where the two do not belong together."""
    if pipe.control:
        raise UserError(f"the model has a ControlNet of its own: leave {path} out")
    control, params = folder.read_controlnet(path)
    for name in ("in_channels", "width", "heads", "cross_heads", "text_dim"):
        if getattr(control.net, name) != getattr(pipe.model, name):
            raise UserError(
                f"{path} holds a ControlNet with {name}={getattr(control.net, name)}, the model has {getattr(pipe.model, name)}: "
                "these do not belong together"
            )
    if control.depth >= pipe.model.depth:
        raise UserError(
            f"{path} holds a ControlNet of {control.depth} blocks, the model has {pipe.model.depth}: these do not belong together"
        )
    dtype = jnp.dtype(pipe.dtype)
    params = jax.device_put(jax.tree.map(lambda a: a.astype(dtype), params))
    params = control.unstack(params) if unrolled else params
    model = _computed(
        Controlled(trunk=pipe.model, control=control), dtype=pipe.dtype, residual_dtype=pipe.dtype
    )
    both = {"trunk": pipe.params["transformer"], "control": params}
    return dataclasses.replace(
        pipe, model=model, params=pipe.params | {"transformer": both}, programs={}
    )


def _load(path, *, dtype, pixels_dtype, instruction, tile, platform, say):
    if not path.is_dir():
        raise UserError(
            f"no directory {path}: give a diffusers folder, a converted model, the --workdir of a run, or an exported file"
        )
    unrolled = parts.block_by_block(platform)
    options = dict(
        dtype=dtype, pixels_dtype=pixels_dtype, place=functools.partial(_place, unrolled), say=say
    )
    if folder.is_diffusers(path):
        wording = instruction_lib.published(instruction)
        checkpoint = folder.read_diffusers(path, instruction=wording, **options)
        return _published(checkpoint, dtype, tile, unrolled)
    if folder.is_ours(path):
        checkpoint = folder.read_ours(path, **options)
        if instruction is not None:
            checkpoint = dataclasses.replace(
                checkpoint, instruction=instruction_lib.published(instruction)
            )
        return _published(checkpoint, dtype, tile, unrolled)
    return _run(
        path,
        dtype,
        pixels_dtype=pixels_dtype,
        instruction=instruction,
        tile=tile,
        platform=platform,
        say=say,
    )


def _published(checkpoint, dtype, tile, unrolled):
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            checkpoint.tokenizer, local_files_only=True
        )
    except Exception as error:  # the library raises many kinds for a damaged folder
        raise UserError(
            f"cannot read the tokenizer in {checkpoint.tokenizer} ({error}): download it again"
        ) from None
    text = parts.GemmaText(
        checkpoint.text_encoder, prompts_lib.GemmaPrompts(tokenizer, checkpoint.instruction)
    )
    pixels = parts.AutoencoderPixels(checkpoint.autoencoder, tile)
    trees = dict(checkpoint.params)
    for part, model in (
        ("transformer", checkpoint.transformer),
        ("text_encoder", checkpoint.text_encoder),
        ("controlnet", checkpoint.controlnet),
    ):
        if part in unrolled and model is not None:
            trees[part] = model.unstack(trees[part])
    params = {
        "transformer": trees["transformer"],
        "text": parts.gemma_params(text, trees["text_encoder"]),
        "pixels": trees["autoencoder"],
    }
    side = 32 * pixels.factor
    model = checkpoint.transformer
    if checkpoint.controlnet is not None:
        model = Controlled(trunk=model, control=checkpoint.controlnet)
        params["transformer"] = {"trunk": params["transformer"], "control": trees["controlnet"]}
    return Pipeline(model, text, pixels, params, side, side, 4.5, "code", 1, dtype)


_STACKS = ("blocks.", "zero_out.", "layers.")


def _place(unrolled, part, path, array):
    """Moves one array to the device as soon as it is read, layer by layer where blocks run one by one."""
    if part in unrolled and path.startswith(_STACKS):
        return [jax.device_put(layer) for layer in array]
    return jax.device_put(array)


def read_config(path) -> config_lib.Config:
    """The config of a run directory. Raises UserError for anything that is not one."""
    if not (path / run_files.CONFIG).is_file():
        raise UserError(
            f"{path} has no {run_files.CONFIG}, {folder.MODEL} or {folder.INDEX}: give the --workdir of a run, a converted "
            "model or a diffusers folder"
        )
    try:
        tree = json.loads((path / run_files.CONFIG).read_text())
    except ValueError as error:
        raise UserError(
            f"{path / run_files.CONFIG} is not JSON ({error}): restore it from the run"
        ) from None
    if (
        isinstance(tree, dict) and {"_class_name", "architectures"} & tree.keys()
    ):  # diffusers' and transformers'
        raise UserError(
            f"{path} holds one part of a published model: give the folder above it, {path.resolve().parent}"
        )
    if not (path / run_files.STUDENT).is_file():
        raise UserError(
            f"{path} has no {run_files.STUDENT} yet: let its run finish (same sprint_jax.main command)"
        )
    return config_lib.parse(tree)


def read_student(path):
    """(model, parameters as NumPy float32, config) of a finished run directory."""
    path = pathlib.Path(path)
    config = read_config(path)
    model = build.student(config)
    abstract = jax.eval_shape(lambda: model.init(jax.random.key(0)))  # not even a key is computed
    return model, weights.load(path / run_files.STUDENT, abstract), config


def _run(path, dtype, *, platform, **options):
    model, params, config = read_student(path)
    model = _computed(model, dtype=dtype, residual_dtype=dtype)
    params = jax.device_put(jax.tree.map(lambda a: a.astype(jnp.dtype(dtype)), params))
    e = config.evaluation
    if config.text.vocabulary == "gemma":
        if not config.data.model:
            raise UserError(
                f"{path} was distilled from features alone: name a folder with its text encoder and autoencoder as data.model in {run_files.CONFIG}"
            )
        pipe = _load(pathlib.Path(config.data.model), dtype=dtype, platform=platform, **options)
        if "transformer" in parts.block_by_block(platform):
            params = model.unstack(params)
        return dataclasses.replace(
            pipe,
            model=model,
            params=pipe.params | {"transformer": params},
            height=config.data.size,
            width=config.data.size,
            guidance_scale=e.student_guidance,
            schedule=e.schedule,
            programs={},
        )
    pixels = parts.EmbeddedPixels(build.codec(config))
    return Pipeline(
        model,
        parts.EmbeddedText(build.text_encoder(config)),
        pixels,
        {"transformer": params, "text": {}, "pixels": {}},
        config.data.size,
        config.data.size,
        e.student_guidance,
        e.schedule,
        16,
        dtype,
    )


def over_devices(pipe, devices):
    """The pipeline with its parameters on all of `devices` and the pictures of a batch cut over them.

    Batches must then be multiples of their number. Everything goes without kernels.
    """
    mesh = jax.sharding.Mesh(np.array(devices), ("rows",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    pipe = _by(
        pipe, attention="plain", depthwise="plain"
    )  # left to itself the compiler would gather a kernel's operands
    if isinstance(pipe.pixels, parts.AutoencoderPixels):
        pipe = dataclasses.replace(pipe, pixels=dataclasses.replace(pipe.pixels, spread=True))
    return dataclasses.replace(pipe, params=jax.device_put(pipe.params, whole), rows=rows)


def _spread(
    run, rows, params, arrays, guidance, times, seed, indices, draws, start, control, control_scale
):
    """A program's run with its batch cut over devices."""
    devices = rows.mesh.size
    if len(indices) % devices:
        raise UserError(
            f"batches of {len(indices)} pictures on {devices} devices: use a multiple of {devices}"
        )
    arrays, indices, start, control = jax.device_put((arrays, indices, start, control), rows)
    return run(params, arrays, guidance, times, seed, indices, draws, start, control, control_scale)


def generate(pipe, prompts, **options):
    """Pictures of prompts in few steps: `generation.generate`, which says what there is to ask for."""
    return generation.generate(pipe, prompts, **options)


def sample(
    model,
    text,
    pixels,
    params,
    arrays,
    guidance,
    times,
    seed,
    indices,
    draws,
    start,
    control=None,
    control_scale=None,
    *,
    output,
    shape,
):
    """Traced: text features, the few steps, pixels. model, text, pixels: of a `Pipeline`.

    Args:
      params: as `Pipeline.params`. arrays: of `text.prepare`, stacked. guidance: scalar. times: [steps + 1].
      seed: int32. indices: int32 [B]. draws: [steps, B, h, w, c], or None to draw from (seed, indices).
      start: [B, h, w, c] to start from, or None. control: [B, h, w, c] latents of a condition, or None for none.
      control_scale: scalar, with control. output: "pixels" or "latent". shape: (h, w, c).
    """
    run = _joined(*_stages(model, text, pixels, output))
    return run(
        params,
        arrays,
        guidance,
        times,
        seed,
        indices,
        draws,
        start,
        control,
        control_scale,
        shape=shape,
    )


def _joined(read, paint, decode):
    """Three functions as one; see `sample`."""

    def run(params, arrays, *drawn, shape):
        latents = paint(params["transformer"], *read(params["text"], arrays), *drawn, shape=shape)
        return decode(params["pixels"], latents)

    return run


def _stages(model, text, pixels, output):
    """What reads the prompts, takes the few steps and makes pixels: functions of their own parameters and of arrays."""

    def read(params, arrays):
        return text.features(params, arrays)

    def paint(
        params,
        features,
        mask,
        guidance,
        times,
        seed,
        indices,
        draws,
        start,
        control,
        control_scale,
        *,
        shape,
    ):
        if draws is None:
            draws = programs.noises(seed, indices, shape, times.shape[0] - 1)
        w = jnp.full(indices.shape, guidance) if model.guidance_embed else None
        cond = {"text": features, "mask": mask}
        if control is not None:
            cond |= {"control": control, "control_scale": jnp.full(indices.shape, control_scale)}
        v = lambda x, t: model.apply(params, x, t, guidance=w, **cond).velocity
        return samplers.scm(trigflow.from_flow(v), draws[0], draws[1:], times, start=start)

    def decode(params, latents):
        return latents if output == "latent" else pixels.decode(params, latents)

    return read, paint, decode
