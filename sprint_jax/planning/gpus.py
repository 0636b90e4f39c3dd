"""NVIDIA GPUs to compile for without having one.

jax[cuda12] brings the compiler, which needs neither a GPU nor a driver.
"""

import dataclasses
import importlib.util
import os
from typing import Any

from sprint_jax.errors import UserError
from sprint_jax.planning import hardware

_PLUGIN = "jax_plugins.xla_cuda12"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Architecture:
    """What the compiler asks of a device besides memory and bandwidth; sizes are in bytes."""

    capability: int
    cores: int  # streaming multiprocessors
    units: int  # float32 units of a core
    shared: int  # shared memory of a core
    shared_of_block: int  # shared memory that a block may have
    cache: int  # second-level cache
    clock: float  # GHz


# From the vendor's architecture papers.
_HOPPER = _Architecture(
    capability=9,
    cores=132,
    units=128,
    shared=233472,
    shared_of_block=232448,
    cache=52428800,
    clock=1.98,
)
_AMPERE = _Architecture(
    capability=8,
    cores=108,
    units=64,
    shared=167936,
    shared_of_block=166912,
    cache=41943040,
    clock=1.41,
)
_ARCHITECTURES = {hardware.H200: _HOPPER, hardware.H100: _HOPPER, hardware.A100: _AMPERE}


def compiler() -> bool:
    """Return whether the compiler is installed."""
    return (
        importlib.util.find_spec("jax_plugins") is not None
        and importlib.util.find_spec(_PLUGIN) is not None
    )


def prepare() -> None:
    """Let the compiler load without a GPU, and hide a GPU that is there.

    Call this before JAX is imported.
    """
    os.environ |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "CUDA_VISIBLE_DEVICES": "-1"}


def devices(device: hardware.Device, nodes: int, per_node: int) -> list[Any]:
    """Return nodes x per_node devices, to put into a mesh and compile for.

    Raises UserError if the compiler is missing or does not know the device.
    """
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(
            platform="cuda", topology=f"1x{nodes}x{per_node}", target_config=_target(device)
        )
    except Exception as error:  # the library raises many kinds
        line = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot compile for {nodes} x {per_node} {device.name} ({line}): pip install "
            "'jax[cuda12]' at jax's version"
        ) from None
    return found.devices


def _target(device):
    """Return the compiler's description of a device, as text of its protocol buffer."""
    a = _ARCHITECTURES[device]
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {a.capability} }}
          core_count: {a.cores} fpus_per_core: {a.units} clock_rate_ghz: {a.clock}
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          shared_memory_per_block: 49152 shared_memory_per_core: {a.shared}
          shared_memory_per_block_optin: {a.shared_of_block}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          l2_cache_size: {a.cache} memory_bandwidth: {int(device.bandwidth)}
          device_memory_size: {device.memory}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 12 minor: 9 }}
        device_description_str: "NVIDIA {device.name.upper()}"
    """
