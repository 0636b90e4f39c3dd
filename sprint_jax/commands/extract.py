"""Extract weights from the newest checkpoint of a run, finished or not.

Reads the parameters alone, or their average where a run keeps one, on one machine, whatever the
devices of the run were. With --to_file=OTHER/student.safetensors an unfinished run can be sampled
from and converted: its config.json is written beside the file, and --model=OTHER reads both. The
file may not lie in the run's own folder, which would then count as finished.
"""

import dataclasses
import pathlib

from sprint_jax.runtime import cli
from sprint_jax.storage import files, settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(files.Paths):
    """Options of `sprint-jax extract`."""

    run_dir: files.LocalPath = ""
    """Work directory of a run, its --workdir."""
    stage: str | None = None
    """Phase whose checkpoint is read, a name of the run's config.order; default: the last that has
    one.
    """
    to_file: files.LocalPath = ""
    """Safetensors file to write."""


def run(options: Options) -> pathlib.Path:
    """Write the weights and return the file's path. Raises UserError without such a checkpoint."""
    cli.require("run_dir", options.run_dir, "name the --workdir of a run")
    cli.require("to_file", options.to_file, "name the file to write")
    cli.no_folder("to_file", options.to_file)
    from sprint_jax.training import extract

    run_dir, to_file = pathlib.Path(options.run_dir), pathlib.Path(options.to_file)
    with settings.file_claim(to_file, "--to_file"):
        return extract.write(run_dir, options.stage, to_file, say=print)
