"""Measure how many examples a second the reader of encoded data sets delivers per core.

    python -m benchmarks.input_speed [--encoded=DIR] [--text=features|tokens] [--records=1000]
        [--batch=32]

Without --encoded it writes a temporary data set of random records in the published shape:
32 x 32 x 32 float16 latents (1024 px) with 300 tokens, or with 300 x 2304 float16 text features.
Records get no larger than that, since captions are usually shorter. In the second pass the file
system's cache is warm. So the first pass measures the storage and the second one the reader.

The result is compared with an H200 that takes 48 examples a second: 790 TFLOP/s of dense bfloat16
over the 16.4 TFLOP that one example of the 0.6B model costs in a generator and a discriminator
step together. No training reaches this speed.
"""

import os
import pathlib
import tempfile
import time

import numpy as np

from benchmarks.harness import options as options_lib
from sprint_jax.data import batches, encoded

H200_FLOPS = 790e12
EXAMPLE_FLOPS = 16.4e12
SHAPE, LENGTH, WIDTH = (32, 32, 32), 300, 2304


def write_random(folder: pathlib.Path, kind: str, count: int, shard: int = 250) -> None:
    """Write a data set of random records. kind: "features" or "tokens"."""
    rng = np.random.default_rng(0)

    def record():
        if kind == "features":
            text = {"text": rng.standard_normal((LENGTH, WIDTH), np.float32).astype(np.float16)}
        else:
            text = {"tokens": rng.integers(0, 256000, LENGTH, np.int32)}
        latent = rng.standard_normal(SHAPE, np.float32).astype(np.float16)
        return {"latent": latent, "caption": np.zeros(200, np.uint8)} | text

    shards = []
    for number, start in enumerate(range(0, count, shard)):
        records = [record() for _ in range(min(shard, count - start))]
        shards.append(encoded.write_shard(folder / f"train-{number:05d}{encoded.SUFFIX}", records))
    described = dict(
        model="random",
        source="random",
        text=kind,
        text_dim=WIDTH if kind == "features" else 0,
        text_length=LENGTH,
        channels=SHAPE[-1],
        factor=32,
    )
    encoded.write_manifest(folder / encoded.MANIFEST, described, shards)


def measure(folder: pathlib.Path | str, batch: int) -> None:
    """Read a data set twice and print the speed of both passes."""
    data = encoded.Encoded(folder, "train")
    batch = min(batch, len(data))
    read = batches.BatchReader(data, seed=0, batch=batch)
    steps = read.plan.steps_per_epoch
    size = sum(
        shard["bytes"] for shard in data.manifest["shards"] if shard["split"] == "train"
    ) / len(data)
    kind = data.manifest["text"]
    print(
        f"{len(data)} examples of {size / 1e3:.0f} kB, text as {kind}, batches of {batch}",
        flush=True,
    )
    needed = H200_FLOPS / EXAMPLE_FLOPS
    for name in ("first pass", "second pass"):
        begin, used = time.perf_counter(), time.process_time()
        for step in range(steps):
            read(step)
        wall, core = time.perf_counter() - begin, time.process_time() - used
        speed = steps * batch / core
        print(
            f"{name:<12} {speed:8.0f} examples/s per core ({steps * batch / wall:.0f} by wall "
            f"clock), {speed / needed:.1f} times the {needed:.0f} of one H200",
            flush=True,
        )


def main() -> None:
    """Measure the data set that the options name, or a random one."""
    parser = options_lib.parser(__doc__)
    parser.add_argument(
        "--encoded",
        help="folder of an encoded data set; default: a temporary, random one",
    )
    parser.add_argument("--text", choices=sorted(encoded.KINDS), default="features")
    parser.add_argument("--records", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores", flush=True)
    if options.encoded:
        measure(options.encoded, options.batch)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_random(pathlib.Path(folder), options.text, options.records)
        measure(folder, options.batch)


if __name__ == "__main__":
    main()
