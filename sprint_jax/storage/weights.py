"""Parameter trees as safetensors files: flat names joined by dots, written whole or not at all."""

import errno
import os
import pathlib
from typing import Any, Protocol

import jax
import numpy as np

from sprint_jax.errors import UserError
from sprint_jax.storage import files, safetensors_files
from sprint_jax.storage.trees import flatten, unflatten


class Digest(Protocol):
    """A digest of `hashlib`."""

    def update(self, data: Any, /) -> None: ...


def abstract(model: Any) -> Any:
    """Return the shapes of a network's parameters."""
    return jax.eval_shape(model.init, jax.random.key(0))


def feed(digest: Digest, params: dict[str, Any]) -> None:
    """Feed names, dtypes, shapes and numbers of a tree, sorted by name, into a digest."""
    for name, leaf in sorted(flatten(params).items()):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8))


def save(path: str | os.PathLike, params: dict[str, Any]) -> None:
    """Write a tree as float32 to `path`; a reader never sees a partial file.

    Raises UserError if no file can be made there, and OSError if the disk is full.
    """
    flat = {k: np.asarray(jax.device_get(v), np.float32) for k, v in flatten(params).items()}
    try:
        with files.whole(path) as partial:
            safetensors_files.write_file(partial, flat)
    except OSError as error:
        if error.errno == errno.ENOSPC:  # `runtime.cli` has a line with a remedy of its own
            raise
        raise UserError(
            f"cannot write {path} ({error.strerror}): name a file in a folder that can be written"
        ) from None


def load(path: str | os.PathLike, expected: Any) -> dict[str, Any]:
    """Read a tree of the structure and shapes of `expected` (abstract or real), as float32.

    Raises UserError naming the file and the first names or shapes that disagree.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"no weights at {path}: give an existing .safetensors file")
    found = safetensors_files.scan(path)
    wanted = flatten(expected)
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or extra:
        raise UserError(
            f"{path} does not fit the config: missing {missing[:3]}, unexpected {extra[:3]}; use "
            "the config that the weights were made with"
        )
    flat = {}
    for name, leaf in wanted.items():
        if found[name].shape != leaf.shape:
            raise UserError(
                f"{path} does not fit the config: {name} has shape {found[name].shape}, the model "
                f"needs {leaf.shape}; use the config that the weights were made with"
            )
        flat[name] = np.empty(leaf.shape, np.float32)
        safetensors_files.read(found[name], flat[name])
    return unflatten(flat)


def cast(params: dict[str, Any], dtype: str, where: str | os.PathLike) -> dict[str, Any]:
    """Return a tree of NumPy float32 in another dtype.

    where: what the weights came from. Raises UserError for a value that is not finite there.
    """
    flat = {}
    for name, leaf in flatten(params).items():
        with np.errstate(over="ignore"):
            flat[name] = leaf.astype(jax.numpy.dtype(dtype))
        safetensors_files.check_finite(flat[name], name, where)
    return unflatten(flat)
