"""A checkpoint of eight simulated devices, restored on fewer; run by test_checkpoints.py.

PYTHONPATH=tests python -m helpers.checkpoints_on_devices CHECKPOINTS OUT.json COUNT...
"""

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np

from helpers import on_devices
from sprint_jax import build
from sprint_jax.training import datasets, sharding, stages
from sprint_jax.training.checkpoints import Checkpoints, fingerprints
from sprint_jax.training.stage import Placed, place


def restore_on(folder: pathlib.Path, out: pathlib.Path, counts: list[int]) -> None:
    """Save a step of the `smoke` discriminator on a 1x8 mesh, then restore and continue it.

    Writes to `out`, for each count of devices, what was restored and the metrics of the next step.
    """
    settings = on_devices.parse_config()
    data = datasets.Shapes(settings)
    teacher = on_devices.randomize(jax.jit(build.teacher(settings).init)(jax.random.key(0)))
    stage = stages.make(settings, "sprint", data, teacher=teacher)
    # The discriminator's step: it compiles in a third of the generator's time.
    stage = dataclasses.replace(stage, functions=stage.functions[1:])
    rows = on_devices.random_batch(settings)

    def next_step(placed, state):
        frozen = place(stage.frozen, placed.frozen)
        batch = {k: jax.device_put(a, sharding.batch(placed.mesh)) for k, a in rows.items()}
        return placed.lower(stage.functions[0], batch).compile()(state, frozen, batch)

    first = Placed.on(stage, sharding.mesh(1, 8))
    state = place(on_devices.random_start(stage), first.state)
    state, _ = next_step(first, state)
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(1, state)
    saved, numbers = jax.device_get(state), fingerprints(state)
    _, report = next_step(first, state)
    expected = report.scalars | report.norms
    found = {}
    for count in counts:
        shape = {1: (1, 1), 2: (1, 2), 4: (2, 2)}[count]
        placed = Placed.on(stage, sharding.mesh(*shape, jax.devices()[:count]))
        with Checkpoints(folder, keep=1) as checkpoints:
            restored, step = checkpoints.restore_newest(placed.state)
        equal = all(
            a.tobytes() == b.tobytes()
            for a, b in zip(jax.tree.leaves(jax.device_get(restored)), jax.tree.leaves(saved))
        )
        places = jax.tree.map(lambda a, b: a.sharding == b.sharding, restored, placed.state)
        same_numbers = fingerprints(restored) == numbers
        _, report = next_step(placed, restored)
        metrics = report.scalars | report.norms
        found[count] = {
            "step": step,
            "equal": equal,
            "placed": all(jax.tree.leaves(places)),
            "fingerprints": same_numbers,
            "metrics": {
                k: [float(np.max(metrics[k])), float(np.max(expected[k]))]
                for k in ("disc", "disc_grad_norm")
            },
        }
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    restore_on(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), list(map(int, sys.argv[3:])))
