"""DMD: the student's images are moved to where the teacher finds them likelier than a critic does,
which learns what the student makes; see `diffusion.dmd`.

A round is an update of the student and a few of the critic for images in one step, then the same
for images in two, and so on: one program for each number of steps. Only the last of the student's
calls has a gradient.

The critic knows the guidance scale, as the student does. Without it, it would learn the mixture
over scales and drive their laws apart. It starts as the student.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from sprint_jax.diffusion import dmd, flow, samplers, trigflow
from sprint_jax.objectives import anchor, guided, views
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

SIGMA_D = trigflow.SIGMA_D


@dataclasses.dataclass(frozen=True, kw_only=True)
class DmdTerm(guided.Guided):
    """Settings of distribution matching."""

    sample_steps: int
    """Images in 1, 2, ... up to this many steps, each in updates of their own."""
    sampler_times: float
    """Share of samples whose steps after the first have the sampler's times; those of the others
    are drawn as the renoising's.
    """
    renoise_mean: float
    """Mean of the renoising's time sampler."""
    renoise_std: float
    """Its standard deviation."""
    dmd_normalize: bool
    """Divide a sample's gradient by the distance of its image from the teacher's prediction."""
    dmd_guidance: Literal["coupled", "same", "full", "cleaner"]
    """coupled: the guided teacher. Else matching and guidance are apart (Decoupled DMD), the
    latter at the same renoising, at one of its own, or at one below the student's own time.
    """
    critic_updates: int
    """Updates of the critic after each of the student."""
    critic_pull: float
    """Before each of its updates the critic becomes this much of itself, and the student for the
    rest (implicit distribution alignment); 1 for none.
    """

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, what to use instead) for each value out of range."""
        yield from super().problems()
        for name in ("sample_steps", "critic_updates"):
            if getattr(self, name) < 1:
                yield name, "use 1 or more"
        if not 0 <= self.sampler_times <= 1:
            yield "sampler_times", "use a share in [0, 1]"
        if not self.renoise_std > 0:
            yield "renoise_std", "use a number above 0"
        if not 0 < self.critic_pull <= 1:
            yield "critic_pull", "use a share in (0, 1], 1 for none"

    @property
    def round(self) -> tuple[str, ...]:
        """The student, then the critic, for each number of steps."""
        return ("student", *["fake"] * self.critic_updates) * self.sample_steps

    def needs(self) -> Needs:
        """Return what DMD asks of a run: a teacher."""
        return Needs(teacher=True, images=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dmd(DmdTerm, anchor.AnchorTerm):
    """Settings of DMD alone, with an anchor on rollouts of the teacher."""

    kind: Literal["dmd"]
    """Names this objective."""
    dmd_weight: float
    """Factor of the pseudo-loss, a mean over elements."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, what to use instead) for each value out of range."""
        yield from super().problems()
        if not self.dmd_weight > 0:
            yield "dmd_weight", "use a number above 0"
        if self.stored and not self.anchor_weight:
            yield "stored", "use 0: without an anchor_weight no rollout is read"

    def needs(self) -> Needs:
        """Return what DMD asks of a run: a teacher, and the anchor's rollouts."""
        return anchor.AnchorTerm.needs(self)

    def objective(self, networks: Networks) -> Objective:
        """Build the objective."""

        def student(steps):
            def draw_all(key, batch, frozen):
                (k_sample, k_anchor, *_), shared = guided.draw(self, key, batch)
                drawn = {"cond": shared["cond"], "w": shared["w"]}
                drawn |= {"dmd": draw(self, k_sample, shared["x0"], steps)}
                if not self.anchor_weight:
                    return drawn
                return drawn | {"anchor": anchor.draw(self, k_anchor, shared)}

            def loss(params, draws, state, frozen):
                each, scalars = term(self, networks, params, draws, state, frozen)
                value = self.dmd_weight * each.mean()
                if self.anchor_weight:
                    pull, found = anchor.term(self, networks, params, draws["anchor"], frozen)
                    value, scalars = value + self.anchor_weight * pull.mean(), scalars | found
                return value, Aux(scalars=renamed(scalars, steps))

            return Update(role="student", draw=draw_all, loss=loss, names=loss_names("loss", steps))

        return matching(self, networks, student)


def named(name: str, steps: int) -> str:
    """Return a name of what belongs to images in that many steps."""
    return name if steps == 1 else f"{name}_{steps}_steps"


def renamed(scalars: dict[str, jax.Array], steps: int) -> dict[str, jax.Array]:
    """Return scalars by such names."""
    return {named(name, steps): value for name, value in scalars.items()}


def loss_names(loss: str, steps: int) -> tuple[str, str]:
    """Return the names of a loss and of its gradient's norm for images in that many steps."""
    norm = "grad_norm" if loss == "loss" else f"{loss}_grad_norm"
    return named(loss, steps), named(norm, steps)


def matching(settings: DmdTerm, networks: Networks, student: Any) -> Objective:
    """Build an objective of the student's updates and the critic's.

    student: number of steps -> the student's update.
    """

    def begin_both(frozen: Frozen, begin: PyTree, key: jax.Array) -> dict[str, Start]:
        return start(settings, networks, frozen, begin, key)

    updates, order = {}, []
    for steps in range(1, settings.sample_steps + 1):
        labels = named("student", steps), named("fake", steps)
        updates |= dict(
            zip(labels, (student(steps), critic(settings, networks, steps)), strict=True)
        )
        order += [labels[0], *[labels[1]] * settings.critic_updates]
    return Objective(
        main="student", round=tuple(order), updates=updates, start=begin_both, sampler="renoise"
    )


def start(
    settings: DmdTerm, networks: Networks, frozen: Frozen, begin: PyTree, key: jax.Array
) -> dict[str, Start]:
    """Return where student and critic begin: the critic as the student."""
    params = guided.begin_student(settings, networks, frozen, begin, key)
    return {"student": Start(params), "fake": Start(jax.tree.map(jnp.copy, params))}


def draw(settings: DmdTerm, key: jax.Array, x0: jax.Array, steps: int) -> dict[str, Any]:
    """Draw the student's noises and times, and the renoising of its image.

    z [B, ...] and step_noise [B, steps - 1, ...] at unit variance, times [B, steps], tau [B] and
    n [B, ...] at scale sigma_d, of the matching and of guidance that is apart.
    """
    k_z, k_steps, k_times, k_which, k_tau, k_guide = jax.random.split(key, 6)
    count = x0.shape[0]
    late = [
        jnp.where(
            jax.random.bernoulli(k_which, settings.sampler_times, (count,)),
            float(samplers.scm_times(steps)[i]),
            _time(settings, jax.random.fold_in(k_times, i), count),
        )
        for i in range(1, steps)
    ]
    times = jnp.stack([jnp.full((count,), trigflow.T_MAX), *late], 1)
    # Decreasing, as a sampler's.
    times = -jnp.sort(-times, 1)
    drawn = {
        "z": jax.random.normal(k_z, x0.shape),
        "step_noise": jax.random.normal(k_steps, (count, steps - 1, *x0.shape[1:])),
        "times": times,
        "matching": _renoising(settings, k_tau, x0),
    }
    match settings.dmd_guidance:
        case "full":
            drawn["guidance"] = _renoising(settings, k_guide, x0)
        case "cleaner":
            k_tau, k_n = jax.random.split(k_guide)
            tau = dmd.cleaner_time(k_tau, times[:, -1], _SHIFT)
            drawn["guidance"] = {"tau": tau, "n": guided.noise(k_n, x0)}
    return drawn


_SHIFT = 3.0  # of the flow times of published Decoupled DMD


def _time(settings, key, count):
    mean, std = settings.renoise_mean, settings.renoise_std
    return trigflow.sample_time(key, count, mean=mean, std=std)


def _renoising(settings, key, x0):
    k_tau, k_n = jax.random.split(key)
    return {"tau": _time(settings, k_tau, x0.shape[0]), "n": guided.noise(k_n, x0)}


def images(networks: Networks, params: PyTree, draws: Draws) -> jax.Array:
    """Return the student's images x at scale sigma_d, with a gradient through the last call."""
    F = lambda u, t: views.student_F(networks.trained, params, draws["cond"], draws["w"])(u, t)[0]
    drawn = draws["dmd"]
    times, noises = drawn["times"].T, jnp.moveaxis(drawn["step_noise"], 1, 0)
    xt = samplers.simulate(F, drawn["z"], noises, times)
    return trigflow.denoise(F(xt / SIGMA_D, times[-1]), xt, times[-1])


def term(
    settings: DmdTerm,
    networks: Networks,
    params: PyTree,
    draws: Draws,
    state: State,
    frozen: Frozen,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the pseudo-loss of each sample [B], and its statistics."""
    x = images(networks, params, draws)
    g, scalars = gradient(settings, networks, x, draws, state, frozen)
    return dmd.loss(x, g), scalars


def gradient(
    settings: DmdTerm,
    networks: Networks,
    x: jax.Array,
    draws: Draws,
    state: State,
    frozen: Frozen,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return g at the student's images x, stopped, and its statistics.

    critic_ratio: error of the critic's velocity over that of the teacher (the guided one where
    guidance is coupled), on the same renoised images; 1 means that it knows no more of the student
    than the teacher does.
    """
    x = jax.lax.stop_gradient(x)
    cond, w, seen = draws["cond"], draws["w"], draws["dmd"]["matching"]
    tau, n = seen["tau"], seen["n"]
    y = trigflow.interpolate(x, n, tau)
    clean = lambda F_value, y, tau: trigflow.denoise(F_value.astype(jnp.float32), y, tau)
    F_phi = _critic(networks, state.roles["fake"].params, draws)(y / SIGMA_D, tau)
    fake, normalize = clean(F_phi, y, tau), settings.dmd_normalize
    halves = views.teacher_halves(networks, frozen, cond, settings.uncond_mask)
    if settings.dmd_guidance == "coupled" or not networks.trained.guidance_embed:
        velocity = views.teacher_velocity(networks, frozen, cond, w, settings.uncond_mask)
        F_T = velocity(y, tau) / SIGMA_D
        g = dmd.pseudo_gradient(x, clean(F_T, y, tau), fake, normalize=normalize)
    elif settings.dmd_guidance in ("full", "cleaner"):
        F_T = views.teacher_F(networks, frozen, cond)(y / SIGMA_D, tau)
        other = draws["dmd"]["guidance"]
        y2 = trigflow.interpolate(x, other["n"], other["tau"])
        both = [clean(F, y2, other["tau"]) for F in halves(y2 / SIGMA_D, other["tau"])]
        pair = (clean(F_T, y, tau), fake)
        g = dmd.decoupled_gradient(x, pair, (both[0], both[1]), w, normalize=normalize)
    else:
        F_u, F_T = halves(y / SIGMA_D, tau)
        pair, guide = (clean(F_T, y, tau), fake), (clean(F_u, y, tau), clean(F_T, y, tau))
        g = dmd.decoupled_gradient(x, pair, guide, w, normalize=normalize)
    error = lambda F: flow.mean_per_sample(jnp.square(F - dmd.critic_target(x, n, tau))).mean()
    rms = lambda a: jnp.sqrt(jnp.square(a).mean())
    return g, {
        "dmd_gap": rms(SIGMA_D * jnp.sin(flow.expand(tau, y)) * (F_phi - F_T)),
        "dmd_rms": rms(g),
        "critic_ratio": error(F_phi) / error(F_T),
        "image_mean": x.mean(),
        "image_std": x.std(),
    }


def _critic(networks, params, draws):
    F = views.student_F(networks.trained, params, draws["cond"], draws["w"])
    return lambda u, t: F(u, t)[0]


def critic(settings: DmdTerm, networks: Networks, steps: int) -> Update:
    """Build the critic's update on the student's images in that many steps."""

    def draw_all(key, batch, frozen):
        (k_sample, *_), shared = guided.draw(settings, key, batch)
        drawn = draw(settings, k_sample, shared["x0"], steps)
        return {"cond": shared["cond"], "w": shared["w"], "dmd": drawn}

    def loss(params, draws, state, frozen):
        x = jax.lax.stop_gradient(images(networks, state.roles["student"].params, draws))
        tau, n = draws["dmd"]["matching"]["tau"], draws["dmd"]["matching"]["n"]
        y = trigflow.interpolate(x, n, tau)
        each = dmd.critic_loss(_critic(networks, params, draws)(y / SIGMA_D, tau), x, n, tau)
        return each.mean(), Aux()

    def begin(params, state):
        k = settings.critic_pull
        if k == 1:
            return params
        return jax.tree.map(lambda a, b: k * a + (1 - k) * b, params, state.roles["student"].params)

    return Update(
        role="fake", draw=draw_all, loss=loss, begin=begin, names=loss_names("critic", steps)
    )
