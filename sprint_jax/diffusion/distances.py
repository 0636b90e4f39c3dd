"""Distances of an error e = prediction - target from zero, one number a sample.

Gradients with respect to e differ in how large errors count: without bound (`square`), all alike
(`pseudo_huber`, `token_huber`), or the less the larger they are (`cauchy`, `adaptive`). Constants
are in units of one element, so they do not depend on the size of a sample.
"""

import jax
import jax.numpy as jnp

from sprint_jax.diffusion.flow import mean_per_sample
from sprint_jax.diffusion.types import PerSample, Samples, Scalar


def square(e: Samples) -> PerSample:
    """Return mean e^2."""
    return mean_per_sample(jnp.square(e))


def pseudo_huber(e: Samples, c: Scalar) -> PerSample:
    """Return sqrt(mean e^2 + c^2) - c. iCT's constant .00054 sqrt(D) on a sum is c = .00054."""
    return jnp.sqrt(square(e) + c * c) - c


def token_huber(e: Samples, c: Scalar) -> PerSample:
    """Return the mean over tokens of their `pseudo_huber`; a token is the last axis of e."""
    per_token = jnp.sqrt(jnp.square(e).mean(-1) + c * c) - c
    return mean_per_sample(per_token)


def cauchy(e: Samples, c: Scalar) -> PerSample:
    """Return log(1 + mean e^2 / (2 c^2)), the distance of sLCT."""
    return jnp.log1p(square(e) / (2 * c * c))


def adaptive(e: Samples, c: Scalar, p: float = 1.0) -> PerSample:
    """Return mean e^2 / sg(mean e^2 + c)^p, the weight of MeanFlow.

    MeanFlow writes sums over the D elements: its c is D times this one, and for p = 1 the loss is
    the same.
    """
    m = square(e)
    return m / jax.lax.stop_gradient(m + c) ** p
