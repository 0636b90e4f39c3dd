"""Combine the weights of students of one teacher, or of one run's checkpoints.

    sprint-jax average --runs=A,B,C --averaged=NEW                        the mean
    sprint-jax average --runs=A,B --weights=.7,.3 --averaged=NEW
    sprint-jax average --runs=A --checkpoints=repair --relative=.1 --averaged=NEW
    sprint-jax average --runs=A --checkpoints=repair --search=10 --averaged=NEW

The result is a folder with a student and a config, like that of a run: every command that takes
--model reads it. See "model soups", arXiv 2203.05482, EDM2's averages after the fact, 2312.02696,
and LCSC, 2404.02241, which searches the weights.
"""

import dataclasses
import pathlib

from sprint_jax.runtime import cli
from sprint_jax.storage import files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(files.Paths):
    """Options of `sprint-jax average`."""

    runs: tuple[files.LocalPath, ...] = ()
    """Work directories of finished runs: two or more, or one with --checkpoints."""
    averaged: files.LocalPath = ""
    """Folder to make, for the averaged student."""
    checkpoints: str = ""
    """Phase of the one run whose checkpoints are combined, such as repair."""
    weights: tuple[float, ...] = ()
    """Weights of the runs or checkpoints; their sum must be 1. Without them it is the mean."""
    relative: float = 0.0
    """Average the checkpoints by a power of their step; the standard deviation of the average in
    training time, as a share of the whole, from .05 to .25.
    """
    search: int = 0
    """Rounds of a search for the weights by right images in one step, on the selection half of the
    embedded captions. The run must report the final half.
    """
    prompts: int = 256
    """Prompts for each score of the search."""
    seed: int = 0
    """Seed of the search."""


def run(options: Options) -> pathlib.Path:
    """Write the averaged student and return its folder.

    Raises UserError unless all runs share one network and one given teacher.
    """
    from sprint_jax.training import combination

    values = dataclasses.asdict(options)
    runs, target = values.pop("runs"), values.pop("averaged")
    choice = combination.Choice(**values)
    combination.check(choice, runs)
    cli.require("averaged", target, "name the folder to make")
    combination.write(choice, [pathlib.Path(path) for path in runs], target, say=print)
    return pathlib.Path(target)
