"""Transformer forward and DC-AE decode against diffusers, float32, same threads, in one run.

    python -m benchmarks.parity_speed [--part=transformer|autoencoder|both]

Needs the development dependencies (PyTorch, diffusers). Prints medians and the ratio ours / theirs; runs
of the two alternate, so that a noisy machine slows both. Pin it (`taskset -c 0`) for one thread.
"""

import os
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))

import jax
import numpy as np
from absl import app, flags

_PART = flags.DEFINE_enum("part", "both", ["transformer", "autoencoder", "both"], "What to time.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Alternating runs of each.")
_SIDE = flags.DEFINE_integer("side", 512, "Pixels of the decoded picture.")


def alternate(name, ours, theirs):
    times = {"ours": [], "diffusers": []}
    for _ in range(_REPEATS.value):
        for side, call in (("ours", ours), ("diffusers", theirs)):
            begin = time.perf_counter()
            call()
            times[side].append(time.perf_counter() - begin)
    medians = {side: statistics.median(t) for side, t in times.items()}
    spread = {side: f"[{min(t):.2f}, {max(t):.2f}]" for side, t in times.items()}
    print(
        f"{name}: ours {medians['ours']:.2f} s {spread['ours']}, diffusers {medians['diffusers']:.2f} s "
        f"{spread['diffusers']}, ratio {medians['ours'] / medians['diffusers']:.2f}", flush=True,
    )  # fmt: skip


def compiled(function, *arguments):
    begin = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    print(f"compiled in {time.perf_counter() - begin:.1f} s", flush=True)
    return program


def load(module, part, describe):
    import tempfile

    import test_parity

    with tempfile.TemporaryDirectory() as folder:
        return test_parity.converted(module, part, describe, pathlib.Path(folder))


def transformer():
    import fabricate
    import test_parity
    import torch

    theirs = fabricate.transformer("0.6b")
    model, params = load(theirs, "transformer", test_parity.describe_transformer)
    params = model.unstack(jax.device_put(params))  # as the pipeline runs it on a CPU
    x, text = test_parity.normals(1, 32, 32, 32), test_parity.normals(1, 300, 2304)
    mask, t, w = np.ones((1, 300), np.float32), np.float32([0.7]), np.float32([4.5])
    program = compiled(model.apply, params, x, t, text, mask, w)
    inputs = test_parity.to_torch(x), torch.tensor(text), torch.tensor(t)
    options = dict(encoder_attention_mask=torch.tensor(mask), guidance=torch.tensor(w) * 0.1)

    def reference():
        with torch.inference_mode():
            return theirs(*inputs, **options).sample

    ours = lambda: jax.block_until_ready(program(params, x, t, text, mask, w))
    print(f"relative difference {test_parity.relative(ours().velocity, test_parity.from_torch(reference())):.1e}")
    alternate("0.6B transformer, 32x32 latents, 300 tokens", ours, reference)


def autoencoder():
    import fabricate
    import test_parity
    import torch

    from sprint_jax.conversion import configs

    theirs = fabricate.autoencoder("0.6b")
    model, params = load(theirs, "autoencoder", configs.autoencoder)
    params = jax.device_put(params)
    cells = _SIDE.value // 32
    z = test_parity.normals(1, cells, cells, 32)
    program = compiled(model.decode, params, z)

    def reference():
        with torch.inference_mode():
            return theirs.decode(test_parity.to_torch(z)).sample

    ours = lambda: jax.block_until_ready(program(params, z))
    print(f"relative difference {test_parity.relative(ours(), test_parity.from_torch(reference())):.1e}")
    alternate(f"DC-AE decode at {_SIDE.value}", ours, reference)


def main(argv):
    del argv
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print(f"jax {jax.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    if _PART.value != "autoencoder":
        transformer()
    if _PART.value != "transformer":
        autoencoder()


if __name__ == "__main__":
    app.run(main)
