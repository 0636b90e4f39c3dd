"""Stored rollouts: pairs of noise and what a teacher makes of it, with all states between.

    DIR/pairs.json                  what made them
    DIR/shard-00000/nodes.npy       float16 [n, K + 1, h, w, c], states from noise to data
                    w.npy           float32 [n], guidance scales
                    mask.npy, and text.npy or tokens.npy: the captions, as the data set gives them
                    control.npy, control_scale.npy: with a ControlNet
    DIR/shard-00001/ …

Arrays of a row are files of their own, so that reading maps them into memory and touches the rows
of a batch alone. A shard appears whole or not at all.
"""

import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence

import numpy as np

from sprint_jax.data.order import Order
from sprint_jax.data.prefetch import Prefetch
from sprint_jax.data.protocols import Batch
from sprint_jax.errors import UserError
from sprint_jax.storage import files, settings

KEEPER = settings.Keeper(
    file="pairs.json",
    flag="workdir",
    refusal=(
        "{folder} holds rollouts of {key}={old}, now {new}: remove it, or choose another --{flag}"
    ),
    unreadable="{path} cannot be read ({why}): remove {folder}",
)


def shard(folder: pathlib.Path, number: int) -> pathlib.Path:
    """Return the folder of a shard."""
    return folder / f"shard-{number:05d}"


def write_shard(path: pathlib.Path, rows: Mapping[str, np.ndarray]) -> None:
    """Write a shard, whole or not at all. Numbers are kept in half precision where that is exact.

    Raises UserError where the disk is full.
    """
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # a killed process may have left it
    try:
        partial.mkdir(parents=True)
        with files.unfinished(partial):
            for name, array in rows.items():
                np.save(partial / f"{name}.npy", _halved(array))
            files.rename_finished(partial, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}): make room and give the same "
            "command, finished shards are kept"
        ) from None


def _halved(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.float32:
        return array
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return half if np.array_equal(half, array) else array


def check_room(folder: pathlib.Path, count: int, rows: Mapping[str, np.ndarray]) -> None:
    """Raise UserError unless the disk holds `count` more rows like these [n, ...]."""
    size = len(next(iter(rows.values())))
    needed = count * sum(a.nbytes for a in rows.values()) // size
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder} needs {needed / 2**30:.2f} GiB for {count} stored rollouts and its disk has "
            f"{free / 2**30:.2f} GiB: lower `stored`, set it to 0 (new rollouts in every update), "
            "or choose another --workdir"
        )


class Pairs:
    """The rows of a folder, for random access."""

    def __init__(self, folder: str | os.PathLike, shards: int):
        """Map all shards into memory. Raises UserError for one that is missing or damaged."""
        self._shards = [_opened(shard(pathlib.Path(folder), i)) for i in range(shards)]
        sizes = [len(one["nodes"]) for one in self._shards]
        self._starts = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, numbers: Sequence[int] | np.ndarray) -> Batch:
        """Return rows: "nodes" float16, int32 as it is, all others float32, and "latent", the ends
        of the rollouts.
        """
        found = []
        for number in numbers:
            i = int(np.searchsorted(self._starts, number, "right")) - 1
            row = number - self._starts[i]
            found.append({name: array[row] for name, array in self._shards[i].items()})
        rows = {name: np.stack([one[name] for one in found]) for name in found[0]}
        rows |= {n: a.astype(np.float32) for n, a in rows.items() if _is_half(n, a)}
        return rows | {"latent": rows["nodes"][:, -1].astype(np.float32)}

    def batches(
        self, batch: int, start: int, stop: int, process: int, processes: int, *, seed: int
    ) -> Prefetch[Batch]:
        """Return a context and iterator of this process's rows of the batches start .. stop - 1.

        Their order is that of `data.order`.
        """
        order = Order(len(self), seed)

        def make(step: int) -> Batch:
            return self.read(order.rows(step, batch, process, processes))

        return Prefetch(make, start, stop)


def _is_half(name, array):
    return name != "nodes" and array.dtype == np.float16


def _opened(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        arrays = {file.stem: np.load(file, mmap_mode="r") for file in files.children(path)}
        if len({len(a) for a in arrays.values()}) != 1 or "nodes" not in arrays:
            raise ValueError("its arrays differ in length, or one is missing")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({error}): remove it, and give the same command"
        ) from None
    return arrays
