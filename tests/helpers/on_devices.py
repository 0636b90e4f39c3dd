"""Run by test_sharding.py with eight simulated devices: steps of the `smoke` models on several meshes.

    PYTHONPATH=tests python -m helpers.on_devices OUT.json [4x2 ...]

Compares on each mesh what one device computes, and writes what it measured.
"""

import dataclasses
import json
import pathlib
import re
import sys

import jax
import numpy as np

from helpers.configs import card
from sprint_jax import build, config
from sprint_jax.planning import collectives
from sprint_jax.training import datasets, loop, run, sharding

BATCH = 16
MESHES = ((8, 1), (4, 2), (2, 4), (1, 8))


def settings():
    tree = card(preset="smoke")
    # Rates at which an update is no larger than the gradient it came from, so that a difference shows.
    plain = dict(kind="adamw", lr=1e-3, muon_lr=0.0, b1=0.9, b2=0.99, warmup=0, decay_to=1.0)
    tree.teacher.update(batch=BATCH, pretrained="none")
    tree.phases.teacher.optimizers.network.update(plain)
    tree.phases.sprint.objective.update(batch=BATCH)
    tree.phases.sprint.optimizers.student.update(plain)
    tree.phases.sprint.optimizers.heads.update(plain)
    return config.parse(tree)


def batch(c):
    """Random latents in a fixed order: what a codec makes is not the subject."""
    rng = np.random.default_rng(0)
    shapes = datasets.abstract_batch(c, BATCH)
    made = {k: rng.standard_normal(a.shape).astype(np.float32) for k, a in shapes.items()}
    return made | {
        "mask": (np.arange(c.text.length) < 5 + np.arange(BATCH)[:, None] % 8).astype(np.float32)
    }


def relative(a, b):
    """Largest relative difference of the leaves of two trees, each by its Euclidean norm.

    Left out are biases in front of a normalisation: their gradient is zero but for rounding, which Adam
    makes as large as any other update.
    """
    worst = 0.0
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if x.size and not re.search("conv_(in|mid)/bias", name):
            x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
            worst = max(worst, np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30))
    return float(worst)


def stepped(stage, mesh, one_batch, moved):
    """([(metrics, state)] of each function from a state whose every leaf is random, what was measured).

    share: of the state's bytes that one device holds. gathered: the largest all-gather, over the largest leaf.
    """
    placed = loop.Placed.on(stage, mesh)
    state = loop.place(moved, placed.state)
    frozen = loop.place(stage.frozen, placed.frozen)
    split = sharding.batch(mesh)
    results, gathered = [], 0
    for function in stage.functions:
        arrays = jax.tree.map(lambda a: jax.device_put(a, split), one_batch)
        compiled = placed.lower(function, arrays).compile()
        found = collectives.parse(compiled.as_text())
        gathered = max([gathered, *(c.bytes for c in found if c.kind == "all-gather")])
        state, metrics = compiled(state, frozen, arrays)
        results.append(jax.device_get((metrics, state)))
    bytes_ = [a.size * a.dtype.itemsize for a in jax.tree.leaves(placed.state)]
    measured = {
        "share": sharding.per_device_bytes(placed.state) / sum(bytes_),
        "gathered": gathered / max(bytes_),
    }
    return results, measured


def randomised(tree):
    rng = np.random.default_rng(1)
    move = lambda a: (
        a + (0.05 * rng.standard_normal(a.shape)).astype(a.dtype) if a.dtype == np.float32 else a
    )
    return jax.tree.map(move, jax.tree.map(np.asarray, tree))


def main():
    c = settings()
    chosen = [tuple(map(int, name.split("x"))) for name in sys.argv[2:]] or MESHES
    data = datasets.Shapes(c)
    one = sharding.mesh(1, 1, jax.devices()[:1])
    teacher = randomised(jax.jit(build.teacher(c).init)(jax.random.key(0)))
    stages = {
        "teacher": run.teacher_stages(
            dataclasses.replace(c, teacher=dataclasses.replace(c.teacher, pretrained="")),
            data,
            None,
        )[0](None),
        "sprint": run.sprint_stage(c, data, teacher),
    }
    found = {}
    for name, stage in stages.items():
        fresh = jax.jit(stage.start)(stage.frozen, stage.begun)
        moved = fresh.replace(params=randomised(fresh.params))
        moved = jax.tree.map(np.asarray, moved)
        expected, _ = stepped(stage, one, batch(c), moved)
        for data_axis, fsdp in chosen:
            mesh = sharding.mesh(data_axis, fsdp)
            results, measured = stepped(stage, mesh, batch(c), moved)
            found[f"{name} {data_axis}x{fsdp}"] = {
                "metrics": [relative(r[0], e[0]) for r, e in zip(results, expected)],
                "state": [relative(r[1], e[1]) for r, e in zip(results, expected)],
                **measured,
            }
    pathlib.Path(sys.argv[1]).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
