"""Peak memory of loading a model and of one picture, against the size of its weights.

python -m benchmarks.load_memory --model=DIR [--dtype=bfloat16] [--side=512]
"""

import resource

import jax
from absl import app, flags

_MODEL = flags.DEFINE_string("model", None, "Diffusers or converted folder.", required=True)
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", "float32 or bfloat16.")
_SIDE = flags.DEFINE_integer("side", 512, "Pixels of the picture.")


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(argv):
    del argv
    import transformers  # noqa: F401 (what the libraries themselves take is not counted)

    from sprint_jax.sampling import generation, loading

    jax.jit(lambda x: x + 1)(0)
    before = peak()
    pipe = loading.load(_MODEL.value, dtype=_DTYPE.value)
    weights = sum(a.nbytes for a in jax.tree.leaves(pipe.params)) / 2**30
    loaded = peak() - before
    print(
        f"weights {weights:.2f} GiB, peak while loading {loaded:.2f} GiB above the libraries' {before:.2f}: "
        f"{loaded / weights:.2f} x the weights",
        flush=True,
    )
    generation.generate(pipe, ["a lake in autumn"], steps=1, height=_SIDE.value, width=_SIDE.value)
    print(f"peak after one picture of {_SIDE.value} px: {peak():.2f} GiB in all")


if __name__ == "__main__":
    app.run(main)
