"""Flow matching: path, target, time sampling and loss (paper section 2.1; teacher training).

    x_t = (1 - t) x0 + t z,   z ~ N(0, I),   t in [0, 1]
    target velocity dx_t/dt = z - x0

Symbols: x0 data at unit scale [B, ...], z noise, xt state, t time [B], v(xt, t) the network.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from sprint_jax.diffusion.types import Network, PerSample, Samples, Scalar


def expand(t: Shaped[Array, "*s"], x: Shaped[Array, "*d"]) -> Shaped[Array, "*e"]:
    """Reshape t [B] to [B, 1, ..., 1], to broadcast against x [B, ...]."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def mean_per_sample(x: Samples) -> PerSample:
    """Return the mean over everything but the batch."""
    return x.reshape(x.shape[0], -1).mean(-1)


def interpolate(x0: Samples, z: Samples, t: PerSample) -> Samples:
    """Return the path x_t = (1 - t) x0 + t z."""
    t = expand(t, x0)
    return (1 - t) * x0 + t * z


def sample_time(
    key: PRNGKeyArray, batch: int, *, mean: Scalar, std: Scalar, shift: Scalar
) -> Float[Array, " {batch}"]:
    """Draw logit-normal times in (0, 1), shifted toward noise, float32.

    t = sigmoid(n), n ~ N(mean, std^2), then t <- shift t / (1 + (shift - 1) t). The published
    trainer reads t off a grid of 1000; here it is continuous.
    """
    t = jax.nn.sigmoid(mean + std * jax.random.normal(key, (batch,)))
    return shift * t / (1 + (shift - 1) * t)


def denoise(v: Samples, xt: Samples, t: PerSample) -> Samples:
    """Return x0_hat = x_t - t v, where a straight line along the velocity ends."""
    return xt - expand(t, xt) * v


def loss(v: Network, x0: Samples, z: Samples, t: PerSample) -> PerSample:
    """Return the mean squared velocity error of each sample.

    Args:
      v: the network.
      x0, z: data and noise at unit scale.
      t: times.
    """
    xt = interpolate(x0, z, t)
    return mean_per_sample(jnp.square(v(xt, t) - (z - x0)))


def guided(v_uncond: Samples, v_cond: Samples, w: PerSample) -> Samples:
    """Apply classifier-free guidance, v_u + w (v_c - v_u)."""
    return v_uncond + expand(w, v_cond) * (v_cond - v_uncond)


def guided_halves(f: Network, w: PerSample) -> Network:
    """Return the guided network, which evaluates both halves of the guidance in one call.

    Args:
      f: network on 2B samples, with B unconditional conditions and then B conditional ones.
      w: guidance scale of each of the B samples.
    """

    def guided_f(x, t):
        both = f(jnp.concatenate([x, x]), jnp.concatenate([t, t]))
        uncond, cond = jnp.split(both, 2)
        return guided(uncond, cond, w)

    return guided_f
