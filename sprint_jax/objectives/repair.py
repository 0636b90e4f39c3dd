"""Repair: one step learns what its image becomes when it is renoised and drawn again, and stays
near the teacher's rollouts; see `diffusion.repair`.

    L = d_token(f(z, 1) - y')  +  a [p trim(d(f(z', 1) - x_end)) + (1 - p) d(f(x_j, t_j) - x_end)]

The second part is the anchor on a share of the batch; see `objectives.anchor`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from sprint_jax.diffusion import distances, flow, repair
from sprint_jax.objectives import anchor, guided, rollouts, views
from sprint_jax.objectives.base import Aux, Draws, Frozen, Networks, Objective, PyTree, State
from sprint_jax.objectives.conditions import concatenate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repair(anchor.AnchorTerm):
    """Settings of repair."""

    kind: Literal["repair"]
    """Names this objective."""
    hops: int
    """How often an image is renoised and drawn again."""
    tries: int
    """How often each image is drawn again; the nearest result is learned."""
    hop_from: tuple[float, ...]
    """Two flow times: the first hop's is drawn evenly between them."""
    hop_ratio: float
    """rho: the flow time where a hop ends over that where it begins, and where the next begins."""
    hop_steps: int
    """Guided calls of the teacher from a hop's time down to hop_ratio of it, where the frozen
    student denoises; with 0 that denoises at once, which is cheaper and drifts.
    """
    hop_c: float
    """Root mean square error of a token above which its gradient grows no further."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, what to use instead) for each value out of range."""
        yield from super().problems()
        if self.hops < 1:
            yield "hops", "use 1 or more"
        if self.tries < 1:
            yield "tries", "use 1 or more"
        if self.hop_steps < 0:
            yield "hop_steps", "use 0 (the frozen student alone) or more"
        low, *rest = self.hop_from or (0.0,)
        if len(rest) != 1 or not 0 < low <= rest[0] <= 1:
            yield "hop_from", "use two flow times in (0, 1], the smaller one first"
        if not 0 < self.hop_ratio <= 1:
            yield "hop_ratio", "use a ratio in (0, 1]"
        if not self.hop_c > 0:
            yield "hop_c", "use a number above 0"
        if not self.anchor_weight > 0:
            yield "anchor_weight", "use a number above 0: hops make the images' spread narrower"

    def objective(self, networks: Networks) -> Objective:
        """Build the objective. The student's extra arrays are the frozen student f_0."""

        def loss(params, draws, state, frozen):
            return _loss(self, networks, params, draws, state, frozen)

        draw_all = lambda key, batch, frozen: draw(self, key, batch)
        copied = lambda params: jax.tree.map(jnp.copy, params)
        return guided.student_alone(self, networks, draw_all, loss, extra=copied)


def draw(settings: Repair, key: jax.Array, batch: Any) -> dict[str, Any]:
    """Draw noise, hops and their first time for every sample, and the anchor's rollouts."""
    (k_noise, k_hops, k_time, k_anchor, *_), shared = guided.draw(settings, key, batch)
    shape = shared["x0"].shape
    low, high = settings.hop_from
    return {
        "z": jax.random.normal(k_noise, shape),
        "n": jax.random.normal(k_hops, (shape[0], settings.tries, settings.hops, *shape[1:])),
        "s": jax.random.uniform(k_time, shape[:1], minval=low, maxval=high),
        "cond": shared["cond"],
        "w": shared["w"],
        "anchor": anchor.draw(settings, k_anchor, shared),
    }


def _loss(
    settings: Repair,
    networks: Networks,
    params: PyTree,
    draws: Draws,
    state: State,
    frozen: Frozen,
) -> tuple[jax.Array, Aux]:
    """Return the mean loss of repair and anchor, from one call of the student for both."""
    z, cond, w = draws["z"], draws["cond"], draws["w"]
    at = rollouts.points(settings, networks, draws["anchor"], frozen)
    v = views.student_v(
        networks.trained, params, concatenate(cond, at.cond), jnp.concatenate([w, at.w])
    )
    x, t = jnp.concatenate([z, at.x]), jnp.concatenate([jnp.ones(z.shape[0]), at.t])
    y, anchored = jnp.split(flow.denoise(v(x, t), x, t), [z.shape[0]])
    v0 = views.student_v(networks.trained, state.roles["student"].extra, cond, w)
    teacher = views.teacher_v(networks, frozen, cond, w, settings.uncond_mask)
    again = lambda noises: repair.hops(
        v0,
        teacher,
        y,
        noises,
        draws["s"],
        ratio=settings.hop_ratio,
        steps=settings.hop_steps,
    )
    tries = [again(jnp.moveaxis(draws["n"][:, k], 1, 0)) for k in range(settings.tries)]
    e = y - repair.nearest(y, jnp.stack(tries))
    repaired = distances.token_huber(e, settings.hop_c)
    pull, aux = anchor.of_errors(settings, anchored - at.end, at)
    scalars = {"repair": repaired.mean(), "repair_error": distances.square(e).mean()}
    return repaired.mean() + settings.anchor_weight * pull.mean(), Aux(scalars=scalars | aux)
