"""Options of the commands that load a model or generate images with one."""

import dataclasses
import pathlib
import sys
from typing import Literal

from sprint_jax.storage import files

# A finished student of the embedded shapes, as a run directory.
SHIPPED = pathlib.Path(__file__).parents[1] / "assets" / "shapes"


def say(message: object) -> None:
    """Print a line of progress on stderr."""
    print(message, file=sys.stderr, flush=True)


def model_or_shipped(model: str) -> str:
    """Return the model. For an empty one return the shipped student, with a line on stderr."""
    if model:
        return model
    say("no --model: using the student of shapes that ships with the code")
    return str(SHIPPED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(files.Paths):
    """Which model, and how it is computed."""

    model: files.LocalPath = ""
    """Diffusers folder, converted folder, or work directory of a run (--workdir)."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of weights and arithmetic; default: bfloat16, on a CPU float32."""
    tile: bool = False
    """Decode in overlapping tiles of 1024 px: less memory for large images."""
    instruction_file: files.LocalPath | None = None
    """Text before each prompt of a published model; '' for none; default: the model's own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageOptions(ModelOptions):
    """Which images a model generates."""

    prompts: files.LocalPath | None = None
    """File of prompts: text, one a line, or .jsonl, .json, .csv or .tsv with a field prompt."""
    steps: int = 2
    """Network calls per image, 1 or more."""
    seed: int = 0
    """Selects the noise."""
    out: files.LocalPath | None = None
    """Folder for the images and manifest.jsonl."""
    guidance_scale: float | None = None
    """Embedded guidance scale; default: the model's."""
    schedule: Literal["code", "paper", "even"] | None = None
    """List of times; default: the model's."""
    timesteps: tuple[float, ...] | None = None
    """Angles from about 1.57 to 0, steps + 1 of them, instead of a schedule."""
    height: int | None = None
    """Pixels, a multiple of 32; default: the model's."""
    width: int | None = None
    """Pixels, a multiple of 32; default: the model's."""
    images_per_prompt: int | None = None
    """Images of each prompt; default: 1."""
    batch_size: int | None = None
    """Images generated at a time; default: the model's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOptions(ImageOptions):
    """Options of `sprint-jax sample`."""

    model: files.LocalPath = ""
    """Diffusers folder, converted folder, work directory of a run, or exported file; default: the
    student of shapes that ships with the code."""
    out: files.LocalPath = "images"
    """Folder for the images and manifest.jsonl; images that are in it are kept."""
    overwrite: bool = False
    """Replace the images that an earlier command wrote in --out."""
    prompt: list[str] = dataclasses.field(default_factory=list)
    """What to draw; may be repeated."""
    resolution_binning: bool = False
    """Generate the nearest of diffusers' sizes for the published models, then resize."""
    image: files.LocalPath | None = None
    """Image to start from."""
    strength: float | None = None
    """With --image: how much may change, more than 0 and at most 1; default: 0.6."""
    control: files.LocalPath | None = None
    """Sketch for a model with a ControlNet: an image, white lines on black."""
    control_scale: float | None = None
    """With --control: how strongly it is followed; default: 1, as in training."""
    controlnet: files.LocalPath | None = None
    """Folder of a diffusers ControlNet to condition the model on."""
    attention: Literal["plain", "pallas"] | None = None
    """Attention and depthwise convolutions by XLA, or by kernels where the device has them;
    default: kernels on an NVIDIA GPU."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions(ModelOptions):
    """Options of `sprint-jax export`."""

    out: files.LocalPath = ""
    """File to make."""
    steps: tuple[int, ...] = (1, 2, 4)
    """Network calls per image, a program for each."""
    height: int | None = None
    """Pixels, a multiple of 32; default: the model's."""
    width: int | None = None
    """Pixels, a multiple of 32; default: the model's."""
    schedule: Literal["code", "paper", "even"] | None = None
    """List of times that is used by default; default: the model's."""
    batch_sizes: tuple[int, ...] | None = None
    """Images generated at a time, a program for each; default: the model's."""
    longest_prompt: int | None = None
    """Tokens of the longest prompt; default: all that the model reads."""
    platforms: tuple[Literal["cpu", "cuda", "rocm", "tpu"], ...] | None = None
    """Devices to export for; default: this one."""
