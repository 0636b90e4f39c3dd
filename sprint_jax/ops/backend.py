"""Where the kernels run, of attention and of depthwise convolutions: what a name means on which device, and the one way to start one.

    "plain"      no kernel: the JAX code that stands beside each one, for XLA to compile
    "interpret"  the kernel's body run as JAX operations: slow, anywhere, for tests
    "triton"     compiled by Pallas' Triton back end, for NVIDIA GPUs
    "tpu"        compiled by Mosaic, for TPUs

Why Triton: it is the one GPU back end whose kernel bodies are those of the TPU and of the interpreter, and it works
on both lines of JAX in use (0.10, 0.11). It is deprecated since 0.11; on Hopper the way forward is Mosaic GPU
(wgmma, TMA). Measured on an H200 (`docs/results/speed.md`): a picture of the 0.6B size takes 26.5 ms with them and 27.8 without, a pair of training
steps 1.01 s and 1.23 s, and both have become faster since. So pictures are made by them there, and training is where it is asked to: elsewhere its numbers
were not compared with them. Mosaic GPU was not compared; Triton stays until it has been, or until a release of JAX drops it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

BACKENDS = ("plain", "interpret", "triton", "tpu")
WANTED = ("plain", "pallas")
LARGEST_HEAD = 128
# Heads of linear attention: wider ones make blocks of 128 x 128 states, which Triton compiles for minutes or not at all.
LARGEST_LINEAR_HEAD = {"triton": 64, "tpu": 128}
DTYPES = ("float32", "bfloat16")

# Of every kernel compiled by Triton; `benchmarks/tiles.py` tries others.
WARPS, STAGES = 4, 2

# Of the depthwise convolution, which has no kernel for TPUs.
DEPTHWISE = ("plain", "interpret", "triton")

_COMPILED = {"gpu": "triton", "cuda": "triton", "tpu": "tpu"}


def depthwise(platform, attention="pallas") -> str:
    """The backend of depthwise convolutions beside that of attention, "plain" for no kernels at all. platform: as `jax.default_backend()`
    names it."""
    found = None if attention == "plain" else _compiled(platform)
    return found if found in DEPTHWISE else "plain"


def _compiled(platform):
    """The backend that compiles kernels for a platform, or None."""
    found = _COMPILED.get(platform)
    return None if found == "triton" and not _ampere() else found


def _ampere():
    """Whether this process' GPU, where it has one, is NVIDIA's and new enough for XLA's Triton. AMD's call themselves "gpu" as well."""
    capability = getattr(jax.devices()[0], "compute_capability", None)
    if capability is None:
        return True  # programs for one that is not here
    major = str(capability).split(".")[0]
    return major.isdigit() and int(major) >= 8


def fastest(platform) -> str:
    """The one of `WANTED` that makes pictures fastest on a platform, as `jax.default_backend()` names it."""
    return "pallas" if _compiled(platform) == "triton" else "plain"


def launches_cost(platform) -> bool:
    """Whether a picture waits for the host to prepare what it starts on the device."""
    return _compiled(platform) == "triton"


def resolve(wanted, platform, linear, cross, dtype):
    """What a wish means on a device.

    Args:
      wanted: "plain" or "pallas".
      platform: as `jax.default_backend()` names it.
      linear, cross: channels per head of the two attentions that would use a kernel; None for one that is not there.
      dtype: compute dtype, by name.
    Returns:
      (backend, sentence): one of `BACKENDS`, and None or one line for people that says why it is "plain" all the same.
    """
    if wanted not in WANTED:
        raise ValueError(f"attention {wanted!r}: use one of {', '.join(WANTED)}")
    if wanted == "plain":
        return "plain", None
    missing, head_dims = None, [d for d in (linear, cross) if d is not None]
    found = _compiled(platform)
    if platform not in _COMPILED:
        missing = f"there is no compiled kernel for a {platform} (only for {' and '.join(sorted(set(_COMPILED) - {'cuda'}))})"
    elif found is None:
        missing = "kernels for a GPU are for NVIDIA's from compute capability 8.0 on, which this one has not"
    elif any(d % 8 or not 8 <= d <= LARGEST_HEAD for d in head_dims):
        missing = f"heads are {', '.join(map(str, sorted(set(head_dims))))} wide and kernels take multiples of 8 up to {LARGEST_HEAD}"
    elif linear is not None and linear > LARGEST_LINEAR_HEAD[found]:
        missing = f"heads of linear attention are {linear} wide and kernels for a {platform} take up to {LARGEST_LINEAR_HEAD[found]}"
    elif dtype not in DTYPES:
        missing = f"the compute dtype is {dtype} and kernels take {' and '.join(DTYPES)}"
    if missing:
        return "plain", f"attention: plain JAX instead of Pallas kernels, for {missing}"
    return found, None


def next_power_of_two(n):
    return 1 << max(0, n - 1).bit_length()


def padded_to(n, multiple):
    return -(-n // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Operand:
    """An input of a kernel, or the shape of an output, and the block of it that one program sees.

    array: an array, or a ShapeDtypeStruct for an output. Its leading axis is the batch unless `shared`.
    block, index: as in `pallas.BlockSpec`; None in a block is an axis of size one that the kernel does not see.
    """

    array: jax.Array | jax.ShapeDtypeStruct
    block: tuple
    index: object
    shared: bool = False

    @property
    def spec(self):
        return pl.BlockSpec(self.block, self.index)


def local_batch(batch):
    """Samples of one device: where a mesh is in use and divides them, its share, else all."""
    mesh = jax.sharding.get_abstract_mesh()
    return batch if mesh.empty or batch % mesh.size else batch // mesh.size


def launch(body, grid, ins, outs, *, backend, name):
    """Runs `body(refs)` once for each index of `grid`, `refs` being a dict of the names in `ins` and `outs`.

    Args:
      body: function of a dict of references; programs must not depend on each other.
      grid: numbers of programs; the first axis counts samples and is given as None.
      ins, outs: dicts of `Operand`.
      backend: "interpret", "triton" or "tpu".
      name: of the kernel, as profiles show it.
    Returns:
      dict of arrays, as named in `outs`.

    Where a mesh is in use every device runs the kernel on its own samples, or on all where they do not divide by the
    devices: left to itself the compiler would gather the operands of a kernel, which it cannot cut, or refuse it.
    """
    (batch,) = {o.array.shape[0] for o in (*ins.values(), *outs.values()) if not o.shared}
    local = local_batch(batch)

    def kernel(*refs):
        body(dict(zip((*ins, *outs), refs, strict=True)))

    def run(*arrays):
        return pl.pallas_call(
            kernel,
            grid=(local, *grid[1:]),
            in_specs=[o.spec for o in ins.values()],
            out_specs=[o.spec for o in outs.values()],
            out_shape=[
                jax.ShapeDtypeStruct((local, *o.array.shape[1:]), o.array.dtype)
                for o in outs.values()
            ],
            interpret=backend == "interpret",
            compiler_params=_compiler_params(backend, len(grid)),
            name=name,
        )(*arrays)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:
        samples = PartitionSpec(mesh.axis_names) if local != batch else PartitionSpec()
        run = jax.shard_map(
            run,
            in_specs=tuple(PartitionSpec() if o.shared else samples for o in ins.values()),
            out_specs=samples,
            check_vma=False,  # kernels do not say along which axes their outputs vary
        )
    return dict(zip(outs, run(*(o.array for o in ins.values())), strict=True))


def _compiler_params(backend, axes):
    """Always said outright: which back end a GPU gets by default differs between the lines of JAX."""
    if backend == "triton":
        from jax.experimental.pallas import triton

        return triton.CompilerParams(num_warps=WARPS, num_stages=STAGES)
    if backend == "tpu":
        from jax.experimental.pallas import tpu

        return tpu.CompilerParams(dimension_semantics=("parallel",) * axes)
    if backend != "interpret":
        raise ValueError(f"backend {backend!r}: use one of {', '.join(BACKENDS[1:])}")
    return None


def dot(a, b, dtype, contract=(1, 0)):
    """a b over one axis of each, accumulated in float32, as accurately as if both were float32.

    Args:
      a, b: matrices of `dtype` or of float32. A float32 matrix in a bfloat16 computation enters as the sum of two
        bfloat16 ones, which keeps 16 bits of it at the tensor units' speed; of the four products the least is left out.
      dtype: operands' dtype, bfloat16 or float32.
      contract: the axis of a and the axis of b that are summed over.
    """
    total = None
    for i, left in enumerate(_parts(a, dtype)):
        for j, right in enumerate(_parts(b, dtype)):
            if i + j < 2:
                term = single_dot(left, right, contract)
                total = term if total is None else total + term
    return total


def single_dot(a, b, contract=(1, 0)):
    """a b over one axis of each, operands as they are, accumulated in float32."""
    exact = a.dtype == jnp.float32
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _parts(a, dtype):
    if a.dtype == dtype:
        return (a,)
    high = a.astype(dtype)
    return high, (a - high.astype(jnp.float32)).astype(dtype)


def rounded(a, dtype):
    """Float32 values as `dtype` holds them, still float32: not every device computes in bfloat16."""
    return a.astype(dtype).astype(jnp.float32)
