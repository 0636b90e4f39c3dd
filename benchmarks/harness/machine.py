"""Where a measurement is made: device, threads, commit, and what the device reaches on large products and copies."""

import gc
import os
import pathlib
import sys

import jax
import jax.numpy as jnp

from benchmarks.harness import floors, timing
from sprint_jax.storage import revision


def threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def where() -> dict:
    """The columns that every row of a run shares."""
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    return {
        "device": _processor() if on_cpu else device.device_kind,
        "threads": threads() if on_cpu else None,
        "jax": jax.__version__,
        "commit": revision.commit(),
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "cpu"


def collect():
    """Gives memory of what is not used any more back to the device, PyTorch's too, whose cache nobody else can take from."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def rates(dtype: str) -> floors.Rates:
    """Known rates of an H200 in bfloat16; elsewhere the best of a few large products and copies made now.

    As many threads as this process may use; float32 products on a GPU in the precision that the models use.
    """
    if dtype == "bfloat16" and "H200" in jax.devices()[0].device_kind.split():  # a GH200 has others
        return floors.H200_BFLOAT16
    on_cpu = jax.default_backend() == "cpu"
    n, numbers = (2048, 2**26) if on_cpu else (8192, 2**30)
    a = jax.jit(lambda key: jax.random.normal(key, (n, n), dtype))(jax.random.key(0))
    product = jax.jit(jnp.matmul).lower(a, a).compile()
    long = jnp.ones(numbers, dtype)
    copy = jax.jit(lambda x: -x).lower(long).compile()
    shortest = 0.0 if on_cpu else 0.05
    best = lambda function, *args: min(
        timing.alternate(
            {"": timing.Program({"": timing.Call(lambda: function(*args), jax.block_until_ready)})},
            7,
            shortest,
        )[""].total
    )
    return floors.Rates(2 * n**3 / best(product, a, a), 2 * long.nbytes / best(copy, long))
