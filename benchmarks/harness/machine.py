"""The machine of a measurement: device, threads, commit, and best rates of products and copies."""

import gc
import os
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.harness import floors, timing
from sprint_jax.storage import revision


def threads() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def where() -> dict[str, Any]:
    """Return the columns that every row of a run shares."""
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


def collect() -> None:
    """Release unused device memory, including PyTorch's cache, which JAX cannot use."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def rates(dtype: str) -> floors.Rates:
    """Return the known rates of an H200 in bfloat16, or else the best of a few measured now.

    Measurements use large products and copies and all threads of this process. float32 products
    on a GPU have the precision that the models use.
    """
    if dtype == "bfloat16" and "H200" in jax.devices()[0].device_kind.split():  # a GH200 differs
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
