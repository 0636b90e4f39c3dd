"""Prompts' features to pictures: the student in a few steps, the teacher in many. Pure, then batched.

What pictures are made of is a dict `cond`, as a network's `apply` takes it by name: {"text" [B, L, D], "mask" [B, L]},
and for a ControlNet {"control" [B, h, w, c], "control_scale" [B]} besides.

A picture's noise comes from (seed, index) alone, and pictures are made in batches of one fixed size, the
last one padded, so a picture is the same alone and in company, to the last bit.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sprint_jax.diffusion import flow, samplers, trigflow


def noises(seed, indices, shape, count):
    """count draws per picture: [count, B, *shape] unit-variance float32; seed, indices int32 [B]."""

    def one(index):
        key = jax.random.fold_in(jax.random.key(seed), index)
        return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(
            jnp.arange(count)
        )

    return jnp.swapaxes(jax.vmap(one)(indices), 0, 1)


def student_sampler(model, pixels, shape, times):
    """Returns sample(params, null, cond, guidance, seed, indices) -> uint8 [B, H, W, 3].

    pixels: the seam (`parts.py`). params: {"transformer", "pixels"}. times: angles from
    `samplers.scm_times`. shape: of one latent. guidance: scalar embedded scale.
    """

    def sample(params, null, cond, guidance, seed, indices):
        del null
        draws = noises(seed, indices, shape, len(times) - 1)
        w = jnp.full(indices.shape, guidance) if model.guidance_embed else None
        v = lambda x, t: model.apply(params["transformer"], x, t, guidance=w, **cond).velocity
        latents = samplers.scm(trigflow.from_flow(v), draws[0], draws[1:], times)
        return pixels.decode(params["pixels"], latents)

    return jax.jit(sample)


def teacher_sampler(model, pixels, shape, times, sampler="trigflow"):
    """As `student_sampler` for the guided teacher, by "trigflow" rotation (angles) or "flow" Euler (times).

    null: {"text" [1, L, D], "mask" [1, L]} of the null prompt, used under the prompt's own mask.
    """

    def sample(params, null, cond, guidance, seed, indices):
        noise = noises(seed, indices, shape, 1)[0]
        w = jnp.full(indices.shape, guidance)
        uncond = cond | {"text": jnp.broadcast_to(null["text"], cond["text"].shape)}
        twice = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), uncond, cond)

        def v(x, t):
            both = model.apply(
                params["transformer"], jnp.concatenate([x, x]), jnp.concatenate([t, t]), **twice
            ).velocity
            uncond, cond = jnp.split(both, 2)
            return flow.guided(uncond, cond, w)

        if sampler == "flow":
            latents = samplers.flow_euler(v, noise, times)
        else:
            latents = samplers.trigflow_euler(trigflow.from_flow(v), noise, times)
        return pixels.decode(params["pixels"], latents)

    return jax.jit(sample)


def run(sampler, params, null, cond, *, guidance, seed, batch, starts=None, say=lambda done: None):
    """Pictures of all rows of `cond`, picture i from (seed, i, row i): uint8 [N, H, W, 3].

    null: {"text", "mask"} of the null prompt. starts: rows at which to
    begin a batch, for one of several processes; default all. say: called with the number of pictures done.
    """
    images, count = [], len(cond["text"])
    for start in range(0, count, batch) if starts is None else starts:
        rows = np.minimum(np.arange(start, start + batch), count - 1)  # the last batch is padded
        indices = np.arange(start, start + batch, dtype=np.int32)
        some = {name: a[rows] for name, a in cond.items()}
        made = sampler(params, null, some, np.float32(guidance), np.int32(seed), indices)
        images.append(np.asarray(made)[: count - start])
        say(sum(map(len, images)))
    return np.concatenate(images)
