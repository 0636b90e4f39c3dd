"""TrigFlow and its lossless exchange with flow matching (paper Prop. 3.1, Eq. 6-8).

    x_t = cos(t) x0 + sin(t) z,   x0 = sigma_d * data,   z ~ N(0, sigma_d^2 I),   t in [0, pi/2]
    PF-ODE   dx_t/dt = sigma_d F(x_t / sigma_d, t)
    Eq. (4)  f(x_t, t) = cos(t) x_t - sin(t) sigma_d F(x_t / sigma_d, t)

Networks F take the state at unit scale, u = x_t / sigma_d, and the angle t, and predict at unit
scale. All functions are differentiable in both modes and run in float32.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from sprint_jax.diffusion.flow import expand
from sprint_jax.diffusion.types import Network, PerSample, Samples, Scalar

SIGMA_D = 0.5
T_MAX = math.pi / 2  # the published code writes 1.57080, which is 3.7e-6 larger


def to_flow_time(t: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Return t_FM = sin t / (sin t + cos t), Eq. (6)."""
    return jnp.sin(t) / (jnp.sin(t) + jnp.cos(t))


def from_flow_time(t_fm: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Invert Eq. (6): t = atan2(t_FM, 1 - t_FM)."""
    return jnp.arctan2(t_fm, 1 - t_fm)


def flow_norm(t_fm: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Return sqrt(t_FM^2 + (1 - t_FM)^2), the factor between the two states."""
    return jnp.sqrt(jnp.square(t_fm) + jnp.square(1 - t_fm))


def to_flow_state(u: Samples, t: PerSample) -> Samples:
    """Return x_FM = u sqrt(t_FM^2 + (1 - t_FM)^2), Eq. (7), of u = x_Trig / sigma_d at angle t."""
    return u * expand(flow_norm(to_flow_time(t)), u)


def from_flow_state(x_fm: Samples, t_fm: PerSample) -> Samples:
    """Invert Eq. (7): return u of x_FM at the flow time t_FM."""
    return x_fm / expand(flow_norm(t_fm), x_fm)


def from_flow_velocity(v: Samples, x_fm: Samples, t_fm: PerSample) -> Samples:
    """Return F of a flow velocity, Eq. (8).

    F = [(1 - 2 t_FM) x_FM + (1 - 2 t_FM + 2 t_FM^2) v] / sqrt(t_FM^2 + (1 - t_FM)^2)
    """
    t = expand(t_fm, x_fm)
    return ((1 - 2 * t) * x_fm + (1 - 2 * t + 2 * t * t) * v) / flow_norm(t)


def to_flow_velocity(F: Samples, u: Samples, t: PerSample) -> Samples:
    """Invert Eq. (8): return v of F, the unit-scale TrigFlow state u and the angle t."""
    t_fm = expand(to_flow_time(t), u)
    x_fm = u * flow_norm(t_fm)
    return (F * flow_norm(t_fm) - (1 - 2 * t_fm) * x_fm) / (1 - 2 * t_fm + 2 * t_fm * t_fm)


def from_flow(v: Network) -> Network:
    """Turn a flow-matching network v(x_FM, t_FM) into a TrigFlow network F(u, t), untrained."""

    def F(u, t):
        u = u.astype(jnp.float32)
        t_fm = to_flow_time(t)
        x_fm = to_flow_state(u, t)
        return from_flow_velocity(v(x_fm, t_fm), x_fm, t_fm)

    return F


def to_flow(F: Network) -> Network:
    """Turn a TrigFlow network F(u, t) into a flow-matching network v(x_FM, t_FM)."""

    def v(x_fm, t_fm):
        t = from_flow_time(t_fm)
        u = from_flow_state(x_fm, t_fm)
        return to_flow_velocity(F(u, t), u, t)

    return v


def interpolate(x0: Samples, z: Samples, t: PerSample) -> Samples:
    """Return the path x_t = cos(t) x0 + sin(t) z, with x0 and z at scale sigma_d."""
    t = expand(t, x0)
    return jnp.cos(t) * x0 + jnp.sin(t) * z


def denoise(F_value: Samples, xt: Samples, t: PerSample) -> Samples:
    """Return x0_hat = cos(t) x_t - sin(t) sigma_d F, Eq. (4), with xt at scale sigma_d."""
    t = expand(t, xt)
    return jnp.cos(t) * xt - jnp.sin(t) * SIGMA_D * F_value


def sample_time(
    key: PRNGKeyArray, batch: int, *, mean: Scalar, std: Scalar
) -> Float[Array, " {batch}"]:
    """Draw t = arctan(e^n / sigma_d), n ~ N(mean, std^2), the times of sCM and of renoising."""
    n = mean + std * jax.random.normal(key, (batch,))
    return jnp.arctan(jnp.exp(n) / SIGMA_D)


def with_max_time(
    key: PRNGKeyArray, t: Float[Array, "*s"], probability: Scalar
) -> Float[Array, "*s"]:
    """Replace each entry of t by pi/2 with the given probability (max-time weighting, 3.3)."""
    return jnp.where(jax.random.bernoulli(key, probability, t.shape), T_MAX, t)
