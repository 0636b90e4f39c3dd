"""Random arrays for tests, and how far two arrays differ."""

from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike, DTypeLike


def normals(*shape: int, seed: int = 0) -> np.ndarray:
    """Return one array of standard normal numbers, float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def normal_arrays(
    *shapes: tuple[int, ...], seed: int = 0, dtype: DTypeLike = np.float32
) -> tuple[np.ndarray, ...]:
    """Return arrays of standard normal numbers, one for each shape, all from one generator."""
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def max_error(value: ArrayLike, expected: ArrayLike) -> float:
    """Return the largest absolute difference divided by the largest absolute expected entry."""
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    return np.abs(value - expected).max() / np.abs(expected).max()


def relative_error(value: ArrayLike, expected: ArrayLike) -> float:
    """Return the Euclidean norm of the difference divided by that of the expected array.

    Raises AssertionError if the shapes differ.
    """
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    assert value.shape == expected.shape
    return np.linalg.norm(value - expected) / max(np.linalg.norm(expected), 1e-300)


def tree_error(value: Any, expected: Any) -> float:
    """Return the largest `relative_error` over the leaves of two trees of the same structure."""
    pairs = zip(jax.tree.leaves(value), jax.tree.leaves(expected), strict=True)
    return max(relative_error(a, b) for a, b in pairs)


def same_bits(one: Any, other: Any) -> bool:
    """Return whether two trees are bit-equal; NaN equals nothing."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)
