"""Parameter trees as safetensors files: flat names joined by dots, written whole or not at all."""

import pathlib

import jax
import numpy as np
import safetensors
import safetensors.numpy

from sprint_jax import files
from sprint_jax.errors import UserError


def flatten(tree, prefix=()):
    """Nested dict -> {"a.b.c": leaf}."""
    flat = {}
    for name, child in tree.items():
        path = (*prefix, name)
        flat |= flatten(child, path) if isinstance(child, dict) else {".".join(path): child}
    return flat


def unflatten(flat):
    """The inverse of `flatten`."""
    tree = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def save(path, params, *, dtype="float32"):
    """Writes a tree to `path`; a reader never sees a partial file."""
    flat = {k: np.asarray(jax.device_get(v)).astype(dtype) for k, v in flatten(params).items()}
    with files.whole(path) as partial:
        partial.write_bytes(safetensors.numpy.save(flat))  # not save_file: its files are private to their owner


def load(path, expected):
    """Reads a tree of the structure and shapes of `expected` (abstract or real), as float32.

    Raises UserError naming the file and the first names or shapes that disagree.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"no weights at {path}: give an existing .safetensors file")
    try:
        found = safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}): copy it again") from None
    wanted = flatten(expected)
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or extra:
        raise UserError(
            f"{path} does not fit the config: missing {missing[:3]}, unexpected {extra[:3]}; "
            "use the config that the weights were made with"
        )
    for name, leaf in wanted.items():
        if found[name].shape != leaf.shape:
            raise UserError(
                f"{path} does not fit the config: {name} has shape {found[name].shape}, the model needs "
                f"{leaf.shape}; use the config that the weights were made with"
            )
    return unflatten({k: found[k].astype(np.float32) for k in wanted})
