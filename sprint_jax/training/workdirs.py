"""The work directory of a run: claimed by one process, kept to one config."""

import contextlib
import fcntl
import json
import pathlib
from collections.abc import Iterator

from sprint_jax import config as config_lib
from sprint_jax.errors import UserError
from sprint_jax.storage import files, run_files, weights


@contextlib.contextmanager
def claim(workdir: pathlib.Path) -> Iterator[None]:
    """Make the work directory and hold it for this process. Raises UserError where another holds it."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
    except OSError as error:
        raise UserError(
            f"cannot write in {workdir} ({error.strerror}): choose another --workdir"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another run is working in {workdir}: wait for it, or choose another --workdir"
            ) from None
        yield


def write_config(config: config_lib.Config, workdir: pathlib.Path) -> None:
    """Record the resolved config. Raises UserError for a directory in which another one has begun something."""
    path = workdir / run_files.CONFIG
    tree = json.loads(json.dumps(config_lib.to_dict(config)))
    if path.exists():
        old = _recorded(path)
        differing = _differences(old, tree) if _begun(workdir) else []
        if differing:
            name, was, now = differing[0]
            raise UserError(
                f"{workdir} was made with {name}={was}, now {now}: use the same config, or another "
                "--workdir"
            )
        if old == tree:
            return
    elif any(child.name != ".lock" for child in workdir.iterdir()):
        raise UserError(
            f"{workdir} is not empty and not a run of this project: choose another --workdir"
        )
    files.write_text(path, json.dumps(tree, indent=2) + "\n")


def _recorded(path):
    """Return a config.json of ours as a dict. Raises UserError for any other."""
    with contextlib.suppress(json.JSONDecodeError):
        old = json.loads(path.read_text())
        if isinstance(old, dict) and {"data", "model", "teacher", "phases"} <= old.keys():
            return old
        if isinstance(old, dict) and {"data", "model", "teacher", "sprint"} <= old.keys():
            raise UserError(
                f"{path} was written by version 0.1, whose checkpoints cannot be resumed: choose "
                "another --workdir"
            )
    raise UserError(f"{path} is not a config of this project: choose another --workdir")


def _begun(workdir):
    """Return whether there is more than a config and empty records: until then another config may take over."""
    unclaimed = (".lock", run_files.CONFIG, "events")
    return any(child.name not in unclaimed for child in workdir.iterdir())


def _differences(old, new):
    """Return [(dotted name, old, new)] of all leaves that differ, but for the mesh: other devices may resume."""
    a, b = weights.flatten(old), weights.flatten(new)
    known = sorted(name for name in a.keys() | b.keys() if not name.startswith("mesh."))
    return [
        (f"config.{n}", a.get(n, "nothing"), b.get(n, "nothing"))
        for n in known
        if a.get(n) != b.get(n)
    ]
