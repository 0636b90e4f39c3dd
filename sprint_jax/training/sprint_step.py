"""The two steps of SANA-Sprint: generator (sCM + LADD) and discriminator (heads alone).

They alternate on consecutive batches, generator first, as in the published trainer (the paper's
Algorithm 2 has the discriminator first on shared draws). The teacher is the velocity field, the feature
extractor of the heads and the starting point of the student; it is an argument and never changes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from sprint_jax import config as config_lib
from sprint_jax.diffusion import ladd, scm, trigflow
from sprint_jax.models.ladd_heads import LADDHeads
from sprint_jax.models.linear_dit import LinearDiT
from sprint_jax.training import state as state_lib


@dataclasses.dataclass(frozen=True)
class Nets:
    """Descriptions of the three networks and the two optimisers."""

    teacher: LinearDiT
    student: LinearDiT
    heads: LADDHeads
    tx: optax.GradientTransformation
    heads_tx: optax.GradientTransformation


def student_params(teacher_params, nets: Nets, key):
    """The teacher's parameters plus fresh ones for what only the student has.

    The guidance embedding ends in zeros, so the student starts as the teacher exactly.
    """
    fresh = nets.student.init(key)
    inputs = {**fresh["inputs"], **teacher_params["inputs"]}
    return jax.tree.map(jnp.copy, {**teacher_params, "inputs": inputs})


def init(params, nets: Nets, c: config_lib.Sprint, key) -> state_lib.SprintState:
    """State at step 0 around given student parameters."""
    heads, spectral = nets.heads.init(key)
    return state_lib.SprintState(
        step=jnp.zeros((), jnp.int32), params=params, ema=state_lib.start_ema(params, c.ema),
        opt=nets.tx.init(params), heads=heads, heads_opt=nets.heads_tx.init(heads), spectral=spectral,
        rejected=jnp.zeros((2,), jnp.int32),
    )  # fmt: skip


def student_F(nets: Nets, params, batch, w):
    """The student as a TrigFlow network (u, t) -> (F, logvar), closed over text and guidance w [B]."""

    guidance = w if nets.student.guidance_embed else None

    def F(u, t):
        t_fm = trigflow.to_flow_time(t)
        x_fm = trigflow.to_flow_state(u, t)
        out = nets.student.apply(params, x_fm, t_fm, batch["text"], batch["mask"], guidance)
        return trigflow.from_flow_velocity(out.velocity, x_fm, t_fm), out.logvar

    return F


def teacher_velocity(nets: Nets, frozen, batch, w, uncond_mask):
    """dx_t/dt of the guided teacher, both halves of the guidance in one call on 2B samples.

    A student that is not told the scale learns the unguided teacher, as in the published code.
    """
    if not nets.student.guidance_embed:
        v = lambda x, t: nets.teacher.apply(
            frozen["teacher"], x, t, batch["text"], batch["mask"]
        ).velocity
        F = trigflow.from_flow(v)
        return lambda xt, t: trigflow.SIGMA_D * F(xt / trigflow.SIGMA_D, t)
    n = batch["text"].shape[0]
    null = jnp.broadcast_to(frozen["null_text"], batch["text"].shape)
    mask = batch["mask"]
    if uncond_mask == "null":
        mask = jnp.broadcast_to(frozen["null_mask"], mask.shape)
    text = jnp.concatenate([null, batch["text"]])
    mask = jnp.concatenate([mask, batch["mask"]])

    def velocity(xt, t):
        v = lambda x, t: nets.teacher.apply(frozen["teacher"], x, t, text, mask).velocity
        u = xt / trigflow.SIGMA_D
        F = trigflow.from_flow(v)(jnp.concatenate([u, u]), jnp.concatenate([t, t]))
        return scm.teacher_velocity(F[:n], F[n:], w)

    return velocity


def discriminate(nets: Nets, frozen, heads, spectral, c, batch, u, s, *, update):
    """Logits of the heads on the teacher's features of (u, s); the trunk stops after the last hooked block."""
    x_fm, t_fm = trigflow.to_flow_state(u, s), trigflow.to_flow_time(s)
    features = nets.teacher.apply(
        frozen["teacher"], x_fm, t_fm, batch["text"], batch["mask"],
        features=c.head_blocks, velocity=False,
    ).features  # fmt: skip
    return nets.heads.apply(heads, spectral, features, update=update)


def generate(nets, params, c, batch, x0, w, keys):
    """Student prediction x0_hat at a (max-time weighted) time of its own. keys: time, max-time, noise."""
    n = x0.shape[0]
    t = trigflow.sample_time(keys[0], n, mean=c.p_mean, std=c.p_std)
    t = trigflow.with_max_time(keys[1], t, c.max_time)
    z = trigflow.SIGMA_D * jax.random.normal(keys[2], x0.shape)
    xt = trigflow.interpolate(x0, z, t)
    F, _ = student_F(nets, params, batch, w)(xt / trigflow.SIGMA_D, t)
    return trigflow.denoise(F, xt, t)


def _renoise(x0, c, key):
    k_time, k_noise = jax.random.split(key)
    s = trigflow.sample_time(k_time, x0.shape[0], mean=c.disc_mean, std=c.disc_std)
    z = trigflow.SIGMA_D * jax.random.normal(k_noise, x0.shape)
    return ladd.renoise(x0, z, s), s


def _guidance(c, key, n):
    return jax.random.choice(key, jnp.asarray(c.guidance, jnp.float32), (n,))


def make_generator_step(nets: Nets, c: config_lib.Sprint, seed: int):
    """Returns step(state, frozen, batch) -> (state, metrics), pure.

    frozen: {"teacher" params, "null_text" [1, L, D], "null_mask" [1, L]}.
    batch: {"latent" [B, H, W, C] unit scale, "text" [B, L, D], "mask" [B, L]}.
    """

    def losses(params, state, frozen, batch, key):
        k_w, k_t, k_z, k_s, *k_gan = jax.random.split(key, 7)
        x0 = trigflow.SIGMA_D * batch["latent"]
        n = x0.shape[0]
        w = _guidance(c, k_w, n)
        total, metrics = 0.0, {}
        if c.scm_weight:
            t = trigflow.sample_time(k_t, n, mean=c.p_mean, std=c.p_std)
            z = trigflow.SIGMA_D * jax.random.normal(k_z, x0.shape)
            per_sample, aux = scm.loss(
                student_F(nets, params, batch, w),
                teacher_velocity(nets, frozen, batch, w, c.uncond_mask),
                x0, z, t,
                r=scm.tangent_warmup(state.step + 1, c.tangent_warmup),
                weighting=c.weighting, normalize=c.tangent_normalize,
            )  # fmt: skip
            total += c.scm_weight * per_sample.mean()
            metrics |= {"scm": per_sample.mean()} | {k: v.mean() for k, v in aux.items()}
        if c.adv_weight:
            x0_hat = generate(nets, params, c, batch, x0, w, k_gan)
            u, s = _renoise(x0_hat, c, k_s)
            logits, _ = discriminate(
                nets, frozen, state.heads, state.spectral, c, batch, u, s, update=False
            )
            adv = ladd.generator_loss(logits, reduction=c.reduction).mean()
            total += c.adv_weight * adv
            metrics["adv"] = adv
        return total, metrics

    def step(state, frozen, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (value, metrics), grads = jax.value_and_grad(losses, has_aux=True)(
            state.params, state, frozen, batch, key
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


def make_discriminator_step(nets: Nets, c: config_lib.Sprint, seed: int):
    """Returns step(state, frozen, batch) -> (state, metrics), pure; arguments as for the generator."""

    def loss(heads, state, frozen, batch, key):
        k_w, k_fake, k_real, k_shift, *k_gan = jax.random.split(key, 7)
        x0 = trigflow.SIGMA_D * batch["latent"]
        w = _guidance(c, k_w, x0.shape[0])
        fake_batch = batch
        x0_hat = jax.lax.stop_gradient(generate(nets, state.params, c, batch, x0, w, k_gan))
        u_fake, s_fake = _renoise(x0_hat, c, k_fake)
        if c.misaligned:
            u_shift, s_shift = _renoise(ladd.misaligned(x0), c, k_shift)
            u_fake, s_fake = jnp.concatenate([u_fake, u_shift]), jnp.concatenate([s_fake, s_shift])
            fake_batch = {k: jnp.concatenate([batch[k], batch[k]]) for k in ("text", "mask")}
        u_real, s_real = _renoise(x0, c, k_real)
        # Two calls, fake first: each is one power iteration, and groups of the local norm do not mix.
        run = lambda spectral, b, u, s: discriminate(
            nets, frozen, heads, spectral, c, b, u, s, update=True
        )
        fake, spectral = run(state.spectral, fake_batch, u_fake, s_fake)
        real, spectral = run(spectral, batch, u_real, s_real)
        value = ladd.discriminator_loss(real, fake, reduction=c.reduction)
        n = x0.shape[0]
        margins = {
            f"head_{block}/{name}": side.mean()
            for block, d_real, d_fake in zip(c.head_blocks, real, fake)
            for name, side in (("real", d_real), ("fake", d_fake[:n]))
        }
        return value, (spectral, margins)

    def step(state, frozen, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (value, (spectral, margins)), grads = jax.value_and_grad(loss, has_aux=True)(
            state.heads, state, frozen, batch, key
        )
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(value)
        updates, heads_opt = nets.heads_tx.update(grads, state.heads_opt, state.heads)
        heads = optax.apply_updates(state.heads, updates)
        new = state.replace(
            step=state.step + 1,
            rejected=state_lib.count_rejected(state.rejected, finite),
            **state_lib.select(
                finite,
                dict(heads=heads, heads_opt=heads_opt, spectral=spectral),
                dict(heads=state.heads, heads_opt=state.heads_opt, spectral=state.spectral),
            ),
        )
        metrics = {"disc": value, "disc_grad_norm": norm, "rejected": new.rejected}
        return new, metrics | margins | state_lib.module_norms(grads, "disc_grad_norm")

    return step
