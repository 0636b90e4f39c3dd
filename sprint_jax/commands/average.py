"""Average students that were distilled from one teacher with different seeds.

The result is a folder with a student and a config, like that of a run: every command that takes
--model reads it. See "model soups", arXiv 2203.05482.
"""

import dataclasses
import pathlib

from sprint_jax.errors import UserError
from sprint_jax.runtime import cli
from sprint_jax.storage import files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(files.Paths):
    """Options of `sprint-jax average`."""

    runs: tuple[files.LocalPath, ...] = ()
    """Work directories of two or more finished runs, with commas between."""
    averaged: files.LocalPath = ""
    """Folder to make, for the averaged student."""


def run(options: Options) -> pathlib.Path:
    """Write the averaged student and return its folder.

    Raises UserError unless all runs share one network and one given teacher.
    """
    runs = [pathlib.Path(path) for path in options.runs]
    if len(runs) < 2:
        raise UserError(
            f"--runs={','.join(options.runs)}: name two or more runs, with commas between"
        )
    cli.require("averaged", options.averaged, "name the folder to make")
    from sprint_jax.training import average

    average.write(runs, options.averaged)
    print(
        f"wrote {options.averaged}: the mean of {len(runs)} students. It is a --model for "
        "sprint-jax sample, evaluate and serve"
    )
    return pathlib.Path(options.averaged)
