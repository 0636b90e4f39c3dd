"""Time other tiles and numbers of warps for the kernels of a GPU beside the ones in use.

    python -m benchmarks.tiles [--kernel=cross|linear|depthwise ...] [--samples=16]

Shapes are those of a published training step of the 0.6B size, in bfloat16. For each choice it
times the value, the value with its tangent and the value with its gradients. A line has the median
of back-to-back runs, its ratio to the first line, and the difference of its results from the first
line's. A choice that does not compile prints the reason. To adopt a choice, change the constant of
that name in `sprint_jax/ops/pallas`.
"""

import contextlib
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.harness import bench, timing
from benchmarks.harness import options as options_lib
from sprint_jax.ops import cross_attention, depthwise, linear_attention
from sprint_jax.ops.pallas import cross_attention as cross_kernel
from sprint_jax.ops.pallas import depthwise as depthwise_kernel
from sprint_jax.ops.pallas import kernel as kernel_lib
from sprint_jax.ops.pallas import linear_attention as linear_kernel

ROUNDS, SHORTEST = 5, 0.02  # seconds of runs back to back
# {kernel: (module, constants of each choice)}, the choice in use first. WARPS and STAGES are in
# `ops/pallas/kernel.py`.
CHOICES = {
    "cross": (
        cross_kernel,
        [
            {},
            {"QUERIES": 128, "WARPS": 8},
            {"QUERIES": 128},
            {"KEYS": 32},
            {"KEYS": 128},
            {"STAGES": 3},
            {"STAGES": 1},
            {"WARPS": 8},
            {"QUERIES": 128, "KEYS": 32, "WARPS": 8},
        ],
    ),
    "linear": (
        linear_kernel,
        [
            {},
            {"CHANNELS": 64},
            {"TOKENS": 128},
            {"TOKENS": 32},
            {"WARPS": 2},
            {"WARPS": 8},
            {"STAGES": 3},
        ],
    ),
    "depthwise": (
        depthwise_kernel,
        [
            {},
            {"ROWS": 8},
            {"ROWS": 2},
            {"COLUMNS": 8},
            {"COLUMNS": 32},
            {"CHANNELS": (32, 16)},
            {"ROWS": 8, "CHANNELS": (32, 16)},
            {"WARPS": 2},
            {"WARPS": 8},
        ],
    ),
}


def main() -> None:
    """Time the kernels that the options name."""
    parser = options_lib.parser(__doc__)
    parser.add_argument("--kernel", action="append", choices=list(CHOICES))
    parser.add_argument("--samples", type=int, default=16)
    options = parser.parse_args()
    if jax.default_backend() != "gpu":
        raise SystemExit(
            "error: JAX sees no GPU here; kernels of other platforms have no such choices"
        )
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {options.samples} samples, "
        f"median of {ROUNDS} times {SHORTEST} s of runs"
    )
    for kernel in options.kernel or CHOICES:
        search(kernel, subject(kernel, "triton", options.samples), print)


def subject(
    kernel: str,
    backend: str,
    samples: int,
    *,
    tokens: int = 1024,
    text: int = 300,
    width: int = 1152,
    hidden: int = 5760,
) -> tuple[Callable, tuple[jax.Array, ...]]:
    """Return a kernel and its arrays. The first array has a tangent, all have gradients.

    tokens: a square number. width: a multiple of 72 and of 32.
    """
    normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
    if kernel == "cross":
        q, k, v = (
            normal(i, samples, n, width // 72, 72) for i, n in enumerate((tokens, text, text))
        )
        mask = jnp.ones((samples, text))
        return lambda q, k, v: cross_attention.attend(q, k, v, mask, backend=backend), (q, k, v)
    if kernel == "linear":
        run = lambda qkv, *norms: linear_attention.attend(
            qkv, *norms, heads=width // 32, eps=1e-5, backend=backend
        )
        return run, (normal(0, samples, tokens, 3 * width), jnp.ones(width), jnp.ones(width))
    side = round(tokens**0.5)
    run = lambda x, w, bias: depthwise.conv(x, w, bias, True, backend)
    return run, (normal(0, samples, side, side, hidden), normal(1, 3, 3, hidden), jnp.zeros(hidden))


def search(
    kernel: str,
    subject: tuple[Callable, tuple[jax.Array, ...]],
    say: Callable[[str], None],
    rounds: int = ROUNDS,
    shortest: float = SHORTEST,
) -> dict[str, dict[str, tuple[float, float]]]:
    """Time each choice and direction and print a line for each by `say`.

    Returns {choice: {direction: (seconds, difference)}}.
    """
    module, choices = CHOICES[kernel]
    function, arrays = subject
    derived = {
        "value": function,
        "tangent": lambda x, *rest: jax.jvp(lambda x: function(x, *rest), (x,), (x,)),
        "gradient": lambda *arrays: jax.vjp(function, *arrays)[1](function(*arrays)),
    }
    found, first = {}, {}
    for choice in choices:
        label = ", ".join(f"{name} {value}" for name, value in choice.items()) or "in use"
        with _chosen(module, choice):
            for direction, f in derived.items():
                try:
                    program, _ = bench.compiled(f, *arrays)
                    result = program(*arrays)
                    times = timing.alternate(
                        {"": bench.program(program, *arrays)}, rounds, shortest
                    )
                except Exception as error:  # whatever a compiler raises
                    say(f"{kernel:10} {direction:9} {label}: {bench.sentence(error)}")
                    continue
                seconds = timing.middle(times[""].total)
                base, expected = first.setdefault(direction, (seconds, result))
                difference = float(_difference(result, expected))
                found.setdefault(label, {})[direction] = seconds, difference
                say(
                    f"{kernel:10} {direction:9} {1e6 * seconds:8.0f} us {seconds / base:6.2f} x   "
                    f"difference {difference:.1e}   {label}"
                )
    return found


@contextlib.contextmanager
def _chosen(module, choice):
    """Change constants of a kernel's module, or of `ops/pallas/kernel.py`, inside the context."""
    jax.clear_caches()  # kernels are traced once per shape
    with contextlib.ExitStack() as stack:
        for name, value in choice.items():
            stack.enter_context(
                mock.patch.object(module if hasattr(module, name) else kernel_lib, name, value)
            )
        yield
    jax.clear_caches()


@jax.jit
def _difference(values, expected):
    """Return the largest distance of all arrays, relative to the norm of the expected one."""
    norm = lambda a: jnp.linalg.norm(a.astype(jnp.float32).ravel())
    apart = lambda a, b: (
        norm(a.astype(jnp.float32) - b.astype(jnp.float32)) / jnp.maximum(norm(b), 1e-30)
    )
    return jnp.stack(jax.tree.leaves(jax.tree.map(apart, values, expected))).max()


if __name__ == "__main__":
    main()
