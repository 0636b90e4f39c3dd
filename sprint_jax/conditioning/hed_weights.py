"""Weights of ControlNet's edge detector, from the published .pth file or as safetensors.

Both kinds of file use the published names.
"""

import os
import pathlib
from typing import Any

import numpy as np

from sprint_jax.conditioning.hed import HED
from sprint_jax.conversion import rules
from sprint_jax.conversion.rules import Row
from sprint_jax.errors import UserError
from sprint_jax.storage import safetensors_files, torch_files, weights

FILE = "ControlNetHED.pth"
_GIVE = f"give {FILE} (of lllyasviel/Annotators), or the file that --save_weights wrote from it"


def load(path: str | os.PathLike[str], model: HED) -> dict[str, Any]:
    """Read the parameters of `model` as NumPy float32. A .pth file needs PyTorch.

    Raises UserError if the file is missing, damaged or of another network.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"no HED weights at {path}: {_GIVE}")
    table, abstract = rows(model), weights.abstract(model)
    pickled, what = path.suffix != ".safetensors", f"HED detector {path}"
    elsewhere = (
        f"run sprint-jax condition there with --weights={path} --save_weights=FILE.safetensors, "
        "and give that file"
    )
    # A damaged file is reported as it is; only an error of the fit says which file to give.
    arrays = torch_files.read(path, elsewhere) if pickled else {}
    found = {} if pickled else safetensors_files.scan(path)
    try:
        if pickled:
            return rules.from_arrays(table, arrays, abstract, what)
        return rules.load(table, found, abstract, np.float32, what)
    except UserError as error:
        raise UserError(f"{error}: {_GIVE}") from None


def save(source: str | os.PathLike[str], target: str | os.PathLike[str], model: HED) -> None:
    """Write the weights of `load(source, model)` to a safetensors file, atomically."""
    weights.save(target, rules.export(rows(model), load(source, model)))


def rows(m: HED) -> list[Row]:
    """Return the table of `ControlNetHED_Apache2`, whose blocks count from 1."""
    table, into = [Row("norm", (1, 3, 1, 1), "offset", "channels")], 3
    for i, (width, convs) in enumerate(zip(m.widths, m.convs, strict=True)):
        block, stage = f"block{i + 1}", f"stages.{i}"
        for j in range(convs):
            table.append(
                Row(
                    f"{block}.convs.{j}.weight",
                    (width, into, 3, 3),
                    f"{stage}.convs.{j}.kernel",
                    "conv",
                )
            )
            table.append(Row(f"{block}.convs.{j}.bias", (width,), f"{stage}.convs.{j}.bias"))
            into = width
        table.append(
            Row(f"{block}.projection.weight", (1, width, 1, 1), f"{stage}.side.kernel", "conv1x1")
        )
        table.append(Row(f"{block}.projection.bias", (1,), f"{stage}.side.bias"))
    return table
