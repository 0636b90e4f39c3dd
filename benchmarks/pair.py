"""Time and memory of one generator + discriminator pair of a card, by part, on one device.

    python -m benchmarks.pair [--preset=shapes] [--batch=N] [--remat=none|block|cheap]

Random parameters and random batches: for `sana_600m` and `sana_1600m` no weights are needed.
"""

import argparse
import pathlib
import runpy
import statistics
import time

import jax
import jax.numpy as jnp

from sprint_jax import build, config, inputs, run
from sprint_jax.training import loop, sharding

ROOT = pathlib.Path(__file__).parent.parent
REPEATS = 9


def random_like(abstract, key):
    """Random normal arrays, 1 in masks."""
    make = lambda name, a, k: jnp.ones(a.shape, a.dtype) if "mask" in name else jax.random.normal(k, a.shape, a.dtype)
    keys = jax.random.split(key, len(abstract))
    return {name: make(name, a, k) for (name, a), k in zip(sorted(abstract.items()), keys, strict=True)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="shapes")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--remat")
    options = parser.parse_args()
    tree = runpy.run_path(str(ROOT / "configs/sprint.py"))["get_config"](options.preset)
    tree.mesh.update(data=1, fsdp=1)
    tree.sprint.batch = options.batch or tree.sprint.batch
    tree.model.remat = options.remat or tree.model.remat
    c = config.parse(tree)
    data = inputs.Abstract(c)
    data.frozen = random_like(data.frozen, jax.random.key(0))
    teacher = jax.jit(build.teacher(c).init)(jax.random.key(1))
    stage = run.sprint_stage(c, data, teacher)
    placed = loop.Placed.on(stage, sharding.mesh(1, 1, jax.devices()[:1]))
    state, frozen = jax.jit(stage.start)(stage.frozen, stage.begun), stage.frozen
    batch = random_like(inputs.abstract_batch(c, c.sprint.batch), jax.random.key(2))
    total = 0.0
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, preset {options.preset}, batch {c.sprint.batch}, "
        f"remat {c.model.remat}, median of {REPEATS}"
    )
    for name, function in zip(("generator", "discriminator"), stage.functions, strict=True):
        begin = time.perf_counter()
        step = placed.lower(function, batch).compile()
        compile_seconds, seconds = time.perf_counter() - begin, []
        for _ in range(REPEATS + 1):
            begin = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, frozen, batch))
            seconds.append(time.perf_counter() - begin)
        middle = statistics.median(seconds[1:])
        total += middle
        memory = step.memory_analysis().temp_size_in_bytes / 2**20
        print(f"{name:14} {1e3 * middle:9.1f} ms   temporaries {memory:7.0f} MiB   compiled in {compile_seconds:.0f} s")
    print(f"{'pair':14} {1e3 * total:9.1f} ms   {c.sprint.batch / total:.1f} pictures/s")
    used = jax.devices()[0].memory_stats()
    if used:
        print(f"peak memory of the device {used['peak_bytes_in_use'] / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
