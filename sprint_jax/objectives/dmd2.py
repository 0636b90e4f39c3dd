"""DMD2 (Yin et al. 2024): distribution matching and an adversarial loss on the same images.

    L = dmd_weight h L_DMD(x) + adv_weight L_adv(y)         x the student's image, y renoised

The published heads sit on the critic's bottleneck; ours sit on the frozen teacher's features, as in
LADD, so the critic's own training leaves them alone. A round is an update of the student, one of
the heads and a few of the critic, for each number of steps.

h weighs samples for another divergence than the reverse KL (f-distill, Xu et al. 2025). It reads
the density ratio off the heads, so they are trained by the logistic loss then.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from sprint_jax.diffusion import dmd as maths
from sprint_jax.diffusion import ladd as adversarial
from sprint_jax.diffusion import trigflow
from sprint_jax.objectives import dmd, guided, ladd
from sprint_jax.objectives.base import (
    Aux,
    Draws,
    Frozen,
    Needs,
    Networks,
    Objective,
    PyTree,
    Start,
    State,
    Update,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dmd2(dmd.DmdTerm, ladd.HeadsTerm):
    """Settings of DMD2."""

    kind: Literal["dmd2"]
    """Names this objective."""
    dmd_weight: float
    """Factor of the pseudo-loss, a mean over elements."""
    adv_weight: float
    """Factor of the adversarial loss."""
    divergence: maths.Divergence
    """What the weighted DMD gradient descends; reverse_kl needs no weights."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, what to use instead) for each value out of range."""
        yield from super().problems()
        for name in ("dmd_weight", "adv_weight"):
            if not getattr(self, name) > 0:
                yield name, "use a number above 0"
        if self.divergence != "reverse_kl" and self.heads_loss != "softplus":
            yield "heads_loss", f"use softplus: hinge heads carry no ratio for {self.divergence}"
        if self.divergence != "reverse_kl" and self.misaligned:
            yield "misaligned", "use False: heads that see wrong captions carry another ratio"
        same = (self.disc_mean, self.disc_std) == (self.renoise_mean, self.renoise_std)
        if self.divergence != "reverse_kl" and not same:
            yield "disc_mean", "use renoise_mean and renoise_std: heads are read at those times"

    @property
    def round(self) -> tuple[str, ...]:
        """The student, the heads and the critic, for each number of steps."""
        return ("student", "heads", *["fake"] * self.critic_updates) * self.sample_steps

    def needs(self) -> Needs:
        """Return what DMD2 asks of a run: what heads ask, and weights that sum to the batch."""
        heads = ladd.HeadsTerm.needs(self)
        return dataclasses.replace(heads, whole=self.divergence != "reverse_kl")

    def objective(self, networks: Networks) -> Objective:
        """Build the objective."""

        def start(frozen: Frozen, begin: PyTree, key: jax.Array) -> dict[str, Start]:
            k_student, k_heads = jax.random.split(key)
            roles = dmd.start(self, networks, frozen, begin, k_student)
            return roles | {"heads": ladd.start_heads(self, networks, k_heads)}

        updates, order = {}, []
        for steps in range(1, self.sample_steps + 1):
            made = (_student, _heads, dmd.critic)
            names = [dmd.named(role, steps) for role in ("student", "heads", "fake")]
            updates |= {n: make(self, networks, steps) for n, make in zip(names, made, strict=True)}
            order += [*names[:2], *names[2:] * self.critic_updates]
        return Objective(
            main="student", round=tuple(order), updates=updates, start=start, sampler="renoise"
        )


def _student(settings: Dmd2, networks: Networks, steps: int) -> Update:
    def draw(key, batch, frozen):
        (k_sample, *_), shared = guided.draw(settings, key, batch)
        return {"cond": shared["cond"], "w": shared["w"]} | {
            "dmd": dmd.draw(settings, k_sample, shared["x0"], steps)
        }

    def loss(params, draws, state, frozen):
        value, scalars = _value(settings, networks, params, draws, state, frozen)
        return value, Aux(scalars=dmd.renamed(scalars, steps))

    return Update(role="student", draw=draw, loss=loss, names=dmd.loss_names("loss", steps))


def _value(
    settings: Dmd2,
    networks: Networks,
    params: PyTree,
    draws: Draws,
    state: State,
    frozen: Frozen,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    x = dmd.images(networks, params, draws)
    g, scalars = dmd.gradient(settings, networks, x, draws, state, frozen)
    heads, seen = state.roles["heads"], draws["dmd"]["matching"]
    y = trigflow.interpolate(x, seen["n"], seen["tau"]) / trigflow.SIGMA_D
    logits = ladd.discriminate(
        settings,
        networks,
        frozen.teacher,
        (heads.params, heads.extra["real"]),
        draws["cond"],
        (y, seen["tau"]),
    )
    ratio = jnp.stack([one.mean(-1) for one in logits]).mean(0)
    h = maths.divergence_weight(ratio, settings.divergence)
    # So that a divergence changes which samples count, and the weight of the term does not.
    matched = (h / h.mean() * maths.loss(x, g)).mean()
    adv = adversarial.generator_loss(
        logits, reduction=settings.reduction, loss=settings.heads_loss
    ).mean()
    value = settings.dmd_weight * matched + settings.adv_weight * adv
    return value, scalars | {"adv": adv, "log_ratio": ratio.mean()}


def _heads(settings: Dmd2, networks: Networks, steps: int) -> Update:
    def draw_images(settings: Any, keys: Any, x0: jax.Array) -> dict[str, Any]:
        return {"dmd": dmd.draw(settings, keys[0], x0, steps)}

    made = ladd.heads_update(
        settings,
        networks,
        images=dmd.images,
        draw_images=draw_images,
        names=dmd.loss_names("disc", steps),
    )
    if steps == 1:
        return made

    def loss(params, draws, state, frozen):
        value, aux = made.loss(params, draws, state, frozen)
        return value, aux.replace(scalars=dmd.renamed(aux.scalars, steps))

    return dataclasses.replace(made, loss=loss)
