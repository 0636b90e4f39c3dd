"""safetensors files read tensor by tensor into place, and written whole or not at all.

The library maps a file into memory, which counts every page twice beside the copy that is kept. Here a
tensor is read in pieces straight into the array that will hold it, in the dtype asked for, so loading
needs little more than the weights themselves. Nothing is ever unpickled.
"""

import dataclasses
import json
import math
import os
import pathlib

import ml_dtypes
import numpy as np
import safetensors.numpy

from sprint_jax.errors import UserError

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_PIECE = 1 << 24  # elements read at a time
_MAX_HEADER = 100 << 20
METADATA = {"format": "pt"}  # PyTorch's loaders insist on it


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor lies. offset: in bytes from the start of the file. dtype: or the file's word for one that is no weight's."""

    file: pathlib.Path
    dtype: np.dtype | str
    shape: tuple[int, ...]
    offset: int


def scan(path) -> dict[str, Tensor]:
    """Names and places of the tensors of one file. Raises UserError for one that is cut off or damaged."""
    path = pathlib.Path(path)

    def damaged(why):
        return UserError(f"{path} is not a whole safetensors file ({why}): copy it again")

    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise damaged("its header does not fit")
            header = json.loads(file.read(length))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): give an existing file") from None
    except ValueError:
        raise damaged("its header is not JSON") from None
    tensors, end = {}, 0
    try:
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = entry["dtype"], tuple(map(int, entry["shape"]))
            start, stop = entry["data_offsets"]
            known = _DTYPES.get(dtype, dtype)
            if (
                start != end
                or stop < start
                or (dtype in _DTYPES and stop - start != math.prod(shape) * known.itemsize)
            ):
                raise damaged(f"the place of {name} is wrong")
            tensors[name] = Tensor(path, known, shape, 8 + length + start)
            end = stop
    except (AttributeError, KeyError, TypeError, ValueError):
        raise damaged("its header is malformed") from None
    if 8 + length + end != size:
        raise damaged(f"{size} bytes where {8 + length + end} belong")
    return tensors


def find(folder, stem) -> dict[str, Tensor]:
    """Tensors of a part of a diffusers or transformers folder, in one file or several with an index.

    stem: "diffusion_pytorch_model" or "model". A variant (`stem.bf16.safetensors`) serves where no plain
    file is.
    """
    folder = pathlib.Path(folder)
    index = _one(folder, [f"{stem}.safetensors.index.json", f"{stem}.safetensors.index.*.json"])
    single = _one(folder, [f"{stem}.safetensors", f"{stem}.*.safetensors"])
    if single is not None and (index is None or single.name == f"{stem}.safetensors"):
        return scan(single)
    if index is None:
        if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
            raise UserError(
                f"{folder} has only pickled weights, which are never opened: convert them to safetensors"
            )
        raise UserError(f"{folder} has no {stem}.safetensors: download the whole folder")
    try:
        placed = json.loads(index.read_text())["weight_map"]
        files = {name: folder / pathlib.Path(file).name for name, file in placed.items()}
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index} is not an index of safetensors files: copy it again") from None
    scanned = {file: scan(file) for file in sorted(set(files.values()))}
    lost = sorted(name for name, file in files.items() if name not in scanned[file])
    if lost:
        raise UserError(
            f"{index} names tensors that its files lack: {', '.join(lost[:5])}; copy the folder again"
        )
    return {name: scanned[file][name] for name, file in files.items()}


def _one(folder, patterns):
    """The file of the first pattern that matches; several of one pattern are an error."""
    for pattern in patterns:
        found = [p for p in sorted(folder.glob(pattern)) if not _is_shard(p)]
        if len(found) > 1:
            raise UserError(
                f"{folder} has several variants ({', '.join(p.name for p in found)}): keep one"
            )
        if found:
            return found[0]
    return None


def _is_shard(path):
    return path.name.endswith(".safetensors") and "-of-" in path.name


def read(tensor: Tensor, name, out, arrange):
    """Reads a tensor and stores it, converted, through `out[...] = arrange(tensor)`.

    out: array view of the target dtype. arrange: reorders axes; None copies piece by piece, for tensors
    that are large and need none. Raises UserError for a value that is not finite, in the file or in out's
    dtype.
    """
    check_dtype(tensor, name)
    count = math.prod(tensor.shape)
    with open(tensor.file, "rb", buffering=0) as file:
        file.seek(tensor.offset)
        if arrange is not None:
            out[...] = arrange(
                _checked(_take(file, tensor, count), name, tensor).reshape(tensor.shape)
            )
            return
        flat = out.reshape(-1)
        if not np.shares_memory(flat, out):
            raise ValueError(f"{name}: a large tensor must be read into contiguous memory")
        for start in range(0, count, _PIECE):
            stop = min(start + _PIECE, count)
            flat[start:stop] = _checked(_take(file, tensor, stop - start), name, tensor)


def check_dtype(tensor: Tensor, name):
    """Raises UserError for a tensor of integers, of 8-bit floats and the like: a buffer may be there, a weight may not be one."""
    if isinstance(tensor.dtype, str):
        raise UserError(
            f"{tensor.file} holds {name} as {tensor.dtype}: weights must be F64, F32, F16 or BF16"
        )


def _take(file, tensor, count):
    piece = np.empty(count, tensor.dtype)
    view = memoryview(piece.view(np.uint8)).cast("B")
    done = 0
    while done < len(view):
        got = file.readinto(view[done:])
        if not got:
            raise UserError(f"{tensor.file} ended while it was read: copy it again")
        done += got
    return piece


def _checked(piece, name, tensor):
    # In 16-bit floats, all exponent bits set means infinity or NaN; testing bits avoids a float32 copy.
    if piece.dtype.itemsize == 2:
        exponent = np.uint16(0x7F80 if piece.dtype == ml_dtypes.bfloat16 else 0x7C00)
        finite = not ((piece.view(np.uint16) & exponent) == exponent).any()
    else:
        finite = bool(np.isfinite(piece).all())
    if not finite:
        raise UserError(
            f"{tensor.file} holds values of {name} that are infinite or not numbers (float16 overflow?): "
            "get the weights in bfloat16 or float32"
        )
    return piece


def write(folder, stem, named_tensors, *, shard_bytes):
    """Writes tensors as PyTorch's libraries do: one file, or several and an index.

    named_tensors: {name: array}. shard_bytes: most bytes of one file (a single tensor may exceed it).
    """
    folder, shards, room = pathlib.Path(folder), [{}], shard_bytes
    for name, array in named_tensors.items():
        if array.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = np.ascontiguousarray(array)
        room -= array.nbytes
    if len(shards) == 1:
        _save(folder / f"{stem}.safetensors", shards[0])
        return
    names = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        _save(folder / file, shard)
    total = sum(a.nbytes for shard in shards for a in shard.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {
            name: file for file, shard in zip(names, shards, strict=True) for name in shard
        },
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / f"{stem}.safetensors.index.json").write_text(text)


def _save(path, tensors):
    safetensors.numpy.save_file(tensors, path, metadata=METADATA)
    os.chmod(path, 0o644)  # the library makes files private to their owner
