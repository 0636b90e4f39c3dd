"""Measure time and memory of one generator and discriminator step of a card on one device.

    python -m benchmarks.pair [--preset=sprint] [--batch=N] [--remat=none|block|cheap]

Parameters and batches are random, so `sana_600m` and `sana_1600m` need no weights.
"""

import statistics
import time
from typing import Any

import jax

from benchmarks.harness import options as options_lib
from benchmarks.harness import training
from sprint_jax.training import sharding
from sprint_jax.training.stage import Placed

REPEATS = 9


def main() -> None:
    """Compile, time and print both steps."""
    parser = options_lib.parser(__doc__)
    parser.add_argument("--preset", default="sprint")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--remat")
    options = parser.parse_args()

    def change(tree):
        tree.phases.sprint.batch = options.batch or tree.phases.sprint.batch
        tree.model.remat = options.remat or tree.model.remat

    c = training.card(options.preset, change)
    stage, frozen, state, batch = training.start(c)
    count = c.phases["sprint"].batch
    placed = Placed.on(stage, sharding.mesh(1, 1, jax.devices()[:1]))
    total = 0.0
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, preset {options.preset}, batch "
        f"{count}, remat {c.model.remat}, median of {REPEATS}"
    )
    for name, function in zip(stage.labels, stage.functions, strict=True):
        begin = time.perf_counter()
        step = placed.lower(function, batch).compile()
        compile_seconds, seconds = time.perf_counter() - begin, []
        for _ in range(REPEATS + 1):
            begin = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, frozen, batch))
            seconds.append(time.perf_counter() - begin)
        middle = statistics.median(seconds[1:])
        total += middle
        analysis: Any = step.memory_analysis()
        memory = analysis.temp_size_in_bytes / 2**20
        print(
            f"{name:14} {1e3 * middle:9.1f} ms   temporaries {memory:7.0f} MiB   compiled in "
            f"{compile_seconds:.0f} s"
        )
    print(f"{'pair':14} {1e3 * total:9.1f} ms   {count / total:.1f} images/s")
    used = jax.devices()[0].memory_stats()
    if used:
        print(f"peak memory of the device {used['peak_bytes_in_use'] / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
