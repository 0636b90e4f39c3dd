"""Two-time consistency: d/dt X(x_t, t, r) = 0 along the teacher, or along data.

    v - (sigma_d F) - (cos sin x_t + sigma_d dF/dt) / cos^2 = 0 at t - r       see flow_map.eulerian

With r = 0 it is sCM, with r = t flow matching. Along the guided teacher it is a distilled MeanFlow
(Geng et al. 2025) in TrigFlow; along data (`velocity="data"`) it is MeanFlow itself, with the
guidance that iMF makes of the student's own velocities; along the student's own velocity at r = t
it is self-distillation (ESD) with the tangent stopped. The published ESD sends its gradient through
the time derivative instead, which needs a second derivative and forbids kernels.

The tangent is normalized as in sCM. The prior is 1: 1 / tan(t - r) would diverge on the diagonal,
and the log-variance, which knows both times, weighs.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp

from sprint_jax.diffusion import flow_map, scm, trigflow
from sprint_jax.diffusion.flow import expand
from sprint_jax.objectives import two_times, views
from sprint_jax.objectives.base import Aux, Draws, Networks, PyTree, State
from sprint_jax.objectives.by_time import by_time
from sprint_jax.objectives.conditions import Conditions

SIGMA_D = trigflow.SIGMA_D


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eulerian(two_times.TwoTimes):
    """Settings of two-time consistency."""

    kind: Literal["eulerian"]
    """Names this objective."""
    velocity: Literal["teacher", "self", "data"]
    """What the map follows: the guided teacher, its own value at r = t, or data."""
    tangent_warmup: int
    """Updates over which the tangent's second bracket rises to its full weight."""
    logvar_gradient: Literal["network", "head"]
    """See `views.student_map`."""
    tangent_c: float
    """c of the tangent's normalization g / (|g| + c)."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, what to use instead) for each value out of range."""
        yield from super().problems()
        if self.velocity == "data" and self.states == "rollout":
            yield "states", "use data: velocity data needs images"
        if not self.tangent_c > 0:
            yield "tangent_c", "use a number above 0"

    def student(
        self, networks: Networks, params: PyTree, cond: Conditions, w: jax.Array
    ) -> flow_map.Map:
        """Return the student (u, t, r) -> (F, logvar)."""
        return views.student_map(
            networks.trained, params, cond, w, logvar_gradient=self.logvar_gradient
        )

    def term(
        self, see: two_times.Views, where: two_times.At, draws: Draws, state: State
    ) -> tuple[jax.Array, Aux]:
        """Return the loss of each sample [B], and its statistics."""
        v = see.here()
        if self.velocity == "self":
            v = jnp.where(expand(where.diagonal, v), v, see.velocity(where.xt, where.t))
        elif self.velocity == "data":
            v = v + _guidance(see, where, draws["w"])
        warm = scm.tangent_warmup(state.step + 1, self.tangent_warmup)
        return term(see.F, v, where, warm=warm, c=self.tangent_c)


def _guidance(see, where, w):
    """Return (1 - 1/w) sigma_d (F_c - F_u) at r = t, stopped: iMF's effective scale is w."""
    at = (where.xt / SIGMA_D, where.t, where.t)
    change = see.F_minus(*at) - see.F_null(*at)
    return expand(1 - 1 / w, change) * SIGMA_D * change


def term(
    F: flow_map.Map, v: jax.Array, where: two_times.At, *, warm: jax.Array | float, c: float
) -> tuple[jax.Array, Aux]:
    """Return the loss of each sample [B], and its statistics. v: dx_t/dt at its state."""
    value, logvar, g = flow_map.eulerian(F, v, where.xt, where.t, where.r, warm=warm)
    per_sample, found = scm.regress(value, logvar, g, prior=1.0, normalize=True, c=c)
    scalars = {"eulerian": per_sample.mean()} | {k: a.mean() for k, a in found.items()}
    return per_sample, Aux(
        scalars=scalars,
        by_time=by_time(where.t, trigflow.T_MAX, {"map": per_sample} | found),
    )
