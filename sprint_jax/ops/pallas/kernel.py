"""Launching a Pallas kernel on a GPU, a TPU or the interpreter, and the arithmetic inside kernels.

Triton is the one GPU compiler of Pallas whose kernel bodies are those of the TPU and of the
interpreter, and it works on both JAX releases in use (0.10 and 0.11). JAX 0.11 deprecates it.
Mosaic GPU, its successor on Hopper, has not been compared with it here.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from sprint_jax.ops.backend import BACKENDS

# Used for every kernel that Triton compiles; `benchmarks/tiles.py` tries other values.
WARPS, STAGES = 4, 2

Refs = dict[Any, Any]  # references of a kernel, by the names of its operands


def next_power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n, and at least 1."""
    return 1 << max(0, n - 1).bit_length()


def round_up(n: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least n."""
    return -(-n // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Operand:
    """An input of a kernel, or the shape of an output, and the block of it that one program sees.

    array: an array, or a ShapeDtypeStruct for an output. Its leading axis is the batch unless
      `shared`.
    block, index: as in `pallas.BlockSpec`. None in a block is an axis of size one that the kernel
      does not see.
    shared: whether all samples use the same array.
    """

    array: Array | jax.ShapeDtypeStruct
    block: tuple[int | None, ...]
    index: Callable[..., tuple[Any, ...]]
    shared: bool = False

    @property
    def spec(self) -> pl.BlockSpec:
        """The block specification that Pallas takes."""
        return pl.BlockSpec(self.block, self.index)


def local_batch(batch: int) -> int:
    """Return the samples of one device: its share if the mesh in use divides them, else all."""
    mesh = jax.sharding.get_abstract_mesh()
    return batch if mesh.empty or batch % mesh.size else batch // mesh.size


def launch(
    body: Callable[[Refs], None],
    grid: Sequence[int],
    ins: Mapping[Any, Operand],
    outs: Mapping[Any, Operand],
    *,
    backend: str,
    name: str,
) -> dict[Any, Array]:
    """Run `body(refs)` once for each sample and index of `grid`, and return the outputs by name.

    On a mesh every device runs the kernel on its own samples, or on all of them if their number
    does not divide by the devices. Without that the compiler, which cannot split a kernel, would
    gather its operands or refuse it.

    Args:
      body: function of a dict of references, named as in `ins` and `outs`. Programs must not
        depend on each other.
      grid: numbers of programs along each axis after the first, which counts samples.
      ins, outs: dicts of `Operand`.
      backend: "interpret", "triton" or "tpu".
      name: name of the kernel in profiles.

    Raises:
      ValueError: for any other backend.
    """
    (batch,) = {o.array.shape[0] for o in (*ins.values(), *outs.values()) if not o.shared}
    local = local_batch(batch)

    def kernel(*refs):
        body(dict(zip((*ins, *outs), refs, strict=True)))

    def run(*arrays):
        return pl.pallas_call(
            kernel,
            grid=(local, *grid),
            in_specs=[o.spec for o in ins.values()],
            out_specs=[o.spec for o in outs.values()],
            out_shape=[
                jax.ShapeDtypeStruct((local, *o.array.shape[1:]), o.array.dtype)
                for o in outs.values()
            ],
            interpret=backend == "interpret",
            compiler_params=_compiler_params(backend, 1 + len(grid)),
            name=name,
        )(*arrays)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:
        samples = PartitionSpec(mesh.axis_names) if local != batch else PartitionSpec()
        run = jax.shard_map(
            run,
            in_specs=tuple(PartitionSpec() if o.shared else samples for o in ins.values()),
            out_specs=samples,
            check_vma=False,  # kernels do not declare the mesh axes along which outputs vary
        )
    return dict(zip(outs, run(*(o.array for o in ins.values())), strict=True))


def _compiler_params(backend: str, axes: int) -> Any:
    """Return the compiler's options. Explicit, as the default GPU compiler differs by release."""
    if backend == "triton":
        from jax.experimental.pallas import triton

        return triton.CompilerParams(num_warps=WARPS, num_stages=STAGES)
    if backend == "tpu":
        from jax.experimental.pallas import tpu

        return tpu.CompilerParams(dimension_semantics=("parallel",) * axes)
    if backend != "interpret":
        raise ValueError(f"backend {backend!r}: use one of {', '.join(BACKENDS[1:])}")
    return None


def dot(a: Array, b: Array, dtype: Any, contract: tuple[int, int] = (1, 0)) -> Array:
    """Return a b over one axis of each, as accurate as if both were float32, in float32.

    Args:
      a, b: matrices of `dtype` or of float32. A float32 matrix in a bfloat16 computation enters as
        the sum of two bfloat16 ones, which keeps 16 of its bits at the speed of the tensor units.
        The smallest of the four products is left out.
      dtype: dtype of the operands, bfloat16 or float32.
      contract: the axis of a and the axis of b that are summed over.
    """
    terms = [
        single_dot(left, right, contract)
        for i, left in enumerate(_split(a, dtype))
        for j, right in enumerate(_split(b, dtype))
        if i + j < 2
    ]
    total, *rest = terms
    for term in rest:
        total = total + term
    return total


def single_dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """Return a b over one axis of each, with the operands as they are, accumulated in float32."""
    exact = a.dtype == jnp.float32
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _split(a: Array, dtype: Any) -> tuple[Array, ...]:
    """Return arrays of `dtype` whose sum is a, up to 16 bits of it."""
    if a.dtype == dtype:
        return (a,)
    high = a.astype(dtype)
    return high, (a - high.astype(jnp.float32)).astype(dtype)


def round_to(a: Array, dtype: Any) -> Array:
    """Round float32 values to `dtype` but keep them float32.

    Not every device computes in bfloat16.
    """
    return a.astype(dtype).astype(jnp.float32)
