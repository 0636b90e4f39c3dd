"""SANA-Sprint: sCM and LADD together. Generator and discriminator updates alternate on consecutive
batches.

The teacher is the velocity field, the feature extractor of the heads and the starting point of the
student; it never changes.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from sprint_jax.objectives import guided, ladd, scm
from sprint_jax.objectives.base import Aux, Networks, Objective, Update


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScmLadd(scm.ScmTerm, ladd.LaddTerm):
    """Settings of sCM + LADD."""

    kind: Literal["scm_ladd"]
    """Names this objective."""
    scm_weight: float
    """Factor of the consistency loss; 0 leaves it out."""
    adv_weight: float
    """Factor of the adversarial loss (lambda); 0 leaves it out."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, what to use instead) for each value out of range."""
        yield from super().problems()
        if not (self.scm_weight > 0 or self.adv_weight > 0):
            yield "scm_weight", "adv_weight is 0 as well: nothing to train"

    def objective(self, networks: Networks) -> Objective:
        """Build the objective."""

        def draw(key, batch, frozen):
            keys, shared = guided.draw(self, key, batch)
            x0 = shared["x0"]
            return shared | scm.draw_path(self, keys, x0) | ladd.draw_view(self, keys, x0)

        def loss(params, draws, state, frozen):
            terms, aux = [], Aux()
            if self.scm_weight:
                per_sample, aux = scm.term(self, networks, params, draws, state, frozen)
                terms.append(self.scm_weight * per_sample.mean())
            if self.adv_weight:
                each = ladd.generator_term(self, networks, params, draws, state, frozen)
                adv = each.mean()
                terms.append(self.adv_weight * adv)
                aux = aux.replace(scalars=aux.scalars | {"adv": adv})
            return sum(terms[1:], terms[0]), aux

        return ladd.adversarial(self, networks, Update(role="student", draw=draw, loss=loss))
