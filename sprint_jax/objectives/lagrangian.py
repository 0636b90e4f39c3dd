"""Lagrangian distillation: d/dr X(x_t, t, r) = v(X, r), as one step of a solver.

The student jumps to just before r, the velocity is asked where it lands, and the student should
land where that velocity leads; see `flow_map.lagrangian`. No derivative of the student is needed,
so kernels serve, and the teacher is asked where the student goes. With `velocity="self"` it is the
self-distillation LSD by value (Boffi et al. 2025). Published variants send the gradient through the
derivative in r as well; in one dimension that gains nothing.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp

from sprint_jax.diffusion import flow_map
from sprint_jax.objectives import two_times
from sprint_jax.objectives.base import Aux, Draws, State


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lagrangian(two_times.TwoTimes):
    """Settings of Lagrangian distillation."""

    kind: Literal["lagrangian"]
    """Names this objective."""
    delta: float
    """Angle of the solver's step."""
    heun: bool
    """Heun's step, with two calls of the velocity and an error of delta^2, instead of Euler's."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, what to use instead) for each value out of range."""
        yield from super().problems()
        if not 0 < self.delta < 1:
            yield "delta", "use an angle in (0, 1)"

    def term(
        self, see: two_times.Views, where: two_times.At, draws: Draws, state: State
    ) -> tuple[jax.Array, Aux]:
        """Return the loss of each sample [B], and its statistics."""
        return two_times.regressed(self, errors(self, see, where), where)


def errors(settings: Lagrangian, see: two_times.Views, where: two_times.At) -> jax.Array:
    """Return the error of the map per unit of angle, on the diagonal that of its velocity."""
    F, earlier = two_times.on_both(see, where)
    # Two times nearer than the step would leave nothing to jump over.
    r = jnp.maximum(jnp.minimum(earlier, where.t - settings.delta), 0.0)
    error, value = flow_map.lagrangian(
        F,
        see.F_minus,
        see.velocity,
        where.xt,
        where.t,
        r,
        delta=settings.delta,
        heun=settings.heun,
    )
    return two_times.mixed(settings, error, value, see, where)
