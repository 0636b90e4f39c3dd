"""Flow maps: students that jump from any time t to any earlier time r (MeanFlow and its kin).

    X(x_t, t, r) = cos(t - r) x_t - sin(t - r) sigma_d F(u, t, r),   u = x_t / sigma_d

F(u, t, r) is the average velocity between the two times as `trigflow.from_flow_velocity` turns it.
F(u, t, t) is the velocity itself, and F(u, t, 0) that of a consistency model. Three equations hold
at the exact map and at no other, and each gives an objective:

    Eulerian     d/dt X(x_t, t, r) = 0 along the teacher             r = 0 is sCM
    Lagrangian   d/dr X(x_t, t, r) = sigma_d F_T(X / sigma_d, r)
    semigroup    X(X(x_t, t, q), q, r) = X(x_t, t, r)                needs the velocity at r = t

Symbols: t >= q >= r angles [B], v = dx_t/dt of the teacher, F- the stopped student.
"""

from collections.abc import Callable
from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp

from sprint_jax.diffusion import scm, trigflow
from sprint_jax.diffusion.flow import expand
from sprint_jax.diffusion.types import Network, PerSample, Samples, Scalar

SIGMA_D = trigflow.SIGMA_D
Aux = TypeVar("Aux")

# (u, t, r) -> (F, logvar or any other value), and -> F alone.
Map: TypeAlias = Callable[[Samples, PerSample, PerSample], tuple[Samples, Aux]]
Stopped: TypeAlias = Callable[[Samples, PerSample, PerSample], Samples]


def jump(F_value: Samples, xt: Samples, d: PerSample) -> Samples:
    """Return X = cos(d) x_t - sin(d) sigma_d F for a jump over the angle d = t - r."""
    d = expand(d, xt)
    return jnp.cos(d) * xt - jnp.sin(d) * SIGMA_D * F_value


def eulerian(
    F: Map[Aux], v: Samples, xt: Samples, t: PerSample, r: PerSample, *, warm: Scalar
) -> tuple[Samples, Aux, Samples]:
    """Return the student's value and its stopped tangent target: sCM with the jump t - r for t.

    g = -cos^2(t - r) (sigma_d F- - v) - warm (cos(t - r) sin(t - r) x_t + sigma_d J)

    with J = dF along (cos sin v / sigma_d, cos sin, 0) by one forward-mode pass. For r = 0 it is
    `scm.consistency` to the last bit, for r = t plain flow matching.

    Returns:
      F and logvar, both with gradient, and g, stopped and not yet normalized.
    """
    d = t - r
    cos_sin = jnp.cos(d) * jnp.sin(d)
    tangents = (expand(cos_sin, xt) * v / SIGMA_D, cos_sin)
    value, J, logvar = jax.jvp(lambda u, t: F(u, t, r), (xt / SIGMA_D, t), tangents, has_aux=True)
    F_minus, J = jax.lax.stop_gradient((value, J))
    return value, logvar, jax.lax.stop_gradient(scm.tangent(F_minus, J, v, xt, d, warm))


def lagrangian(
    F: Map[Aux],
    F_minus: Stopped,
    velocity: Network,
    xt: Samples,
    t: PerSample,
    r: PerSample,
    *,
    delta: Scalar,
    heun: bool,
) -> tuple[Samples, Aux]:
    """Return the error of the map per unit of angle, and the student's other value.

    The stopped student jumps to p = min(r + delta, t), the teacher steps from there to r, and the
    student should land at the same place. The teacher is asked where the student goes, and no
    derivative of the student is needed. At the exact map the error is O(delta), with Heun's step
    O(delta^2).

    Args:
      F, F_minus: the student with and without gradient.
      velocity: (xt, t) -> dx_t/dt, the guided teacher.
      delta: angle of the teacher's step.
      heun: take Heun's step, with two calls of the teacher, instead of Euler's.
    """
    p = jnp.minimum(r + delta, t)
    y = jump(F_minus(xt / SIGMA_D, t, p), xt, t - p)
    h, k = expand(p - r, xt), velocity(y, p)
    if heun:
        k = (k + velocity(y - h * k, r)) / 2
    target = jax.lax.stop_gradient(y - h * k)
    value, aux = F(xt / SIGMA_D, t, r)
    return (jump(value, xt, t - r) - target) / jnp.sin(h), aux


def semigroup(
    F: Map[Aux], F_minus: Stopped, xt: Samples, t: PerSample, q: PerSample, r: PerSample
) -> tuple[Samples, Aux]:
    """Return the error of one jump against two jumps of the stopped student, and its other value.

    Any map of a semigroup satisfies this, so the diagonal r = t has to be trained beside it.
    """
    middle = jump(F_minus(xt / SIGMA_D, t, q), xt, t - q)
    target = jump(F_minus(middle / SIGMA_D, q, r), middle, q - r)
    value, aux = F(xt / SIGMA_D, t, r)
    return jump(value, xt, t - r) - jax.lax.stop_gradient(target), aux
