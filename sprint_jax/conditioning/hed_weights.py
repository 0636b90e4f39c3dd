"""The weights of ControlNet's edge detector: the published file, or a safetensors file with the same names."""

import pathlib

import jax
import numpy as np

from sprint_jax import weights
from sprint_jax.conversion import rules, state_dicts, tables, tensors
from sprint_jax.errors import UserError

FILE = "ControlNetHED.pth"
_GIVE = f"give {FILE} (of lllyasviel/Annotators), or what --save_weights made of it"


def load(path, model):
    """Parameters of a `models.hed.HED`, NumPy float32, from a .pth (needs PyTorch) or .safetensors file by the published names.

    Raises UserError naming the file for one that is not there, not whole, or of another network.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"no HED weights at {path}: {_GIVE}")
    rows, abstract = tables.hed(model), jax.eval_shape(model.init, jax.random.key(0))
    pickled, what = path.suffix != ".safetensors", f"HED detector {path}"
    elsewhere = f"run sprint_jax.condition there with --weights={path} --save_weights=FILE.safetensors, and give that file"
    found = state_dicts.read(path, elsewhere) if pickled else tensors.scan(path)
    try:
        if pickled:
            return rules.from_arrays(rows, found, abstract, what)
        return rules.load(rows, found, abstract, np.float32, what)
    except UserError as error:
        raise UserError(f"{error}: {_GIVE}") from None


def save(source, target, model):
    """Writes the weights of `load(source, model)` as safetensors by the published names, whole or not at all."""
    weights.save(target, rules.export(tables.hed(model), load(source, model)))
