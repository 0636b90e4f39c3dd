"""A Fréchet distance of images on the features of a fixed random network.

It is not FID: values are comparable only with each other. The network has three convolutions with
seeded random weights. An image has 64 features, the means and standard deviations of the channels
of each layer. Statistics are float64.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

DIM = 64
_SEED = 7
_WIDTHS = (8, 12, 12)  # 32 channels in all: 32 means and 32 deviations

Moments: TypeAlias = tuple[np.ndarray, np.ndarray]  # mean [D], covariance [D, D]


def _kernels() -> list[np.ndarray]:
    # The streams of RandomState never change, so distances are comparable across NumPy versions.
    rng = np.random.RandomState(_SEED)
    kernels, channels = [], 3
    for width in _WIDTHS:
        kernels.append(rng.randn(3, 3, channels, width).astype(np.float32) / np.sqrt(9 * channels))
        channels = width
    return kernels


@jax.jit
def _apply(x: jax.Array, kernels: list[jax.Array]) -> jax.Array:
    pooled = []
    for kernel in kernels:
        x = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.leaky_relu(x, 0.2)
        pooled += [x.mean((1, 2)), x.std((1, 2))]
    return jnp.concatenate(pooled, -1)


def features(images: np.ndarray) -> np.ndarray:
    """Return the features of images, uint8 [B, S, S, 3], as float64 [B, DIM]."""
    kernels = _kernels()
    chunks = [images[i : i + 128] for i in range(0, len(images), 128)]
    scaled = (np.asarray(c, np.float32) / 127.5 - 1 for c in chunks)
    return np.concatenate([np.asarray(_apply(x, kernels), np.float64) for x in scaled])


def moments(features: np.ndarray) -> Moments:
    """Return the mean [D] and the covariance [D, D] of features [B, D]."""
    return features.mean(0), np.cov(features, rowvar=False)


def trace_of_root(a: np.ndarray, b: np.ndarray) -> float:
    """Return tr((a b)^(1/2)) of two covariances [D, D], as the sum of the roots of eigenvalues."""
    # For covariances of any rank the eigenvalues are real and nonnegative, except for rounding.
    eigenvalues = scipy.linalg.eigvals(a @ b)
    return np.sqrt(np.clip(np.real(eigenvalues), 0, None)).sum()


def distance(
    a: Moments,
    b: Moments,
    trace_of_root: Callable[[np.ndarray, np.ndarray], float] = trace_of_root,
) -> float:
    """Return |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two Gaussians."""
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    root = trace_of_root(cov_a, cov_b)
    return float(np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root)
