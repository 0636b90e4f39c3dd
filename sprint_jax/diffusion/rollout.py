"""Rollouts: the states that a teacher passes through from noise to data.

A step from t to t' = t - d in flow coordinates is

    order 1 (Euler)               x <- x - d v(x, t)
    order 2 (Adams-Bashforth)     x <- x - d [(1 + d / 2d') v(x, t) - d / 2d' v']

with v' and d' of the step before; the first step is Euler's. So a rollout of second order needs no
more calls than one of first order. TrigFlow's rotation step is the Euler step here. The same
extrapolation inside the rotation would count the curvature twice.

Symbols: v(x, t) the guided teacher's flow velocity, z noise, K steps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sprint_jax.diffusion.samplers import Times
from sprint_jax.diffusion.types import Network, Samples

ORDERS = (1, 2)


class Rollout(NamedTuple):
    """A rollout.

    states: at all times, from the noise to the end. velocities: of the teacher at all states but
    the last.
    """

    states: Float[Array, "k b *d"]
    velocities: Float[Array, "j b *d"]


def rollout(v: Network, z: Samples, times: Times, *, order: int) -> Rollout:
    """Follow the teacher from z along the times, which all samples share. No gradient passes.

    Args:
      v: the flow network.
      z: unit-variance noise.
      times: flow times, K + 1 of them, from 1 down to 0 for a whole route.
      order: 1 or 2.

    Raises:
      ValueError: for another order.
    """
    if order not in ORDERS:
        raise ValueError(f"order {order}: use 1 or 2")
    times = jnp.asarray(times)

    def step(carry, st):
        x, before, d_before = carry
        s, t = st
        now, d = v(x, jnp.full((x.shape[0],), s)), s - t
        k = d / (2 * d_before) if order == 2 else jnp.zeros(())  # 0 in the first step
        x = x - d * ((1 + k) * now - k * before)
        return (x, now, d), (x, now)

    start = (z, jnp.zeros_like(z), jnp.asarray(jnp.inf, z.dtype))
    _, (after, velocities) = jax.lax.scan(step, start, (times[:-1], times[1:]))
    return jax.lax.stop_gradient(Rollout(jnp.concatenate([z[None], after]), velocities))


def tbcm_times(steps: int, shift: float) -> Float[np.ndarray, " n"]:
    """Return the flow times of TBCM's route from 1 to 0, steps + 1 of them.

    The published code shifts twice: the ends of a grid from 1 to .001, and the evenly spaced times
    between them again. Its route ends at the last but one of these times, whose velocity it needs.
    """
    shifted = lambda t: shift * t / (1 + (shift - 1) * t)
    times = shifted(np.linspace(shifted(1.0), shifted(1e-3), steps))
    return np.append(times, 0.0).astype(np.float32)


def jittered(key: PRNGKeyArray, times: Times) -> Float[Array, " n"]:
    """Draw each time but the first between itself and the one before, uniformly (TBCM).

    One draw serves all samples, and follows from the key alone.
    """
    times = jnp.asarray(times)
    share = jax.random.uniform(key, (times.shape[0] - 1,))
    return jnp.concatenate([times[:1], times[1:] + share * (times[:-1] - times[1:])])
