"""Serve a page to draw on, and a JSON API.

The page has text to image, image to image and sketch to image. Programs ask POST /generate, whose
JSON Schema is at GET /schema. Both wait in one request queue. A request gives the image that
`sprint-jax sample --batch_size=1` draws for the same prompt, seed and options.
"""

import dataclasses
import os
from typing import Literal

from sprint_jax.errors import UserError
from sprint_jax.runtime import compile_cache
from sprint_jax.sampling.options import ModelOptions, model_or_shipped
from sprint_jax.storage import files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    """Options of `sprint-jax serve`."""

    model: files.LocalPath = ""
    """Diffusers folder, converted folder, run directory, or exported file; default: the student of
    shapes that ships with the code."""
    attention: Literal["plain", "pallas"] | None = None
    """XLA, or kernels where the device has them; default: kernels on an NVIDIA GPU."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in: then set a password."""
    port: int = 7860
    """Port to listen at; 0 takes a free one."""
    password: str | None = None
    """Required from everyone; the variable SPRINT_JAX_PASSWORD keeps it out of process lists."""
    queue: int = 64
    """Requests that may wait; further ones are refused at once."""
    max_steps: int = 4
    """Most network calls per image."""
    max_prompt: int = 2000
    """Most characters of a prompt."""
    sizes: tuple[str, ...] = ()
    """HEIGHTxWIDTH on offer, each compiled before the start; default: the model's own."""
    grace: float = 10.0
    """Seconds to finish the image in work after the first Ctrl-C or SIGTERM; a second one ends at
    once."""
    ready_tokens: int | None = None
    """Compile for prompts of at most this length before the start; default: all."""


def run(options: Options) -> None:
    """Serve until a signal ends the process."""
    try:
        from sprint_jax.serving import service
    except ModuleNotFoundError as error:
        remedy = "pip install 'sprint_jax[app]'"
        raise UserError(f"serving needs the package {error.name}: {remedy}") from None
    compile_cache.start()
    values = dataclasses.asdict(options)
    values["model"] = model_or_shipped(options.model)
    instruction = values.pop("instruction_file")
    password = options.password or os.environ.get("SPRINT_JAX_PASSWORD")
    service.serve(**values | {"instruction": instruction, "password": password})
