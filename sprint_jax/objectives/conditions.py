"""The conditions of a batch: what a network sees besides the state, under the names that `apply`
takes.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

# Folded into a step's key, so that its other draws do not depend on whether there is a ControlNet.
_CONTROL = 1_000_003

Conditions = dict[str, jax.Array]


def conditions(
    batch: Mapping[str, jax.Array], key: jax.Array, control_dropout: float
) -> Conditions:
    """Return {"text" [B, L, D], "mask" [B, L]}, and "control" with "control_scale" where the batch
    has one.

    control: [B, h, w, c] latents. control_scale: [B], the batch's own, or 0 with probability
    control_dropout, else 1. key: of the step.
    """
    cond = {"text": batch["text"], "mask": batch["mask"]}
    if "control_scale" in batch:
        return cond | {name: batch[name] for name in ("control", "control_scale")}
    if "control" in batch:
        kept = jax.random.bernoulli(
            jax.random.fold_in(key, _CONTROL), 1 - control_dropout, batch["text"].shape[:1]
        )
        cond |= {"control": batch["control"], "control_scale": kept.astype(jnp.float32)}
    return cond


def concatenate(a: Conditions, b: Conditions) -> Conditions:
    """Join two conditions along the samples."""
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), a, b)


def repeat(cond: Conditions, k: int) -> Conditions:
    """Return every sample k times, the copies of a sample together."""
    return jax.tree.map(lambda a: jnp.repeat(a, k, axis=0), cond)


def tile(cond: Conditions, k: int) -> Conditions:
    """Return all samples k times, one copy of the batch after the other."""
    return jax.tree.map(lambda a: jnp.tile(a, (k, *(1,) * (a.ndim - 1))), cond)


def unconditional(cond: Conditions, null_text: jax.Array) -> Conditions:
    """Replace the text by the empty prompt's features [1, L, D], under the mask of the text."""
    return cond | {"text": jnp.broadcast_to(null_text, cond["text"].shape)}
