"""What of a batch a network is told besides the state: the same names as `LinearDiT.apply` and `Controlled.apply` have."""

import jax
import jax.numpy as jnp

# Folded into a step's key, so that its other draws do not depend on whether there is a ControlNet.
_CONTROL = 1_000_003


def conditions(batch, key, control_dropout) -> dict:
    """{"text" [B, L, D], "mask" [B, L]}, and where the batch has a "control" [B, h, w, c] that too, with "control_scale" [B]:
    0 with probability control_dropout, else 1. key: of the step.
    """
    cond = {"text": batch["text"], "mask": batch["mask"]}
    if "control" in batch:
        kept = jax.random.bernoulli(
            jax.random.fold_in(key, _CONTROL), 1 - control_dropout, batch["text"].shape[:1]
        )
        cond |= {"control": batch["control"], "control_scale": kept.astype(jnp.float32)}
    return cond
