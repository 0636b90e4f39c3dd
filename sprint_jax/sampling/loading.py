"""Loading a pipeline: from a published or converted folder, or from a run directory.

Networks are described first, then kernels are chosen, then arrays are read.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from sprint_jax import build
from sprint_jax import config as config_lib
from sprint_jax.conversion import folder
from sprint_jax.encoders import load as encoders
from sprint_jax.encoders.pixels import EmbeddedPixels
from sprint_jax.encoders.text import EmbeddedText
from sprint_jax.errors import UserError
from sprint_jax.models.controlnet import Controlled, ControlNet
from sprint_jax.ops import backend
from sprint_jax.sampling.pipeline import Pipeline, computed
from sprint_jax.storage import files, json_files, run_files, weights

DTYPES = ("bfloat16", "float32")
Say = Callable[[str], None]


def default_dtype() -> str:
    """Return the default dtype here: float32 on a CPU, which has no faster bfloat16; else
    bfloat16.
    """
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How a model is loaded; see `load`."""

    dtype: str
    pixels_dtype: str | None
    attention: str | None
    controlnet: pathlib.Path | str | None
    instruction: str | None
    tile: bool
    platform: str | None
    say: Say

    @property
    def of_pixels(self) -> str:
        """The autoencoder's dtype."""
        return self.pixels_dtype or self.dtype

    @property
    def unrolled(self) -> tuple[str, ...]:
        """Names of the networks that run without a loop over blocks."""
        return backend.unrolled(self.platform)

    @property
    def wanted(self) -> str:
        """The kernels that are wanted, "plain" or "pallas"."""
        fastest = backend.fastest(jax.default_backend()) if self.platform is None else "plain"
        return self.attention or fastest


def load(
    path: pathlib.Path | str,
    *,
    dtype: str = "bfloat16",
    pixels_dtype: str | None = None,
    attention: str | None = None,
    controlnet: pathlib.Path | str | None = None,
    instruction: str | None = None,
    tile: bool = False,
    platform: str | None = None,
    say: Say = lambda message: None,
) -> Pipeline:
    """Load a pipeline from a diffusers folder, a converted folder, or a run directory.

    Args:
      path: the folder. `sprint-jax convert` makes the converted ones.
      dtype: "bfloat16" or "float32", of the parameters and of the computation. Latents, times and
        normalizations are float32 in both.
      pixels_dtype: the same for the autoencoder of a published model; None is dtype.
      attention: "plain" for no kernels at all, or "pallas" for those of attention and of
        depthwise convolutions where the device has them; `say` gets a line where it has none of
        attention. None takes them on an NVIDIA GPU. What a run directory was trained with does
        not matter.
      controlnet: folder of a diffusers ControlNet to control the model by. A run directory
        trained with one has its own, and so has a folder with a controlnet/.
      instruction: text file with the instruction before each prompt, "" for none; None takes the
        one stored with a converted model, or that of the installed diffusers package. Run
        directories have none.
      tile: decode images in overlapping tiles of 1024 px, to bound memory.
      platform: what the programs are for, as `jax.default_backend()` names it, None for that one,
        "" for several. It decides which published networks run unrolled (`backend.unrolled`).
        Where it is not None, for programs that run elsewhere, none holds a kernel that was not
        asked for.
      say: called with a line for each part that is read.

    Raises UserError for anything that is not a whole model of one of the three kinds.
    """
    path = files.local(path, "path")
    how = Options(
        dtype=dtype,
        pixels_dtype=pixels_dtype,
        attention=attention,
        controlnet=controlnet and files.local(controlnet, "controlnet"),
        instruction=instruction and files.given(instruction, "instruction"),
        tile=tile,
        platform=platform,
        say=say,
    )
    for name, value in (("dtype", how.dtype), ("pixels_dtype", how.of_pixels)):
        if value not in DTYPES:
            raise UserError(f"{name} {value!r}: use one of {', '.join(DTYPES)}")
    if how.attention is not None and how.attention not in backend.WANTED:
        raise UserError(f"attention {how.attention!r}: use one of {', '.join(backend.WANTED)}")
    if not path.is_dir():
        raise UserError(
            f"no directory {path}: give a diffusers folder, a converted model, the --workdir of a "
            "run, or an exported file"
        )
    if folder.is_diffusers(path) or folder.is_ours(path):
        return _published(path, how)
    return _run(path, how)


def _published(path: pathlib.Path, how: Options) -> Pipeline:
    """Load a published or converted folder."""
    described = folder.describe(path, dtype=how.dtype)
    wording = encoders.wording_of(described, how.instruction)
    models = described.models
    model, extra = _with_controlnet(models["transformer"], models.get("controlnet"), how)
    model = _with_kernels(model, how)
    described = described.replace(autoencoder=_pixels_with_kernels(models["autoencoder"], how))
    place = encoders.placing(how.unrolled)
    trees = described.read(dtype=how.dtype, pixels_dtype=how.of_pixels, place=place, say=how.say)
    parts = encoders.assemble(described, trees, wording, tile=how.tile, unrolled=how.unrolled)
    params = _unstacked("transformer", models["transformer"], trees["transformer"], how)
    if isinstance(model, Controlled):
        control = extra
        if control is None:
            control = _unstacked("controlnet", models["controlnet"], trees["controlnet"], how)
        params = {"trunk": params, "control": control}
    side = 32 * parts.pixels.factor
    return Pipeline(
        model=model,
        text=parts.text,
        pixels=parts.pixels,
        params={"transformer": params} | parts.params,
        height=side,
        width=side,
        guidance_scale=4.5,
        schedule="code",
        batch_size=1,
        dtype=how.dtype,
        staged=_staged(how),
    )


def _staged(how: Options) -> bool:
    return how.platform is None and backend.launches_cost(jax.default_backend())


def _unstacked(part: str, model: Any, params: Any, how: Options) -> Any:
    return model.unstack(params) if part in how.unrolled else params


def _with_kernels(model: Any, how: Options) -> Any:
    """Return the transformer, with its ControlNet, computed by the kernels that are wanted and can
    be had.
    """
    here = jax.default_backend()
    trunk = model.trunk if isinstance(model, Controlled) else model
    heads = trunk.width // trunk.heads, trunk.width // trunk.cross_heads
    attention, sentence = backend.resolve(how.wanted, here, *heads, how.dtype)
    if sentence and how.attention:
        how.say(sentence)
    return computed(model, attention=attention, depthwise=_depthwise(how))


def _depthwise(how: Options) -> str:
    wanted = how.wanted if how.platform is None else "plain"
    return backend.depthwise(jax.default_backend(), wanted)


def _pixels_with_kernels(model: Any, how: Options) -> Any:
    """Return the autoencoder, computed by kernels where they can be had."""
    here = jax.default_backend()
    attention, _ = backend.resolve(how.wanted, here, model.head_dim, None, how.of_pixels)
    # A TPU's kernel would fill heads of 32 up to 128 lanes.
    attention = attention if attention != "tpu" else "plain"
    return dataclasses.replace(model, attention=attention, depthwise=_depthwise(how))


def _with_controlnet(model: Any, own: ControlNet | None, how: Options) -> tuple[Any, Any]:
    """Return (the transformer with its ControlNet, parameters of the ControlNet of `how`).

    own: the ControlNet of the model's folder. The parameters are None where there is no other.
    Raises UserError where model and ControlNet do not belong together.
    """
    if how.controlnet is None:
        return (model if own is None else Controlled(trunk=model, control=own)), None
    path = how.controlnet
    if own is not None or isinstance(model, Controlled):
        raise UserError(f"the model has a ControlNet of its own: leave {path} out")
    how.say(f"reading {path}")
    control, params = folder.read_controlnet(path)
    for name in ("in_channels", "width", "heads", "cross_heads", "text_dim"):
        theirs, ours = getattr(control.net, name), getattr(model, name)
        if theirs != ours:
            raise UserError(
                f"{path} holds a ControlNet with {name}={theirs}, the model has {ours}: these do "
                "not belong together"
            )
    if control.depth >= model.depth:
        raise UserError(
            f"{path} holds a ControlNet of {control.depth} blocks, the model has {model.depth}: "
            "these do not belong together"
        )
    params = jax.device_put(weights.cast(params, how.dtype, path))
    params = _unstacked("controlnet", control, params, how)
    both = Controlled(trunk=model, control=control)
    return computed(both, dtype=how.dtype, residual_dtype=how.dtype), params


def read_config(path: pathlib.Path) -> config_lib.Config:
    """Read the config of a run directory. Raises UserError for anything that is not one."""
    if not (path / run_files.CONFIG).is_file():
        raise UserError(
            f"{path} has no {run_files.CONFIG}, {folder.MODEL} or {folder.INDEX}: give the "
            "--workdir of a run, a converted model or a diffusers folder"
        )
    tree = json_files.read_object(path / run_files.CONFIG, "restore it from the run")
    # diffusers' and transformers' own files.
    if {"_class_name", "architectures"} & tree.keys():
        raise UserError(
            f"{path} holds one part of a published model: give the folder above it, "
            f"{path.resolve().parent}"
        )
    if config_lib.is_old(tree):
        raise UserError(
            f"{path} is a run of version 0.1: convert it with that version (python -m "
            "sprint_jax.convert), or train it again"
        )
    if not (path / run_files.STUDENT).is_file():
        raise UserError(
            f"{path} has no {run_files.STUDENT} yet: let its run finish (rerun its command)"
        )
    return config_lib.parse(tree)


def read_student(path: pathlib.Path | str) -> tuple[Any, Any, config_lib.Config]:
    """Read (model, parameters as NumPy float32, config) of a finished run directory."""
    path = pathlib.Path(path)
    config = read_config(path)
    model = build.student(config)
    abstract = jax.eval_shape(lambda: model.init(jax.random.key(0)))  # not even a key is computed
    return model, weights.load(path / run_files.STUDENT, abstract), config


def _run(path: pathlib.Path, how: Options) -> Pipeline:
    """Load a run directory."""
    described, params, config = read_student(path)
    model = computed(described, dtype=how.dtype, residual_dtype=how.dtype)
    params = jax.device_put(weights.cast(params, how.dtype, path / run_files.STUDENT))
    c, e = config, config.evaluation
    published = c.text.vocabulary == "gemma"
    if published:
        if not c.data.model:
            raise UserError(
                f"{path} was distilled from features alone: name a folder with its text encoder "
                f"and autoencoder as data.model in {run_files.CONFIG}"
            )
        parts = _encoders(pathlib.Path(c.data.model), how)
        params = _unstacked("transformer", model, params, how)
    else:
        parts = encoders.Encoders(
            text=EmbeddedText(build.text_encoder(c)),
            pixels=EmbeddedPixels(build.codec(c)),
            params={"text": {}, "pixels": {}},
        )
    model, extra = _with_controlnet(model, None, how)
    if extra is not None:
        params = {"trunk": params, "control": extra}
    return Pipeline(
        model=_with_kernels(model, how),
        text=parts.text,
        pixels=parts.pixels,
        params={"transformer": params} | parts.params,
        height=c.data.size,
        width=c.data.size,
        guidance_scale=e.student_guidance,
        schedule=e.schedule,
        batch_size=1 if published else 16,
        dtype=how.dtype,
        fixed_guidance=_trained_at(c) == {e.student_guidance},
        staged=published and _staged(how),
    )


def _trained_at(c: config_lib.Config) -> set[float]:
    """Return the guidance scales that the student's phases were trained at."""
    phases = [
        c.phases[name] for name in config_lib.active(c) if c.phases[name].network == "student"
    ]
    return {scale for p in phases for scale in getattr(p.objective, "guidance", ())}


def _encoders(path: pathlib.Path, how: Options) -> encoders.Encoders:
    """Load the encoders of a published folder, without its transformer."""
    described = encoders.describe(path, dtype=how.dtype)
    autoencoder = _pixels_with_kernels(described.models["autoencoder"], how)
    return encoders.read(
        described.replace(autoencoder=autoencoder),
        dtype=how.dtype,
        pixels_dtype=how.of_pixels,
        instruction=how.instruction,
        unrolled=how.unrolled,
        tile=how.tile,
        say=how.say,
    )
