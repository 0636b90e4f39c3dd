"""Processes of one run: agreement, barriers, and bringing a sharded tree to the host.

With a single process all of this is the identity.
"""

import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sprint_jax.errors import UserError
from sprint_jax.storage import json_files

_ROOM = 16384  # bytes of an identity


def primary() -> bool:
    """Return whether this process writes what people read."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def from_primary(number: int) -> int:
    """Return process 0's value of a small integer: one answer to what depends on files."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def exists(path: pathlib.Path) -> bool:
    """Return whether process 0 sees the file: all act on one answer."""
    return bool(from_primary(int(path.exists())))


def any_true(flag: bool) -> bool:
    """Return whether the flag holds on any process."""
    if jax.process_count() == 1:
        return flag
    return bool(np.asarray(multihost_utils.process_allgather(np.array([flag]))).any())


def anywhere(flag: bool) -> jax.Array:
    """Start `any_true` without waiting: a device array.

    All processes must call it equally often.
    """
    devices = jax.sharding.Mesh(np.array(jax.devices()), "d")
    split, whole = (
        jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec(*axes))
        for axes in (("d",), ())
    )
    flags = jax.make_array_from_process_local_data(split, np.full(jax.local_device_count(), flag))
    return _any(whole)(flags)


@functools.cache
def _any(whole):
    return jax.jit(lambda flags: flags.any(), out_shardings=whole)


def compare(identity: dict[str, Any]) -> None:
    """Raise UserError where a process differs from process 0 in any of {what: value}, naming both
    values.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(identity, sort_keys=True).encode()
    if len(text) > _ROOM:
        raise ValueError(f"identity of {len(text)} bytes; the room is {_ROOM}")
    padded = np.frombuffer(text.ljust(_ROOM), np.uint8)
    everyone = multihost_utils.process_allgather(padded)
    first, *others = (json_files.parse(row.tobytes()) for row in np.asarray(everyone))
    for process, other in enumerate(others, 1):
        for what in sorted(first.keys() | other.keys()):
            if first.get(what) != other.get(what):
                raise UserError(
                    f"processes disagree: {what} is {first.get(what)} at process 0 and "
                    f"{other.get(what)} at process {process}: start all with the same code and "
                    "flags"
                )


def to_host(tree: Any) -> Any:
    """Bring a tree of global arrays to the host as NumPy, whole, on every process; leaf by leaf."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(
        lambda a: np.asarray(multihost_utils.process_allgather(a, tiled=True)), tree
    )


def concatenate(array: np.ndarray) -> np.ndarray:
    """Join arrays of equal shape from every process, in their order, on every process."""
    if jax.process_count() == 1:
        return array
    return np.concatenate(np.asarray(multihost_utils.process_allgather(array)))
