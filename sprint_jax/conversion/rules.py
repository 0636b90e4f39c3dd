"""Conversion between named tensors and parameter trees, by tables of names and shapes.

A `Row` maps one foreign tensor to a place in one of our arrays. A table (`tables.py`) lists the
rows of a model. `load` and `export` apply a table and require an exact match.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from sprint_jax.errors import UserError
from sprint_jax.storage import safetensors_files, weights

Params: TypeAlias = dict[str, Any]  # nested dicts with arrays (or other leaves) at the ends
Place: TypeAlias = tuple[int | slice, ...]  # index of a part of an array

_WEIGHTS = (np.float64, np.float32, np.float16)  # dtypes of weights that PyTorch shares with NumPy

_Function: TypeAlias = Callable[[np.ndarray], np.ndarray]

# Each layout: (to ours, to theirs). Theirs are those of PyTorch: Linear [out, in],
# Conv2d [out, in / groups, k, k].
_LAYOUTS: dict[str, tuple[_Function, _Function]] = {
    "same": (lambda a: a, lambda a: a),
    "dense": (lambda a: a.T, lambda a: a.T),
    "conv1x1": (lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None]),
    # One number for each channel: [1, C, 1, 1] <-> [C].
    "channels": (lambda a: a[0, :, 0, 0], lambda a: a[None, :, None, None]),
    "conv": (lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1)),
    "depthwise": (lambda a: a[:, 0].transpose(1, 2, 0), lambda a: a.transpose(2, 0, 1)[:, None]),
    # Grouped 1x1 with equal numbers of input and output channels: [g o, i, 1, 1] <-> [g, i, o].
    "grouped": (
        lambda a: a[:, :, 0, 0].reshape(-1, a.shape[1], a.shape[1]).transpose(0, 2, 1),
        lambda a: a.transpose(0, 2, 1).reshape(-1, a.shape[1])[:, :, None, None],
    ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """A foreign tensor, or an equal part of it, and its place in one of our arrays."""

    theirs: str  # name of the tensor
    shape: tuple[int, ...]  # of the whole tensor
    ours: str  # dotted path of our array
    layout: str = "same"  # key of `_LAYOUTS`
    _: dataclasses.KW_ONLY
    place: Place = ()  # index of our array: a layer of a stack, a slice of the last axis, or ()
    aliases: tuple[str, ...] = ()  # other names that the tensor may have
    # (k, n): only the k-th of n equal parts of the first axis. Such rows share the name `theirs`.
    chunk: tuple[int, int] = (0, 1)

    @property
    def size(self) -> int:
        """Number of elements that the row fills."""
        return math.prod(self.shape) // self.chunk[1]

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Return the part of a foreign tensor that fills `place`, in our layout."""
        k, n = self.chunk
        rows = array.shape[0] // n
        return _LAYOUTS[self.layout][0](array[k * rows : (k + 1) * rows])

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Return a part of our array in the foreign layout."""
        return _LAYOUTS[self.layout][1](array)

    def is_copy(self) -> bool:
        """Return whether the file holds the elements in the order of their place."""
        return (
            self.layout == "same"
            and self.chunk == (0, 1)
            and not any(isinstance(i, slice) for i in self.place)
        )


def load(
    rows: Sequence[Row],
    found: Mapping[str, safetensors_files.Tensor],
    abstract: Params,
    dtype: npt.DTypeLike | None,
    what: str,
    place: Callable[[str, np.ndarray], Any] = lambda path, array: array,
) -> Params:
    """Read a parameter tree from files.

    Args:
      rows: the table.
      found: the tensors of the files by name.
      abstract: tree of our shapes.
      dtype: of the result. None keeps the dtype of the files, or the widest if they differ.
      what: name of the model part, for errors.
      place: (dotted path, array) -> leaf of the result. It is called as soon as an array is
        complete, for example to move it to a device before the next one is read.

    Raises UserError if tensors are missing, unexpected, given twice or of another shape.
    """
    names = _match(rows, found, what)
    shapes = {path: leaf.shape for path, leaf in weights.flatten(abstract).items()}
    check_cover(rows, shapes)
    for name in names.values():
        safetensors_files.check_dtype(found[name])
    if dtype is None:
        dtype = widest(np.dtype(found[name].dtype) for name in names.values())
    flat: dict[str, Any] = {}
    by_target: dict[str, list[Row]] = {}
    for row in rows:
        by_target.setdefault(row.ours, []).append(row)
    # The largest arrays first, which keeps the peak memory of intermediate arrays low.
    for path in sorted(by_target, key=lambda p: -math.prod(shapes[p])):
        array = np.empty(shapes[path], dtype)
        for row in by_target[path]:
            arrange = None if row.is_copy() else row.to_ours
            safetensors_files.read(found[names[row]], array[row.place], arrange)
        flat[path] = place(path, array)
    return weights.unflatten(flat)


def widest(dtypes: Iterable[np.dtype]) -> np.dtype:
    """Return the dtype that holds all of the given dtypes; float32 for bfloat16 and float16.

    NumPy has no common dtype for those two.
    """
    dtypes = list(dtypes)
    try:
        return np.result_type(*dtypes)
    except TypeError:
        return np.result_type(np.float32, *(d for d in dtypes if d.itemsize > 2))


def from_arrays(
    rows: Sequence[Row], found: Mapping[str, np.ndarray], abstract: Params, what: str
) -> Params:
    """Convert tensors in memory to a parameter tree, float32. Raises UserError as `load`."""
    names = _match(rows, found, what)
    flat = {
        path: np.empty(leaf.shape, np.float32) for path, leaf in weights.flatten(abstract).items()
    }
    check_cover(rows, {path: array.shape for path, array in flat.items()})
    for row in rows:
        array = np.asarray(found[names[row]])
        if array.dtype not in _WEIGHTS:
            raise UserError(
                f"{what} holds {names[row]} as {array.dtype}: weights must be float64, float32, "
                "float16 or bfloat16"
            )
        safetensors_files.check_finite(array, names[row], what)
        flat[row.ours][row.place] = row.to_ours(array)
    return weights.unflatten(flat)


def export(rows: Sequence[Row], params: Params) -> dict[str, np.ndarray]:
    """Convert a tree of NumPy arrays to {foreign name: array}, the inverse of `load`.

    Results may be views of `params`.
    """
    flat = weights.flatten(params)
    check_cover(rows, {path: a.shape for path, a in flat.items()})
    pieces: dict[str, list[np.ndarray]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for row in rows:  # tables list the chunks of a tensor in order
        pieces.setdefault(row.theirs, []).append(row.to_theirs(flat[row.ours][row.place]))
        shapes[row.theirs] = row.shape
    out = {
        name: parts[0] if len(parts) == 1 else np.concatenate(parts)
        for name, parts in pieces.items()
    }
    for name, array in out.items():
        if array.shape != shapes[name]:
            raise ValueError(f"{name}: table says {shapes[name]}, exported {array.shape}")
    return out


def _match(rows: Sequence[Row], found: Mapping[str, Any], what: str) -> dict[Row, str]:
    """Find the name of each row in the files. Raises UserError unless the match is exact."""
    names: dict[Row, str] = {}
    missing, wrong, doubled = [], [], []
    for row in rows:
        present = [name for name in (row.theirs, *row.aliases) if name in found]
        if not present:
            missing.append(row.theirs)
        elif len(present) > 1:
            doubled.append(" and ".join(present))
        else:
            names[row] = present[0]
            if found[present[0]].shape != row.shape:
                wrong.append(
                    f"{present[0]} is {found[present[0]].shape}, the config says {row.shape}"
                )
    extra = sorted(
        found.keys() - set(names.values()) - {n for pair in doubled for n in pair.split(" and ")}
    )
    problems = []
    for label, items in (
        ("missing", missing),
        ("unexpected", extra),
        ("given twice", doubled),
        ("misshapen", wrong),
    ):
        if items:
            more = f" and {len(items) - 5} more" if len(items) > 5 else ""
            problems.append(f"{label}: {', '.join(items[:5])}{more}")
    if problems:
        raise UserError(f"the weights of the {what} do not fit its config; {'; '.join(problems)}")
    return names


def check_cover(rows: Sequence[Row], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a table fills every element of our arrays exactly once.

    Raises ValueError, because a table that does not is a bug.
    """
    twice = [
        name for (name, _), n in Counter((row.theirs, row.chunk) for row in rows).items() if n > 1
    ]
    if twice:
        raise ValueError(f"table names {twice[:3]} twice")
    filled: Counter[str] = Counter()
    for row in rows:
        if row.ours not in shapes:
            raise ValueError(f"table fills {row.ours}, which the model lacks")
        filled[row.ours] += row.size
    for path, shape in shapes.items():
        if filled[path] != math.prod(shape):
            raise ValueError(f"table fills {filled[path]} of {math.prod(shape)} elements of {path}")
    places = Counter((row.ours, str(row.place)) for row in rows)
    if max(places.values()) > 1:
        raise ValueError("table fills one place twice")
