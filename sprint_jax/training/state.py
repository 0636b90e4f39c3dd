"""Training state and the pieces every step shares: optimiser, EMA and the guard against non-finite updates."""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from sprint_jax import config as config_lib


@flax.struct.dataclass
class TeacherState:
    """step: int32, steps done. ema: None without EMA. rejected: [in a row, in all] int32 [2]."""

    step: jax.Array
    params: dict
    ema: dict | None
    opt: optax.OptState
    rejected: jax.Array


@flax.struct.dataclass
class SprintState:
    """As TeacherState for the student, plus the discriminator heads; step counts both networks' updates."""

    step: jax.Array
    params: dict
    ema: dict | None
    opt: optax.OptState
    heads: dict
    heads_opt: optax.OptState
    spectral: dict
    rejected: jax.Array


def optimizer(c: config_lib.Optimizer, steps: int) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW with linear warm-up and a cosine to `decay_to * lr` over `steps`."""
    cosine = optax.cosine_decay_schedule(c.lr, max(1, steps - c.warmup), alpha=c.decay_to)
    # The first update already moves: warm-up runs from lr / (warmup + 1) to lr.
    rise = optax.linear_schedule(c.lr / (c.warmup + 1), c.lr, c.warmup)
    schedule = optax.join_schedules([rise, cosine], [c.warmup])
    return optax.chain(
        optax.clip_by_global_norm(c.clip),
        optax.adamw(schedule, b1=c.b1, b2=c.b2, weight_decay=c.weight_decay),
    )


def start_ema(params, decay):
    """A copy (never an alias: both are donated), or None when decay is 0."""
    return jax.tree.map(jnp.copy, params) if decay else None


def update_ema(ema, params, decay, step):
    """ema <- d ema + (1 - d) params, with d raised from 0.1 to `decay` over the first steps."""
    if ema is None:
        return None
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: d * e + (1 - d) * p, ema, params)


def select(finite, new, old):
    """new where the update is finite, else old, leaf by leaf."""
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)


def count_rejected(rejected, finite):
    """[in a row, in all] after one more update."""
    bad = jnp.logical_not(finite).astype(jnp.int32)
    return jnp.stack([(rejected[0] + bad) * bad, rejected[1] + bad])


def module_norms(grads, prefix="grad_norm"):
    """Gradient norm of each module (two levels of names), for logs and for naming a non-finite one."""
    norms = {}
    for name, child in grads.items():
        groups = child.items() if isinstance(child, dict) else [("", child)]
        for sub, leaf in groups:
            norms[f"{prefix}/{name}/{sub}".rstrip("/")] = optax.tree.norm(leaf)
    return norms
