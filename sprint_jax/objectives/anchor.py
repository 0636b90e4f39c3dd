"""The anchor: a regression on rollouts of the teacher that holds what another loss lets drift.

    p trim(d(f(z, 1) - x_end)) + (1 - p) d(f(x_j, t_j) - x_end)

From the noise a rollout counts only where the student's error is small already: there it is free to
choose another arrangement than the teacher. See `objectives.rollouts` for points of rollouts.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from sprint_jax.diffusion import distances, repair
from sprint_jax.objectives import rollouts, views
from sprint_jax.objectives.base import Draws, Frozen, Needs, Networks, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnchorTerm(rollouts.PointTerm):
    """Settings of the anchor."""

    anchor_share: float
    """Rollouts of the anchor for each sample of the batch."""
    anchor_weight: float
    """Weight of the anchor; 0 leaves it out."""
    anchor_trim: float
    """Mean square error below which a rollout counts from its noise."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, what to use instead) for each value out of range."""
        yield from super().problems()
        if not self.anchor_weight >= 0:
            yield "anchor_weight", "use 0 (none) or more"
        if not 0 < self.anchor_share <= 1:
            yield "anchor_share", "use a share in (0, 1]"

    def needs(self) -> Needs:
        """Return what an anchor asks of a run: that it is cut as the batch."""
        return dataclasses.replace(super().needs(), shares=(self.anchor_share,))


def draw(settings: AnchorTerm, key: jax.Array, shared: Draws) -> dict[str, Any]:
    """Draw the anchor's rollouts: a share of the batch, with the conditions of its first samples,
    that is cut into parts as the batch is.
    """
    count = round(settings.anchor_share * shared["x0"].shape[0])
    return rollouts.draw(settings, key, jax.tree.map(lambda a: a[:count], shared))


def term(
    settings: AnchorTerm, networks: Networks, params: PyTree, draws: Draws, frozen: Frozen
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the anchor of each point [N], and its statistics. draws: of `draw`."""
    at = rollouts.points(settings, networks, draws, frozen)
    v = views.student_v(networks.trained, params, at.cond, at.w)
    return of_errors(settings, rollouts.errors(v, at), at)


def of_errors(
    settings: AnchorTerm, e: jax.Array, at: rollouts.Points
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the anchor of each point [N], and its statistics. e: the student's errors there."""
    error, values = distances.square(e), distances.token_huber(e, settings.distance_c)
    kept = error < settings.anchor_trim
    trimmed = repair.trimmed(values, e, settings.anchor_trim)
    scalars = rollouts.by_place("error", error, at) | {
        "anchor_kept": rollouts.by_place("kept", kept, at)["noise_kept"]
    }
    return at.weight * jnp.where(at.t >= 1, trimmed, values), scalars
