"""NVIDIA GPUs that are not here, as devices to compile for: jax[cuda12] brings the compiler, which needs neither GPU nor driver."""

import importlib.util
import os

from sprint_jax.errors import UserError
from sprint_jax.planning import hardware

_PLUGIN = "jax_plugins.xla_cuda12"

# What the compiler asks of a device, beside its memory and bandwidth: architecture, multiprocessors, float32 units of each, its
# shared memory and what a block may have of it, bytes of the second cache, GHz. From the vendor's architecture papers.
_COMPILED_FOR = {
    hardware.H200: (9, 132, 128, 233472, 232448, 52428800, 1.98),
    hardware.H100: (9, 132, 128, 233472, 232448, 52428800, 1.98),
    hardware.A100: (8, 108, 64, 167936, 166912, 41943040, 1.41),
}


def compiler() -> bool:
    """Whether the compiler is installed."""
    return (
        importlib.util.find_spec("jax_plugins") is not None
        and importlib.util.find_spec(_PLUGIN) is not None
    )


def prepare():
    """To be called before JAX is imported: lets the compiler load where there is no GPU, and hides one that is there."""
    os.environ |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "CUDA_VISIBLE_DEVICES": "-1"}


def devices(device: hardware.Device, nodes: int, of_each: int) -> list:
    """nodes x of_each devices, to put into a mesh and compile for. Raises UserError where the compiler does not know how to."""
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(
            platform="cuda", topology=f"1x{nodes}x{of_each}", target_config=_target(device)
        )
    except Exception as error:  # the library raises many kinds
        line = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot compile for {nodes} x {of_each} {device.name} ({line}): pip install 'jax[cuda12]' at jax's version"
        ) from None
    return found.devices


def _target(device):
    """The compiler's description of a device, as text of its protocol buffer."""
    major, cores, units, shared, of_block, cache, clock = _COMPILED_FOR[device]
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} }}
          core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock}
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {of_block}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          l2_cache_size: {cache} memory_bandwidth: {int(device.bandwidth)} device_memory_size: {device.memory}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 12 minor: 9 }}
        device_description_str: "NVIDIA {device.name.upper()}"
    """
