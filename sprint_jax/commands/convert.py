"""Convert checkpoints between the diffusers layout and ours.

The content of --from decides what is written to --to.

    a diffusers SANA-Sprint folder    our form: model.json, safetensors and instruction
    our form                          a diffusers folder with bit-equal tensors
    a work directory of a run         diffusers' transformer/ and scheduler/
    a .safetensors file with the      diffusers' transformer/ and scheduler/
      official repository's names
"""

import dataclasses
import functools
import pathlib

from sprint_jax.runtime import cli
from sprint_jax.storage import files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(files.Paths):
    """Options of `sprint-jax convert`."""

    from_: files.LocalPath = ""
    """Folder or native .safetensors file to convert."""
    to: files.LocalPath = ""
    """Folder to make; it must not exist or be empty."""
    instruction: files.LocalPath | None = None
    """Text file with the instruction before each prompt ('' for none); default: of diffusers."""


def run(options: Options) -> pathlib.Path:
    """Write the converted checkpoint and return its folder. Raises UserError for anything else."""
    cli.require("from", options.from_, "give a folder")
    cli.require("to", options.to, "give a folder")
    from sprint_jax.sampling import convert

    say = functools.partial(print, flush=True)
    convert.convert(
        pathlib.Path(options.from_), pathlib.Path(options.to), options.instruction, say=say
    )
    say(f"wrote {options.to}")
    return pathlib.Path(options.to)
