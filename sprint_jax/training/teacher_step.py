"""The flow-matching step of the teacher, and what fine-tuning adds to one that lacks QK-norm."""

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from sprint_jax import config as config_lib
from sprint_jax.diffusion import flow
from sprint_jax.models.controlnet import Controlled
from sprint_jax.models.linear_dit import LinearDiT
from sprint_jax.training import batch as batch_lib
from sprint_jax.training import buckets
from sprint_jax.training import state as state_lib

_FF_GATE = 5  # row of a block's table that gates its Mix-FFN


def start(model: LinearDiT, key, *, borders: bool):
    """Random parameters of a teacher to be trained from nothing.

    borders: raise the signal of where a token stands. SANA has no positional embedding: only the zero
      padding of the 3x3 convolutions tells, and from the usual start that is so small a part of the hidden
      state that a small model does not find it in thousands of steps (`docs/dev/lab-notebook/2026-11.md`). Random
      biases before the convolution, an open gate behind it and a weaker patch embedding make it a few percent.
    """
    params = model.init(key)
    if not borders:
        return params
    bias = params["blocks"]["ff"]["conv_inverted"]["bias"]
    table = params["blocks"]["scale_shift_table"]
    params["blocks"]["ff"]["conv_inverted"]["bias"] = 2.0 * jax.random.normal(
        jax.random.fold_in(key, 1), bias.shape
    )
    params["blocks"]["scale_shift_table"] = table.at[:, _FF_GATE].add(1.0)
    params["inputs"]["patch_embed"]["kernel"] = 0.3 * params["inputs"]["patch_embed"]["kernel"]
    return params


def init(params, tx, c: config_lib.Teacher) -> state_lib.TeacherState:
    """State at step 0 around given parameters."""
    return state_lib.TeacherState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=state_lib.start_ema(params, c.ema),
        opt=tx.init(params),
        rejected=jnp.zeros((2,), jnp.int32),
    )


def make_step(model, tx, c: config_lib.Teacher, seed: int):
    """Returns step(state, frozen, batch) -> (state, metrics), pure.

    model: a `LinearDiT`, all of which is trained; or a `Controlled`, whose ControlNet alone is: state.params are then
    its parameters and frozen["trunk"] those of the trunk.
    frozen: {"null_text" [1, L, D]}; captions dropped with probability caption_dropout become it, under
    the mask of the caption (as in the published trainer, which the uncond branch of sCM matches).
    batch: {"latent" [B, H, W, C] unit scale, "text" [B, L, D], "mask" [B, L]}, and with a ControlNet "control" as latent. No
    sample goes without it: one that did would teach the ControlNet nothing.
    """
    steered = isinstance(model, Controlled)

    def step(state, frozen, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        k_time, k_noise, k_drop = jax.random.split(key, 3)
        x0 = batch["latent"]
        n = x0.shape[0]
        t = flow.sample_time(k_time, n, mean=c.time_mean, std=c.time_std, shift=c.time_shift)
        z = jax.random.normal(k_noise, x0.shape)
        drop = jax.random.bernoulli(k_drop, c.caption_dropout, (n, 1, 1))
        text = jnp.where(drop, frozen["null_text"], batch["text"])

        cond = {"text": text, "mask": batch["mask"]}
        if steered:
            cond = batch_lib.conditions(batch, key, 0.0) | cond

        def loss(params, b):
            whole = {"trunk": frozen["trunk"], "control": params} if steered else params
            v = lambda x, t: model.apply(whole, x, t, **b["cond"]).velocity
            per_sample = flow.loss(v, b["x0"], b["z"], b["t"])
            return per_sample.mean(), buckets.by_time(b["t"], 1.0, {"loss": per_sample})

        drawn = {"x0": x0, "z": z, "t": t, "cond": cond}
        (value, by_time), grads = state_lib.value_and_grad(loss, state.params, drawn, c.accumulate)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(value)
        updates, opt = tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state_lib.update_ema(state.ema, params, c.ema, state.step)
        new = state.replace(
            step=state.step + 1,
            rejected=state_lib.count_rejected(state.rejected, finite),
            **state_lib.select(
                finite,
                dict(params=params, ema=ema, opt=opt),
                dict(params=state.params, ema=state.ema, opt=state.opt),
            ),
        )
        metrics = {"loss": value, "grad_norm": norm, "rejected": new.rejected, "by_time": by_time}
        return new, metrics | state_lib.module_norms(grads)

    return step


def add_qk_norm(params, model: LinearDiT, key):
    """Parameters of a teacher without QK-norm, completed for `model` by norm weights of one.

    Every other parameter is kept. A change of time scale needs no parameters. Raises ValueError if more
    than the norms differ.
    """
    fresh = jax.eval_shape(model.init, key)
    have = traverse_util.flatten_dict(params)
    merged = {}
    for name, leaf in traverse_util.flatten_dict(fresh).items():
        if name in have:
            merged[name] = have.pop(name)
        elif "norm_q" in name or "norm_k" in name:
            merged[name] = jnp.ones(leaf.shape, leaf.dtype)
        else:
            raise ValueError(f"{'/'.join(name)} is missing from the teacher and is no QK-norm")
    if have:
        raise ValueError(
            f"the teacher has parameters the model lacks: {['/'.join(n) for n in have]}"
        )
    return traverse_util.unflatten_dict(merged)
