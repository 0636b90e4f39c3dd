"""Semigroup distillation: one jump equals two, X(X(x_t, t, q), q, r) = X(x_t, t, r).

See `flow_map.semigroup`. Every map of a semigroup satisfies it, the map that stays where it is
among them, so at least half of the batch should learn the velocity at r = t: from the guided
teacher, or from data (`velocity="self"`, the self-distillation PSD of Boffi et al. 2025).
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp

from sprint_jax.diffusion import flow_map
from sprint_jax.objectives import two_times
from sprint_jax.objectives.base import Aux, Draws, State


@dataclasses.dataclass(frozen=True, kw_only=True)
class Semigroup(two_times.TwoTimes):
    """Settings of semigroup distillation."""

    kind: Literal["semigroup"]
    """Names this objective."""
    middle: Literal["uniform", "half"]
    """q: drawn evenly between r and t, or half way."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, what to use instead) for each value out of range."""
        yield from super().problems()
        if not self.diagonal > 0:
            yield "diagonal", "use a share above 0, .5 or more: jumps alone do not know the data"

    def term(
        self, see: two_times.Views, where: two_times.At, draws: Draws, state: State
    ) -> tuple[jax.Array, Aux]:
        """Return the loss of each sample [B], and its statistics."""
        share = jnp.full_like(where.t, 0.5) if self.middle == "half" else draws["q"]
        return two_times.regressed(self, errors(self, see, where, share), where)


def errors(
    settings: Semigroup, see: two_times.Views, where: two_times.At, share: jax.Array
) -> jax.Array:
    """Return the error of the map, on the diagonal that of its velocity. share: of t - r, [B]."""
    F, earlier = two_times.on_both(see, where)
    q = earlier + share * (where.t - earlier)
    error, value = flow_map.semigroup(F, see.F_minus, where.xt, where.t, q, earlier)
    return two_times.mixed(settings, error, value, see, where)
