"""Write the report page of a run, finished or not.

The page is RUN_DIR/report.html. Every run writes it at its end as well.
"""

import dataclasses
import pathlib

from sprint_jax.runtime import cli
from sprint_jax.storage import files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(files.Paths):
    """Options of `sprint-jax report`."""

    run_dir: files.LocalPath = ""
    """Work directory of a run, its --workdir."""


def run(options: Options) -> pathlib.Path:
    """Write the page and return its path. Raises UserError if the folder holds no run."""
    cli.require("run_dir", options.run_dir, "name the --workdir of a run")
    from sprint_jax.reporting import page

    written = page.write(options.run_dir)
    print(f"wrote {written}")
    return written
