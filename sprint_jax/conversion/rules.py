"""From named tensors to a parameter tree and back, by tables whose every row states a name and a shape.

A `Row` says which foreign tensor fills which place of which of our arrays. Tables (`tables.py`) list rows
for one model; `load` and `export` apply them and accept nothing but an exact match.
"""

import dataclasses
import math
from collections import Counter

import numpy as np

from sprint_jax.errors import UserError
from sprint_jax.storage import tensors, weights

# Layouts: (to ours, to theirs). Theirs are PyTorch's: Linear [out, in], Conv2d [out, in / groups, k, k].
_LAYOUTS = {
    "same": (lambda a: a, lambda a: a),
    "dense": (lambda a: a.T, lambda a: a.T),
    "conv1x1": (lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None]),
    "channels": (
        lambda a: a[0, :, 0, 0],
        lambda a: a[None, :, None, None],
    ),  # one number of each, [1, C, 1, 1]
    "conv": (lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1)),
    "depthwise": (lambda a: a[:, 0].transpose(1, 2, 0), lambda a: a.transpose(2, 0, 1)[:, None]),
    # Grouped 1x1 with as many channels out as in, per group: [g o, i, 1, 1] <-> [g, i, o].
    "grouped": (
        lambda a: a[:, :, 0, 0].reshape(-1, a.shape[1], a.shape[1]).transpose(0, 2, 1),
        lambda a: a.transpose(0, 2, 1).reshape(-1, a.shape[1])[:, :, None, None],
    ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One foreign tensor.

    theirs: its name. shape: its shape. ours: dotted path of our array. layout: a key of `_LAYOUTS`.
    place: index of our array that it fills: a layer of a stack, a span of the last axis, or all (()).
    aliases: other names it may have.
    chunk: (k, n) if only the k-th of n equal parts of its first axis goes there; rows then share `theirs`.
    """

    theirs: str
    shape: tuple[int, ...]
    ours: str
    layout: str = "same"
    place: tuple = ()
    aliases: tuple[str, ...] = ()
    chunk: tuple[int, int] = (0, 1)

    @property
    def size(self) -> int:
        return math.prod(self.shape) // self.chunk[1]

    def to_ours(self, array):
        """The part of a foreign tensor that fills `place`."""
        k, n = self.chunk
        rows = array.shape[0] // n
        return _LAYOUTS[self.layout][0](array[k * rows : (k + 1) * rows])

    def to_theirs(self, array):
        return _LAYOUTS[self.layout][1](array)

    def copies(self) -> bool:
        """Whether the tensor goes to its place as it lies in the file."""
        return (
            self.layout == "same"
            and self.chunk == (0, 1)
            and not any(isinstance(i, slice) for i in self.place)
        )


def load(rows, found, abstract, dtype, what, place=lambda path, array: array):
    """Reads a parameter tree.

    Args:
      rows: the table. found: {name: tensors.Tensor}. abstract: tree of our shapes.
      dtype: of the result, or None for the dtype of the files (the widest, if they differ).
      what: names the part in errors.
      place: (path, NumPy array) -> leaf of the result, called as soon as an array is complete; moves it to
        a device, say, before the next one is read.
    Returns:
      the tree.
    Raises UserError listing missing, unexpected, doubled or misshapen tensors.
    """
    names = _match(rows, found, what)
    shapes = {path: leaf.shape for path, leaf in weights.flatten(abstract).items()}
    _check_cover(rows, shapes)
    for name in names.values():
        tensors.check_dtype(found[name], name)
    if dtype is None:
        dtype = _widest({found[name].dtype for name in names.values()})
    flat, by_target = {}, {}
    for row in rows:
        by_target.setdefault(row.ours, []).append(row)
    # Largest first: the pieces read on the way are then small beside what is already there.
    for path in sorted(by_target, key=lambda p: -math.prod(shapes[p])):
        array = np.empty(shapes[path], dtype)
        for row in by_target[path]:
            arrange = None if row.copies() else row.to_ours
            tensors.read(found[names[row]], names[row], array[row.place], arrange)
        flat[path] = place(path, array)
    return weights.unflatten(flat)


def _widest(dtypes):
    """The dtype that holds all of them; float32 where bfloat16 and float16 meet, of which NumPy knows none."""
    try:
        return np.result_type(*dtypes)
    except TypeError:
        return np.result_type(np.float32, *(d for d in dtypes if d.itemsize > 2))


def from_arrays(rows, found, abstract, what):
    """`load` for tensors that are in memory: {name: NumPy array} -> the tree, float32. Raises UserError as `load` does."""
    names = _match(rows, found, what)
    flat = {
        path: np.empty(leaf.shape, np.float32) for path, leaf in weights.flatten(abstract).items()
    }
    _check_cover(rows, {path: array.shape for path, array in flat.items()})
    for row in rows:
        array = np.asarray(found[names[row]])
        if not np.isfinite(array).all():
            raise UserError(
                f"the weights of the {what} hold values of {names[row]} that are infinite or not numbers: get them again"
            )
        flat[row.ours][row.place] = row.to_ours(array)
    return weights.unflatten(flat)


def export(rows, params):
    """{foreign name: array}, the inverse of `load`. Arrays may be views. params: NumPy arrays."""
    flat = weights.flatten(params)
    _check_cover(rows, {path: a.shape for path, a in flat.items()})
    pieces, shapes = {}, {}
    for row in rows:  # tables list the chunks of one tensor in order
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


def _match(rows, found, what):
    """{row: name in the files}; exact or an error."""
    names, missing, wrong, doubled = {}, [], [], []
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


def _check_cover(rows, shapes):
    """Every element of every array of ours is filled exactly once; a table that fails is a mistake of ours."""
    twice = [
        name for (name, _), n in Counter((row.theirs, row.chunk) for row in rows).items() if n > 1
    ]
    if twice:
        raise ValueError(f"table names {twice[:3]} twice")
    filled = Counter()
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
