"""Repair: one step learns from what a frozen student makes of its renoised image.

    y = f(z, 1)                                             the student's image in one step
    y_0 = sg(y),  y_i = f_0((1 - s_i) y_(i-1) + s_i n_i, s_i),  s_(i+1) = rho s_i     the hops
    L = d(y - y_H)

f_0 is the student that the phase began from. A few-step student draws better images in several
steps than in one, and its sampler is this very chain, so it can teach its own first step: a
distillation of the multistep consistency sampler (Song et al. 2023, Algorithm 1) into one step, as
progressive distillation (Salimans & Ho 2022) does with a solver, on the student's own images.

On data of separate modes a hop from s moves a blend of two modes to one of them, if s is so large
that their renoised images overlap, and leaves an image alone, if s is so small that others do not.
Inside a mode f_0 pulls toward its center: for data N(m, s_d^2) the expected hop of y is
m + k (y - m) with k = s_d (1 - s) / sqrt((1 - s)^2 s_d^2 + s^2) < 1. So the spread shrinks unless
something holds it. An anchor on rollouts of the teacher does; it is trimmed, because at t = 1 the
student must be free to choose another mode than the teacher.

Symbols: z and n noise, s flow times [B], e an error [B, ...].
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sprint_jax.diffusion import flow
from sprint_jax.diffusion.distances import square
from sprint_jax.diffusion.types import Network, PerSample, Samples, Scalar


def hops(
    v0: Network, y: Samples, noises: Float[Array, "h b *d"], s: PerSample, *, ratio: float
) -> Samples:
    """Return y_H: renoise and denoise by the frozen student, once for each of the noises.

    Args:
      v0: the frozen student's flow network.
      y: the student's images. No gradient passes.
      noises: unit-variance draws n_1 ... n_H.
      s: s_1, the flow time of the first hop.
      ratio: rho, of each time to the one before.
    """
    y = jax.lax.stop_gradient(y)
    for n in noises:
        xs = flow.interpolate(y, n, s)
        y = flow.denoise(v0(xs, s), xs, s)
        s = ratio * s
    return jax.lax.stop_gradient(y)


def trimmed(values: PerSample, e: Samples, limit: Scalar) -> PerSample:
    """Return values where the mean square of the error e is below the limit, and 0 elsewhere.

    So a sample counts only where the student agrees with the teacher's choice already.
    """
    return jnp.where(square(jax.lax.stop_gradient(e)) < limit, values, 0.0)
