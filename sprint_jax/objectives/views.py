"""Networks as callables: the student as a TrigFlow network, the guided teacher as a velocity.

Objectives see networks through these alone, at unit scale and in angles; see `diffusion.trigflow`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import traverse_util

from sprint_jax.diffusion import flow, trigflow
from sprint_jax.objectives import conditions
from sprint_jax.objectives.base import Frozen, Network, Networks, PyTree
from sprint_jax.objectives.conditions import Conditions

Field = Callable[[jax.Array, jax.Array], jax.Array]
WithLogvar = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
Average = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Map = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def student_params(
    teacher: PyTree, student: Network, key: jax.Array, *, logvar_start: float
) -> PyTree:
    """Copy the teacher's parameters and add fresh ones for what only the student has.

    The embeddings of guidance and of a second time end in zeros, so the student starts as the
    teacher exactly, with a log-variance of `logvar_start` everywhere.
    """
    fresh: dict[tuple[str, ...], PyTree] = traverse_util.flatten_dict(student.init(key))
    for path, leaf in fresh.items():
        if path[-2:] == ("logvar", "bias"):
            fresh[path] = jnp.full_like(leaf, logvar_start)
    merged = fresh | traverse_util.flatten_dict(teacher)
    return jax.tree.map(jnp.copy, traverse_util.unflatten_dict(merged))


def student_F(
    student: Network,
    params: PyTree,
    cond: Conditions,
    w: jax.Array,
    *,
    logvar_gradient: str = "network",
) -> WithLogvar:
    """Return the student as a TrigFlow network (u, t) -> (F, logvar), closed over conditions and
    guidance w [B]. One with a second time jumps to 0; see `student_map`.
    """
    F = student_map(student, params, cond, w, logvar_gradient=logvar_gradient)
    return lambda u, t: F(u, t, jnp.zeros_like(t))


def student_map(
    student: Network,
    params: PyTree,
    cond: Conditions,
    w: jax.Array,
    *,
    logvar_gradient: str = "network",
) -> Map:
    """Return the student as a flow map (u, t, r) -> (F, logvar) in angles, closed over conditions
    and guidance w [B]. A student without a second time does not look at r.

    logvar_gradient: what the gradient of logvar trains, "network" (code: the head, and through it
      the embedding of times and guidance that it reads) or "head" alone. Values do not depend on
      it.
    """
    guidance = w if student.guidance_embed else None

    def F(u, t, r):
        t_fm = trigflow.to_flow_time(t)
        x_fm = trigflow.to_flow_state(u, t)
        target = trigflow.to_flow_time(r) if student.target_embed else None
        out = student.apply(params, x_fm, t_fm, guidance=guidance, target=target, **cond)
        logvar = out.logvar
        if logvar_gradient == "head":
            # Once more without blocks, so that only the head's parameters get a gradient.
            plain = {"text": cond["text"], "mask": cond["mask"]}
            alone = student.apply(
                _head_alone(params),
                x_fm,
                t_fm,
                guidance=guidance,
                target=target,
                **plain,
                velocity=False,
            )
            logvar = alone.logvar
        return trigflow.from_flow_velocity(out.velocity, x_fm, t_fm), logvar

    return F


def _head_alone(params: PyTree) -> PyTree:
    """Stop the gradient of all parameters but those of the log-variance head."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict(
        {
            path: leaf if "logvar" in path else jax.lax.stop_gradient(leaf)
            for path, leaf in flat.items()
        }
    )


def student_v(student: Network, params: PyTree, cond: Conditions, w: jax.Array) -> Field:
    """Return the student as a flow network (x, t) -> v, closed over conditions and guidance w.

    Of one with a second time it is the average velocity down to 0.
    """
    v = student_average(student, params, cond, w)
    return lambda x, t: v(x, t, jnp.zeros_like(t))


def student_average(student: Network, params: PyTree, cond: Conditions, w: jax.Array) -> Average:
    """Return the student as a flow map (x, t, r) -> average velocity between r and t, closed over
    conditions and guidance w. A student without a second time does not look at r.
    """
    guidance = w if student.guidance_embed else None

    def v(x, t, r):
        target = r if student.target_embed else None
        return student.apply(params, x, t, guidance=guidance, target=target, **cond).velocity

    return v


def teacher_v(
    networks: Networks, frozen: Frozen, cond: Conditions, w: jax.Array, uncond_mask: str
) -> Field:
    """Return the guided teacher as a flow network (x, t) -> v; see `teacher_velocity`."""
    if not networks.trained.guidance_embed:
        return _teacher(networks, frozen, cond)
    both = _both(frozen, cond, uncond_mask)
    return flow.guided_halves(_teacher(networks, frozen, both), w)


def teacher_velocity(
    networks: Networks, frozen: Frozen, cond: Conditions, w: jax.Array, uncond_mask: str
) -> Field:
    """Return dx_t/dt of the guided teacher, both halves of the guidance in one call on 2B samples.

    uncond_mask: "cond" (code: the prompt's own mask on null features) or "null" (the null prompt's
    mask). A student that is not conditioned on the scale learns the unguided teacher, as in the
    published code.
    """
    if not networks.trained.guidance_embed:
        F = trigflow.from_flow(_teacher(networks, frozen, cond))
    else:
        both = _both(frozen, cond, uncond_mask)
        F = flow.guided_halves(trigflow.from_flow(_teacher(networks, frozen, both)), w)
    return lambda xt, t: trigflow.SIGMA_D * F(xt / trigflow.SIGMA_D, t)


def teacher_halves(
    networks: Networks, frozen: Frozen, cond: Conditions, uncond_mask: str
) -> Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Return the teacher as (u, t) -> F without and with the condition, from one call."""
    F = trigflow.from_flow(_teacher(networks, frozen, _both(frozen, cond, uncond_mask)))

    def halves(u, t):
        uncond, with_cond = jnp.split(F(jnp.concatenate([u, u]), jnp.concatenate([t, t])), 2)
        return uncond, with_cond

    return halves


def teacher_F(networks: Networks, frozen: Frozen, cond: Conditions) -> Field:
    """Return the teacher with the condition, unguided, as a TrigFlow network (u, t) -> F."""
    return trigflow.from_flow(_teacher(networks, frozen, cond))


def _teacher(networks: Networks, frozen: Frozen, cond: Conditions) -> Field:
    return lambda x, t: networks.teacher.apply(frozen.teacher, x, t, **cond).velocity


def _both(frozen: Frozen, cond: Conditions, uncond_mask: str) -> Conditions:
    """Return the conditions of both halves of the guidance, the unconditional ones first."""
    uncond = conditions.unconditional(cond, frozen.null_text)
    if uncond_mask == "null":
        uncond["mask"] = jnp.broadcast_to(frozen.null_mask, cond["mask"].shape)
    return conditions.concatenate(uncond, cond)
