"""LADD alone: an adversarial loss from small heads on the frozen teacher's features (paper Eq. 11,
12).
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from sprint_jax.diffusion import ladd, trigflow
from sprint_jax.models.discriminator import GROUP, LADDHeads
from sprint_jax.objectives import guided, views
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
    State,
    Update,
)
from sprint_jax.objectives.conditions import Conditions, concatenate
from sprint_jax.optim import came


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadsTerm(guided.Guided):
    """Settings of the discriminator's heads."""

    disc_mean: float
    """Mean of the renoising's time sampler."""
    disc_std: float
    """Its standard deviation."""
    reduction: Literal["code", "paper"]
    """See `diffusion.ladd`."""
    misaligned: bool
    """Count real images with another image's text as fakes (code alone)."""
    heads_loss: Literal["hinge", "softplus"]
    """The loss of the heads: hinge (published), or logistic."""
    head_blocks: tuple[int, ...]
    """Teacher blocks with a discriminator head, counted from 0."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, what to use instead) for each value out of range."""
        yield from super().problems()
        blocks = self.head_blocks
        if not blocks or list(blocks) != sorted(set(blocks)) or blocks[0] < 0:
            yield "head_blocks", "use increasing block numbers from 0"

    def needs(self) -> Needs:
        """Return what heads ask of a run: a teacher with these blocks, and batches that normalize
        evenly.
        """
        return Needs(
            teacher=True,
            blocks=self.head_blocks,
            batch=2 if self.misaligned else 1,
            group=GROUP,
            groups_of=(1, 2) if self.misaligned else (1,),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaddTerm(HeadsTerm, guided.Timed):
    """Settings of the adversarial loss."""

    max_time: float
    """Probability p that the student predicts from the largest time (max-time weighting)."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, what to use instead) for each value out of range."""
        yield from super().problems()
        if not 0 <= self.max_time <= 1:
            yield "max_time", "use a probability in [0, 1]"

    @property
    def round(self) -> tuple[str, ...]:
        """The student, then the discriminator's heads."""
        return ("student", "heads")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ladd(LaddTerm):
    """Settings of LADD alone."""

    kind: Literal["ladd"]
    """Names this objective."""

    def objective(self, networks: Networks) -> Objective:
        """Build the objective."""

        def loss(params, draws, state, frozen):
            value = generator_term(self, networks, params, draws, state, frozen).mean()
            return value, Aux(scalars={"adv": value})

        def draws(key, batch, frozen):
            return draw_generator(self, key, batch)

        return adversarial(self, networks, Update(role="student", draw=draws, loss=loss))


def adversarial(settings: LaddTerm, networks: Networks, student: Update) -> Objective:
    """Build an objective of a student's update and the discriminator's, in that order.

    The generator comes first, as in the published trainer; the paper's Algorithm 2 has the
    discriminator first, on shared draws.
    """

    def start(frozen: Frozen, begin: PyTree, key: jax.Array) -> dict[str, Start]:
        k_student, k_heads = jax.random.split(key)
        heads = start_heads(settings, networks, k_heads)
        begins = guided.begin_student(settings, networks, frozen, begin, k_student)
        return {"student": Start(begins), "heads": heads}

    return Objective(
        main="student",
        round=settings.round,
        updates={"student": student, "heads": heads_update(settings, networks)},
        start=start,
        sampler="renoise",
    )


def start_heads(settings: HeadsTerm, networks: Networks, key: jax.Array) -> Start:
    """Return where the heads begin."""
    heads, spectral = heads_of(settings, networks).init(key)
    return Start(heads, start_spectral(spectral))


def heads_of(settings: HeadsTerm, networks: Networks) -> LADDHeads:
    """Describe the discriminator's heads."""
    return LADDHeads(width=networks.width, count=len(settings.head_blocks), dtype=networks.dtype)


def start_spectral(spectral: PyTree) -> PyTree:
    """Return the extra arrays of the heads' role: singular vectors for fakes and, one iteration
    later, for reals.
    """
    return {"fake": spectral, "real": jax.tree.map(jnp.copy, spectral)}


def discriminate(
    settings: HeadsTerm,
    networks: Networks,
    teacher: PyTree,
    heads: tuple[PyTree, PyTree],
    cond: Conditions,
    seen: tuple[jax.Array, jax.Array],
) -> list[jax.Array]:
    """Return the logits of the heads on the teacher's features; the teacher stops after the last
    hooked block.

    heads: their parameters and singular vectors. seen: the renoised image u at unit scale and its
    angle s.
    """
    u, s = seen
    x_fm, t_fm = trigflow.to_flow_state(u, s), trigflow.to_flow_time(s)
    features = networks.teacher.apply(
        teacher, x_fm, t_fm, **cond, features=settings.head_blocks, velocity=False
    ).features
    return heads_of(settings, networks).apply(*heads, features)


def generate(networks: Networks, params: PyTree, draws: Draws) -> jax.Array:
    """Return the student's prediction x0_hat from the drawn start {"t" [B], "z" [B, ...]}."""
    start = draws["start"]
    xt = trigflow.interpolate(draws["x0"], start["z"], start["t"])
    F, _ = views.student_F(networks.trained, params, draws["cond"], draws["w"])(
        xt / trigflow.SIGMA_D, start["t"]
    )
    return trigflow.denoise(F, xt, start["t"])


def draw_start(settings: LaddTerm, keys: Sequence[jax.Array], x0: jax.Array) -> dict[str, Any]:
    """Draw the time and noise that the student predicts from, at the largest time with probability
    p.
    """
    t = guided.times(keys[0], settings, x0.shape[0])
    return {
        "t": trigflow.with_max_time(keys[1], t, settings.max_time),
        "z": guided.noise(keys[2], x0),
    }


def draw_renoising(settings: HeadsTerm, key: jax.Array, x0: jax.Array) -> dict[str, Any]:
    """Draw the time and noise of the discriminator's view."""
    k_time, k_noise = jax.random.split(key)
    mean, std = settings.disc_mean, settings.disc_std
    return {
        "t": trigflow.sample_time(k_time, x0.shape[0], mean=mean, std=std),
        "z": guided.noise(k_noise, x0),
    }


def renoise(x0: jax.Array, drawn: Any) -> tuple[jax.Array, jax.Array]:
    """Return the renoised image at unit scale and its angle."""
    return ladd.renoise(x0, drawn["z"], drawn["t"]), drawn["t"]


def draw_generator(settings: LaddTerm, key: jax.Array, batch: Any) -> dict[str, Any]:
    """Draw what the generator's term of a batch reads: `guided.draw`, and `draw_view`."""
    keys, shared = guided.draw(settings, key, batch)
    return shared | draw_view(settings, keys, shared["x0"])


def draw_view(settings: LaddTerm, keys: Sequence[jax.Array], x0: jax.Array) -> dict[str, Any]:
    """Draw the student's start, and the renoising through which the heads see its prediction.

    keys: the six of `guided.draw`. The first two are those of `scm.draw_path`.
    """
    return {
        "start": draw_start(settings, keys[3:], x0),
        "renoise": draw_renoising(settings, keys[2], x0),
    }


def generator_term(
    settings: LaddTerm,
    networks: Networks,
    params: PyTree,
    draws: Draws,
    state: State,
    frozen: Frozen,
) -> jax.Array:
    """Return Eq. (11) of each sample [B]."""
    heads = state.roles["heads"]
    logits = discriminate(
        settings,
        networks,
        frozen.teacher,
        (heads.params, heads.extra["real"]),
        draws["cond"],
        renoise(generate(networks, params, draws), draws["renoise"]),
    )
    return ladd.generator_loss(logits, reduction=settings.reduction, loss=settings.heads_loss)


def draw_generated(settings: Any, keys: Sequence[jax.Array], x0: jax.Array) -> dict[str, Any]:
    """Draw what `generate` reads beside the data. settings: a `LaddTerm`. keys: three."""
    return {"start": draw_start(settings, keys, x0)}


def heads_update(
    settings: HeadsTerm,
    networks: Networks,
    *,
    images: Callable[[Networks, PyTree, Draws], jax.Array] = generate,
    draw_images: Callable[[Any, Sequence[jax.Array], jax.Array], dict[str, Any]] = draw_generated,
    names: tuple[str, str] = ("disc", "disc_grad_norm"),
) -> Update:
    """Build the discriminator's update: Eq. (12) on real, generated and misaligned images.

    images: (networks, the student's parameters, draws) -> its images. draw_images: (settings, three
    keys, x0) -> what they read beside conditions and scales. names: see `base.Update`.
    """

    def prepare(role: Role) -> PyTree:
        # A power iteration before the fakes and one before the reals, as two forward passes have
        # in training.
        advance = heads_of(settings, networks).advance
        fake = advance(role.params, role.extra["real"])
        return {"fake": fake, "real": advance(role.params, fake)}

    def draw(key, batch, frozen):
        (k_fake, k_real, k_shift, *k_gan), shared = guided.draw(settings, key, batch)
        x0 = shared["x0"]
        return (
            shared
            | draw_images(settings, k_gan, x0)
            | {
                "fake": draw_renoising(settings, k_fake, x0),
                "real": draw_renoising(settings, k_real, x0),
                "shifted": ladd.misaligned(x0),
                "shift": draw_renoising(settings, k_shift, x0),
            }
        )

    def loss(params, draws, state, frozen):
        extra, cond = state.roles["heads"].extra, draws["cond"]
        student = state.roles["student"].params
        x0_hat = jax.lax.stop_gradient(images(networks, student, draws))
        fakes, fake_cond = renoise(x0_hat, draws["fake"]), cond
        if settings.misaligned:
            wrong = renoise(draws["shifted"], draws["shift"])
            fakes = tuple(jnp.concatenate(pair) for pair in zip(fakes, wrong, strict=True))
            fake_cond = concatenate(cond, cond)
        look = lambda side, cond, seen: discriminate(
            settings, networks, frozen.teacher, (params, extra[side]), cond, seen
        )
        # Two calls: groups of the local norm do not mix real and fake.
        fake = look("fake", fake_cond, fakes)
        real = look("real", cond, renoise(draws["x0"], draws["real"]))
        value = ladd.discriminator_loss(
            real, fake, reduction=settings.reduction, loss=settings.heads_loss
        )
        return value, Aux(scalars=_margins(settings, real, fake))

    return Update(
        role="heads",
        draw=draw,
        loss=loss,
        prepare=prepare,
        names=names,
        rules=came.HEADS,
    )


def _margins(settings, real, fake) -> dict[str, jax.Array]:
    """Return the mean logit of each head on real images and on generated ones (not on misaligned
    pairs).
    """
    return {
        f"head_{block}/{name}": side.mean()
        for block, d_real, d_fake in zip(settings.head_blocks, real, fake, strict=True)
        for name, side in (("real", d_real), ("fake", d_fake[: d_real.shape[0]]))
    }
