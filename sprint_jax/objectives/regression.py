"""Trajectory regression: the student learns where rollouts of the guided teacher end.

    L = p d(f(z, 1) - x_end) + (1 - p) d(f(x_j, t_j) - x_end),   f(x, t) = x - t v(x, t)

Each rollout serves twice: from its noise, and from a state j drawn evenly among the inner ones.
Along an ODE trajectories do not cross, so the minimum over many of them is the consistency
function. CMT (sony/cmt) regresses all states of noised data; here the rollout begins from noise,
so it needs prompts alone.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from sprint_jax.diffusion import distances, flow, rollout, samplers
from sprint_jax.objectives import guided, views
from sprint_jax.objectives.base import Aux, Draws, Frozen, Needs, Networks, Objective
from sprint_jax.objectives.by_time import by_time
from sprint_jax.objectives.conditions import Conditions, concatenate


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutTerm(guided.Guided):
    """Settings of a regression on rollouts."""

    route_steps: int
    """K: guided calls of the teacher in a rollout."""
    route_order: int
    """1 (Euler) or 2 (Adams-Bashforth, as many calls)."""
    route_shift: float
    """Shift of the rollout's times towards noise."""
    from_noise: float
    """p: weight of the error from the noise; the rest is that from an inner state."""
    distance_c: float
    """Root mean square error of a sample above which its gradient grows no further."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, what to use instead) for each value out of range."""
        yield from super().problems()
        if self.route_steps < 2:
            yield "route_steps", "use 2 or more"
        if self.route_order not in rollout.ORDERS:
            yield "route_order", "use 1 or 2"
        if not self.route_shift > 0:
            yield "route_shift", "use a number above 0"
        if not 0 <= self.from_noise <= 1:
            yield "from_noise", "use a weight in [0, 1]"
        if not self.distance_c > 0:
            yield "distance_c", "use a number above 0"

    @property
    def round(self) -> tuple[str, ...]:
        """The student alone."""
        return ("student",)

    def needs(self) -> Needs:
        """Return what a regression on rollouts asks of a run: a teacher."""
        return Needs(teacher=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regression(RolloutTerm):
    """Settings of trajectory regression."""

    kind: Literal["regression"]
    """Names this objective."""

    def objective(self, networks: Networks) -> Objective:
        """Build the objective."""

        def draw_all(key, batch, frozen):
            (k_route, *_), shared = guided.draw(self, key, batch)
            return draw(self, k_route, shared)

        def loss(params, draws, state, frozen):
            ends = states_and_end(self, networks, draws, frozen)
            v = views.student_v(networks.trained, params, *twice(draws))
            per_sample, aux = term(self, v, *ends)
            return per_sample.mean(), aux

        return guided.student_alone(self, networks, draw_all, loss)


def draw(settings: RolloutTerm, key: jax.Array, shared: Draws) -> dict[str, Any]:
    """Draw the noise z of rollouts and the index j of an inner state for conditions and scales.

    shared: {"x0", "cond", "w"} of `guided.draw`; x0 gives the shape of latents alone.
    """
    k_noise, k_state = jax.random.split(key)
    x0 = shared["x0"]
    return {
        "z": jax.random.normal(k_noise, x0.shape),
        "j": jax.random.randint(k_state, x0.shape[:1], 1, settings.route_steps),
        "cond": shared["cond"],
        "w": shared["w"],
    }


def states_and_end(
    settings: RolloutTerm, networks: Networks, draws: Draws, frozen: Frozen
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Roll the teacher out. Returns (states [2B, ...], times [2B], ends [2B, ...]).

    The first B states are the noise, the others the drawn inner states.
    """
    times = jnp.asarray(samplers.flow_times(settings.route_steps, settings.route_shift))
    v = views.teacher_v(networks, frozen, draws["cond"], draws["w"], settings.uncond_mask)
    states = rollout.rollout(v, draws["z"], times, order=settings.route_order).states
    j = draws["j"]
    inner = states[j, jnp.arange(j.shape[0])]
    return (
        jnp.concatenate([states[0], inner]),
        jnp.concatenate([jnp.ones(j.shape[0]), times[j]]),
        jnp.concatenate([states[-1], states[-1]]),
    )


def twice(draws: Draws) -> tuple[Conditions, jax.Array]:
    """Return the conditions and scales of the 2B states of `states_and_end`."""
    return concatenate(draws["cond"], draws["cond"]), jnp.concatenate([draws["w"], draws["w"]])


def term(
    settings: RolloutTerm, v: views.Field, states: jax.Array, times: jax.Array, ends: jax.Array
) -> tuple[jax.Array, Aux]:
    """Return the loss of each rollout [B], and its statistics. v: the student's, for 2B states."""
    e = flow.denoise(v(states, times), states, times) - ends
    from_noise, inner = jnp.split(distances.pseudo_huber(e, settings.distance_c), 2)
    p, error = settings.from_noise, distances.square(e)
    noise_error, inner_error = jnp.split(error, 2)
    scalars = {"noise_error": noise_error.mean(), "inner_error": inner_error.mean()}
    return p * from_noise + (1 - p) * inner, Aux(
        scalars=scalars, by_time=by_time(times, 1.0, {"error": error})
    )
