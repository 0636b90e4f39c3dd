"""rCM (Zheng et al. 2025): consistency as the engine, distribution matching against its blur.

    L = L_sCM + lambda L_DMD

Consistency covers the teacher's law and blurs, reverse KL seeks its modes and sharpens. A round is
an update of the student and a few of the critic for images in one step, then the same for images in
two, and so on.

Published weights are factors of sums over the D elements with a tangent of norm 1, so they mean
another thing at every D. `dmd_balance="gradient"` makes dmd_weight the ratio of the two gradients'
norms at the network's output instead.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp

from sprint_jax.diffusion import dmd as maths
from sprint_jax.diffusion import trigflow
from sprint_jax.objectives import dmd, guided, scm
from sprint_jax.objectives.base import (
    Aux,
    Draws,
    Frozen,
    Needs,
    Networks,
    Objective,
    PyTree,
    State,
    Update,
)

SIGMA_D = trigflow.SIGMA_D


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rcm(dmd.DmdTerm, scm.ScmTerm):
    """Settings of rCM."""

    kind: Literal["rcm"]
    """Names this objective."""
    dmd_weight: float
    """lambda, a factor of the pseudo-loss (a mean over elements), or a ratio; see dmd_balance."""
    dmd_balance: Literal["fixed", "gradient"]
    """fixed: lambda as it is. gradient: so that the gradient of L_DMD at the network's output has
    lambda times the norm of that of L_sCM, over the batch.
    """
    dmd_start: int
    """Updates of all roles before which the student learns by consistency alone; the critic learns
    from the beginning.
    """

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, what to use instead) for each value out of range."""
        yield from super().problems()
        if not self.dmd_weight > 0:
            yield "dmd_weight", "use a number above 0, or the objective scm"
        if self.dmd_start < 0:
            yield "dmd_start", "use 0 or more"

    def needs(self) -> Needs:
        """Return what rCM asks of a run: a teacher and images; one weight for a whole batch."""
        return Needs(teacher=True, whole=self.dmd_balance == "gradient")

    def objective(self, networks: Networks) -> Objective:
        """Build the objective."""

        def student(steps):
            def draw(key, batch, frozen):
                keys, shared = guided.draw(self, key, batch)
                drawn = shared | scm.draw_path(self, keys, shared["x0"])
                return drawn | {"dmd": dmd.draw(self, keys[2], shared["x0"], steps)}

            def loss(params, draws, state, frozen):
                total, aux = value(self, networks, params, draws, state, frozen)
                return total, aux.replace(scalars=dmd.renamed(aux.scalars, steps))

            return Update(role="student", draw=draw, loss=loss, names=dmd.loss_names("loss", steps))

        return dmd.matching(self, networks, student)


def value(
    settings: Rcm,
    networks: Networks,
    params: PyTree,
    draws: Draws,
    state: State,
    frozen: Frozen,
) -> tuple[jax.Array, Aux]:
    """Return the mean loss of a batch, and its statistics."""
    consistency, found, aux = scm.parts(settings, networks, params, draws, state, frozen)
    x = dmd.images(networks, params, draws)
    g, scalars = dmd.gradient(settings, networks, x, draws, state, frozen)
    norms = gradient_norms(settings, found, draws, g)
    weight = settings.dmd_weight
    if settings.dmd_balance == "gradient":
        weight = weight * norms["scm_output_grad"] / jnp.maximum(norms["dmd_output_grad"], 1e-12)
    weight = jnp.where(state.step >= settings.dmd_start, weight, 0.0)
    total = consistency.mean() + weight * maths.loss(x, g).mean()
    return total, aux.replace(scalars=aux.scalars | scalars | norms | {"dmd_factor": weight})


def gradient_norms(
    settings: Rcm, scm_found: dict[str, jax.Array], draws: Draws, g: jax.Array
) -> dict[str, jax.Array]:
    """Return the mean norms of both gradients at the network's output F, stopped.

    d L_sCM / dF = 2 omega / e^l (F - target) / D, and x = cos x_t - sin sigma_d F carries g / D to
    F by sin sigma_d.
    """
    size = g[0].size
    omega = 1.0 if settings.weighting == "paper" else 1 / (SIGMA_D * jnp.tan(draws["t"]))
    error = jnp.sqrt(size * scm_found["error"])
    consistency = 2 * omega * jnp.exp(-scm_found["logvar"]) * error / size
    norm = jnp.sqrt(jnp.square(g).reshape(g.shape[0], -1).sum(-1))
    matched = SIGMA_D * jnp.sin(draws["dmd"]["times"][:, -1]) * norm / size
    return jax.lax.stop_gradient(
        {"scm_output_grad": consistency.mean(), "dmd_output_grad": matched.mean()}
    )
