"""Training state and the pieces every step shares: optimiser, EMA and the guard against non-finite updates."""

import math

import flax.struct
import jax
import jax.numpy as jnp
import optax

from sprint_jax import config as config_lib
from sprint_jax.models.discriminator import GROUP as SLICE
from sprint_jax.training import came as came_lib


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
    """As TeacherState for the student, plus the discriminator heads; step counts both networks' updates.

    rejected: [in a row of the student, in a row of the heads, in all] int32 [3].
    """

    step: jax.Array
    params: dict
    ema: dict | None
    opt: optax.OptState
    heads: dict
    heads_opt: optax.OptState
    spectral: dict
    rejected: jax.Array


def optimizer(
    c: config_lib.Optimizer, steps: int, batch: int, came_rules
) -> optax.GradientTransformation:
    """Global-norm clipping, then the optimiser with linear warm-up and a cosine to `decay_to` over `steps`.

    batch: the global one, for the square-root rule of the rate. came_rules: (factored, stacked) of the tree
    that is optimised, see `came`.
    """
    factor = math.sqrt(batch / c.reference_batch) if c.reference_batch else 1.0

    def schedule(lr):
        lr = factor * lr
        cosine = optax.cosine_decay_schedule(lr, max(1, steps - c.warmup), alpha=c.decay_to)
        # The first update already moves: warm-up runs from lr / (warmup + 1) to lr.
        rise = optax.linear_schedule(lr / (c.warmup + 1), lr, c.warmup)
        return optax.join_schedules([rise, cosine], [c.warmup])

    if c.kind == "muon":
        update = optax.contrib.muon(
            schedule(c.muon_lr),
            weight_decay=c.weight_decay,
            adam_b1=c.b1,
            adam_b2=c.b2,
            adam_weight_decay=c.weight_decay,
            adam_learning_rate=schedule(c.lr),
            muon_weight_dimension_numbers=_matrices,
        )
    elif c.kind == "came":
        update = came_lib.came(
            schedule(c.lr),
            b1=c.b1,
            b2=c.b2,
            b3=c.b3,
            weight_decay=c.weight_decay,
            factored=came_rules[0],
            stacked=came_rules[1],
        )
    else:
        update = optax.adamw(schedule(c.lr), b1=c.b1, b2=c.b2, weight_decay=c.weight_decay)
    return optax.chain(optax.clip_by_global_norm(c.clip), update)


def _matrices(params):
    """Which axes of which parameters Muon treats as a matrix: inner kernels, layer by layer of a stack."""

    def axes(path, leaf):
        names = [str(key.key) for key in path]
        if names[-1] != "kernel" or names[-2] in ("patch_embed", "proj_out", "logvar"):
            return None
        return optax.contrib.MuonDimensionNumbers(
            reduction_axis=leaf.ndim - 2, output_axis=leaf.ndim - 1
        )

    return jax.tree_util.tree_map_with_path(axes, params)


def start_ema(params, decay):
    """A copy (never an alias: both are donated), or None when decay is 0."""
    return jax.tree.map(jnp.copy, params) if decay else None


def update_ema(ema, params, decay, step):
    """ema <- d ema + (1 - d) params, with d raised from 0.1 to `decay` over the first steps."""
    if ema is None:
        return None
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: d * e + (1 - d) * p, ema, params)


def averaged(state):
    """Parameters that a stage ends with: their moving average, or as they are where none is kept."""
    return state.params if state.ema is None else state.ema


def value_and_grad(loss, params, batch, parts):
    """((value, aux), gradients) of `loss(params, batch) -> (value, aux)`, a mean over samples.

    parts: 1 takes the batch whole; more average over that many parts one after the other, so that only one
    part's activations are held. A part takes every parts-th run of SLICE samples: groups of the
    discriminator's normalisation stay whole, and each device works on samples that it already holds.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        return gradient(params, batch)
    cut = jax.tree.map(lambda a: _parts(a, parts), batch)
    first = jax.eval_shape(gradient, params, jax.tree.map(lambda a: a[0], cut))

    def add(total, part):
        return jax.tree.map(jnp.add, total, gradient(params, part)), None

    total, _ = jax.lax.scan(add, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), first), cut)
    return jax.tree.map(lambda a: a / parts, total)


def _parts(a, parts):
    """[B, ...] -> [parts, B / parts, ...]."""
    run = SLICE if a.shape[0] % (SLICE * parts) == 0 else 1
    a = a.reshape(-1, parts, run, *a.shape[1:])
    return jnp.swapaxes(a, 0, 1).reshape(parts, -1, *a.shape[3:])


def select(finite, new, old):
    """new where the update is finite, else old, leaf by leaf."""
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)


def count_rejected(rejected, finite, network=0):
    """[in a row, of each network; in all] after one more update of a network."""
    bad = jnp.logical_not(finite).astype(jnp.int32)
    return rejected.at[network].set((rejected[network] + bad) * bad).at[-1].add(bad)


def module_norms(grads, prefix="grad_norm"):
    """Gradient norm of each module (two levels of names), for logs and for naming a non-finite one."""
    norms = {}
    for name, child in grads.items():
        groups = child.items() if isinstance(child, dict) else [("", child)]
        for sub, leaf in groups:
            norms[f"{prefix}/{name}/{sub}".rstrip("/")] = optax.tree.norm(leaf)
    return norms
