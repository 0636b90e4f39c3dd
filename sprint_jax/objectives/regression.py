"""Trajectory regression: the student learns where rollouts of the guided teacher end.

    L = p d(f(z, 1) - x_end) + (1 - p) d(f(x_j, t_j) - x_end),   f(x, t) = x - t v(x, t)

See `objectives.rollouts`. CMT (sony/cmt) regresses all states of noised data; here the rollout
begins from noise, so it needs prompts alone.
"""

import dataclasses
from typing import Literal

import jax

from sprint_jax.diffusion import distances
from sprint_jax.objectives import guided, rollouts, views
from sprint_jax.objectives.base import Aux, Networks, Objective
from sprint_jax.objectives.by_time import by_time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regression(rollouts.PointTerm):
    """Settings of trajectory regression."""

    kind: Literal["regression"]
    """Names this objective."""

    def objective(self, networks: Networks) -> Objective:
        """Build the objective."""

        def draw(key, batch, frozen):
            (k_route, *_), shared = guided.draw(self, key, batch)
            return rollouts.draw(self, k_route, shared)

        def loss(params, draws, state, frozen):
            at = rollouts.points(self, networks, draws, frozen)
            v = views.student_v(networks.trained, params, at.cond, at.w)
            per_sample, aux = term(self, v, at)
            return per_sample.mean(), aux

        return guided.student_alone(self, networks, draw, loss)


def term(
    settings: rollouts.PointTerm, v: views.Field, at: rollouts.Points
) -> tuple[jax.Array, Aux]:
    """Return the loss of each point [N], and its statistics. v: the student's."""
    e = rollouts.errors(v, at)
    error = distances.square(e)
    return at.weight * distances.pseudo_huber(e, settings.distance_c), Aux(
        scalars=rollouts.by_place("error", error, at),
        by_time=by_time(at.t, 1.0, {"error": error}),
    )
