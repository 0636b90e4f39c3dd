"""A Fréchet distance on fixed, seeded, untrained features. It is not FID and is comparable only with itself.

Features are those of a small random convolutional network: means and deviations over space of three
layers, 64 numbers a picture. Statistics are in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

DIM = 64
_SEED = 7
_WIDTHS = (8, 12, 12)  # (8 + 12 + 12) means and as many deviations


def _kernels():
    # RandomState: its streams never change, so distances can be compared across versions.
    rng = np.random.RandomState(_SEED)
    kernels, channels = [], 3
    for width in _WIDTHS:
        kernels.append(rng.randn(3, 3, channels, width).astype(np.float32) / np.sqrt(9 * channels))
        channels = width
    return kernels


@jax.jit
def _features(x, kernels):
    pooled = []
    for kernel in kernels:
        x = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.leaky_relu(x, 0.2)
        pooled += [x.mean((1, 2)), x.std((1, 2))]
    return jnp.concatenate(pooled, -1)


def features(images):
    """uint8 [B, S, S, 3] -> float64 [B, DIM]."""
    kernels = _kernels()
    chunks = [images[i : i + 128] for i in range(0, len(images), 128)]
    scaled = (np.asarray(c, np.float32) / 127.5 - 1 for c in chunks)
    return np.concatenate([np.asarray(_features(x, kernels), np.float64) for x in scaled])


def moments(features):
    """[B, D] -> mean [D], covariance [D, D]."""
    return features.mean(0), np.cov(features, rowvar=False)


def distance(a, b):
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two (mean, covariance) pairs."""
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    # The trace of the root of C_a C_b is the sum of the roots of its eigenvalues, which are real and
    # not negative up to rounding, whatever the rank.
    eigenvalues = scipy.linalg.eigvals(cov_a @ cov_b)
    root = np.sqrt(np.clip(eigenvalues.real, 0, None)).sum()
    return float(np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root)
