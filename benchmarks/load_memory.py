"""Measure the peak memory of loading a model and of one image, against the size of its weights.

python -m benchmarks.load_memory --model=DIR [--dtype=bfloat16] [--side=512]
"""

import dataclasses
import resource
import sys
from typing import Literal

import jax

from sprint_jax.runtime import cli
from sprint_jax.storage import files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(files.Paths):
    """Options of `python -m benchmarks.load_memory`."""

    model: files.LocalPath = ""
    """Diffusers or converted folder."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights and arithmetic."""
    side: int = 512
    """Pixels of the image."""


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run(options: Options) -> None:
    """Print the peaks, in GiB."""
    cli.require("model", options.model, "give a diffusers or converted folder")
    import transformers  # noqa: F401 (what the libraries themselves take is not counted)

    from sprint_jax.sampling import generation, loading

    jax.jit(lambda x: x + 1)(0)
    before = peak()
    pipe = loading.load(options.model, dtype=options.dtype)
    weights = sum(a.nbytes for a in jax.tree.leaves(pipe.params)) / 2**30
    loaded = peak() - before
    print(
        f"weights {weights:.2f} GiB, peak while loading {loaded:.2f} GiB above the libraries' "
        f"{before:.2f}: {loaded / weights:.2f} x the weights",
        flush=True,
    )
    generation.generate(
        pipe, ["a lake in autumn"], steps=1, height=options.side, width=options.side
    )
    print(f"peak after one picture of {options.side} px: {peak():.2f} GiB in all")


if __name__ == "__main__":
    cli.start(
        Options, run, sys.argv[1:], prog="python -m benchmarks.load_memory", description=__doc__
    )
