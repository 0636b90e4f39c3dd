"""Flow maps: students that learn jumps between any two times; see `diffusion.flow_map`.

What their objectives share: states and pairs of times, and the velocity dx_t/dt that the map should
follow. It is that of the guided teacher, or the student's own: its value at r = t, which a share of
the batch learns from data by flow matching (self-distillation).

States are noised data, or those of the teacher's rollouts; the latter need prompts alone.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from sprint_jax.diffusion import distances, flow_map, trigflow
from sprint_jax.diffusion.flow import expand
from sprint_jax.diffusion.types import Network
from sprint_jax.objectives import guided, rollouts, views
from sprint_jax.objectives.base import Aux, Draws, Frozen, Needs, Networks, Objective, PyTree, State
from sprint_jax.objectives.by_time import by_time
from sprint_jax.objectives.conditions import Conditions, unconditional

SIGMA_D = trigflow.SIGMA_D


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoTimes(rollouts.RolloutTerm, guided.Timed):
    """Settings of a flow map's objective. Of two drawn times the later is t, the earlier r."""

    states: Literal["data", "rollout"]
    """Where states come from: noised data, or rollouts (by route_* and stored)."""
    velocity: Literal["teacher", "self"]
    """What the map follows: the guided teacher, or its own value at r = t, which then learns from
    data and never from the teacher.
    """
    diagonal: float
    """Share of samples with r = t, which learn the velocity itself."""
    to_zero: float
    """Share of the others with r = 0, as in sampling in one step."""
    from_noise: float
    """Share of samples at the noise, t = pi/2."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, what to use instead) for each value out of range."""
        yield from super().problems()
        for name in ("diagonal", "to_zero", "from_noise"):
            if not 0 <= getattr(self, name) <= 1:
                yield name, "use a share in [0, 1]"
        if self.velocity == "self" and not self.diagonal > 0:
            yield "diagonal", "use a share above 0: velocity self is learned there"
        if self.velocity == "self" and self.states == "rollout":
            yield "states", "use data: velocity self learns from images"
        if self.stored and self.states == "data":
            yield "stored", "use 0: states data read no rollouts"

    def needs(self) -> Needs:
        """Return what flow maps ask of a run: a teacher, a second time, images or rollouts."""
        images = self.states == "data"
        return Needs(teacher=True, target=True, images=images, stored=self.stored)

    def objective(self, networks: Networks) -> Objective:
        """Build the objective."""

        def draw_all(key, batch, frozen):
            return draw(self, key, batch)

        def loss(params, draws, state, frozen):
            where = at(self, networks, draws, frozen)
            see = look(self, networks, params, draws, frozen, where)
            per_sample, aux = self.term(see, where, draws, state)
            return per_sample.mean(), aux

        return guided.student_alone(self, networks, draw_all, loss)

    def student(
        self, networks: Networks, params: PyTree, cond: Conditions, w: jax.Array
    ) -> flow_map.Map:
        """Return the student (u, t, r) -> (F, logvar)."""
        return views.student_map(networks.trained, params, cond, w)

    def term(self, see: "Views", where: "At", draws: Draws, state: State) -> tuple[jax.Array, Aux]:
        """Return the loss of each sample [B], and its statistics."""
        raise NotImplementedError


class At(NamedTuple):
    """Where a flow map is asked: xt at scale sigma_d, angles t >= r [B], and which samples have
    r = t.
    """

    xt: jax.Array
    t: jax.Array
    r: jax.Array
    diagonal: jax.Array


def draw(settings: TwoTimes, key: jax.Array, batch: Any) -> dict[str, Any]:
    """Draw noise and data or rollouts, and both times. i: index of a rollout's state."""
    keys, shared = guided.draw(settings, key, batch)
    k_states, k_t, k_shares, k_q = keys[:4]
    count = shared["x0"].shape[0]
    masks = jax.random.uniform(k_shares, (3, count))
    of_two = jnp.stack([guided.times(k, settings, count) for k in jax.random.split(k_t)])
    drawn = {
        "t": jnp.where(masks[2] < settings.from_noise, trigflow.T_MAX, of_two.max(0)),
        "r": jnp.where(masks[1] < settings.to_zero, 0.0, of_two.min(0)),
        "diagonal": masks[0] < settings.diagonal,
        "q": jax.random.uniform(k_q, (count,)),
    }
    if settings.states == "data":
        z = guided.noise(k_states, shared["x0"])
        return drawn | {"x0": shared["x0"], "z": z, "cond": shared["cond"], "w": shared["w"]}
    k_states, k_i = jax.random.split(k_states)
    inner = jax.random.randint(k_i, (count,), 1, settings.route_steps)
    first = masks[2] < settings.from_noise
    return drawn | rollouts.start(settings, k_states, shared) | {"i": jnp.where(first, 0, inner)}


def at(settings: TwoTimes, networks: Networks, draws: Draws, frozen: Frozen) -> At:
    """Return states and times of an update. r is scaled to lie below the time of a rollout's
    state.
    """
    if settings.states == "data":
        t, r = draws["t"], draws["r"]
        xt = trigflow.interpolate(draws["x0"], draws["z"], t)
    else:
        i = draws["i"]
        nodes, times = rollouts.nodes(settings, networks, draws, frozen), settings.times()
        x, t_fm = nodes[jnp.arange(i.shape[0]), i], times[i]
        t = trigflow.from_flow_time(t_fm)
        xt = SIGMA_D * trigflow.from_flow_state(x, t_fm)
        r = draws["r"] * t / trigflow.T_MAX
    return At(xt, t, jnp.where(draws["diagonal"], t, r), draws["diagonal"])


class Views(NamedTuple):
    """The networks of an update as callables.

    F: the student (u, t, r) -> (F, logvar). F_minus: its value, stopped. F_null: the same for the
    empty prompt. velocity: (xt, t) ->
    dx_t/dt that the map follows, stopped. here: () -> dx_t/dt at the states of the update, which
    the diagonal learns: the teacher's, or that of the data.
    """

    F: flow_map.Map
    F_minus: flow_map.Stopped
    F_null: flow_map.Stopped
    velocity: Network
    here: Callable[[], jax.Array]


def look(
    settings: TwoTimes,
    networks: Networks,
    params: PyTree,
    draws: Draws,
    frozen: Frozen,
    where: At,
) -> Views:
    """Return the networks of an update."""
    cond, w = draws["cond"], draws["w"]
    F = settings.student(networks, params, cond, w)

    def stopped(cond):
        still = settings.student(networks, jax.lax.stop_gradient(params), cond, w)
        return lambda u, t, r: jax.lax.stop_gradient(still(u, t, r)[0])

    F_minus, F_null = stopped(cond), stopped(unconditional(cond, frozen.null_text))
    if settings.velocity == "teacher":
        teacher = views.teacher_velocity(networks, frozen, cond, w, settings.uncond_mask)
        velocity = lambda xt, t: jax.lax.stop_gradient(teacher(xt, t))
        here = lambda: velocity(where.xt, where.t)
    else:
        velocity = lambda xt, t: SIGMA_D * F_minus(xt / SIGMA_D, t, t)
        here = lambda: _of_data(draws, where.t)
    return Views(F, F_minus, F_null, velocity, here)


def _of_data(draws, t):
    """Return dx_t/dt = cos(t) z - sin(t) x0 of the path from this noise to these data."""
    t = expand(t, draws["z"])
    return jnp.cos(t) * draws["z"] - jnp.sin(t) * draws["x0"]


def on_both(see: Views, where: At) -> tuple[flow_map.Map, jax.Array]:
    """Return a student whose second value is F itself, at r = t on the diagonal, and an earlier
    time than t for those samples.

    So one call serves both parts: the error of the map, which means nothing there, and `mixed`.
    """
    earlier = jnp.where(where.diagonal, where.t / 2, where.r)

    def F(u, t, r):
        value, _ = see.F(u, t, jnp.where(where.diagonal, t, r))
        return value, value

    return F, earlier


def mixed(
    settings: TwoTimes, error: jax.Array, value: jax.Array, see: Views, where: At
) -> jax.Array:
    """Return the error of a map, on the diagonal that of its velocity sigma_d F."""
    if not settings.diagonal:
        return error
    own = SIGMA_D * value - see.here()
    return jnp.where(expand(where.diagonal, own), own, error)


def regressed(settings: TwoTimes, e: jax.Array, where: At) -> tuple[jax.Array, Aux]:
    """Return the loss of each error [B, ...], and statistics."""
    error = distances.square(e)
    share = jnp.maximum(where.diagonal.mean(), 1e-9)
    scalars = {
        "error": error.mean(),
        "diagonal_error": jnp.where(where.diagonal, error, 0).mean() / share,
    }
    return distances.pseudo_huber(e, settings.distance_c), Aux(
        scalars=scalars, by_time=by_time(where.t, trigflow.T_MAX, {"map": error})
    )
