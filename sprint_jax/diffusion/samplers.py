"""Samplers: few-step SCM for the student, TrigFlow rotation and flow Euler for the teacher.

Each takes a network as a callable, noise as arrays and a list of times that ends in 0, and returns
clean latents at unit scale. Steps are a `lax.scan`, so compile time does not grow with their
number.

Symbols: F(u, t) TrigFlow network, v(x, t) flow network, s -> t one step.
"""

import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sprint_jax.diffusion import flow_map, trigflow
from sprint_jax.diffusion.flow import expand
from sprint_jax.diffusion.types import Network, Samples
from sprint_jax.errors import UserError

SIGMA_D = trigflow.SIGMA_D
PUBLISHED_T_MAX = 1.57080  # the released code's pi/2, 3.7e-6 too large
SCHEDULES = ("code", "paper", "even")

# Paper Table 7; the search found them one after the other. arctan(200 / 0.5) = 1.56830.
_PAPER = {
    1: (math.pi / 2, 0.0),
    2: (math.atan(400.0), 1.3, 0.0),
    4: (math.atan(400.0), 1.3, 1.1, 0.6, 0.0),
}

Times: TypeAlias = Float[Array | np.ndarray, " n"]  # decreasing, ending in 0


def scm_times(steps: int, schedule: str = "code") -> Float[np.ndarray, " n"]:
    """Return the angles of the few-step sampler, steps + 1 of them, ending in 0.

    Args:
      steps: 1 or more.
      schedule: "code" is the released sampler (2 steps: 1.57080, 1.3, 0; else evenly spaced from
        1.57080). "paper" is Table 7 and exists for 1, 2 and 4 steps. "even" is evenly spaced in
        flow time, for students that jump between any two times.

    Raises:
      UserError: for other steps or schedules.
    """
    if steps < 1:
        raise UserError(f"steps {steps}: use 1 or more")
    if schedule == "paper":
        if steps not in _PAPER:
            raise UserError(
                f"schedule 'paper' has no list for {steps} steps: use 1, 2 or 4, or 'code'"
            )
        return np.array(_PAPER[steps], np.float32)
    if schedule == "even":
        t = np.linspace(1, 0, steps + 1)
        return np.arctan2(t, 1 - t).astype(np.float32)
    if schedule != "code":
        raise UserError(f"schedule {schedule!r}: use one of {', '.join(SCHEDULES)}")
    if steps == 2:
        return np.array([PUBLISHED_T_MAX, 1.3, 0.0], np.float32)
    return np.linspace(PUBLISHED_T_MAX, 0, steps + 1, dtype=np.float32)


def trig_times(steps: int) -> Float[np.ndarray, " n"]:
    """Return evenly spaced angles from pi/2 to 0, steps + 1 of them."""
    return np.linspace(trigflow.T_MAX, 0, steps + 1, dtype=np.float32)


def flow_times(steps: int, shift: float = 1.0) -> Float[np.ndarray, " n"]:
    """Return flow times from 1 to 0, steps + 1 of them, shifted toward noise.

    Evenly spaced times become t <- shift t / (1 + (shift - 1) t).
    """
    t = np.linspace(1, 0, steps + 1)
    return (shift * t / (1 + (shift - 1) * t)).astype(np.float32)


def scm(
    F: Network,
    noise: Samples,
    step_noise: Float[Array, "k b *d"],
    times: Times,
    start: Samples | None = None,
) -> Samples:
    """Sample by multi-step consistency (paper section 2.2; released `SCMScheduler`).

        x0_hat = cos(s) x - sin(s) sigma_d F(x / sigma_d, s)
        x <- cos(t) x0_hat + sin(t) sigma_d noise

    Args:
      F: the TrigFlow network.
      noise: unit-variance start.
      step_noise: unit-variance draws between steps, one less than steps. The released code also
        draws one at t = 0, where it is multiplied by sin 0.
      times: angles, steps + 1 of them.
      start: clean latents at unit scale to begin from (img2img). Then x = sigma_d (cos(s) start +
        sin(s) noise) at the first time s. None begins from noise alone.

    Returns:
      The last x0_hat / sigma_d, at unit scale.

    Raises:
      ValueError: for another number of draws.
    """
    times = jnp.asarray(times)
    if step_noise.shape[0] != times.shape[0] - 2:
        raise ValueError(f"{step_noise.shape[0]} step noises for {times.shape[0] - 1} steps")
    angles = jnp.broadcast_to(times[:, None], (times.shape[0], noise.shape[0]))
    x = _before_last(F, _first(noise, times, start), step_noise, angles[:-1])
    return trigflow.denoise(F(x / SIGMA_D, angles[-2]), x, angles[-2]) / SIGMA_D


def simulate(
    F: Network,
    noise: Samples,
    step_noise: Float[Array, "k b *d"],
    times: Float[Array, "n b"],
) -> Samples:
    """Return the state at scale sigma_d before the last call of `scm`, stopped.

    So a loss can send its gradient through the last call alone ("backward simulation").

    Args:
      F, noise, step_noise: those of `scm`.
      times: angles of every call and sample, without the 0 at the end.
    """
    return jax.lax.stop_gradient(_before_last(F, SIGMA_D * noise, step_noise, times))


def _before_last(F, x, step_noise, times):
    """Renoise the network's predictions from each time to the next."""

    def step(x, inputs):
        s, t, z = inputs
        t = expand(t, x)
        clean = trigflow.denoise(F(x / SIGMA_D, s), x, s)
        return jnp.cos(t) * clean + jnp.sin(t) * SIGMA_D * z, None

    if times.shape[0] > 1:  # an empty loop would still be traced and compiled
        x, _ = jax.lax.scan(step, x, (times[:-1], times[1:], step_noise))
    return x


def _first(noise, times, start):
    """Return the first state, at the first time: of noise alone, or from clean latents."""
    if start is None:
        return SIGMA_D * noise
    return SIGMA_D * (jnp.cos(times[0]) * start + jnp.sin(times[0]) * noise)


def trigflow_euler(F: Network, noise: Samples, times: Times) -> Samples:
    """Sample by first-order rotation along the PF-ODE.

        x_t = cos(s - t) x_s - sin(s - t) sigma_d F(x_s / sigma_d, s)

    The arguments and the result are those of `scm`, without draws between steps.
    """

    def step(x, st):
        s, t = st
        F_s = F(x / SIGMA_D, jnp.full((x.shape[0],), s))
        return jnp.cos(s - t) * x - jnp.sin(s - t) * SIGMA_D * F_s, None

    times = jnp.asarray(times)
    x, _ = jax.lax.scan(step, SIGMA_D * noise, (times[:-1], times[1:]))
    return x / SIGMA_D


def jumps(
    F: flow_map.Stopped, noise: Samples, times: Times, start: Samples | None = None
) -> Samples:
    """Sample a flow map by one jump from each time to the next, without noise between them.

        x_r = cos(t - r) x_t - sin(t - r) sigma_d F(x_t / sigma_d, t, r)

    F: (u, t, r) -> F, as in `diffusion.flow_map`. start and the result are those of `scm`.
    """
    times = jnp.asarray(times)

    def step(x, tr):
        t, r = (jnp.full((x.shape[0],), angle) for angle in tr)
        return flow_map.jump(F(x / SIGMA_D, t, r), x, t - r), None

    x, _ = jax.lax.scan(step, _first(noise, times, start), (times[:-1], times[1:]))
    return x / SIGMA_D


def flow_euler(v: Network, noise: Samples, times: Times) -> Samples:
    """Sample by Euler steps of dx/dt = v(x, t) in flow time. times: from 1 to 0."""

    def step(x, st):
        s, t = st
        return x + (t - s) * v(x, jnp.full((x.shape[0],), s)), None

    times = jnp.asarray(times)
    x, _ = jax.lax.scan(step, noise, (times[:-1], times[1:]))
    return x
