"""Parameter trees as safetensors files: flat names joined by dots, written whole or not at all."""

import errno
import json
import pathlib

import jax
import numpy as np
import safetensors
import safetensors.numpy

from sprint_jax.errors import UserError
from sprint_jax.storage import files
from sprint_jax.storage.trees import flatten, unflatten


def feed(digest, params):
    """Names, dtypes, shapes and numbers of a tree, in an order of their own, into a `hashlib` digest."""
    for name, leaf in sorted(flatten(params).items()):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8))


def save(path, params, *, dtype="float32"):
    """Writes a tree to `path`; a reader never sees a partial file. Raises UserError where no file can be made."""
    # Contiguous, because safetensors writes the memory of an array, whatever its strides say.
    flat = {k: np.ascontiguousarray(jax.device_get(v), dtype) for k, v in flatten(params).items()}
    try:
        with files.whole(path) as partial:
            partial.write_bytes(
                safetensors.numpy.save(flat)
            )  # not save_file: its files are private to their owner
    except OSError as error:
        if error.errno == errno.ENOSPC:  # which `cli.user_errors` tells with a remedy of its own
            raise
        raise UserError(
            f"cannot write {path} ({error.strerror}): name a file in a folder that can be written"
        ) from None


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
        raise UserError(
            f"{path} is not a readable safetensors file ({error}): copy it again"
        ) from None
    except (AttributeError, KeyError, TypeError) as error:  # a dtype that NumPy does not know
        raise UserError(
            f"{path} holds a dtype that is not read here ({error}): use float32, float16 or bfloat16"
        ) from None
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


def write_stream(file, flat):
    """Writes {name: array} as safetensors, one array after the other. file: binary, open for writing."""
    header, end = {}, 0
    for name, array in flat.items():
        start, end = end, end + array.size * array.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for array in flat.values():
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def read_stream(file):
    """Yields (name, array) of what `write_stream` wrote, to the end of the file. Raises ValueError where it does not fit."""
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    dtypes = {name: jax.numpy.dtype(dtype) for dtype, name in _NAMES.items()}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        data = file.read(end - start)
        if len(data) != end - start:
            raise ValueError(f"{name} is cut off")
        yield name, np.frombuffer(data, dtypes[entry["dtype"]]).reshape(entry["shape"])
    if file.read(1):  # reading to the end is what checks a zip member's sum
        raise ValueError("bytes after the last array")


_NAMES = {"float32": "F32", "bfloat16": "BF16", "int32": "I32"}
