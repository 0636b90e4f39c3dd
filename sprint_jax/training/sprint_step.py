"""The two steps of SANA-Sprint: generator (sCM + LADD) and discriminator (heads alone).

They alternate on consecutive batches, generator first, as in the published trainer (the paper's
Algorithm 2 has the discriminator first on shared draws). The teacher is the velocity field, the feature
extractor of the heads and the starting point of the student; it is an argument and never changes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from sprint_jax import config as config_lib
from sprint_jax.diffusion import ladd, scm, trigflow
from sprint_jax.models.controlnet import Controlled
from sprint_jax.models.discriminator import LADDHeads
from sprint_jax.models.linear_dit import LinearDiT
from sprint_jax.training import batch as batch_lib
from sprint_jax.training import buckets
from sprint_jax.training import state as state_lib


@dataclasses.dataclass(frozen=True)
class Nets:
    """Descriptions of the three networks and the two optimisers. With a ControlNet both teacher and student have one."""

    teacher: LinearDiT | Controlled
    student: LinearDiT | Controlled
    heads: LADDHeads
    tx: optax.GradientTransformation
    heads_tx: optax.GradientTransformation


def student_params(teacher_params, nets: Nets, key, *, logvar_start):
    """The teacher's parameters plus fresh ones for what only the student has.

    The guidance embedding ends in zeros, so the student starts as the teacher exactly, with a log-variance of
    logvar_start everywhere.
    """
    fresh = traverse_util.flatten_dict(nets.student.init(key))
    for path, leaf in fresh.items():
        if path[-2:] == ("logvar", "bias"):
            fresh[path] = jnp.full_like(leaf, logvar_start)
    return jax.tree.map(
        jnp.copy, traverse_util.unflatten_dict(fresh | traverse_util.flatten_dict(teacher_params))
    )


def init(params, nets: Nets, c: config_lib.Sprint, key) -> state_lib.SprintState:
    """State at step 0 around given student parameters."""
    heads, spectral = nets.heads.init(key)
    return state_lib.SprintState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=state_lib.start_ema(params, c.ema),
        opt=nets.tx.init(params),
        heads=heads,
        heads_opt=nets.heads_tx.init(heads),
        spectral=spectral,
        rejected=jnp.zeros((3,), jnp.int32),
    )


def start(teacher_params, nets: Nets, c: config_lib.Sprint, key) -> state_lib.SprintState:
    """State at step 0 of a distillation: the student that is its teacher still, and fresh heads."""
    k_student, k_heads = jax.random.split(key)
    return init(
        student_params(teacher_params, nets, k_student, logvar_start=c.logvar_start),
        nets,
        c,
        k_heads,
    )


def student_F(nets: Nets, params, cond, w, *, logvar_gradient="network"):
    """The student as a TrigFlow network (u, t) -> (F, logvar), closed over its conditions and guidance w [B].

    logvar_gradient: what the gradient of logvar trains, "network" (code: the head, and through it the embedding of
      time and guidance that it reads) or "head" alone. Values do not depend on it.
    """

    guidance = w if nets.student.guidance_embed else None

    def F(u, t):
        t_fm = trigflow.to_flow_time(t)
        x_fm = trigflow.to_flow_state(u, t)
        out = nets.student.apply(params, x_fm, t_fm, guidance=guidance, **cond)
        logvar = out.logvar
        if (
            logvar_gradient == "head"
        ):  # again, without blocks, from parameters of which only the head's get a gradient
            plain = {"text": cond["text"], "mask": cond["mask"]}
            logvar = nets.student.apply(
                _head_alone(params), x_fm, t_fm, guidance=guidance, **plain, velocity=False
            ).logvar
        return trigflow.from_flow_velocity(out.velocity, x_fm, t_fm), logvar

    return F


def _head_alone(params):
    """The same parameters, all but those of the log-variance head stopped."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict(
        {
            path: leaf if "logvar" in path else jax.lax.stop_gradient(leaf)
            for path, leaf in flat.items()
        }
    )


def teacher_velocity(nets: Nets, frozen, cond, w, uncond_mask):
    """dx_t/dt of the guided teacher, both halves of the guidance in one call on 2B samples.

    A student that is not told the scale learns the unguided teacher, as in the published code.
    """
    if not nets.student.guidance_embed:
        v = lambda x, t: nets.teacher.apply(frozen["teacher"], x, t, **cond).velocity
        F = trigflow.from_flow(v)
        return lambda xt, t: trigflow.SIGMA_D * F(xt / trigflow.SIGMA_D, t)
    n = cond["text"].shape[0]
    uncond = cond | {"text": jnp.broadcast_to(frozen["null_text"], cond["text"].shape)}
    if uncond_mask == "null":
        uncond["mask"] = jnp.broadcast_to(frozen["null_mask"], cond["mask"].shape)
    both = _concatenate(uncond, cond)

    def velocity(xt, t):
        v = lambda x, t: nets.teacher.apply(frozen["teacher"], x, t, **both).velocity
        u = xt / trigflow.SIGMA_D
        F = trigflow.from_flow(v)(jnp.concatenate([u, u]), jnp.concatenate([t, t]))
        return scm.teacher_velocity(F[:n], F[n:], w)

    return velocity


def _concatenate(a, b):
    """Of two conditions, along the samples."""
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), a, b)


def discriminate(nets: Nets, frozen, heads, spectral, c, cond, u, s):
    """Logits of the heads on the teacher's features of (u, s); the trunk stops after the last hooked block."""
    x_fm, t_fm = trigflow.to_flow_state(u, s), trigflow.to_flow_time(s)
    features = nets.teacher.apply(
        frozen["teacher"], x_fm, t_fm, **cond, features=c.head_blocks, velocity=False
    ).features
    return nets.heads.apply(heads, spectral, features)


def generate(nets, params, batch, start):
    """Student prediction x0_hat from the drawn start {"t" [B], "z" [B, ...]} of `_start`."""
    xt = trigflow.interpolate(batch["x0"], start["z"], start["t"])
    F, _ = student_F(nets, params, batch["cond"], batch["w"])(xt / trigflow.SIGMA_D, start["t"])
    return trigflow.denoise(F, xt, start["t"])


# Everything random is drawn for the whole batch before anything is computed, so that an update does not
# depend on how its batch is cut into parts.


def _noise(key, x0):
    return trigflow.SIGMA_D * jax.random.normal(key, x0.shape)


def _guidance(c, key, n):
    return jax.random.choice(key, jnp.asarray(c.guidance, jnp.float32), (n,))


def _start(c, keys, x0):
    """Time and noise that the student predicts from, at the largest time with probability p."""
    t = trigflow.sample_time(keys[0], x0.shape[0], mean=c.p_mean, std=c.p_std)
    return {"t": trigflow.with_max_time(keys[1], t, c.max_time), "z": _noise(keys[2], x0)}


def _renoising(c, key, x0):
    """Time and noise of the discriminator's view."""
    k_time, k_noise = jax.random.split(key)
    return {
        "t": trigflow.sample_time(k_time, x0.shape[0], mean=c.disc_mean, std=c.disc_std),
        "z": _noise(k_noise, x0),
    }


def _renoise(x0, drawn):
    return ladd.renoise(x0, drawn["z"], drawn["t"]), drawn["t"]


def make_generator_step(nets: Nets, c: config_lib.Sprint, seed: int, *, control_dropout=0.0):
    """Returns step(state, frozen, batch) -> (state, metrics), pure.

    frozen: {"teacher" params, "null_text" [1, L, D], "null_mask" [1, L]}.
    batch: {"latent" [B, H, W, C] unit scale, "text" [B, L, D], "mask" [B, L]}, and with a ControlNet "control" as latent,
    which teacher and student go without in a share control_dropout of the samples.
    """

    def draw(key, batch):
        k_w, k_t, k_z, k_s, *k_gan = jax.random.split(key, 7)
        x0 = trigflow.SIGMA_D * batch["latent"]
        n = x0.shape[0]
        return {
            "x0": x0,
            "cond": batch_lib.conditions(batch, key, control_dropout),
            "w": _guidance(c, k_w, n),
            "t": trigflow.sample_time(k_t, n, mean=c.p_mean, std=c.p_std),
            "z": _noise(k_z, x0),
            "start": _start(c, k_gan, x0),
            "renoise": _renoising(c, k_s, x0),
        }

    def losses(params, batch, state, frozen):
        total, metrics = 0.0, {}
        if c.scm_weight:
            per_sample, aux = scm.loss(
                student_F(
                    nets, params, batch["cond"], batch["w"], logvar_gradient=c.logvar_gradient
                ),
                teacher_velocity(nets, frozen, batch["cond"], batch["w"], c.uncond_mask),
                batch["x0"],
                batch["z"],
                batch["t"],
                r=scm.tangent_warmup(state.step + 1, c.tangent_warmup),
                weighting=c.weighting,
                normalize=c.tangent_normalize,
            )
            total += c.scm_weight * per_sample.mean()
            metrics |= {"scm": per_sample.mean()} | {k: v.mean() for k, v in aux.items()}
            metrics["by_time"] = buckets.by_time(
                batch["t"], trigflow.T_MAX, {"scm": per_sample} | aux
            )
        if c.adv_weight:
            u, s = _renoise(generate(nets, params, batch, batch["start"]), batch["renoise"])
            logits = discriminate(nets, frozen, state.heads, state.spectral, c, batch["cond"], u, s)
            adv = ladd.generator_loss(logits, reduction=c.reduction).mean()
            total += c.adv_weight * adv
            metrics["adv"] = adv
        return total, metrics

    def step(state, frozen, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (value, metrics), grads = state_lib.value_and_grad(
            lambda params, part: losses(params, part, state, frozen),
            state.params,
            draw(key, batch),
            c.accumulate,
        )
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(value)
        updates, opt = nets.tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state_lib.update_ema(state.ema, params, c.ema, state.step // 2)
        new = state.replace(
            step=state.step + 1,
            rejected=state_lib.count_rejected(state.rejected, finite),
            **state_lib.select(
                finite,
                dict(params=params, ema=ema, opt=opt),
                dict(params=state.params, ema=state.ema, opt=state.opt),
            ),
        )
        metrics |= {"loss": value, "grad_norm": norm, "rejected": new.rejected}
        return new, metrics | state_lib.module_norms(grads)

    return step


def make_discriminator_step(nets: Nets, c: config_lib.Sprint, seed: int, *, control_dropout=0.0):
    """Returns step(state, frozen, batch) -> (state, metrics), pure; arguments as for the generator."""

    def draw(key, batch):
        k_w, k_fake, k_real, k_shift, *k_gan = jax.random.split(key, 7)
        x0 = trigflow.SIGMA_D * batch["latent"]
        return {
            "x0": x0,
            "cond": batch_lib.conditions(batch, key, control_dropout),
            "w": _guidance(c, k_w, x0.shape[0]),
            "start": _start(c, k_gan, x0),
            "fake": _renoising(c, k_fake, x0),
            "real": _renoising(c, k_real, x0),
            "shifted": ladd.misaligned(x0),
            "shift": _renoising(c, k_shift, x0),
        }

    def loss(heads, batch, state, frozen, spectral):
        cond, n = batch["cond"], batch["x0"].shape[0]
        fake_cond = cond
        x0_hat = jax.lax.stop_gradient(generate(nets, state.params, batch, batch["start"]))
        u_fake, s_fake = _renoise(x0_hat, batch["fake"])
        if c.misaligned:
            u_shift, s_shift = _renoise(batch["shifted"], batch["shift"])
            u_fake, s_fake = jnp.concatenate([u_fake, u_shift]), jnp.concatenate([s_fake, s_shift])
            fake_cond = _concatenate(cond, cond)
        u_real, s_real = _renoise(batch["x0"], batch["real"])
        # Two calls: groups of the local norm do not mix real and fake.
        fake = discriminate(nets, frozen, heads, spectral["fake"], c, fake_cond, u_fake, s_fake)
        real = discriminate(nets, frozen, heads, spectral["real"], c, cond, u_real, s_real)
        value = ladd.discriminator_loss(real, fake, reduction=c.reduction)
        margins = {
            f"head_{block}/{name}": side.mean()
            for block, d_real, d_fake in zip(c.head_blocks, real, fake)
            for name, side in (("real", d_real), ("fake", d_fake[:n]))
        }
        return value, margins

    def step(state, frozen, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        # A power iteration before the fakes and one before the reals, as two forward passes have in training.
        fake = nets.heads.advance(state.heads, state.spectral)
        spectral = nets.heads.advance(state.heads, fake)
        (value, margins), grads = state_lib.value_and_grad(
            lambda heads, part: loss(heads, part, state, frozen, {"fake": fake, "real": spectral}),
            state.heads,
            draw(key, batch),
            c.accumulate,
        )
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(value)
        updates, heads_opt = nets.heads_tx.update(grads, state.heads_opt, state.heads)
        heads = optax.apply_updates(state.heads, updates)
        new = state.replace(
            step=state.step + 1,
            rejected=state_lib.count_rejected(state.rejected, finite, network=1),
            **state_lib.select(
                finite,
                dict(heads=heads, heads_opt=heads_opt, spectral=spectral),
                dict(heads=state.heads, heads_opt=state.heads_opt, spectral=state.spectral),
            ),
        )
        metrics = {"disc": value, "disc_grad_norm": norm, "rejected": new.rejected}
        return new, metrics | margins | state_lib.module_norms(grads, "disc_grad_norm")

    return step
