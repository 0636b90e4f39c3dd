"""A student ready to generate: networks, parameters, and the compiled programs from tokens to
pixels.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sprint_jax.encoders import pixels as pixel_codecs
from sprint_jax.encoders.pixels import AutoencoderPixels, PixelCodec
from sprint_jax.encoders.text import TextEncoder
from sprint_jax.errors import UserError
from sprint_jax.models.controlnet import Controlled
from sprint_jax.models.linear_dit import LinearDiT
from sprint_jax.sampling import generation, programs

Program = Callable[..., tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Pipeline:
    """A student ready to generate.

    Attributes:
      model: the transformer, perhaps with a ControlNet.
      params: {"transformer", "text", "pixels"}.
      height, width, guidance_scale, schedule, batch_size: what `generate` uses by default.
      dtype: of parameters and of most arithmetic.
      rows: how the images of a batch are sharded over devices (`over_devices`); None for one
        device.
      fixed_guidance: whether the student was trained at guidance_scale alone, so that other scales
        mean nothing to it.
      staged: run text encoder, transformer and decoder as three programs instead of one. A GPU
        starts with the first while the host prepares the launches of the others.
    """

    model: LinearDiT | Controlled
    text: TextEncoder
    pixels: PixelCodec
    params: dict[str, Any]
    height: int
    width: int
    guidance_scale: float
    schedule: str
    batch_size: int
    dtype: str
    rows: jax.sharding.NamedSharding | None = None
    fixed_guidance: bool = False
    staged: bool = False

    @property
    def cell(self) -> int:
        """Pixels that sides are multiples of: those of a patch of latents."""
        trunk = self.model.trunk if isinstance(self.model, Controlled) else self.model
        return self.pixels.factor * trunk.patch_size

    @property
    def control(self) -> bool:
        """Whether `generate` takes a condition."""
        return isinstance(self.model, Controlled)

    def program(self, kind: generation.Kind) -> Program:
        """Return the compiled way from tokens to pixels: a program per shape of its arguments, or
        three if staged.
        """
        run = functools.partial(self._programs(kind.output), shape=kind.shape)
        return run if self.rows is None else functools.partial(_over_devices, run, self.rows)

    @functools.cached_property
    def _programs(self) -> Callable[[str], Program]:
        return functools.cache(self._compile)

    def _compile(self, output: str) -> Program:
        networks = self.model, self.text, self.pixels
        if not self.staged:
            whole = functools.partial(sample, *networks, output=output)
            return jax.jit(whole, static_argnames="shape")
        encode, denoise, decode = _stages(*networks, output)
        denoise = jax.jit(denoise, static_argnames="shape")
        return _joined(jax.jit(encode), denoise, jax.jit(decode))

    def encode(self, images: Any) -> jax.Array:
        """Encode uint8 [B, H, W, 3] to latents at unit scale, to start from."""
        return self.pixels.encode(self.params["pixels"], images)


def over_devices(pipe: Pipeline, devices: Sequence[Any]) -> Pipeline:
    """Return a pipeline with its parameters on all of `devices` and the images of a batch sharded
    over them.

    Batches must then be multiples of their number. No kernels: left to itself the compiler would
    gather a kernel's operands.
    """
    mesh = jax.sharding.Mesh(np.array(devices), ("rows",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    pixels = pipe.pixels
    if isinstance(pixels, AutoencoderPixels):
        model = dataclasses.replace(pixels.model, attention="plain", depthwise="plain")
        pixels = dataclasses.replace(pixels, model=model, over_devices=True)
    return dataclasses.replace(
        pipe,
        model=computed(pipe.model, attention="plain", depthwise="plain"),
        pixels=pixels,
        params=jax.device_put(pipe.params, whole),
        rows=rows,
    )


def computed(model: LinearDiT | Controlled, **changes: Any) -> LinearDiT | Controlled:
    """Return a transformer that is computed otherwise: dtypes, attention or depthwise."""
    if not isinstance(model, Controlled):
        return dataclasses.replace(model, **changes)
    net = dataclasses.replace(model.control.net, **changes)
    return Controlled(
        trunk=dataclasses.replace(model.trunk, **changes),
        control=dataclasses.replace(model.control, net=net),
    )


def _over_devices(run, rows, params, arrays, *drawn):
    """Run a program with its batch sharded over devices."""
    guidance, times, seed, indices, draws, start, control, control_scale = drawn
    devices = rows.mesh.size
    if len(indices) % devices:
        raise UserError(
            f"batches of {len(indices)} images on {devices} devices: use a multiple of {devices}"
        )
    arrays, indices, start, control = jax.device_put((arrays, indices, start, control), rows)
    return run(params, arrays, guidance, times, seed, indices, draws, start, control, control_scale)


def sample(
    model: Any,
    text: TextEncoder,
    pixels: PixelCodec,
    params: Any,
    arrays: Any,
    *drawn: Any,
    output: str,
    shape: tuple[int, int, int],
) -> tuple[jax.Array, jax.Array]:
    """Encode text, take the few steps and decode. Traced.

    Returns the images and, bool [B], whether all numbers behind each are finite.

    Args:
      model, text, pixels, params: of a `Pipeline`.
      arrays: of `text.prepare`, stacked.
      *drawn: guidance, a scalar; times [steps + 1]; seed, int32; indices, int32 [B]; draws
        [steps, B, h, w, c], or None to draw from (seed, indices); start [B, h, w, c] to start from,
        or None; control [B, h, w, c] latents of a condition, or None; control_scale, a scalar.
      output: "pixels" or "latent".
      shape: (h, w, c) of one latent.
    """
    run = _joined(*_stages(model, text, pixels, output))
    return run(params, arrays, *drawn, shape=shape)


def _joined(encode, denoise, decode):
    """Join three functions to one; see `sample`."""

    def run(params, arrays, *drawn, shape):
        features = encode(params["text"], arrays)
        latents = denoise(params["transformer"], *features, *drawn, shape=shape)
        return decode(params["pixels"], latents)

    return run


def _stages(model, text, pixels, output):
    """Return text encoding, the few steps, and decoding: functions of their own parameters and of
    arrays.
    """

    def encode(params, arrays):
        return text.features(params, arrays)

    def denoise(params, features, mask, *drawn, shape):
        guidance, times, seed, indices, draws, start, *condition = drawn
        control, control_scale = condition or (None, None)
        if draws is None:
            draws = programs.noises(seed, indices, shape, times.shape[0] - 1)
        cond = {"text": features, "mask": mask}
        if control is not None:
            assert control_scale is not None
            scale = jnp.full(indices.shape, control_scale)
            cond |= {"control": control, "control_scale": scale}
        return programs.student_latents(
            model, params, cond, guidance=guidance, times=times, draws=draws, start=start
        )

    def decode(params, latents):
        if output == "latent":
            return latents, pixel_codecs.finite(latents)
        return pixels.checked(params, latents)

    return encode, denoise, decode
