"""Attention kernels against plain JAX on the accelerator at hand, at the published widths.

    python -m benchmarks.kernels [--batch=8] [--repeats=30]

First every kernel is compared, on one sample, with float32 arithmetic, and one that is more than 1.1 times as far off as the plain
code ends the run. Then, for value, forward-mode derivative and the gradient around a stopped one (what an sCM step
takes), medians of both, their ratio, the least time that reading the inputs and writing the outputs once takes
at --gigabytes_per_second, and the temporary memory of the compiled program.
"""

import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from sprint_jax.kernels import backend, cross_attention, linear_attention

_BATCH = flags.DEFINE_integer("batch", 8, "Samples.")
_REPEATS = flags.DEFINE_integer("repeats", 30, "Runs of each program.")
_RATE = flags.DEFINE_float("gigabytes_per_second", 4300.0, "Of the device's memory, for the floor; default: measured on an H200.")

LINEAR = ((1024, 1152, 36), (4096, 2240, 70))  # tokens, width, heads
CROSS = ((1024, 16, 72), (4096, 16, 72), (1024, 20, 112), (4096, 20, 112))  # queries, heads, channels of a head
KEYS = 300
EPS = 1e-5


def drawn(seed, *shapes, dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return tuple(jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes))


def cases(name):
    """(title, plain, kernels, primals, arguments that have a tangent in sCM)."""
    for tokens, width, heads in LINEAR:
        options = dict(heads=heads, eps=EPS)
        plain = lambda *p, o=options: linear_attention.plain(*p, **o)
        kernels = lambda *p, o=options: linear_attention.attention(*p, **o, backend=name)
        primals = (*drawn(0, *((_BATCH.value, tokens, width),) * 3), *drawn(1, (width,), (width,), dtype=jnp.float32))
        yield f"linear {tokens} x {width}", plain, kernels, primals, 3
    mask = lambda q: (jnp.arange(KEYS) < KEYS // 2) * jnp.ones((q.shape[0], 1))
    for queries, heads, head in CROSS:
        plain = lambda *p: cross_attention.plain(*p, mask(p[0]))
        kernels = lambda *p: cross_attention.attention(*p, mask(p[0]), backend=name)
        keys = (_BATCH.value, KEYS, heads, head)
        primals = drawn(2, (_BATCH.value, queries, heads, head), keys, keys)
        yield f"cross {queries} x {KEYS}, {heads} x {head}", plain, kernels, primals, 1


def directions(f, moving):
    """{name: function of (primals, tangents)}: what runs is one program each."""

    def along(primals, tangents):
        g = lambda *p: f(*p, *primals[moving:])
        return jax.jvp(g, primals[:moving], tangents)

    def stopped(primals, tangents):
        def loss(primals):
            value, J = along(primals, tangents)
            return (value.astype(jnp.float32) * jax.lax.stop_gradient(J.astype(jnp.float32))).sum()

        return jax.grad(loss)(primals)

    return {"forward": lambda primals, tangents: f(*primals), "jvp": along, "grad of stopped jvp": stopped}


def distance(found, exact):
    """The largest relative difference of two trees' leaves, each by its Euclidean norm."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
    far = lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b)
    return max(far(np.asarray(a, np.float32), np.asarray(b, np.float32)) for a, b in pairs)


def check(title, plain, kernels, primals, moving):
    """Ends the run where kernels are further from float32 than plain code by more than a tenth."""
    few = tuple(a[:1] if a.ndim > 1 else a for a in primals)
    tangents = few[:moving]
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), few)
    with jax.default_matmul_precision("highest"):
        exact = {k: jax.jit(g)(wide, wide[:moving]) for k, g in directions(plain, moving).items()}
    for mode in exact:
        ours, theirs = (distance(jax.jit(directions(f, moving)[mode])(few, tangents), exact[mode]) for f in (kernels, plain))
        print(f"{title:<28}{mode:<22} from float32: kernels {ours:.2e}, plain {theirs:.2e}", flush=True)
        if not ours <= max(1.1 * theirs, 1e-5):
            sys.exit(f"{title}, {mode}: the kernels are wrong; nothing is timed")


def measured(function, *arguments):
    """(median milliseconds, temporary bytes) of one program."""
    program = jax.jit(function).lower(*arguments).compile()
    jax.block_until_ready(program(*arguments))
    seconds = []
    for _ in range(_REPEATS.value):
        begin = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        seconds.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(seconds), program.memory_analysis().temp_size_in_bytes


def main(argv):
    del argv
    heads = [w // h for _, w, h in LINEAR] + [d for _, _, d in CROSS]
    name, sentence = backend.resolve("pallas", jax.default_backend(), heads, "bfloat16")
    if sentence:
        print(f"nothing to time: {sentence}, and interpret mode is not a speed")
        return
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {name} kernels, batch {_BATCH.value}, bfloat16, "
          f"medians of {_REPEATS.value}", flush=True)  # fmt: skip
    for case in cases(name):
        check(*case)
    print(f"{'':28}{'':22}{'plain ms':>10}{'kernels ms':>12}{'ratio':>7}{'floor ms':>10}{'plain MB':>10}{'kernels MB':>12}")
    for title, plain, kernels, primals, moving in cases(name):
        tangents = primals[:moving]
        for mode in directions(plain, moving):
            (slow, slow_bytes), (fast, fast_bytes) = (
                measured(directions(f, moving)[mode], primals, tangents) for f in (plain, kernels)
            )
            outputs = jax.eval_shape(directions(plain, moving)[mode], primals, tangents)
            inputs = primals if mode == "forward" else (primals, tangents)
            moved = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((inputs, outputs)))
            print(f"{title:<28}{mode:<22}{slow:>10.3f}{fast:>12.3f}{slow / fast:>7.2f}{1e-6 * moved / _RATE.value:>10.3f}"
                  f"{slow_bytes / 2**20:>10.0f}{fast_bytes / 2**20:>12.0f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    app.run(main)
