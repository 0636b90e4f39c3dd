"""Devices that are not here, as JAX devices to compile for. Imports JAX only to describe them."""

import os
from collections.abc import Sequence
from typing import Any

from sprint_jax.errors import UserError
from sprint_jax.planning import gpus, hardware


def is_tpu(device: hardware.Device) -> bool:
    """Return whether the device is one of Google's."""
    return device.name.startswith("v")


def is_simulated(device: hardware.Device) -> bool:
    """Return whether CPU devices stand for this one, because its compiler is not installed."""
    return not is_tpu(device) and not gpus.compiler()


def prepare(device: hardware.Device, count: int) -> None:
    """Set the process's environment for `devices`. Call it before JAX is imported.

    count: devices of the whole topology.
    """
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    if is_simulated(device):
        simulated = (
            f"--xla_force_host_platform_device_count={count} --xla_backend_optimization_level=0"
        )
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {simulated}"
    elif not is_tpu(device):
        gpus.prepare()


def devices(device: hardware.Device, shape: Sequence[int]) -> Sequence[Any]:
    """Return the devices of a topology. Raises UserError if their compiler cannot describe it."""
    import jax

    if is_simulated(device):
        return jax.devices()
    if not is_tpu(device):
        nodes, of_each = shape
        return gpus.devices(device, nodes, of_each)
    from jax.experimental import topologies

    topology = f"{device.name}:{'x'.join(map(str, shape))}"
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # the library raises many kinds
        line = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot describe {topology} ({line}): pip install libtpu, and use a topology that "
            "exists"
        ) from None
