"""CMT: mid-training on whole rollouts of the teacher (Hu et al. 2025; sony/cmt).

    L = 1/K sum_i d(X(x_i, t_i, t_j) - x_j),   X(x, t, r) = x - (t - r) v(x, t, r)

for all K states of a rollout. With `pairs="ends"` every x_j is the end of the rollout, and the zero
is the consistency function. With `pairs="all"` j is drawn evenly among the states after i, and the
zero is the flow map; the student needs a second time. No derivative of the network, no average as a
target: the cheapest start for another objective, and the steadiest. The published code rolls out
from noised images; here the rollout begins from noise, so prompts alone are a data set.

The error of the solver is the error of the target, so the rollouts should be of second order.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from sprint_jax.diffusion import distances
from sprint_jax.diffusion.flow import expand
from sprint_jax.objectives import guided, rollouts, views
from sprint_jax.objectives.base import Aux, Draws, Needs, Networks, Objective
from sprint_jax.objectives.by_time import by_time
from sprint_jax.objectives.conditions import repeat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cmt(rollouts.RolloutTerm):
    """Settings of CMT."""

    kind: Literal["cmt"]
    """Names this objective."""
    pairs: Literal["ends", "all"]
    """Whether a state learns the end of its rollout, or any later state."""

    def needs(self) -> Needs:
        """Return what CMT asks of a run: rollouts, and for all pairs a second time."""
        return dataclasses.replace(super().needs(), target=self.pairs == "all")

    def objective(self, networks: Networks) -> Objective:
        """Build the objective."""

        def draw_all(key, batch, frozen):
            keys, shared = guided.draw(self, key, batch)
            return draw(self, keys[0], shared)

        def loss(params, draws, state, frozen):
            states = rollouts.nodes(self, networks, draws, frozen)
            k = self.route_steps
            v = views.student_average(
                networks.trained, params, repeat(draws["cond"], k), jnp.repeat(draws["w"], k)
            )
            per_sample, aux = term(v, states, self.times(), draws["j"], c=self.distance_c)
            return per_sample.mean(), aux

        return guided.student_alone(self, networks, draw_all, loss)


def draw(settings: Cmt, key: jax.Array, shared: Draws) -> dict[str, Any]:
    """Draw the rollouts, and the index j [B, K] of the state that each of them should reach."""
    k_noise, k_state = jax.random.split(key)
    k, count = settings.route_steps, shared["x0"].shape[0]
    j = jnp.full((count, k), k)
    if settings.pairs == "all":
        j = jax.random.randint(k_state, (count, k), jnp.arange(k) + 1, k + 1)
    return rollouts.start(settings, k_noise, shared) | {"j": j}


def term(
    v: views.Average, states: jax.Array, times: jax.Array, j: jax.Array, *, c: float
) -> tuple[jax.Array, Aux]:
    """Return the loss of each rollout [B], and its statistics.

    v: (x, t, r) -> average velocity of the student for B K states, those of a rollout together.
    states: [B, K + 1, ...]. times: [K + 1]. j: [B, K].
    """
    b, k = j.shape
    flat = lambda a: a.reshape(b * k, *a.shape[2:])
    x, t = flat(states[:, :-1]), jnp.tile(times[:-1], b)
    target, r = flat(states[jnp.arange(b)[:, None], j]), times[j].reshape(-1)
    e = x - expand(t - r, x) * v(x, t, r) - target
    error = distances.square(e)
    per_sample = distances.pseudo_huber(e, c).reshape(b, k).mean(1)
    noise = error.reshape(b, k)[:, 0].mean()
    return per_sample, Aux(
        scalars={"error": error.mean(), "noise_error": noise},
        by_time=by_time(t, 1.0, {"error": error}),
    )
