"""The one place that builds the networks and embedded encoders of a config."""

import dataclasses
import math
import pathlib
from typing import Any

import jax

from sprint_jax import config as config_lib
from sprint_jax.conversion import folder
from sprint_jax.encoders import patches, words
from sprint_jax.errors import UserError
from sprint_jax.models.controlnet import Controlled, ControlNet
from sprint_jax.models.linear_dit import LinearDiT
from sprint_jax.ops import backend
from sprint_jax.storage import weights

_PACKAGE = "package:"


def text_encoder(c: config_lib.Config) -> words.ShapesText | words.WordsText | None:
    """Build the embedded text encoder; None where Gemma-2 encodes."""
    if c.text.vocabulary == "gemma":
        return None
    return words.ShapesText() if c.text.vocabulary == "shapes" else words.WordsText(c.text.length)


def codec(c: config_lib.Config) -> patches.SpaceToDepth | patches.PatchPCA:
    """Build the embedded pixel codec, with its weights from `codec.weights`."""
    if not c.codec.weights:
        return patches.SpaceToDepth(c.codec.block, c.codec.scale)
    inputs, channels = 3 * c.codec.block**2, c.codec.channels
    shapes = {"mean": (inputs,), "basis": (inputs, channels), "spread": (channels,)}
    expected = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    arrays = weights.load(asset(c.codec.weights), expected)
    return patches.PatchPCA(block=c.codec.block, scale=c.codec.scale, **arrays)


def asset(path: str) -> pathlib.Path:
    """Return a file by its path, or one shipped with the code by "package:NAME"."""
    if path.startswith(_PACKAGE):
        return (
            pathlib.Path(__file__).parent / "assets" / f"{path.removeprefix(_PACKAGE)}.safetensors"
        )
    return pathlib.Path(path)


def latent_shape(c: config_lib.Config) -> tuple[int, int, int]:
    """Return (h, w, c) of one latent."""
    side = c.data.size // c.codec.block
    return side, side, c.codec.channels


def attention(c: config_lib.Config) -> tuple[str, str | None]:
    """Choose what computes attention here, and say so in a sentence where it is not what was
    wanted.

    Where it is "plain", so is the convolution.
    """
    m = c.model
    return backend.resolve(
        m.attention, jax.default_backend(), m.width // m.heads, m.width // m.cross_heads, m.dtype
    )


def _model(c: config_lib.Config, **changes) -> LinearDiT:
    kernels = attention(c)[0]
    fields: dict[str, Any] = dataclasses.asdict(c.model) | dict(
        in_channels=c.codec.channels,
        text_dim=c.text.dim,
        logvar_head=False,
        attention=kernels,
        depthwise=backend.depthwise(jax.default_backend(), kernels),
    )
    return LinearDiT(**(fields | changes))


def student(c: config_lib.Config) -> LinearDiT | Controlled:
    """Describe the student, with its ControlNet where there is one."""
    return _controlled(c, _model(c, logvar_head=True))


def teacher(c: config_lib.Config) -> LinearDiT:
    """Describe the teacher as distillation needs it: not conditioned on the guidance scale."""
    return _model(c, guidance_embed=False, target_embed=False)


def distilled_teacher(c: config_lib.Config) -> LinearDiT | Controlled:
    """Describe what the student learns from: the teacher, perhaps with its ControlNet."""
    return _controlled(c, teacher(c))


def controlnet(c: config_lib.Config) -> ControlNet:
    """Describe the ControlNet of teacher and student alike. Needs control.depth above 0."""
    return ControlNet(net=teacher(c), depth=c.control.depth)


def _controlled(c, trunk):
    return Controlled(trunk=trunk, control=controlnet(c)) if c.control.depth else trunk


def base_teacher(c: config_lib.Config) -> LinearDiT:
    """Describe the teacher as it is first trained, perhaps without QK-norm or dense times."""
    return _model(
        c,
        guidance_embed=False,
        target_embed=False,
        qk_norm=c.teacher.base_qk_norm,
        time_scale=c.teacher.base_time_scale,
    )


def teacher_weights(where: str, model: LinearDiT) -> Any:
    """Read a teacher from a .safetensors file, "package:NAME", or a diffusers folder."""
    return _weights(where, model, published_transformer)


def control_weights(where: str, model: ControlNet) -> Any:
    """Read a ControlNet from a .safetensors file, "package:NAME", or a diffusers folder."""
    return _weights(where, model, published_controlnet)


def _weights(where, model, published):
    path = asset(where)
    return published(path, model) if path.is_dir() else weights.load(path, weights.abstract(model))


def published_transformer(path: pathlib.Path, model: LinearDiT) -> Any:
    """Read parameters of `model` from a folder with a diffusers transformer, as NumPy float32.

    path: a pipeline's folder or its transformer/. Raises UserError where the folder describes
    another network.
    """
    found, params = folder.read_transformer(path)
    _same(path, "transformer", found, model)
    # 1 says nothing: it is also what folders have that do not name a scale, of teachers for [0, 1]
    # and of SANA for [0, 1000].
    if found.time_scale != 1.0 and not math.isclose(1000 * found.time_scale, model.time_scale):
        raise UserError(
            f"{path} holds a transformer with timestep_scale={found.time_scale}, for flow times in "
            f"[0, 1] a time_scale of {1000 * found.time_scale:g}, the config asks for "
            f"{model.time_scale:g}: change config.model.time_scale or "
            "config.teacher.base_time_scale, or give another folder"
        )
    return params


def published_controlnet(path: pathlib.Path, model: ControlNet) -> Any:
    """Read parameters of `model` from a folder of a diffusers ControlNet."""
    found, params = folder.read_controlnet(path)
    if found.depth != model.depth:
        raise UserError(
            f"{path} holds a ControlNet of {found.depth} blocks, the config asks for "
            f"{model.depth}: change config.control.depth"
        )
    _same(path, "ControlNet", found.net, dataclasses.replace(model.net, depth=found.net.depth))
    return params


def _same(path, what, found, model):
    """Raise UserError where two networks differ in more than how they are computed."""
    free = {
        name: getattr(model, name)
        for name in (
            "remat",
            "unroll",
            "dtype",
            "residual_dtype",
            "attention",
            "depthwise",
            "guidance_scale_factor",
        )
    }
    if model.time_scale != found.time_scale:
        # Dense times are in [0, 1]; the folder may scale them elsewhere.
        free["time_scale"] = model.time_scale
    differing = [
        f.name
        for f in dataclasses.fields(model)
        if getattr(dataclasses.replace(found, **free), f.name) != getattr(model, f.name)
    ]
    if differing:
        name = differing[0]
        raise UserError(
            f"{path} holds a {what} with {name}={getattr(found, name)}, the config asks for "
            f"{getattr(model, name)}: change config.model, or give another folder"
        )
