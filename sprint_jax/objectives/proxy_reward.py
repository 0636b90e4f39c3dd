"""Reward by a proxy: heads on the teacher's features learn a judge's verdicts of the student's own
images, and the student raises their logit; see `diffusion.reward`.

    L = reward_weight (-ln sigmoid(logit(y)))  +  anchor_weight x anchor       y = x renoised
    L_proxy = mean of H(verdict(x), logit(y)), H(1, logit of real images), H(0, of wrong captions)

It works for one step, where no policy gradient exists, and gradients of a frozen reward model,
which show as high-frequency noise, never reach an image.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from sprint_jax.diffusion import ladd as adversarial
from sprint_jax.diffusion import reward, trigflow
from sprint_jax.objectives import anchor, guided, judged, ladd, views
from sprint_jax.objectives.base import (
    Aux,
    Draws,
    Frozen,
    Needs,
    Networks,
    Objective,
    PyTree,
    Role,
    Start,
    Update,
)
from sprint_jax.optim import came


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProxyReward(judged.JudgedTerm, ladd.HeadsTerm):
    """Settings of reward by a proxy. The heads' own settings are those of LADD."""

    kind: Literal["proxy_reward"]
    """Names this objective."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, what to use instead) for each value out of range."""
        yield from super().problems()
        if self.heads_loss != "softplus":
            yield "heads_loss", "use softplus: a proxy's logit is that of a probability"

    @property
    def round(self) -> tuple[str, ...]:
        """The student, then the proxy."""
        return ("student", "proxy")

    def needs(self) -> Needs:
        """Return what a proxy asks of a run: what heads and a judge ask."""
        heads = ladd.HeadsTerm.needs(self)
        mine = judged.JudgedTerm.needs(self)
        return dataclasses.replace(
            heads, captions=mine.captions, reward=mine.reward, shares=mine.shares
        )

    def objective(self, networks: Networks) -> Objective:
        """Build the objective."""

        def start(frozen: Frozen, begin: PyTree, key: jax.Array) -> dict[str, Start]:
            k_student, k_proxy = jax.random.split(key)
            params = guided.begin_student(self, networks, frozen, begin, k_student)
            return {"student": Start(params), "proxy": ladd.start_heads(self, networks, k_proxy)}

        return Objective(
            main="student",
            round=self.round,
            updates={"student": _student(self, networks), "proxy": _proxy(self, networks)},
            start=start,
            sampler="renoise",
        )


def _image(networks: Networks, params: PyTree, draws: Draws) -> jax.Array:
    """Return the student's image x in one step, at scale sigma_d."""
    z, t = draws["z"], jnp.full(draws["z"].shape[:1], trigflow.T_MAX)
    F, _ = views.student_F(networks.trained, params, draws["cond"], draws["w"])(
        z / trigflow.SIGMA_D, t
    )
    return trigflow.denoise(F, z, t)


def logits(
    settings: ProxyReward,
    networks: Networks,
    frozen: Frozen,
    heads: tuple[PyTree, PyTree],
    cond: Any,
    seen: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """Return the proxy's logit of each sample [B], the mean over heads and tokens.

    heads: parameters and singular vectors. seen: as `ladd.discriminate` takes it.
    """
    found = ladd.discriminate(settings, networks, frozen.teacher, heads, cond, seen)
    return jnp.stack([one.mean(-1) for one in found]).mean(0)


def _student(settings: ProxyReward, networks: Networks) -> Update:
    def draw(key, batch, frozen):
        (k_z, k_seen, k_anchor, *_), shared = guided.draw(settings, key, batch)
        return {
            "cond": shared["cond"],
            "w": shared["w"],
            "z": guided.noise(k_z, shared["x0"]),
            "seen": ladd.draw_renoising(settings, k_seen, shared["x0"]),
            "anchor": anchor.draw(settings, k_anchor, shared),
        }

    def loss(params, draws, state, frozen):
        proxy = state.roles["proxy"]
        seen = ladd.renoise(_image(networks, params, draws), draws["seen"])
        heads = proxy.params, proxy.extra["real"]
        logit = logits(settings, networks, frozen, heads, draws["cond"], seen)
        wished = reward.wish(logit).mean()
        pull, scalars = anchor.term(settings, networks, params, draws["anchor"], frozen)
        value = settings.reward_weight * wished + settings.anchor_weight * pull.mean()
        return value, Aux(scalars=scalars | {"proxy_logit": logit.mean(), "wish": wished})

    return Update(role="student", draw=draw, loss=loss)


def _proxy(settings: ProxyReward, networks: Networks) -> Update:
    def prepare(role: Role) -> PyTree:
        advance = ladd.heads_of(settings, networks).advance
        fake = advance(role.params, role.extra["real"])
        return {"fake": fake, "real": advance(role.params, fake)}

    def draw(key, batch, frozen):
        (k_z, k_fake, k_real, k_wrong, *_), shared = guided.draw(settings, key, batch)
        x0 = shared["x0"]
        seen = lambda key: ladd.draw_renoising(settings, key, x0)
        return shared | {
            "z": guided.noise(k_z, x0),
            "caption": batch["caption"],
            "wrong": adversarial.misaligned(x0),
            "seen": {"fake": seen(k_fake), "real": seen(k_real), "wrong": seen(k_wrong)},
        }

    def loss(params, draws, state, frozen):
        extra, cond = state.roles["proxy"].extra, draws["cond"]
        x = jax.lax.stop_gradient(_image(networks, state.roles["student"].params, draws))
        verdict = judged.verdicts(networks, x, draws["caption"], frozen)
        ask = lambda image, name, side: logits(
            settings,
            networks,
            frozen,
            (params, extra[side]),
            cond,
            ladd.renoise(image, draws["seen"][name]),
        )
        fake, real = ask(x, "fake", "fake"), ask(draws["x0"], "real", "real")
        parts = [
            reward.verdict_loss(fake, verdict),
            reward.verdict_loss(real, jnp.ones_like(real)),
        ]
        if settings.misaligned:
            wrong = ask(draws["wrong"], "wrong", "fake")
            parts.append(reward.verdict_loss(wrong, jnp.zeros_like(wrong)))
        agreed = ((fake > 0) == (verdict > 0.5)).mean()
        scalars = {"reward": verdict.mean(), "proxy_agreement": agreed}
        return jnp.stack(parts).mean(), Aux(scalars=scalars)

    return Update(
        role="proxy",
        draw=draw,
        loss=loss,
        prepare=prepare,
        names=("proxy", "proxy_grad_norm"),
        rules=came.HEADS,
    )
