"""safetensors files: read tensor by tensor into place, written whole, streamed through archives.

The library maps a file into memory, and pages of the mapping count beside the array that is kept.
So `read` opens the file anew for every piece of a large tensor, which gives the pages of the piece
before back: loading needs 1.03 times the weights instead of 1.5 times. Nothing is ever unpickled.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from sprint_jax.errors import UserError
from sprint_jax.storage import json_files, signatures

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_STREAMED = {name: _DTYPES[name] for name in ("F32", "BF16")} | {"I32": np.dtype(np.int32)}
# Weights of other kinds that a folder may hold instead.
_OTHERS = {
    (".bin", ".pth", ".pt", ".ckpt"): "pickled",
    (".gguf",): "GGUF",
    (".msgpack",): "Flax msgpack",
    (".h5",): "HDF5",
    (".onnx",): "ONNX",
}
_PIECE = 1 << 24  # elements read at a time
METADATA = {"format": "pt"}  # PyTorch's loaders insist on it


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file.

    dtype: for a dtype that no weight may have, the file's word for it.
    """

    file: pathlib.Path
    name: str
    dtype: np.dtype | str
    shape: tuple[int, ...]


def scan(path: str | os.PathLike) -> dict[str, Tensor]:
    """Return {name: Tensor} of one file. Raises UserError if it is cut off or damaged."""
    path = pathlib.Path(path)
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        return {
            name: Tensor(
                path,
                name,
                _DTYPES.get(part.get_dtype(), part.get_dtype()),
                tuple(part.get_shape()),
            )
            for name, part in slices.items()
        }


def metadata(path: str | os.PathLike) -> dict[str, str]:
    """Return what the file's writer said about it. Raises UserError as `scan` does."""
    with _opened(pathlib.Path(path)) as file:
        return file.metadata() or {}


@contextlib.contextmanager
def _opened(path) -> Iterator[Any]:
    """Open a file by the library. Raises UserError if it cannot be read or is not whole."""
    try:
        path.open("rb").close()  # the library's own errors lack the reason as one phrase
        with safetensors.safe_open(path, "numpy") as file:
            yield file
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"cannot read {path} ({why}): give an existing file") from None
    except safetensors.SafetensorError as error:
        raise _not_whole(path, error) from None


def _not_whole(path, error) -> UserError:
    """Return the line for a file that the library refuses: what it is, or that it is damaged."""
    with path.open("rb") as file:
        meant = signatures.is_safetensors(file.read(9))
    if not meant and (found := signatures.describe(path)):
        return UserError(f"{path} is no safetensors file but {found}")
    why = " ".join(str(error).split())[:200]
    return UserError(f"{path} is not a whole safetensors file ({why}): copy it again")


def find(folder: str | os.PathLike, stem: str) -> dict[str, Tensor]:
    """Return {name: Tensor} of a part of a diffusers or transformers folder.

    The part is one file, or several with an index. stem: "diffusion_pytorch_model" or "model". A
    variant (`stem.bf16.safetensors`) is taken if there is no plain file. Raises UserError for a
    folder without weights, with several variants, or with an index that its files contradict.
    """
    folder = pathlib.Path(folder)
    index = _one(folder, [f"{stem}.safetensors.index.json", f"{stem}.safetensors.index.*.json"])
    single = _one(folder, [f"{stem}.safetensors", f"{stem}.*.safetensors"])
    if single is not None and (index is None or single.name == f"{stem}.safetensors"):
        return scan(single)
    if index is None:
        raise UserError(f"{folder} {_lack(folder, stem)}")
    try:
        placed = json_files.read(index)["weight_map"]
        files = {name: folder / pathlib.Path(file).name for name, file in placed.items()}
        if not files:
            raise ValueError("it names no tensor")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index} is not an index of safetensors files: copy it again") from None
    scanned = {file: scan(file) for file in sorted(set(files.values()))}
    lost = sorted(name for name, file in files.items() if name not in scanned[file])
    if lost:
        raise UserError(
            f"{index} names tensors that its files lack: {', '.join(lost[:5])}; copy the folder "
            "again"
        )
    return {name: scanned[file][name] for name, file in files.items()}


def _lack(folder, stem):
    """Say what a folder without safetensors has instead, and what to do."""
    for endings, kind in _OTHERS.items():
        if any(any(folder.glob(f"*{ending}")) for ending in endings):
            return (
                f"has only {kind} weights, which are never opened: convert them to safetensors, or "
                "download them as safetensors"
            )
    return f"has no {stem}.safetensors: download the whole folder"


def _one(folder, patterns):
    """Return the file of the first pattern that matches; several of one pattern are an error."""
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


def read(
    tensor: Tensor, out: np.ndarray, arrange: Callable[[np.ndarray], np.ndarray] | None = None
) -> None:
    """Read a tensor and store it, converted, through `out[...] = arrange(tensor)`.

    out: array view of the target dtype. arrange: reorders axes; None copies piece by piece, for
    tensors that are large and keep their order. Raises UserError for a tensor that is no weight,
    and for a value that is not finite, in the file or in the target dtype.
    """
    check_dtype(tensor)
    if arrange is not None or not tensor.shape:
        with _opened(tensor.file) as file:
            array = file.get_tensor(tensor.name)
            check_finite(array, tensor.name, tensor.file)
            _store(array if arrange is None else arrange(array), tensor, out)
        return
    length = tensor.shape[0]
    rows = max(1, _PIECE // max(1, math.prod(tensor.shape[1:])))
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        with _opened(tensor.file) as file:
            piece = file.get_slice(tensor.name)[start:stop]
            check_finite(piece, tensor.name, tensor.file)
            _store(piece, tensor, out[start:stop])


def check_dtype(tensor: Tensor) -> None:
    """Raise UserError for a tensor of integers, of 8-bit floats and the like.

    Buffers of a module may have such dtypes, weights may not.
    """
    if isinstance(tensor.dtype, str):
        raise UserError(
            f"{tensor.file} holds {tensor.name} as {tensor.dtype}: weights must be F64, F32, F16 "
            "or BF16"
        )


def _store(array, tensor, out):
    """Copy an array of finite values. Raises UserError where a value is too large for `out`."""
    with np.errstate(over="ignore"):
        out[...] = array
    if ml_dtypes.finfo(out.dtype).max < ml_dtypes.finfo(array.dtype).max:
        check_finite(out, tensor.name, tensor.file)


def check_finite(array: np.ndarray, name: str, where: str | os.PathLike) -> None:
    """Raise UserError if weights hold infinity or NaN. All that loads weights calls it.

    name: of the tensor. where: the file, or whatever the weights came from, for the error line.
    """
    # In 16-bit floats, all exponent bits set means infinity or NaN; testing bits avoids a float32
    # copy.
    if array.dtype.itemsize == 2:
        exponent = np.uint16(0x7F80 if array.dtype == ml_dtypes.bfloat16 else 0x7C00)
        finite = not ((array.view(np.uint16) & exponent) == exponent).any()
    else:
        finite = bool(np.isfinite(array).all())
    if not finite:
        why = " (overflow?)" if array.dtype == np.float16 else ""
        raise UserError(
            f"{where} holds values of {name} that are infinite or not numbers in {array.dtype}"
            f"{why}: get the weights again, in bfloat16 or float32"
        )


def write(
    folder: str | os.PathLike,
    stem: str,
    named_tensors: Mapping[str, np.ndarray],
    *,
    shard_bytes: int,
) -> None:
    """Write tensors as PyTorch's libraries do: one file, or several and an index.

    shard_bytes: most bytes of one file; a single tensor may exceed it. Raises OSError.
    """
    folder, shards, room = pathlib.Path(folder), [{}], shard_bytes
    for name, array in named_tensors.items():
        if array.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = array
        room -= array.nbytes
    if len(shards) == 1:
        write_file(folder / f"{stem}.safetensors", shards[0], metadata=METADATA)
        return
    names = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        write_file(folder / file, shard, metadata=METADATA)
    total = sum(a.nbytes for shard in shards for a in shard.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {
            name: file for file, shard in zip(names, shards, strict=True) for name in shard
        },
    }
    json_files.write(folder / f"{stem}.safetensors.index.json", index, sort_keys=True)


def write_file(
    path: str | os.PathLike,
    named_tensors: Mapping[str, np.ndarray],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write one file, array by array. Raises OSError, for a full disk as well."""
    path = pathlib.Path(path)
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    # Contiguous, because the library writes the memory of an array, whatever its strides say.
    whole = {name: np.asarray(array, order="C") for name, array in named_tensors.items()}
    try:
        safetensors.numpy.save_file(whole, path, metadata=metadata)
    except safetensors.SafetensorError as error:
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
        raise
    path.chmod(mode)  # the library makes files private to their owner


def write_stream(file: IO[bytes], named_tensors: Mapping[str, Any]) -> None:
    """Write {name: array} to a file that is open for writing, one array after the other.

    The library needs all bytes in memory to write anything but a file: three times the weights.
    The arrays are float32, bfloat16 or int32.
    """
    names = {dtype: name for name, dtype in _STREAMED.items()}
    header, end = {}, 0
    for name, array in named_tensors.items():
        start, end = end, end + array.size * array.dtype.itemsize
        header[name] = {
            "dtype": names[np.dtype(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for array in named_tensors.values():
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def read_stream(file: IO[bytes]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, array) of what `write_stream` wrote, to the end of the file.

    Raises ValueError if the bytes do not fit the header.
    """
    header = json_files.parse(file.read(int.from_bytes(file.read(8), "little")))
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        data = file.read(end - start)
        if len(data) != end - start:
            raise ValueError(f"{name} is cut off")
        yield name, np.frombuffer(data, _STREAMED[entry["dtype"]]).reshape(entry["shape"])
    if file.read(1):  # reading to the end is what checks a zip member's sum
        raise ValueError("bytes after the last array")
