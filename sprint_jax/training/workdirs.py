"""The work directory of a run: claimed by one process, kept to one config."""

import contextlib
import pathlib

from sprint_jax import config as config_lib
from sprint_jax.errors import UserError
from sprint_jax.storage import json_files, run_files, settings

_KEEPER = settings.Keeper(
    file=run_files.CONFIG,
    flag="workdir",
    required=frozenset({"data", "model", "teacher", "phases"}),
    # A run may resume on another mesh.
    free=("mesh.",),
    no_output=("events",),
    reclaimable=True,
    refusal=(
        "{folder} was made with config.{key}={old}, now {new}: use the same config, or another "
        "--{flag}"
    ),
    foreign="{folder} is not empty and not a run of this project: choose another --{flag}",
    unreadable="{path} is not a config of this project: choose another --{flag}",
    busy="another run is working in {folder} ({who}): wait for it, or choose another --{flag}",
)


def claim(workdir: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Make the work directory and hold it for this process.

    Raises UserError where another holds it.
    """
    return _KEEPER.hold(workdir)


def write_config(config: config_lib.Config, workdir: pathlib.Path) -> None:
    """Record the resolved config.

    Raises UserError for a directory in which another one has begun something.
    """
    path = workdir / run_files.CONFIG
    if path.is_file() and config_lib.is_old(_json(path)):
        raise UserError(
            f"{path} was written by version 0.1, whose checkpoints cannot be resumed: choose "
            "another --workdir"
        )
    _KEEPER.claim(workdir, config_lib.to_dict(config))


def _json(path):
    """Return what a JSON file holds, None where it holds none."""
    with contextlib.suppress(OSError, ValueError):
        return json_files.read(path)
    return None
