"""Rollouts of the guided teacher as training data: made in the update, or read from storage.

An update sees points of rollouts: a state x at its time t, and the end of its rollout. Along an ODE
trajectories do not cross, so the function that maps
every point to its end is the consistency function.

    p d(f(z, 1) - x_end) + (1 - p) d(f(x_j, t_j) - x_end),   f(x, t) = x - t v(x, t)

A rollout that is made in the update is dear, so it gives both terms: its noise with weight p, and a
state j drawn evenly among the inner ones with weight 1 - p. A stored one gives one of the two,
drawn with the same probabilities, so that as many calls of the student see twice the rollouts. The
expected loss is the same.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sprint_jax.diffusion import flow, rollout, samplers
from sprint_jax.objectives import guided, views
from sprint_jax.objectives.base import Draws, Frozen, Needs, Networks
from sprint_jax.objectives.conditions import Conditions, concatenate

# Settings that decide what stored rollouts hold.
CONTENT = (
    "stored",
    "guidance",
    "uncond_mask",
    "control_dropout",
    "route_steps",
    "route_order",
    "route_shift",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Route(guided.Guided):
    """Settings of the teacher's rollouts."""

    route_steps: int
    """K: guided calls of the teacher in a rollout."""
    route_order: int
    """1 (Euler) or 2 (Adams-Bashforth, as many calls)."""
    route_shift: float
    """Shift of the rollout's times towards noise."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, what to use instead) for each value out of range."""
        yield from super().problems()
        if self.route_steps < 2:
            yield "route_steps", "use 2 or more"
        if self.route_order not in rollout.ORDERS:
            yield "route_order", "use 1 or 2"
        if not self.route_shift > 0:
            yield "route_shift", "use a number above 0"

    @property
    def round(self) -> tuple[str, ...]:
        """The student alone."""
        return ("student",)

    def times(self) -> jax.Array:
        """Return the flow times of a rollout [K + 1], from 1 to 0."""
        return jnp.asarray(samplers.flow_times(self.route_steps, self.route_shift))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutTerm(Route):
    """Settings of a regression on rollouts."""

    stored: int
    """Rollouts that are made before training and kept in the work directory; 0 makes new ones in
    every update. Phases that store them share one set.
    """
    distance_c: float
    """Root mean square error above which a gradient grows no further."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, what to use instead) for each value out of range."""
        yield from super().problems()
        if self.stored < 0:
            yield "stored", "use 0 (new rollouts in every update) or more"
        if not self.distance_c > 0:
            yield "distance_c", "use a number above 0"

    def needs(self) -> Needs:
        """Return what rollouts ask of a run: a teacher, their storage, and no images."""
        return Needs(teacher=True, stored=self.stored, images=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PointTerm(RolloutTerm):
    """Settings of a regression of points of rollouts to their ends."""

    from_noise: float
    """p: weight of the error from the noise; the rest is that from an inner state."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, what to use instead) for each value out of range."""
        yield from super().problems()
        if not 0 <= self.from_noise <= 1:
            yield "from_noise", "use a weight in [0, 1]"


class Points(NamedTuple):
    """Points of rollouts. x, end: [N, ...]. t, w, weight: [N]. The weights' mean is 1."""

    x: jax.Array
    t: jax.Array
    end: jax.Array
    cond: Conditions
    w: jax.Array
    weight: jax.Array


def roll_out(settings: Route, networks: Networks, frozen: Frozen, draws: Draws) -> jax.Array:
    """Follow the guided teacher from the noise draws["z"] [B, ...]; return all states
    [B, K + 1, ...].
    """
    v = views.teacher_v(networks, frozen, draws["cond"], draws["w"], settings.uncond_mask)
    states = rollout.rollout(v, draws["z"], settings.times(), order=settings.route_order).states
    return jnp.moveaxis(states, 0, 1)


def nodes(settings: RolloutTerm, networks: Networks, draws: Draws, frozen: Frozen) -> jax.Array:
    """Return the states of rollouts [B, K + 1, ...]: the stored ones, or new ones."""
    if settings.stored:
        return draws["nodes"].astype(jnp.float32)
    return roll_out(settings, networks, frozen, draws)


def start(settings: RolloutTerm, key: jax.Array, shared: Draws) -> dict[str, Any]:
    """Draw what `nodes` reads for the conditions and scales of `guided.draw`: noise, or nothing."""
    kept = {"cond": shared["cond"], "w": shared["w"]}
    if settings.stored:
        return kept | {"nodes": shared["nodes"]}
    return kept | {"z": jax.random.normal(key, shared["x0"].shape)}


def draw(settings: PointTerm, key: jax.Array, shared: Draws) -> dict[str, Any]:
    """Draw what `points` reads for the conditions and scales of `guided.draw`.

    Noise z and the index j of an inner state; of stored rollouts the index alone, 0 for the noise.
    """
    k_noise, k_state = jax.random.split(key)
    count = shared["x0"].shape[:1]
    j = jax.random.randint(k_state, count, 1, settings.route_steps)
    if settings.stored:
        first = jax.random.bernoulli(k_noise, settings.from_noise, count)
        j = jnp.where(first, 0, j)
    return start(settings, k_noise, shared) | {"j": j}


def points(settings: PointTerm, networks: Networks, draws: Draws, frozen: Frozen) -> Points:
    """Return the points of an update: one of each stored rollout, two of each new one."""
    j, cond, w, times = draws["j"], draws["cond"], draws["w"], settings.times()
    pick = lambda states, j: states[jnp.arange(j.shape[0]), j]
    states = nodes(settings, networks, draws, frozen)
    if settings.stored:
        return Points(pick(states, j), times[j], states[:, -1], cond, w, jnp.ones(j.shape))
    both = lambda a, b: jnp.concatenate([a, b])
    p = jnp.full(j.shape, settings.from_noise)
    return Points(
        x=both(states[:, 0], pick(states, j)),
        t=both(jnp.ones(j.shape), times[j]),
        end=both(states[:, -1], states[:, -1]),
        cond=concatenate(cond, cond),
        w=both(w, w),
        weight=2 * both(p, 1 - p),
    )


def errors(v: views.Field, at: Points) -> jax.Array:
    """Return f(x, t) - x_end of a student's flow network v at points."""
    return flow.denoise(v(at.x, at.t), at.x, at.t) - at.end


def by_place(name: str, values: jax.Array, at: Points) -> dict[str, jax.Array]:
    """Return the means of values [N] over points at the noise and over inner ones, for logs."""
    noise = at.t >= 1
    mean = lambda here: jnp.where(here, values, 0).sum() / jnp.maximum(here.sum(), 1)
    return {f"noise_{name}": mean(noise), f"inner_{name}": mean(~noise)}
