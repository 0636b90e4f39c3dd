"""Checks of jaxtyping's shapes while tests run.

Functions of the checked rooms raise `jaxtyping.TypeCheckError` if an argument or a result has
another type, kind of dtype or shape than their signature says.
"""

import jax
import jaxtyping
import numpy as np
from beartype import BeartypeConf, beartype

# An int is a float, as for type checkers.
_CHECKED = beartype(conf=BeartypeConf(is_pep484_tower=True))

ROOMS = ("sprint_jax.diffusion", "sprint_jax.models")


def install():
    """Check the rooms' functions. Call it before any of their modules is imported.

    NumPy arrays count as arrays, since JAX functions accept them.
    """
    jaxtyping.Array = jax.Array | np.ndarray
    jaxtyping.install_import_hook(ROOMS, f"{__name__}.check")


def check(function):
    """Return the function with checked arguments and result.

    The constructors of dataclasses stay unchecked: JAX fills containers with shapes, tracers and
    placeholders.
    """
    return function if function.__name__ == "__init__" else _CHECKED(function)
