"""Features to images, composed once: the student in a few steps, the teacher in many.

`student_latents` is the only composition of network, noise and few-step sampler; the pipeline,
exported files, previews, evaluation and benchmarks all call it. Conditions are a dict `cond` under
the names that a network's `apply` takes: {"text" [B, L, D], "mask" [B, L]}, and for a ControlNet
{"control" [B, h, w, c], "control_scale" [B]}.

An image's noise comes from (seed, index) alone, and images are generated in batches of one fixed
size, the last one padded, so an image is the same alone and in company, to the last bit.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sprint_jax.diffusion import flow, samplers, trigflow

Conditions = Mapping[str, Any]
Sampler = Callable[..., tuple[jax.Array, jax.Array]]


class NotFiniteWarning(UserWarning):
    """Warns of images with numbers that are not finite, which are black."""


def _warn(line: str) -> None:
    warnings.warn(line, NotFiniteWarning, stacklevel=3)


def noises(seed: jax.Array, indices: jax.Array, shape: Sequence[int], count: int) -> jax.Array:
    """Draw `count` noises per image: [count, B, *shape] unit-variance float32. seed: int32;
    indices: int32 [B].
    """

    def one(index):
        key = jax.random.fold_in(jax.random.key(seed), index)
        draw = lambda i: jax.random.normal(jax.random.fold_in(key, i), shape)
        return jax.vmap(draw)(jnp.arange(count))

    return jnp.swapaxes(jax.vmap(one)(indices), 0, 1)


def student_latents(
    model: Any,
    params: Any,
    cond: Conditions,
    *,
    guidance: jax.Array | float,
    times: Any,
    draws: jax.Array,
    start: jax.Array | None = None,
) -> jax.Array:
    """Generate latents [B, h, w, c] at unit scale in few steps. Traced.

    A network with a second time jumps from each time to the next, without noise between them;
    another one denoises and renoises (`samplers.scm`).

    guidance: scalar that the student is conditioned on. times: angles of `samplers.scm_times`.
    draws: [steps, B, h, w, c] unit-variance noise. start: latents to start from, None for noise
    alone.
    """
    count = draws.shape[1]
    w = jnp.full((count,), guidance) if model.guidance_embed else None
    if model.target_embed:

        def F(u, t, r):
            x, s = trigflow.to_flow_state(u, t), trigflow.to_flow_time(t)
            target = trigflow.to_flow_time(r)
            v = model.apply(params, x, s, guidance=w, target=target, **cond).velocity
            return trigflow.from_flow_velocity(v, x, s)

        return samplers.jumps(F, draws[0], times, start=start)
    v = lambda x, t: model.apply(params, x, t, guidance=w, **cond).velocity
    return samplers.scm(trigflow.from_flow(v), draws[0], draws[1:], times, start=start)


def teacher_latents(
    model: Any,
    params: Any,
    null: Conditions,
    cond: Conditions,
    *,
    guidance: jax.Array | float,
    times: Any,
    noise: jax.Array,
    sampler: str = "trigflow",
) -> jax.Array:
    """Generate latents [B, h, w, c] of the guided teacher, by "trigflow" rotation (angles) or
    "flow" Euler (times).

    null: {"text" [1, L, D], "mask" [1, L]} of the empty prompt, used under the prompt's own mask.
    Traced.
    """
    w = jnp.full((noise.shape[0],), guidance)
    uncond = {**cond, "text": jnp.broadcast_to(null["text"], cond["text"].shape)}
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), uncond, dict(cond))
    v = flow.guided_halves(lambda x, t: model.apply(params, x, t, **both).velocity, w)
    if sampler == "flow":
        return samplers.flow_euler(v, noise, times)
    return samplers.trigflow_euler(trigflow.from_flow(v), noise, times)


def student_sampler(model: Any, pixels: Any, shape: Sequence[int], times: Any) -> Sampler:
    """Return a compiled sample(params, null, cond, guidance, seed, indices).

    It returns images, uint8 [B, H, W, 3], and whether each is finite, bool [B].

    pixels: a pixel codec. params: {"transformer", "pixels"}. shape: of one latent. times: of
    `samplers.scm_times`.
    """

    def sample(params, null, cond, guidance, seed, indices):
        draws = noises(seed, indices, shape, len(times) - 1)
        latents = student_latents(
            model, params["transformer"], cond, guidance=guidance, times=times, draws=draws
        )
        return pixels.checked(params["pixels"], latents)

    return jax.jit(sample)


def teacher_sampler(
    model: Any, pixels: Any, shape: Sequence[int], times: Any, *, sampler: str = "trigflow"
) -> Sampler:
    """Return a compiled sampler of the guided teacher, with the signature of `student_sampler`'s.

    sampler: as for `teacher_latents`.
    """

    def sample(params, null, cond, guidance, seed, indices):
        noise = noises(seed, indices, shape, 1)[0]
        latents = teacher_latents(
            model,
            params["transformer"],
            null,
            cond,
            guidance=guidance,
            times=times,
            noise=noise,
            sampler=sampler,
        )
        return pixels.checked(params["pixels"], latents)

    return jax.jit(sample)


def null_of(frozen: Any) -> Conditions:
    """Return the conditions of the empty prompt that a data set's frozen arrays hold."""
    return {"text": frozen.null_text, "mask": frozen.null_mask}


def run(
    sampler: Sampler,
    params: Any,
    null: Conditions,
    cond: Conditions,
    *,
    guidance: float,
    seed: int,
    batch: int,
    starts: Sequence[int] | None = None,
    say: Callable[[int], None] = lambda done: None,
    warn: Callable[[str], None] = _warn,
) -> np.ndarray:
    """Generate an image for each row of `cond`, image i from (seed, i, row i): uint8 [N, H, W, 3].

    null: conditions of the empty prompt. starts: rows at which to begin a batch, for one of
    several processes; None for all. say: called with the number of images done. warn: called with a
    line if images are not finite, which are black.
    """
    images, bad, count = [], 0, len(cond["text"])
    for start in range(0, count, batch) if starts is None else starts:
        rows = np.minimum(np.arange(start, start + batch), count - 1)  # the last batch is padded
        indices = np.arange(start, start + batch, dtype=np.int32)
        some = {name: a[rows] for name, a in cond.items()}
        drawn, finite = sampler(params, null, some, np.float32(guidance), np.int32(seed), indices)
        images.append(np.asarray(drawn)[: count - start])
        bad += np.count_nonzero(~np.asarray(finite)[: count - start])
        say(sum(map(len, images)))
    if bad:
        warn(
            f"{bad} of {sum(map(len, images))} images are not finite (NaN or infinity): the "
            "weights, or the guidance scale, are wrong"
        )
    return np.concatenate(images)
