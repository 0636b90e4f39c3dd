"""The one training step: any `Update` becomes step(state, frozen, batch) -> (state, `Report`),
pure.

Every random number of an update is drawn for the whole batch before anything is computed, so an
update depends neither on how its batch is cut into parts nor on the number of devices.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sprint_jax.models.discriminator import GROUP
from sprint_jax.objectives.base import (
    Aux,
    Batch,
    Draws,
    Frozen,
    Objective,
    PyTree,
    Report,
    Role,
    State,
    Update,
)

Step = Callable[[State, Frozen, Batch], tuple[State, Report]]


def make_step(
    update: Update,
    tx: optax.GradientTransformation,
    *,
    ema: float,
    accumulate: int,
    seed: int | jax.Array,
) -> Step:
    """Build the step of one kind of update.

    tx: the role's optimizer. ema: decay of its moving average, 0 for none. accumulate: parts of a
    batch whose gradients are averaged one after the other. seed: the key of a step is folded from
    (seed, state.step). An update that is not finite changes nothing but the counters.
    """
    label, norm_label = update.names

    def step(state: State, frozen: Frozen, batch: Batch) -> tuple[State, Report]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        role = state.roles[update.role]
        extra, begin = update.prepare(role), update.begin(role.params, state)
        seen = _with(state, update.role, role.replace(extra=extra))
        (value, aux), grads = value_and_grad(
            lambda params, part: update.loss(params, part, seen, frozen),
            begin,
            update.draw(key, batch, frozen),
            accumulate,
        )
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(value)
        changes, opt = tx.update(grads, role.opt, begin)
        params = optax.apply_updates(begin, changes)
        average = update_ema(role.ema, params, ema, role.updates)
        new = role.replace(
            updates=role.updates + 1,
            rejected=count_rejected(role.rejected, finite),
            **select(
                finite,
                dict(params=params, ema=average, opt=opt, extra=extra),
                dict(params=role.params, ema=role.ema, opt=role.opt, extra=role.extra),
            ),
        )
        report = Report(
            scalars=aux.scalars | {label: value},
            by_time=aux.by_time,
            norms={norm_label: norm} | module_norms(grads, norm_label),
            rejected=new.rejected,
        )
        return _with(state, update.role, new).replace(step=state.step + 1), report

    return step


def _with(state: State, name: str, role: Role) -> State:
    return state.replace(roles={**state.roles, name: role})


def start(
    objective: Objective,
    optimizers: Mapping[str, optax.GradientTransformation],
    *,
    ema: float,
    frozen: Frozen,
    begin: PyTree,
    key: jax.Array,
) -> State:
    """Make the state at step 0.

    begin: parameters that the main role begins from, None for the objective's own beginning. The
    moving average belongs to the main role alone.
    """
    roles = {}
    for name, begins in objective.start(frozen, begin, key).items():
        roles[name] = Role(
            params=begins.params,
            ema=start_ema(begins.params, ema if name == objective.main else 0.0),
            opt=optimizers[name].init(begins.params),
            extra=begins.extra,
            updates=jnp.zeros((), jnp.int32),
            rejected=jnp.zeros((2,), jnp.int32),
        )
    return State(step=jnp.zeros((), jnp.int32), roles=roles)


def result(state: State, objective: Objective) -> PyTree:
    """Return what a phase ends with: the main role's moving average, or its parameters without
    one.
    """
    role = state.roles[objective.main]
    return role.params if role.ema is None else role.ema


def start_ema(params: PyTree, decay: float) -> PyTree:
    """Copy the parameters (never alias them: both are donated); None where decay is 0."""
    return jax.tree.map(jnp.copy, params) if decay else None


def update_ema(ema: PyTree, params: PyTree, decay: float, updates: jax.Array) -> PyTree:
    """Move the average: ema <- d ema + (1 - d) params, with d rising from 0.1 to `decay` over the
    first updates.
    """
    if ema is None:
        return None
    d = jnp.minimum(decay, (1.0 + updates) / (10.0 + updates))
    return jax.tree.map(lambda e, p: d * e + (1 - d) * p, ema, params)


def value_and_grad(
    loss: Callable[[PyTree, Draws], tuple[jax.Array, Aux]], params: PyTree, draws: Draws, parts: int
) -> Any:
    """Return ((value, aux), gradients) of a loss that is a mean over samples.

    parts: 1 takes the batch whole; more average over that many parts one after the other, so that
    only one part's activations are held. A part takes every parts-th run of GROUP samples: the
    discriminator's normalization groups stay whole, and each device works on samples that it
    already holds.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        return gradient(params, draws)
    cut = jax.tree.map(lambda a: _parts(a, parts), draws)
    first = jax.eval_shape(gradient, params, jax.tree.map(lambda a: a[0], cut))

    def add(total, part):
        return jax.tree.map(jnp.add, total, gradient(params, part)), None

    total, _ = jax.lax.scan(add, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), first), cut)
    return jax.tree.map(lambda a: a / parts, total)


def _parts(a: jax.Array, parts: int) -> jax.Array:
    """Cut [B, ...] into [parts, B / parts, ...]."""
    run = GROUP if a.shape[0] % (GROUP * parts) == 0 else 1
    runs, rest = a.shape[0] // (parts * run), a.shape[1:]
    a = a.reshape(runs, parts, run, *rest)
    return jnp.swapaxes(a, 0, 1).reshape(parts, runs * run, *rest)


def select(finite: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """Take `new` where the update is finite, else `old`, leaf by leaf."""
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)


def count_rejected(rejected: jax.Array, finite: jax.Array) -> jax.Array:
    """Count one more update in [rejected in a row, rejected in total]."""
    bad = jnp.logical_not(finite).astype(jnp.int32)
    in_a_row, total = rejected
    return jnp.stack([(in_a_row + bad) * bad, total + bad])


def module_norms(grads: PyTree, prefix: str) -> dict[str, jax.Array]:
    """Return the gradient's norm of each module (two levels of names), for logs and to name a
    non-finite one.
    """
    norms = {}
    for name, child in grads.items():
        groups = child.items() if isinstance(child, dict) else [("", child)]
        for sub, leaf in groups:
            norms[f"{prefix}/{name}/{sub}".rstrip("/")] = optax.tree.norm(leaf)
    return norms
