"""Continuous-time consistency distillation in TrigFlow, sCM (paper Eq. 4, 5, 9; section 3.1-3.2).

Symbols: x0 data and z noise at scale sigma_d [B, ...], t angle [B], F the student network at unit
scale, F- its stopped copy, v = dx_t/dt the teacher's velocity, l = logvar [B] (w_phi = -l in the
paper), r the tangent warm-up, g the tangent target.

Where paper and published code differ, the default is the code:
  weighting="code"   omega(t) / e^l * error + l with the prior omega(t) = 1 / (sigma_d tan t)
  weighting="paper"  e^w / D * error - w, no prior (Eq. 9)
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from sprint_jax.diffusion import trigflow
from sprint_jax.diffusion.flow import expand, guided, mean_per_sample
from sprint_jax.diffusion.types import Network, PerSample, Samples, Scalar, Student

SIGMA_D = trigflow.SIGMA_D
WEIGHTINGS = ("code", "paper")

Aux = TypeVar("Aux")


def teacher_velocity(F_uncond: Samples, F_cond: Samples, w: PerSample) -> Samples:
    """Return dx_t/dt = sigma_d (F_u + w (F_c - F_u)) of the teacher at guidance scale w."""
    return SIGMA_D * guided(F_uncond, F_cond, w)


def tangent_warmup(step: float | Shaped[Array, ""], steps: int) -> Float[Array, ""]:
    """Return r = min(1, step / H). Steps count updates of both networks from one."""
    return jnp.minimum(1.0, step / max(1, steps))


def tangent_schedule(
    step: float | Shaped[Array, ""], warmup: int, *, final: float, start: int, steps: int
) -> Float[Array, ""]:
    """Return r of TBCM: the warm-up, then from update `start` on linearly down to `final`.

    steps: updates of the way down. A final r below 1 buys stability with bias: the loss is no
    longer zero at the consistency function.
    """
    down = jnp.clip((step - start) / max(1, steps), 0.0, 1.0)
    return tangent_warmup(step, warmup) * (1 - down * (1 - final))


def tangent(
    F_minus: Samples, J: Samples, v: Samples, xt: Samples, t: PerSample, r: Scalar
) -> Samples:
    """Return cos(t) df/dt of Eq. (5), with the second bracket scaled by r.

    g = -cos^2(t) (sigma_d F- - v) - r (cos(t) sin(t) x_t + sigma_d J)

    J already carries the factor cos(t) sin(t): it is dF along (cos sin v / sigma_d, cos sin), which
    keeps the tangent finite as t -> pi/2.
    """
    cos, sin = jnp.cos(expand(t, xt)), jnp.sin(expand(t, xt))
    return -cos * cos * (SIGMA_D * F_minus - v) - r * (cos * sin * xt + SIGMA_D * J)


def normalize_tangent(g: Samples, c: float = 0.1) -> tuple[Samples, PerSample]:
    """Return g / (||g||_2 + c) and the norm, which is the full L2 norm of each sample."""
    norm = jnp.sqrt(jnp.square(g).reshape(g.shape[0], -1).sum(-1))
    return g / expand(norm + c, g), norm


def consistency(
    F: Callable[[Samples, PerSample], tuple[Samples, Aux]],
    v: Samples,
    xt: Samples,
    t: PerSample,
    *,
    r: Scalar,
) -> tuple[Samples, Aux, Samples]:
    """Return the student's value and its stopped tangent target by one forward-mode pass.

    Args:
      F: (u, t) -> (F, logvar or any other value), the student.
      v: dx_t/dt at (xt, t).
      xt: state at scale sigma_d.
      t: angle.
      r: tangent warm-up.

    Returns:
      F and logvar, both with gradient, and g, stopped and not yet normalized.
    """
    cos_sin = jnp.cos(t) * jnp.sin(t)
    tangents = (expand(cos_sin, xt) * v / SIGMA_D, cos_sin)
    value, J, logvar = jax.jvp(F, (xt / SIGMA_D, t), tangents, has_aux=True)
    F_minus, J = jax.lax.stop_gradient((value, J))
    return value, logvar, jax.lax.stop_gradient(tangent(F_minus, J, v, xt, t, r))


def loss(
    F: Student,
    velocity: Network,
    x0: Samples,
    z: Samples,
    t: PerSample,
    *,
    r: Scalar,
    weighting: str,
    normalize: bool,
) -> tuple[PerSample, dict[str, PerSample]]:
    """Return the sCM loss of each sample at the noised data x_t, Eq. (9); see `loss_at`.

    velocity: (xt, t) -> dx_t/dt, the guided teacher. It gets no gradient. x0, z: data and noise at
    scale sigma_d.
    """
    xt = trigflow.interpolate(x0, z, t)
    v = jax.lax.stop_gradient(velocity(xt, t))
    return loss_at(F, v, xt, t, r=r, weighting=weighting, normalize=normalize)


def loss_at(
    F: Student,
    v: Samples,
    xt: Samples,
    t: PerSample,
    *,
    r: Scalar,
    weighting: str,
    normalize: bool,
) -> tuple[PerSample, dict[str, PerSample]]:
    """Return the sCM loss of each sample at given states, Eq. (9).

    Args:
      F: (u, t) -> (F, logvar), the student.
      v: dx_t/dt of the teacher at (xt, t).
      xt: state at scale sigma_d.
      t: angle in (0, pi/2).
      r: tangent warm-up in [0, 1].
      weighting: "code" or "paper".
      normalize: divide the tangent by its norm, as both sources do.

    Returns:
      The loss, and {"error", "tangent_norm", "logvar"} of each sample.

    Raises:
      ValueError: for an unknown weighting.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting {weighting!r}: use one of {WEIGHTINGS}")
    value, logvar, g = consistency(F, v, xt, t, r=r)
    prior = 1.0 if weighting == "paper" else 1 / (SIGMA_D * jnp.tan(t))
    return regress(value, logvar, g, prior=prior, normalize=normalize)


def regress(
    value: Samples,
    logvar: PerSample,
    g: Samples,
    *,
    prior: PerSample | float,
    normalize: bool,
    c: float = 0.1,
) -> tuple[PerSample, dict[str, PerSample]]:
    """Return the weighted error of a value against itself moved along the tangent target.

        prior / e^l  mean |F - sg(F + g)|^2 + l

    c: of `normalize_tangent`. The results are those of `loss_at`.
    """
    normalized, norm = normalize_tangent(g, c)
    target = jax.lax.stop_gradient(value) + (normalized if normalize else g)
    error = mean_per_sample(jnp.square(value - target))
    return prior * jnp.exp(-logvar) * error + logvar, {
        "error": error,
        "tangent_norm": norm,
        "logvar": logvar,
    }
