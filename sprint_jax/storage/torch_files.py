"""PyTorch's own weight files, for networks that are published in no other form.

Other code opens safetensors only.
"""

import os

import numpy as np

from sprint_jax.errors import UserError
from sprint_jax.storage import signatures


def read(path: str | os.PathLike, elsewhere: str) -> dict[str, np.ndarray]:
    """Return {name: array} of a .pth file, without running any code of the file. Needs PyTorch.

    elsewhere: what to do on a machine with PyTorch, for the error line if it is missing here.
    Raises UserError if PyTorch is missing or the file is no state dict. Callers check that weights
    are finite.
    """
    try:
        import torch
    except ImportError:
        _refuse_others(path)
        raise UserError(
            f"{path} can only be read where PyTorch is installed: {elsewhere}"
        ) from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: _array(value) for name, value in state.items()}
    except Exception as error:  # the library raises many kinds for a damaged file
        _refuse_others(path)
        why = " ".join(str(error).split())[:120]
        raise UserError(
            f"{path} is not a state dict of PyTorch ({why}): download it again"
        ) from None


def _refuse_others(path):
    """Raise UserError for a file that is known to be of another kind."""
    found = signatures.describe(path)
    if found and "PyTorch" not in found:
        raise UserError(f"{path} is no state dict of PyTorch but {found}") from None


def _array(value):
    """Return a tensor as NumPy has it; bfloat16, which NumPy lacks, as float32."""
    return (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
