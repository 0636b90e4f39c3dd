"""TrigFlow and its lossless exchange with flow matching (paper Prop. 3.1, Eq. 6-8).

    x_t = cos(t) x0 + sin(t) z,   x0 = sigma_d * data,   z ~ N(0, sigma_d^2 I),   t in [0, pi/2]
    PF-ODE   dx_t/dt = sigma_d F(x_t / sigma_d, t)
    Eq. (4)  f(x_t, t) = cos(t) x_t - sin(t) sigma_d F(x_t / sigma_d, t)

Networks F take the state at unit scale, u = x_t / sigma_d, and the angle t, and answer at unit scale.
All of this is differentiable in both modes and runs in float32.
"""

import math

import jax
import jax.numpy as jnp

from sprint_jax.diffusion.flow import expand

SIGMA_D = 0.5
T_MAX = math.pi / 2  # the published code writes 1.57080, which is 3.7e-6 beyond


def to_flow_time(t):
    """Eq. (6): t_FM = sin t / (sin t + cos t)."""
    return jnp.sin(t) / (jnp.sin(t) + jnp.cos(t))


def from_flow_time(t_fm):
    """The inverse of Eq. (6): t = atan2(t_FM, 1 - t_FM)."""
    return jnp.arctan2(t_fm, 1 - t_fm)


def flow_norm(t_fm):
    """sqrt(t_FM^2 + (1 - t_FM)^2), the factor between the two states."""
    return jnp.sqrt(jnp.square(t_fm) + jnp.square(1 - t_fm))


def to_flow_state(u, t):
    """Eq. (7): x_FM = u * sqrt(t_FM^2 + (1 - t_FM)^2), with u = x_Trig / sigma_d and t the angle [B]."""
    return u * expand(flow_norm(to_flow_time(t)), u)


def from_flow_state(x_fm, t_fm):
    """The inverse of Eq. (7): u from x_FM and the flow time t_FM [B]."""
    return x_fm / expand(flow_norm(t_fm), x_fm)


def from_flow_velocity(v, x_fm, t_fm):
    """Eq. (8): F = [(1 - 2 t_FM) x_FM + (1 - 2 t_FM + 2 t_FM^2) v] / sqrt(t_FM^2 + (1 - t_FM)^2)."""
    t = expand(t_fm, x_fm)
    return ((1 - 2 * t) * x_fm + (1 - 2 * t + 2 * t * t) * v) / flow_norm(t)


def to_flow_velocity(F, u, t):
    """The inverse of Eq. (8): v from F, the unit-scale TrigFlow state u and the angle t [B]."""
    t_fm = expand(to_flow_time(t), u)
    x_fm = u * flow_norm(t_fm)
    return (F * flow_norm(t_fm) - (1 - 2 * t_fm) * x_fm) / (1 - 2 * t_fm + 2 * t_fm * t_fm)


def from_flow(v):
    """Turns a flow-matching network v(x_FM, t_FM) into a TrigFlow network F(u, t), without training."""

    def F(u, t):
        u = u.astype(jnp.float32)
        t_fm = to_flow_time(t)
        x_fm = to_flow_state(u, t)
        return from_flow_velocity(v(x_fm, t_fm), x_fm, t_fm)

    return F


def to_flow(F):
    """Turns a TrigFlow network F(u, t) into a flow-matching network v(x_FM, t_FM)."""

    def v(x_fm, t_fm):
        t = from_flow_time(t_fm)
        u = from_flow_state(x_fm, t_fm)
        return to_flow_velocity(F(u, t), u, t)

    return v


def interpolate(x0, z, t):
    """The path x_t = cos(t) x0 + sin(t) z; x0 and z at scale sigma_d, t [B]."""
    t = expand(t, x0)
    return jnp.cos(t) * x0 + jnp.sin(t) * z


def denoise(F_value, xt, t):
    """Eq. (4): x0_hat = cos(t) x_t - sin(t) sigma_d F. xt at scale sigma_d, t [B]."""
    t = expand(t, xt)
    return jnp.cos(t) * xt - jnp.sin(t) * SIGMA_D * F_value


def sample_time(key, batch, *, mean, std):
    """t = arctan(e^n / sigma_d), n ~ N(mean, std^2): the time sampler of sCM and of the renoising."""
    n = mean + std * jax.random.normal(key, (batch,))
    return jnp.arctan(jnp.exp(n) / SIGMA_D)


def with_max_time(key, t, probability):
    """Max-time weighting (section 3.3): each entry of t becomes pi/2 with the given probability."""
    return jnp.where(jax.random.bernoulli(key, probability, t.shape), T_MAX, t)
