"""The host's side of image generation, the same for a loaded model and for an exported file.

Turns a request into sizes, times, tokenized prompts and batches. The back end (a
`pipeline.Pipeline` or an `exported.Exported`) only supplies compiled programs. No network is known
here.
"""

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import jax.numpy as jnp
import numpy as np

from sprint_jax.diffusion import limits, samplers
from sprint_jax.encoders import prompts as prompts_lib
from sprint_jax.errors import UserError

# Img2img never starts nearer to noise than this unless strength is 1: at the published t_max
# nothing is left of the image. It is the second time of the published two-step list.
IMAGE_T_MAX = 1.3
STRENGTH = 0.6  # how much of an image to start from may change

Shape = tuple[int, int, int]


class NotFinite(UserError):
    """An image has numbers that are NaN or infinite: the model cannot draw what was asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """Everything that decides shapes, and so the program, of one batch.

    output: "pixels" or "latent". steps: network calls. length: tokens that prompts are padded to.
    batch_size: images. shape: (h, w, c) of one latent. draws, start, control: whether noise,
    latents to start from, or a ControlNet's condition are given.
    """

    output: str
    steps: int
    length: int
    batch_size: int
    shape: Shape
    draws: bool
    start: bool
    control: bool


class Sizes(Protocol):
    """Sizes of latents."""

    @property
    def factor(self) -> int:
        """Pixels per latent cell along each side."""
        ...

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        ...


class Preparing(Protocol):
    """The host's part of a text encoder."""

    def prepare(self, prompts: Sequence[str]) -> list[tuple[int, dict[str, np.ndarray]]]:
        """Return one (padded length, arrays) per prompt."""
        ...


class Generator(Protocol):
    """A back end of `generate`."""

    @property
    def text(self) -> Preparing:
        """The text encoder's host part."""
        ...

    @property
    def pixels(self) -> Sizes:
        """Sizes of latents."""
        ...

    @property
    def params(self) -> Any:
        """The first argument of every program."""
        ...

    @property
    def cell(self) -> int:
        """Pixels that sides are multiples of."""
        ...

    @property
    def control(self) -> bool:
        """Whether a condition can be given."""
        ...

    @property
    def height(self) -> int:
        """Default height in pixels."""
        ...

    @property
    def width(self) -> int:
        """Default width in pixels."""
        ...

    @property
    def guidance_scale(self) -> float:
        """Default guidance scale."""
        ...

    @property
    def schedule(self) -> str:
        """Default time list."""
        ...

    @property
    def batch_size(self) -> int:
        """Default images per program run."""
        ...

    @property
    def dtype(self) -> str:
        """The dtype of most arithmetic."""
        ...

    def program(self, kind: Kind) -> Callable[..., Any]:
        """Return the compiled program of a kind of batch.

        It returns the images and, bool [B], whether all numbers behind each are finite.
        """
        ...

    def encode(self, images: Any) -> Any:
        """Encode uint8 [B, H, W, 3] to latents at unit scale."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Request:
    """A checked request: one entry per image.

    times: [steps + 1]. draws [steps, B, h, w, c], start and condition [B, h, w, c]: arrays or None.
    """

    prompts: list[str]
    output: str
    shape: Shape
    times: np.ndarray
    scale: float
    seed: int
    indices: np.ndarray
    batch_size: int
    draws: np.ndarray | None
    start: np.ndarray | None
    condition: np.ndarray | None
    control_scale: float


def generate(
    pipe: Generator,
    prompts: Sequence[str],
    *,
    steps: int = 2,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    timesteps: Sequence[float] | None = None,
    latents: Any = None,
    step_noise: Any = None,
    image: Any = None,
    strength: float = STRENGTH,
    output: Literal["pixels", "latent"] = "pixels",
    schedule: str | None = None,
    images_per_prompt: int = 1,
    batch_size: int | None = None,
    indices: Sequence[int] | None = None,
    control: Any = None,
    control_scale: float = 1.0,
    say: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Generate images of prompts in few steps.

    Args:
      pipe: from `loading.load` or `exported.load`.
      prompts: texts. Only published models take an empty one, for the unconditional image.
      steps: network calls per image, 1 to 1000.
      guidance_scale: embedded scale; None takes the model's own (4.5 for published models).
      height, width: pixels, multiples of the autoencoder's factor (32); None takes the model's own.
      seed: image i depends on (seed, i, prompt i) alone.
      timesteps: steps + 1 angles from noise (about pi/2) to 0, instead of a schedule.
      latents: [B, h, w, c] unit-variance start noise.
      step_noise: steps - 1 arrays of that shape, the draws between steps. A longer list, as of a
        scheduler that also draws at the end, is cut.
      image: uint8 [H, W, 3] or [B, H, W, 3] to start from (img2img) instead of noise alone.
      strength: in (0, 1], how much of the image may change. Drops the first steps; see
        `image_times`.
      output: "pixels" or "latent".
      schedule: one of `samplers.SCHEDULES`; None takes the model's own.
      images_per_prompt: images of each prompt, side by side in the result.
      batch_size: images per run of the compiled program; images are bit-equal for any company of
        prompts at one batch size. None takes pipe.batch_size.
      indices: the i of each image's noise, for a part of a longer list; None counts from 0.
      control: uint8 [H, W, 3] or [B, H, W, 3], the condition of a model with a ControlNet: a
        sketch, white lines on black. None leaves the ControlNet out.
      control_scale: 0 to 10; 1 follows the sketch as in training, 0 not at all.
      say: called with the number of images done.

    Returns:
      "pixels": uint8 [B, H, W, 3]. "latent": float32 [B, h, w, c] at unit scale, before the
      autoencoder's scaling is undone.

    Raises UserError for anything out of range (`diffusion.limits`), before the first image is
    generated, and for an image that is not finite.
    """
    _check(prompts, output)
    limits.check(
        {
            "steps": steps,
            "images_per_prompt": images_per_prompt,
            "guidance_scale": guidance_scale,
            "strength": strength,
            "control_scale": control_scale,
            "batch_size": batch_size,
            "seed": seed,
        }
    )
    prompts = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    count = len(prompts)
    size = pipe.height if height is None else height, pipe.width if width is None else width
    shape = latent_shape(pipe, *size)
    times = _times(pipe, steps, timesteps, schedule)
    if image is not None:
        times = image_times(times, strength)
    given = _guidance(pipe, guidance_scale)
    request = _Request(
        prompts=prompts,
        output=output,
        shape=shape,
        times=times,
        scale=rounded(given, pipe.dtype),
        seed=seed,
        indices=_indices(indices, count),
        batch_size=batch_size or pipe.batch_size,
        draws=_draws(latents, step_noise, (count, *shape), len(times) - 1),
        start=None if image is None else _encode(pipe, "image", image, count, size),
        condition=None if control is None else _condition(pipe, control, count, size),
        control_scale=control_scale,
    )
    return _run(pipe, request, say)


def _guidance(pipe, given):
    """Return the guidance scale; warn where the model was trained at another one alone."""
    scale = pipe.guidance_scale
    if given is None or given == scale:
        return scale
    if getattr(pipe, "fixed_guidance", False):
        warnings.warn(
            f"guidance_scale {given}: this model was trained at {scale} alone, other scales mean "
            "nothing to it",
            stacklevel=3,
        )
    return given


@contextlib.contextmanager
def checked(pipe: Generator, prompts: Sequence[str], places: Sequence[str]) -> Iterator[None]:
    """Check prompts before any is drawn, and leave out warnings about them in the context.

    places: where each prompt stands, such as "prompts.txt line 3". Messages name it instead of a
    number within a batch. Raises UserError for the first prompt that the model cannot draw.
    """
    for prompt, place in zip(prompts, places, strict=True):
        placed = lambda message, place=place: (
            f"{place}: {str(message).replace('prompt 0 ', 'the prompt ', 1)}"
        )
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                pipe.text.prepare([prompt])
        except UserError as error:
            raise UserError(placed(error)) from None
        for warning in said:
            warnings.warn(placed(warning.message), warning.category, stacklevel=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"prompt \d+ ")
        yield


def _check(prompts, output):
    """Raise UserError for arguments that are wrong for every model."""
    if isinstance(prompts, str):
        raise UserError("prompts must be a list of texts: put brackets around the one")
    if not prompts:
        raise UserError("no prompts: give at least one")
    if output not in ("pixels", "latent"):
        raise UserError(f"output {output!r}: use 'pixels' or 'latent'")


def _run(pipe: Generator, request: _Request, say: Callable[[int], None]) -> np.ndarray:
    """Generate the images of a checked request, batch by batch."""
    rows = pipe.text.prepare(request.prompts)  # checks every prompt before the first image
    programs = {
        length: pipe.program(_kind(request, length)) for length in sorted({n for n, _ in rows})
    }
    pick = lambda a, padded, axis: None if a is None else np.take(a, padded, axis)
    result: list[Any] = [None] * len(request.prompts)
    waiting = None
    for length, members, padded, arrays in prompts_lib.batches(rows, request.batch_size):
        drawn = programs[length](
            pipe.params,
            arrays,
            np.float32(request.scale),
            request.times,
            np.int32(request.seed),
            request.indices[padded].astype(np.int32),
            pick(request.draws, padded, 1),
            pick(request.start, padded, 0),
            pick(request.condition, padded, 0),
            np.float32(request.control_scale),
        )
        # The device works on this batch while the one before it is copied.
        _collect(result, waiting, request, say)
        waiting = members, drawn
    _collect(result, waiting, request, say)
    return np.stack(result)


def _kind(request: _Request, length: int) -> Kind:
    return Kind(
        output=request.output,
        steps=len(request.times) - 1,
        length=length,
        batch_size=request.batch_size,
        shape=request.shape,
        draws=request.draws is not None,
        start=request.start is not None,
        control=request.condition is not None,
    )


def _collect(result, waiting, request, say):
    """Copy a batch (indices, its program's result) into the list of all; None is no batch.

    Raises NotFinite for an image that would be black.
    """
    if waiting is None:
        return
    members, (images, finite) = waiting
    # Padding is left out.
    for index, image, whole in zip(members, np.asarray(images), np.asarray(finite), strict=False):
        if not whole:
            prompt = request.prompts[index]
            shown = prompt if len(prompt) <= 80 else prompt[:77] + "..."
            raise NotFinite(
                f"the image of prompt {shown!r} with seed {request.seed} is not finite (NaN or "
                "infinity): use dtype float32, guidance_scale and times near the model's own, or "
                "weights that are not damaged"
            )
        result[index] = image
    say(sum(image is not None for image in result))


def latent_shape(pipe: Generator, height: int, width: int) -> Shape:
    """Return (h, w, c) of an image's latents. Raises UserError for sides that do not fit."""
    factor = pipe.pixels.factor
    for name, side in (("height", height), ("width", width)):
        if not side <= limits.SIDE:
            limits.check({name: side})
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


def image_times(times: np.ndarray, strength: float) -> np.ndarray:
    """Return the times of img2img: of n steps about n * strength are run, at least one.

    The published pipeline rounds so that its default (2 steps, strength 0.6) starts at pi/2, where
    nothing is left of the image. Here steps are rounded away from noise, and unless strength is 1
    the first time is at most IMAGE_T_MAX. Raises UserError for a strength outside (0, 1].
    """
    limits.check({"strength": strength})
    steps = len(times) - 1
    dropped = min(math.ceil(steps * (1 - strength) - 1e-6), steps - 1)
    kept = np.array(times[dropped:], np.float32)
    if strength < 1:
        while len(kept) > 2 and kept[1] >= IMAGE_T_MAX:
            kept = kept[1:]
        kept[0] = min(kept[0], IMAGE_T_MAX)
    return kept


def _indices(indices, count):
    numbers = np.arange(count) if indices is None else np.asarray(indices)
    if numbers.shape != (count,):
        raise UserError(f"{numbers.size} indices for {count} images: give one each")
    return numbers


def _draws(latents, step_noise, shape, steps):
    """Return [steps, B, h, w, c] of given noises, or None where all are drawn from the seed."""
    if latents is None and step_noise is None:
        return None
    if latents is None:
        raise UserError("step_noise is given without latents: give both, or a seed")
    step_noise = list(step_noise) if step_noise is not None else []
    if len(step_noise) < steps - 1:
        raise UserError(f"{len(step_noise)} step noises for {steps} steps: give {steps - 1}")
    draws = [np.asarray(a, np.float32) for a in (latents, *step_noise[: steps - 1])]
    names = ["latents", *(f"step_noise[{i}]" for i in range(steps - 1))]
    for name, a in zip(names, draws, strict=True):
        if a.shape != shape:
            raise UserError(f"{name} has shape {a.shape}: these prompts and this size need {shape}")
    return np.stack(draws)


def _condition(pipe, control, count, size):
    """Return latents [B, h, w, c] of the condition, for a model that takes one."""
    if not pipe.control:
        raise UserError(
            "control is given and this model has no ControlNet: load a model with one, or leave it "
            "out"
        )
    return _encode(pipe, "control", control, count, size)


def _encode(pipe, name, image, count, size):
    """Return latents [B, h, w, c] at unit scale of one image, or one for each prompt. name: of the
    argument.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim not in (3, 4) or image.shape[-1] != 3:
        raise UserError(
            f"{name} is {image.dtype} {image.shape}: give uint8 [H, W, 3] or one for each prompt"
        )
    image = image if image.ndim == 4 else image[None]
    if len(image) not in (1, count) or image.shape[1:3] != size:
        raise UserError(
            f"{name} has shape {image.shape}: give one, or {count}, of {size[0]} x {size[1]} "
            "(resize first)"
        )
    encoded = np.concatenate([np.asarray(pipe.encode(one[None])) for one in image])
    return np.broadcast_to(encoded, (count, *encoded.shape[1:])).astype(np.float32)


def rounded(scale: float, dtype: str) -> float:
    """Round the guidance scale as the published pipeline does when it runs in bfloat16.

    That pipeline rounds a tenth of the scale once more as it enters the network.
    """
    return float(np.asarray(scale, jnp.dtype(dtype)))
