"""Policies: RLCM and PSO on the sampler's chain of two steps; see `diffusion.reward`.

    x1 = S(z, pi/2)        a = cos(t) x1 + sin(t) sigma_d n        x = S(a, t)
    advantage   L = -A(x) ln pi(a | x1)                      A among images of one prompt (RLCM)
    pairs       L = -ln sigmoid(beta (ln pi - ln pi_0)(best - worst))                 (PSO)

Both are methods with a limit that their papers do not name: the last step is deterministic and gets
no gradient from them. For a linear student at t = 1.3 what is left is 4.5 % of the whole. What
varies between images of a prompt is z, which has no probability.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from sprint_jax.diffusion import reward, samplers, trigflow
from sprint_jax.objectives import anchor, guided, judged, views
from sprint_jax.objectives.base import Aux, Draws, Frozen, Needs, Networks, Objective, PyTree, State

SIGMA_D = trigflow.SIGMA_D


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy(judged.JudgedTerm):
    """Settings of policies."""

    kind: Literal["policy"]
    """Names this objective."""
    preference: Literal["advantage", "pairs"]
    """RLCM, or PSO."""
    group: int
    """G: images of one prompt that are compared."""
    beta: float
    """PSO's factor of the difference, for log-probabilities that are sums over elements."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, what to use instead) for each value out of range."""
        yield from super().problems()
        if self.group < 2:
            yield "group", "use 2 or more"
        if not self.beta > 0:
            yield "beta", "use a number above 0"

    def needs(self) -> Needs:
        """Return what a policy asks of a run: whole groups in a batch that is not cut."""
        return dataclasses.replace(super().needs(), whole=True, multiple=self.group)

    def objective(self, networks: Networks) -> Objective:
        """Build the objective. For PSO the student's extra arrays are its frozen copy."""

        def draw_all(key, batch, frozen):
            return draw(self, key, batch)

        def loss(params, draws, state, frozen):
            return _loss(self, networks, params, draws, state, frozen)

        def reference(params):
            return jax.tree.map(jnp.copy, params) if self.preference == "pairs" else None

        return guided.student_alone(self, networks, draw_all, loss, extra=reference)


def draw(settings: Policy, key: jax.Array, batch: Any) -> dict[str, Any]:
    """Draw noises; each of the first prompts of the batch comes G times, side by side."""
    (k_z, k_n, k_anchor, *_), shared = guided.draw(settings, key, batch)
    count = shared["x0"].shape[0]
    which = jnp.repeat(jnp.arange(count // settings.group), settings.group)
    group = lambda tree: jax.tree.map(lambda a: a[which], tree)
    return {
        "cond": group(shared["cond"]),
        "w": group(shared["w"]),
        "caption": group(batch["caption"]),
        "z": guided.noise(k_z, shared["x0"]),
        "n": guided.noise(k_n, shared["x0"]),
        "anchor": anchor.draw(settings, k_anchor, shared),
    }


def _first(networks: Networks, params: PyTree, draws: Draws) -> jax.Array:
    """Return x1, the student's prediction from the noise."""
    t = jnp.full(draws["z"].shape[:1], trigflow.T_MAX)
    return _predict(networks, params, draws, draws["z"], t)


def _predict(networks, params, draws, xt, t):
    F, _ = views.student_F(networks.trained, params, draws["cond"], draws["w"])(xt / SIGMA_D, t)
    return trigflow.denoise(F, xt, t)


def _loss(
    settings: Policy,
    networks: Networks,
    params: PyTree,
    draws: Draws,
    state: State,
    frozen: Frozen,
) -> tuple[jax.Array, Aux]:
    t = jnp.full(draws["z"].shape[:1], float(samplers.scm_times(2)[1]))
    x1 = _first(networks, params, draws)
    a = jax.lax.stop_gradient(trigflow.interpolate(x1, draws["n"], t))
    x = jax.lax.stop_gradient(_predict(networks, params, draws, a, t))
    R = judged.verdicts(networks, x, draws["caption"], frozen)
    lp = reward.log_prob(a, x1, t)
    # A sum over D elements grows with D, and so does its gradient.
    size = a[0].size
    if settings.preference == "advantage":
        A = reward.advantage(R, settings.group)
        # An update looks at its own samples once, so the ratio is 1 and no clip binds.
        each = reward.policy_loss(lp, jax.lax.stop_gradient(lp), A, clip=1.0)
    else:
        x1_0 = _first(networks, state.roles["student"].extra, draws)
        each = _pairs(settings, R, lp - jax.lax.stop_gradient(reward.log_prob(a, x1_0, t)))
    pull, scalars = anchor.term(settings, networks, params, draws["anchor"], frozen)
    value = settings.reward_weight * each.mean() / size + settings.anchor_weight * pull.mean()
    grouped = R.reshape(-1, settings.group)
    told = (grouped.max(1) > grouped.min(1)).mean()
    return value, Aux(scalars=scalars | {"reward": R.mean(), "groups_that_differ": told})


def _pairs(settings: Policy, R: jax.Array, change: jax.Array) -> jax.Array:
    """Return PSO's loss of each group. change: ln pi - ln pi_0 of each sample."""
    R, change = (a.reshape(-1, settings.group) for a in (R, change))
    rows = jnp.arange(len(R))
    best, worst = R.argmax(1), R.argmin(1)
    different = (R.max(1) > R.min(1)).astype(jnp.float32)
    # Without verdicts there is no loss, so the update is dropped.
    different = jnp.where(jnp.isfinite(R).all(1), different, jnp.nan)
    return reward.pair_loss(
        change[rows, best], change[rows, worst], beta=settings.beta, different=different
    )
