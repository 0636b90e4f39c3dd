"""Flow matching: path, target, time sampling and loss (paper section 2.1; teacher training).

    x_t = (1 - t) x0 + t z,   z ~ N(0, I),   t in [0, 1]
    target velocity dx_t/dt = z - x0

Symbols: x0 data at unit scale [B, ...], z noise, xt state, t time [B], v(xt, t) the network.
"""

import jax
import jax.numpy as jnp


def expand(t, x):
    """t [B] -> [B, 1, ..., 1], to broadcast against x."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def mean_per_sample(x):
    """[B, ...] -> [B], the mean over everything but the batch."""
    return x.reshape(x.shape[0], -1).mean(-1)


def interpolate(x0, z, t):
    """The path x_t = (1 - t) x0 + t z."""
    t = expand(t, x0)
    return (1 - t) * x0 + t * z


def sample_time(key, batch, *, mean, std, shift):
    """Logit-normal times, shifted towards noise.

    t = sigmoid(n), n ~ N(mean, std^2), then t <- shift t / (1 + (shift - 1) t). The published trainer
    reads t off a grid of 1000; here it is continuous.

    Returns: [batch] float32 in (0, 1).
    """
    t = jax.nn.sigmoid(mean + std * jax.random.normal(key, (batch,)))
    return shift * t / (1 + (shift - 1) * t)


def loss(v, x0, z, t):
    """Mean squared velocity error of each sample.

    Args:
      v: callable (xt [B, ...], t [B]) -> [B, ...].
      x0, z: data and noise at unit scale [B, ...]; t: [B].
    Returns:
      [B].
    """
    xt = interpolate(x0, z, t)
    return mean_per_sample(jnp.square(v(xt, t) - (z - x0)))


def guided(v_uncond, v_cond, w):
    """Classifier-free guidance v_u + w (v_c - v_u), w [B]."""
    return v_uncond + expand(w, v_cond) * (v_cond - v_uncond)


def guided_halves(f, w):
    """Return x, t -> guided f, evaluating both halves of the guidance in one call.

    f: callable on 2B samples, whose conditions are B unconditional ones and then B conditional ones. w: [B].
    """

    def guided_f(x, t):
        both = f(jnp.concatenate([x, x]), jnp.concatenate([t, t]))
        uncond, cond = jnp.split(both, 2)
        return guided(uncond, cond, w)

    return guided_f
