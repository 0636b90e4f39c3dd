"""Distribution matching distillation, DMD (Yin et al. 2023; DMD2: Yin et al. 2024).

    y = cos(tau) x + sin(tau) n                     the student's image x, renoised
    g = (X_Phi(y, tau) - X_T(y, tau)) / mean |x - X_T|
    L = 1/2 mean (x - sg(x - g))^2                  so dL/dx = g / D
    L_Phi = mean (F_Phi(y / sigma_d, tau) - (cos(tau) n - sin(tau) x) / sigma_d)^2

X are predictions of the clean image, of the guided teacher T and of a critic Phi, which learns by
flow matching what the student makes. X_Phi - X_T is sigma_d^2 sin^2(tau) / cos(tau) times the
difference of the scores, so L descends KL(p_student || p_teacher) of the renoised images. With an
exact critic and without the divisor, for a student N(m, s^2) and data N(mu, a^2),

    dL/dm = (m - mu) E[sigma_d^2 sin^2 / R],   dL/ds = s E[sigma_d^2 sin^2 (1 / R - 1 / V)],

with R = cos^2 a^2 + sin^2 sigma_d^2 and V = cos^2 s^2 + sin^2 sigma_d^2.

Published losses are sums over the D elements in some places and means in others; here they are
means.

Symbols: x, n at scale sigma_d [B, ...], tau angles [B], w guidance scales.
"""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sprint_jax.diffusion import trigflow
from sprint_jax.diffusion.flow import expand, mean_per_sample
from sprint_jax.diffusion.types import PerSample, Samples

SIGMA_D = trigflow.SIGMA_D
_LEAST = 1e-5  # of the divisor; published

Divergence: TypeAlias = Literal[
    "reverse_kl", "forward_kl", "js", "hellinger", "jeffreys", "softplus"
]


def pseudo_gradient(x: Samples, real: Samples, fake: Samples, *, normalize: bool) -> Samples:
    """Return g, stopped, in float32.

    Args:
      x: the student's images.
      real, fake: predictions X_T and X_Phi of the clean image.
      normalize: divide by the mean distance of x from X_T, of each sample by itself.
    """
    x, real, fake = (jax.lax.stop_gradient(a).astype(jnp.float32) for a in (x, real, fake))
    g = fake - real
    return g / _divisor(x, real) if normalize else g


def decoupled_gradient(
    x: Samples,
    matching: tuple[Samples, Samples],
    guidance: tuple[Samples, Samples],
    w: PerSample,
    *,
    normalize: bool,
) -> Samples:
    """Return g of Decoupled DMD (Liu et al. 2025), stopped, in float32.

        g = (X_Phi - X_T^c)(tau) - (w - 1) (X_T^c - X_T^u)(tau')

    At tau' = tau and without the divisors it is the g of the guided teacher. Each part is divided
    by its own mean distance of x from X_T^c.

    Args:
      x: the student's images.
      matching: X_T^c and X_Phi at tau.
      guidance: X_T^u and X_T^c at tau'.
      w: guidance scales.
      normalize: divide.
    """
    x, cond, fake, uncond, clean = (
        jax.lax.stop_gradient(a).astype(jnp.float32) for a in (x, *matching, *guidance)
    )
    match, guide = fake - cond, expand(w - 1, x) * (clean - uncond)
    if normalize:
        match, guide = match / _divisor(x, cond), guide / _divisor(x, clean)
    return match - guide


def _divisor(x, real):
    return expand(jnp.maximum(mean_per_sample(jnp.abs(x - real)), _LEAST), x)


def loss(x: Samples, g: Samples) -> PerSample:
    """Return 1/2 mean (x - sg(x - g))^2, whose gradient is g / D; its value means nothing."""
    return mean_per_sample(jnp.square(x - jax.lax.stop_gradient(x - g))) / 2


def critic_target(x: Samples, n: Samples, tau: PerSample) -> Samples:
    """Return what F_Phi learns at y, (cos(tau) n - sin(tau) x) / sigma_d."""
    t = expand(tau, x)
    return (jnp.cos(t) * n - jnp.sin(t) * x) / SIGMA_D


def critic_loss(F_value: Samples, x: Samples, n: Samples, tau: PerSample) -> PerSample:
    """Return the critic's loss of each sample. F_value: F_Phi(y / sigma_d, tau). x gets no
    gradient.
    """
    x = jax.lax.stop_gradient(x)
    return mean_per_sample(jnp.square(F_value - critic_target(x, n, tau)))


def divergence_weight(logit: PerSample, kind: Divergence) -> PerSample:
    """Return h(r) = f''(r) r^2 of each sample, for the density ratio r = p_data / p_student at y.

    The DMD gradient weighted by h descends the f-divergence (f-distill, Xu et al. 2025): reverse
    KL 1, forward KL r, Jensen-Shannon r / (2 (1 + r)), squared Hellinger sqrt(r) / 2, Jeffreys
    1 + r. "softplus" is 1 / (1 + r), the weight of a discriminator's own loss softplus(-logit).

    logit: ln r, that of a discriminator trained by the logistic loss; one trained by the hinge loss
      carries no ratio. r is clipped to [.1, 20], as published.
    """
    r = jnp.clip(jnp.exp(jnp.clip(jax.lax.stop_gradient(logit), -10, 10)), 0.1, 20.0)
    match kind:
        case "reverse_kl":
            return jnp.ones_like(r)
        case "forward_kl":
            return r
        case "js":
            return r / (2 * (1 + r))
        case "hellinger":
            return jnp.sqrt(r) / 2
        case "jeffreys":
            return 1 + r
        case "softplus":
            return 1 / (1 + r)


def cleaner_time(key: Array, t: PerSample, shift: float) -> Float[Array, " b"]:
    """Draw tau' below the student's own angle t: uniform before the shift (Decoupled DMD).

    Flow times t_FM = shift u / (1 + (shift - 1) u) with u uniform below the u of t.
    """
    t_fm = trigflow.to_flow_time(t)
    u = t_fm / (shift - (shift - 1) * t_fm) * jax.random.uniform(key, t.shape)
    return trigflow.from_flow_time(shift * u / (1 + (shift - 1) * u))
