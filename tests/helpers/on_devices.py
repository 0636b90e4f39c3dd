"""Steps of the `smoke` models on several meshes of simulated devices, run by test_sharding.py.

    PYTHONPATH=tests python -m helpers.on_devices OUT.json [4x2 ...]

Compares the result on each mesh with that on one device and writes the differences.
"""

import json
import pathlib
import re
import sys
from typing import Any

import jax
import numpy as np

from helpers.configs import card
from sprint_jax import build, config
from sprint_jax.planning import collectives
from sprint_jax.training import datasets, sharding, stages
from sprint_jax.training.stage import Placed, place

BATCH = 16
MESHES = ((8, 1), (4, 2), (2, 4), (1, 8))


def parse_config() -> config.Config:
    """Return the `smoke` config with plain AdamW.

    At its rate no update is larger than the gradient it came from, so that a difference shows.
    """
    tree = card()
    plain = dict(kind="adamw", lr=1e-3, muon_lr=0.0, b1=0.9, b2=0.99, warmup=0, decay_to=1.0)
    tree.phases.teacher.batch = tree.phases.sprint.batch = BATCH
    tree.phases.teacher.optimizers.network.update(plain)
    tree.phases.sprint.optimizers.student.update(plain)
    tree.phases.sprint.optimizers.heads.update(plain)
    return config.parse(tree)


def random_batch(c: config.Config) -> dict[str, np.ndarray]:
    """Return random latents and text, with masks of several lengths; always the same."""
    rng = np.random.default_rng(0)
    shapes = datasets.abstract_batch(c, BATCH)
    arrays = {k: rng.standard_normal(a.shape).astype(np.float32) for k, a in shapes.items()}
    lengths = 5 + np.arange(BATCH)[:, None] % 8
    return arrays | {"mask": (np.arange(c.text.length) < lengths).astype(np.float32)}


def tree_difference(tree: Any, expected: Any) -> float:
    """Return the largest relative difference of the leaves, each by its Euclidean norm.

    Biases in front of a normalization are left out: their gradient is zero but for rounding, which
    Adam makes as large as any other update.
    """
    worst = 0.0
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(expected), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if x.size and not re.search("conv_(in|mid)/bias", name):
            x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
            worst = max(worst, np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30))
    return float(worst)


def run_functions(
    stage: Any, mesh: jax.sharding.Mesh, batch: dict[str, np.ndarray], start: Any
) -> tuple[list, dict[str, float]]:
    """Run each function of a stage once and return ([(report, state)], measurements).

    `share` is the share of the state's bytes that one device holds. `gathered` is the size of the
    largest all-gather divided by that of the largest leaf.
    """
    placed = Placed.on(stage, mesh)
    state = place(start, placed.state)
    frozen = place(stage.frozen, placed.frozen)
    split = sharding.batch(mesh)
    results, gathered = [], 0
    for function in stage.functions:
        arrays = jax.tree.map(lambda a: jax.device_put(a, split), batch)
        compiled = placed.lower(function, arrays).compile()
        found = collectives.parse(compiled.as_text())
        gathered = max([gathered, *(c.bytes for c in found if c.kind == "all-gather")])
        state, report = compiled(state, frozen, arrays)
        results.append(jax.device_get((report, state)))
    sizes = [a.size * a.dtype.itemsize for a in jax.tree.leaves(placed.state)]
    measured = {
        "share": sharding.per_device_bytes(placed.state) / sum(sizes),
        "gathered": gathered / max(sizes),
    }
    return results, measured


def randomize(tree: Any) -> Any:
    """Return a tree as NumPy arrays with noise added to every float32 leaf."""
    rng = np.random.default_rng(1)
    noisy = lambda a: a + (0.05 * rng.standard_normal(a.shape)).astype(a.dtype)
    move = lambda a: noisy(a) if a.dtype == np.float32 else a
    return jax.tree.map(move, jax.tree.map(np.asarray, tree))


def random_start(stage: Any) -> Any:
    """Return the state at step 0 with noise added to the parameters of the main role."""
    state = jax.jit(stage.start)(stage.frozen, stage.init_arrays)
    role = state.roles[stage.main]
    moved = role.replace(params=randomize(role.params))
    return jax.tree.map(np.asarray, state.replace(roles=state.roles | {stage.main: moved}))


def main() -> None:
    c = parse_config()
    chosen = [tuple(map(int, name.split("x"))) for name in sys.argv[2:]] or MESHES
    data = datasets.Shapes(c)
    one = sharding.mesh(1, 1, jax.devices()[:1])
    teacher = randomize(jax.jit(build.teacher(c).init)(jax.random.key(0)))
    found = {}
    for name, distilled in (("teacher", None), ("sprint", teacher)):
        stage = stages.make(c, name, data, teacher=distilled)
        start = random_start(stage)
        expected, _ = run_functions(stage, one, random_batch(c), start)
        for data_axis, fsdp in chosen:
            mesh = sharding.mesh(data_axis, fsdp)
            results, measured = run_functions(stage, mesh, random_batch(c), start)
            pairs = list(zip(results, expected, strict=True))
            found[f"{name} {data_axis}x{fsdp}"] = {
                "metrics": [tree_difference(r[0], e[0]) for r, e in pairs],
                "state": [tree_difference(r[1], e[1]) for r, e in pairs],
                **measured,
            }
    pathlib.Path(sys.argv[1]).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
