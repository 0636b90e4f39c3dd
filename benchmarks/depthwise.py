"""Time our depthwise 3x3 convolution beside nine shifted multiplies and a grouped convolution.

    python -m benchmarks.depthwise

Prints medians of one run and ratios to ours, at the shape of the embedded model's Mix-FFN.
"""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sprint_jax.ops import depthwise

SHAPE = (32, 8, 8, 512)
REPEATS = 25


def median_ms(function: Callable, *arguments: jax.Array) -> float:
    """Return the median milliseconds of a call."""
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(seconds)


def main() -> None:
    """Print the table."""
    x = jax.random.normal(jax.random.key(0), SHAPE)
    w = jax.random.normal(jax.random.key(1), (3, 3, SHAPE[-1]))
    ways = {
        "ours": depthwise.depthwise_conv,
        "nine shifts": depthwise._shifts,
        "grouped conv": depthwise._grouped_conv,
    }
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {SHAPE} float32, median of "
        f"{REPEATS}"
    )
    print(f"{'':14}{'forward':>18}{'tangent in x':>18}{'both gradients':>18}")
    base = None
    for name, conv in ways.items():
        loss = lambda x, w: jnp.square(conv(jnp.tanh(x), w)).mean()
        times = (
            median_ms(jax.jit(conv), x, w),
            median_ms(jax.jit(lambda x, w: jax.jvp(lambda x: conv(x, w), (x,), (x,))), x, w),
            median_ms(jax.jit(jax.grad(loss, argnums=(0, 1))), x, w),
        )
        base = base or times
        print(f"{name:14}" + "".join(f"{t:9.1f} ms {t / b:4.1f} x" for t, b in zip(times, base)))


if __name__ == "__main__":
    main()
