"""A generator and a discriminator step of one preset of configs/sprint.py on one device."""

import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import bench as bench_lib
from benchmarks.harness import floors, timing
from sprint_jax import build, config
from sprint_jax.models.linear_dit import LinearDiT
from sprint_jax.runtime import cards
from sprint_jax.training import datasets, sharding, stages
from sprint_jax.training.stage import Placed

ROOT = pathlib.Path(__file__).parent.parent.parent

Change = Callable[[Any], None]  # edits a config tree


def card(preset: str, change: Change = lambda tree: None) -> config.Config:
    """Return the preset on one device. change: edits the tree before it is parsed."""
    tree: Any = cards.load(f"sprint:{preset}")
    tree.mesh.update(data=1, fsdp=1)
    change(tree)
    return config.parse(tree)


def with_adamw(tree: Any) -> None:
    """Use AdamW for both networks."""
    tree.phases.sprint.optimizers.student.update(kind="adamw", muon_lr=0.0, b2=0.99, b3=0.0)
    tree.phases.sprint.optimizers.heads.update(kind="adamw", muon_lr=0.0, b2=0.99, b3=0.0)


def published_losses(tree: Any) -> None:
    """Use the losses of the PyTorch peer."""
    tree.phases.sprint.objective.update(
        weighting="code", logvar_gradient="network", logvar_start=0.0
    )


def random_like(abstract: dict[str, Any], key: jax.Array) -> dict[str, jax.Array]:
    """Draw normal arrays of the given shapes; masks are 1."""
    make = lambda name, a, k: (
        jnp.ones(a.shape, a.dtype) if "mask" in name else jax.random.normal(k, a.shape, a.dtype)
    )
    keys = jax.random.split(key, len(abstract))
    return {
        name: make(name, a, k) for (name, a), k in zip(sorted(abstract.items()), keys, strict=True)
    }


def start(c: config.Config) -> tuple[Any, Any, Any, Any]:
    """Return (stage, frozen, state, batch) with a random batch.

    Every parameter is moved off its initial value.
    """
    data: Any = datasets.Abstract(c)
    null = {"null_text": data.frozen.null_text, "null_mask": data.frozen.null_mask}
    data.frozen = data.frozen.replace(**random_like(null, jax.random.key(0)))
    teacher = jax.jit(build.teacher(c).init)(jax.random.key(1))
    stage = stages.make(c, "sprint", data, teacher=teacher)
    state = jax.jit(stage.start)(stage.frozen, stage.init_arrays)
    student = state.roles["student"]
    leaves, tree = jax.tree.flatten(student.params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    moved = [a + 0.02 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
    student = student.replace(params=jax.tree.unflatten(tree, moved))
    state = state.replace(roles=state.roles | {"student": student})
    return (
        stage,
        stage.frozen,
        state,
        random_like(datasets.abstract_batch(c, c.phases["sprint"].batch), jax.random.key(2)),
    )


def pair(bench: bench_lib.Bench, c: config.Config) -> bench_lib.Subject:
    """Build the subject of one generator step and one discriminator step.

    Their losses at the first state are compared. The peer is PyTorch without torch.compile.
    """
    stage, frozen, state, batch = start(c)
    placed = Placed.on(stage, sharding.mesh(1, 1, jax.devices()[:1]))
    names = "generator", "discriminator"
    steps, compile_s = [], 0.0
    for function in stage.functions:
        begin = time.perf_counter()
        steps.append(placed.lower(function, batch).compile())
        compile_s += time.perf_counter() - begin
    held = [jax.tree.map(jnp.copy, state)]  # a step donates its state's memory

    def advance(step):
        held[0], metrics = step(held[0], frozen, batch)
        return metrics

    def losses():
        firsts = [step(jax.tree.map(jnp.copy, state), frozen, batch)[1] for step in steps]
        return np.array([firsts[0].scalars["loss"], firsts[1].scalars["disc"]], np.float64)

    calls = {
        name: timing.Call(functools.partial(advance, step), jax.block_until_ready)
        for name, step in zip(names, steps, strict=True)
    }
    side, _, _ = build.latent_shape(c)
    N, m, phase = (side // c.model.patch_size) ** 2, build.student(c), c.phases["sprint"]
    assert isinstance(m, LinearDiT)  # the cards have no ControlNet
    s: Any = phase.objective
    options = dict(batch=phase.batch, itemsize=jnp.dtype(c.model.dtype).itemsize)
    work = floors.generator_step(m, N, c.text.length, s.head_blocks, **options)
    work += floors.discriminator_step(
        m, N, c.text.length, s.head_blocks, misaligned=s.misaligned, **options
    )

    def peer():
        return bench.peers("torch_pair").program(bench, c, frozen, state, batch)

    kinds = {role: optimizer.kind for role, optimizer in phase.optimizers.items()}
    optimizers = (
        f"{kinds['student']} for the student, {kinds['heads']} for the heads; the peer has AdamW "
        "for both"
    )
    return bench_lib.Subject(
        program=timing.Program(calls, losses),
        compile_s=compile_s,
        dtype=c.model.dtype,
        work=work,
        peers=(("PyTorch", peer),),
        note=f"batch {phase.batch}, {optimizers}",
    )
