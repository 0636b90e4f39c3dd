"""Repair: one step learns what its image becomes when it is renoised and drawn again.

    y = f(z, 1)                                             the student's image in one step
    x = (1 - s) y + s n,  s in the middle of the path       renoised, a hop begins
    x' = Phi_v(x; s -> rho s)                               the guided teacher's way, a few steps
    y' = f_0(x', rho s)                                     denoised, s <- rho s for another hop
    L = d(y - sg(y'))                                       y' the nearest of a few tries

f_0 is the student that the phase began from. Drawing again from a middle time moves a blend of two
modes to one of them, if s is so large that their renoised images overlap, and leaves an image
alone, if s is so small that others do not. It is the multistep consistency sampler (Song et al.
2023, Algorithm 1), and SDEdit (Meng et al. 2022) for the teacher's part, distilled into one step as
progressive distillation (Salimans & Ho 2022) does with a solver, on the student's own images.

Renoising and following the exact flow leaves the law of the data as it is, and moves mass between
two modes both ways alike. Without the teacher (no steps between s and rho s) f_0 denoises from s at
once, where it blends itself, and what its blends become favors some modes: the images drift there.
Each try goes where its noise leads, and so does a regression on it: to the middle. The nearest of
a few tries is an image of the mode that y is nearest to, so the student commits.

Inside a mode the expected image moves toward the center: for data N(m, s_d^2) it is m + k (y - m)
with k = s_d (1 - s) / sqrt((1 - s)^2 s_d^2 + s^2) < 1. So the spread shrinks unless something holds
it. An anchor on rollouts of the teacher does; it is trimmed, because at t = 1 the student must be
free to choose another mode than the teacher.

Symbols: z and n noise, s flow times [B], v the guided teacher, e an error [B, ...].
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sprint_jax.diffusion import flow
from sprint_jax.diffusion.distances import square
from sprint_jax.diffusion.types import Network, PerSample, Samples, Scalar


def hops(
    v0: Network,
    v: Network,
    y: Samples,
    noises: Float[Array, "h b *d"],
    s: PerSample,
    *,
    ratio: float,
    steps: int,
) -> Samples:
    """Return the images after one hop for each of the noises. No gradient passes.

    Args:
      v0: the frozen student's flow network.
      v: the guided teacher's. It is not called for 0 steps.
      y: the student's images.
      noises: unit-variance draws, of all hops.
      s: the flow time to which the first hop renoises.
      ratio: rho, of the time where a hop ends to that where it began.
      steps: of the teacher from s to rho s; with 0 the frozen student denoises from s.
    """
    y = jax.lax.stop_gradient(y)
    for n in noises:
        x, after = flow.interpolate(y, n, s), ratio * s
        if steps:
            x, s = follow(v, x, s, after, steps=steps), after
        y = flow.denoise(v0(x, s), x, s)
        s = after
    return jax.lax.stop_gradient(y)


def follow(v: Network, x: Samples, s: PerSample, to: PerSample, *, steps: int) -> Samples:
    """Follow the flow from time s to an earlier one in equal steps of second order.

    They are Adams-Bashforth's, as in `diffusion.rollout`, with a time of its own for each sample.
    """
    d, before = (s - to) / steps, None
    for i in range(steps):
        now = v(x, s - i * d)
        slope = now if before is None else 1.5 * now - 0.5 * before
        x, before = x - flow.expand(d, x) * slope, now
    return x


def nearest(y: Samples, tries: Float[Array, "k b *d"]) -> Samples:
    """Return for each image the one of its tries that is nearest in mean square."""
    y = jax.lax.stop_gradient(y)
    which = jnp.argmin(jax.vmap(lambda one: square(y - one))(tries), axis=0)
    return tries[which, jnp.arange(y.shape[0])]


def trimmed(values: PerSample, e: Samples, limit: Scalar) -> PerSample:
    """Return values where the mean square of the error e is below the limit, and 0 elsewhere.

    So a sample counts only where the student agrees with the teacher's choice already.
    """
    return jnp.where(square(jax.lax.stop_gradient(e)) < limit, values, 0.0)
