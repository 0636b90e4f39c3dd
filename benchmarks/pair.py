"""Time of one generator + discriminator pair of the embedded default, by part.

    python -m benchmarks.pair [--preset=shapes]
"""

import argparse
import pathlib
import runpy
import statistics
import time

import jax

from sprint_jax import build, config
from sprint_jax.data import loader
from sprint_jax.training import sprint_step

ROOT = pathlib.Path(__file__).parent.parent
REPEATS = 9


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="shapes")
    c = config.parse(runpy.run_path(str(ROOT / "configs/sprint.py"))["get_config"](parser.parse_args().preset))
    nets, encoder = build.nets(c), build.text_encoder(c)
    null_text, null_mask = encoder.encode([""])
    teacher = nets.teacher.init(jax.random.key(0))
    frozen = jax.device_put({"teacher": teacher, "null_text": null_text, "null_mask": null_mask})
    student = sprint_step.student_params(teacher, nets, jax.random.key(1))
    state = sprint_step.init(student, nets, c.sprint, jax.random.key(2))
    batch = jax.device_put(loader.make_batch(
        0, seed=0, batch=c.sprint.batch, size=c.data.size, codec=build.codec(c), text_encoder=encoder
    ))  # fmt: skip
    total = 0.0
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, preset {parser.parse_args().preset}, median of {REPEATS}")
    for name, make in (
        ("generator", sprint_step.make_generator_step), ("discriminator", sprint_step.make_discriminator_step)
    ):  # fmt: skip
        begin = time.perf_counter()
        step = jax.jit(make(nets, c.sprint, 0)).lower(state, frozen, batch).compile()
        compile_seconds, seconds = time.perf_counter() - begin, []
        for _ in range(REPEATS + 1):
            begin = time.perf_counter()
            jax.block_until_ready(step(state, frozen, batch))
            seconds.append(time.perf_counter() - begin)
        middle = statistics.median(seconds[1:])
        total += middle
        memory = step.memory_analysis().temp_size_in_bytes / 2**20
        print(f"{name:14} {1e3 * middle:9.1f} ms   temporaries {memory:7.0f} MiB   compiled in {compile_seconds:.0f} s")
    print(f"{'pair':14} {1e3 * total:9.1f} ms   {c.sprint.batch / total:.1f} pictures/s")


if __name__ == "__main__":
    main()
