"""Where a process stands among several: by flags, SLURM, a GKE JobSet or GKE's TPU variables.

`jax.distributed.initialize` detects launchers too, but keeps to itself what it found. The roll call
(`distributed.py`) needs the coordinator and the numbers before JAX starts.
"""

import dataclasses
import re
from collections.abc import Mapping

from sprint_jax.errors import UserError

_PORT = 29400
_FLAGS = "--coordinator, --processes and --process"


@dataclasses.dataclass(frozen=True)
class Place:
    """One process of several.

    coordinator: "host:port" of process 0; the next port is used too. process: its number, from 0.
    """

    coordinator: str
    processes: int
    process: int


def place(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    environ: Mapping[str, str],
) -> Place | None:
    """Return where this process stands, by flags or else by its launcher; None if it is alone.

    coordinator, processes, process: flags, None if not given. Raises UserError if some of them are
    missing, and for variables of a launcher that are missing or are no numbers.
    """
    if coordinator is not None and processes is not None and process is not None:
        return _checked(Place(coordinator, processes, process))
    if coordinator is not None or processes is not None or process is not None:
        raise UserError(f"{_FLAGS} belong together: give all three, or none")
    found = _slurm(environ) or _jobset(environ) or _tpu(environ)
    return _checked(found) if found else None


def _checked(place):
    host, _, port = place.coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65535:
        raise UserError(
            f"--coordinator={place.coordinator}: use host:port, for example 10.0.0.1:{_PORT}"
        )
    if not 0 <= place.process < place.processes:
        raise UserError(
            f"--process={place.process} with --processes={place.processes}: use 0 to "
            f"{place.processes - 1}"
        )
    return place


def _variable(environ, name):
    """Return a launcher's variable. Raises UserError if it is missing."""
    if not environ.get(name):
        raise UserError(
            f"{name} is not set although other variables of the same launcher are: set it, or give "
            f"{_FLAGS}"
        )
    return environ[name]


def _number(environ, name):
    value = _variable(environ, name)
    if not value.isdecimal():
        raise UserError(f"{name}={value} is no whole number: fix or unset it, or give {_FLAGS}")
    return int(value)


def _slurm(environ):
    processes = _number(environ, "SLURM_NTASKS") if "SLURM_NTASKS" in environ else 1
    if processes < 2 or "SLURM_PROCID" not in environ:
        return None
    nodes = environ.get("SLURM_STEP_NODELIST") or _variable(environ, "SLURM_JOB_NODELIST")
    # Jobs that share a node get ports of their own.
    job = _number(environ, "SLURM_JOB_ID") if "SLURM_JOB_ID" in environ else 0
    port = _PORT + 2 * (job % 10000)
    return Place(f"{first_node(nodes)}:{port}", processes, _number(environ, "SLURM_PROCID"))


def first_node(nodes: str) -> str:
    """Return the first host of a SLURM list: "gpu[003-007,9],login1" -> "gpu003"."""
    found = re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", found.group() if found else nodes)


def _jobset(environ):
    """Return the place in an indexed job of a JobSet.

    The manifest in launch/ sets PROCESSES and COORDINATOR.
    """
    if "JOB_COMPLETION_INDEX" not in environ or "COORDINATOR" not in environ:
        return None
    return Place(
        environ["COORDINATOR"],
        _number(environ, "PROCESSES"),
        _number(environ, "JOB_COMPLETION_INDEX"),
    )


def _tpu(environ):
    hosts = environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    if len(hosts) < 2 or "TPU_WORKER_ID" not in environ:
        return None
    return Place(f"{hosts[0]}:{_PORT}", len(hosts), _number(environ, "TPU_WORKER_ID"))
