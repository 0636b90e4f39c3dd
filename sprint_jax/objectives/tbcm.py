"""TBCM: sCM on the teacher's own rollouts, without images (Tang et al. 2025; hustvl/TBCM).

The states x_1 ... x_(K-1) of a rollout, and the velocities that the teacher had there, take the
place of noised data and of another call of the teacher in `diffusion.scm.loss_at`. The tangent is
zero at the consistency function on every state, however coarse the rollout. What coarse steps cost
is the spread of the states: in first order, as published, the last ones lack contrast.

The published code lets the factor r of the tangent's second bracket fall to .75 at the end. That
moves the zero of the loss towards the mean of the data; `tangent_final=1.0` keeps it. Its filter of
prompts whose rollout ends near black is left out.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from sprint_jax.diffusion import rollout, scm, trigflow
from sprint_jax.objectives import guided, rollouts, views
from sprint_jax.objectives.base import Aux, Draws, Frozen, Needs, Networks, Objective, PyTree, State
from sprint_jax.objectives.by_time import by_time
from sprint_jax.objectives.conditions import tile
from sprint_jax.objectives.scm import TangentTerm

SIGMA_D = trigflow.SIGMA_D


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tbcm(rollouts.Route, TangentTerm):
    """Settings of TBCM. route_shift is applied twice, as in the published code."""

    kind: Literal["tbcm"]
    """Names this objective."""
    route_jitter: bool
    """Draw every time but the first anew between itself and the one before, for each batch."""
    tangent_final: float
    """r at the end: 1 (unbiased), or below for stability (code: .75)."""
    tangent_final_start: int
    """Update at which r begins to fall to tangent_final."""
    tangent_final_steps: int
    """Updates that it takes."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, what to use instead) for each value out of range."""
        yield from super().problems()
        if not 0 < self.tangent_final <= 1:
            yield "tangent_final", "use a factor in (0, 1]"

    def needs(self) -> Needs:
        """Return what TBCM asks of a run: a teacher, and no images."""
        return Needs(teacher=True, images=False)

    def times(self) -> jax.Array:
        """Return the flow times of the route [K + 1]."""
        return jnp.asarray(rollout.tbcm_times(self.route_steps, self.route_shift))

    def objective(self, networks: Networks) -> Objective:
        """Build the objective."""

        def draw_all(key, batch, frozen):
            return draw(self, key, batch)

        def loss(params, draws, state, frozen):
            per_sample, aux = _loss(self, networks, params, draws, state, frozen)
            return per_sample.mean(), aux

        return guided.student_alone(self, networks, draw_all, loss)


def draw(settings: Tbcm, key: jax.Array, batch: Any) -> dict[str, Any]:
    """Draw noise z, and the times [B, K + 1] of the route, the same for all samples."""
    (k_noise, k_times, *_), shared = guided.draw(settings, key, batch)
    shape, times = shared["x0"].shape, settings.times()
    if settings.route_jitter:
        times = jnp.append(rollout.jittered(k_times, times[:-1]), 0.0)
    return {
        "z": jax.random.normal(k_noise, shape),
        "times": jnp.broadcast_to(times, (shape[0], len(times))),
        "cond": shared["cond"],
        "w": shared["w"],
    }


def _loss(
    settings: Tbcm,
    networks: Networks,
    params: PyTree,
    draws: Draws,
    state: State,
    frozen: Frozen,
) -> tuple[jax.Array, Aux]:
    """Return the loss of each rollout [B], and its statistics."""
    cond, w, times = draws["cond"], draws["w"], draws["times"][0]
    v = views.teacher_v(networks, frozen, cond, w, settings.uncond_mask)
    made = rollout.rollout(v, draws["z"], times, order=settings.route_order)
    k, b = settings.route_steps - 1, w.shape[0]
    F = views.student_F(
        networks.trained,
        params,
        tile(cond, k),
        jnp.tile(w, k),
        logvar_gradient=settings.logvar_gradient,
    )
    return term(
        F,
        rollout.Rollout(made.states[1:-1], made.velocities[1:]),
        jnp.repeat(times[1:-1], b).reshape(k, b),
        r=scm.tangent_schedule(
            state.step + 1,
            settings.tangent_warmup,
            final=settings.tangent_final,
            start=settings.tangent_final_start,
            steps=settings.tangent_final_steps,
        ),
        weighting=settings.weighting,
        normalize=settings.tangent_normalize,
    )


def term(
    F: views.WithLogvar,
    made: rollout.Rollout,
    times: jax.Array,
    *,
    r: jax.Array | float,
    weighting: str,
    normalize: bool,
) -> tuple[jax.Array, Aux]:
    """Return the loss of each rollout [B], the mean over its k states, and its statistics.

    F: the student for k B samples, those of a state together. made: states and velocities
    [k, B, ...] in flow coordinates. times: [k, B].
    """
    flat = lambda a: a.reshape(-1, *a.shape[2:])
    x, v, t_fm = flat(made.states), flat(made.velocities), flat(times)
    u, t = trigflow.from_flow_state(x, t_fm), trigflow.from_flow_time(t_fm)
    slope = SIGMA_D * trigflow.from_flow_velocity(v, x, t_fm)
    per_state, found = scm.loss_at(
        F, slope, SIGMA_D * u, t, r=r, weighting=weighting, normalize=normalize
    )
    scalars = {"scm": per_state.mean()} | {k: a.mean() for k, a in found.items()}
    return per_state.reshape(times.shape).mean(0), Aux(
        scalars=scalars, by_time=by_time(t, trigflow.T_MAX, {"scm": per_state} | found)
    )
