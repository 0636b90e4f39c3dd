"""Prompts' features to pictures: the student in a few steps, the teacher in many. Pure, then batched.

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
        return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(jnp.arange(count))

    return jnp.swapaxes(jax.vmap(one)(indices), 0, 1)


def student_sampler(model, pixels, shape, times):
    """Returns sample(params, null, text, mask, guidance, seed, indices) -> uint8 [B, H, W, 3].

    pixels: the seam (`parts.py`). params: {"transformer", "pixels"}. times: angles from
    `samplers.scm_times`. shape: of one latent. guidance: scalar embedded scale.
    """

    def sample(params, null, text, mask, guidance, seed, indices):
        del null
        draws = noises(seed, indices, shape, len(times) - 1)
        w = jnp.full(indices.shape, guidance) if model.guidance_embed else None
        v = lambda x, t: model.apply(params["transformer"], x, t, text, mask, w).velocity
        latents = samplers.scm(trigflow.from_flow(v), draws[0], draws[1:], times)
        return pixels.decode(params["pixels"], latents)

    return jax.jit(sample)


def teacher_sampler(model, pixels, shape, times, sampler="trigflow"):
    """As `student_sampler` for the guided teacher, by "trigflow" rotation (angles) or "flow" Euler (times).

    null: {"text" [1, L, D], "mask" [1, L]} of the null prompt, used under the prompt's own mask.
    """

    def sample(params, null, text, mask, guidance, seed, indices):
        noise = noises(seed, indices, shape, 1)[0]
        w = jnp.full(indices.shape, guidance)
        texts = jnp.concatenate([jnp.broadcast_to(null["text"], text.shape), text])
        masks = jnp.concatenate([mask, mask])

        def v(x, t):
            both = model.apply(params["transformer"], jnp.concatenate([x, x]), jnp.concatenate([t, t]), texts, masks).velocity
            uncond, cond = jnp.split(both, 2)
            return flow.guided(uncond, cond, w)

        if sampler == "flow":
            latents = samplers.flow_euler(v, noise, times)
        else:
            latents = samplers.trigflow_euler(trigflow.from_flow(v), noise, times)
        return pixels.decode(params["pixels"], latents)

    return jax.jit(sample)


def run(sampler, params, null, text, mask, *, guidance, seed, batch, starts=None, say=lambda done: None):
    """Pictures of all rows of text, picture i from (seed, i, text i): uint8 [N, H, W, 3].

    text, mask: [N, L, D] and [N, L]. null: {"text", "mask"} of the null prompt. starts: rows at which to
    begin a batch, for one of several processes; default all. say: called with the number of pictures done.
    """
    images = []
    for start in range(0, len(text), batch) if starts is None else starts:
        rows = np.minimum(np.arange(start, start + batch), len(text) - 1)  # the last batch is padded
        indices = np.arange(start, start + batch, dtype=np.int32)
        made = sampler(params, null, text[rows], mask[rows], np.float32(guidance), np.int32(seed), indices)
        images.append(np.asarray(made)[: len(text) - start])
        say(sum(map(len, images)))
    return np.concatenate(images)
