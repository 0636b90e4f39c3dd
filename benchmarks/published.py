"""Published sizes with random weights on this machine: transformer, decoder and prompt to pixels.

    python -m benchmarks.published [--sides=512,1024] [--dtype=bfloat16]

Needs nothing but the run-time packages: parameters are drawn on the device. Prints medians of several runs
and the compile time of each program.
"""

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from sprint_jax import generation, parts
from sprint_jax.diffusion import samplers, trigflow
from sprint_jax.models.dc_ae import DCAE_F32C32
from sprint_jax.models.linear_dit import SANA_600M, SANA_1600M

_SIDES = flags.DEFINE_list("sides", ["512", "1024"], "Pixels of a side.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of weights and arithmetic.")
_REPEATS = flags.DEFINE_integer("repeats", 10, "Runs of each program.")
_TOKENS = flags.DEFINE_integer("tokens", 32, "Text tokens.")


def timed(name, function, *arguments):
    begin = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    compiling, times = time.perf_counter() - begin, []
    jax.block_until_ready(program(*arguments))
    for _ in range(_REPEATS.value):
        begin = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        times.append(time.perf_counter() - begin)
    print(f"{name:<36} {1e3 * statistics.median(times):9.1f} ms  [{1e3 * min(times):.1f}, {1e3 * max(times):.1f}]"
          f"  compile {compiling:.1f} s", flush=True)  # fmt: skip


def drawn(model):
    """Random parameters in the chosen dtype."""
    dtype = jnp.dtype(_DTYPE.value)
    return jax.jit(lambda key: jax.tree.map(lambda a: a.astype(dtype), model.init(key)))(jax.random.key(0))


def main(argv):
    del argv
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {_DTYPE.value}", flush=True)
    pixels = parts.AutoencoderPixels(DCAE_F32C32, tile=False)
    decoder = drawn(DCAE_F32C32)
    for name, size in (("0.6B", SANA_600M), ("1.6B", SANA_1600M)):
        model = dataclasses.replace(size, logvar_head=False, remat="none", dtype=_DTYPE.value)
        params = drawn(model)
        text = jax.random.normal(jax.random.key(1), (1, _TOKENS.value, model.text_dim), _DTYPE.value)
        mask, w = jnp.ones((1, _TOKENS.value)), jnp.full((1,), 4.5)

        def velocity(params, x, t):
            return model.apply(params, x, t, text, mask, w).velocity

        for side in map(int, _SIDES.value):
            shape = (side // 32, side // 32, 32)
            x, t = jax.random.normal(jax.random.key(2), (1, *shape)), jnp.full((1,), 0.7)
            timed(f"{name} transformer, {side} px", velocity, params, x, t)
            for steps in (1, 2):
                times = samplers.scm_times(steps)

                def picture(params, decoder, seed):
                    draws = generation.noises(seed, jnp.zeros(1, jnp.int32), shape, steps)
                    F = trigflow.from_flow(lambda x, t: velocity(params, x, t))
                    return pixels.decode(decoder, samplers.scm(F, draws[0], draws[1:], times))

                timed(f"{name} {steps} step(s) to pixels, {side} px", picture, params, decoder, np.int32(0))
        del params
    for side in map(int, _SIDES.value):
        z = jax.random.normal(jax.random.key(3), (1, side // 32, side // 32, 32))
        timed(f"DC-AE decode, {side} px", pixels.decode, decoder, z)


if __name__ == "__main__":
    app.run(main)
