"""Peak figures of accelerators, for estimates made without one."""

import dataclasses
import math

from sprint_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator at its data sheet's figures."""

    # As `parse_topology` reads it.
    name: str
    # Numbers in its topology: 2 for "16x16", or nodes x devices per node.
    axes: int
    # Dense bfloat16 FLOP/s.
    peak_bf16: float
    # Bytes of memory.
    memory: int
    # Bytes/s of that memory.
    bandwidth: float
    # Bytes/s that one device can send to the others of its pod or node, all its links together.
    link: float
    # Bytes/s of one device between nodes. Equals `link` for TPUs, whose pod is one network.
    outside: float


def _tpu(name: str, axes: int, peak: float, memory: int, bandwidth: float, link: float) -> Device:
    return Device(
        name=name,
        axes=axes,
        peak_bf16=peak,
        memory=memory,
        bandwidth=bandwidth,
        link=link,
        outside=link,
    )


def _gpu(
    name: str, peak: float, memory: int, bandwidth: float, link: float, outside: float
) -> Device:
    return Device(
        name=name,
        axes=2,
        peak_bf16=peak,
        memory=memory,
        bandwidth=bandwidth,
        link=link,
        outside=outside,
    )


# Vendors' data-sheet figures, none of them measured: matrix products reach well under the peak.
# Sheets add a link's two directions; here is one direction, half of that.
# TPU: Google Cloud's "System architecture" pages.
V5E = _tpu("v5e", 2, 197e12, 16 * 2**30, 819e9, link=200e9)
V5P = _tpu("v5p", 3, 459e12, 95 * 2**30, 2765e9, link=600e9)
V6E = _tpu("v6e", 2, 918e12, 32 * 2**30, 1600e9, link=400e9)
# NVIDIA: SXM modules without sparsity, memory in units of 10^9, and a DGX's one network card for
# each GPU (400 Gbit/s for H100 and H200, 200 Gbit/s for A100).
H100 = _gpu("h100", 989.5e12, 80 * 10**9, 3.35e12, link=450e9, outside=50e9)
H200 = _gpu("h200", 989.5e12, 141 * 10**9, 4.8e12, link=450e9, outside=50e9)
A100 = _gpu("a100", 312e12, 80 * 10**9, 2.039e12, link=300e9, outside=25e9)
DEVICES = (V5E, V5P, V6E, H100, H200, A100)


def parse_topology(text: str) -> tuple[Device, tuple[int, ...], int]:
    """Return (device, shape, number of devices) of a topology.

    Examples are "v5e:16x16", "v5p:4x4x4" and, as nodes x devices per node, "h200:8x8". Raises
    UserError for an unknown device, and if the positive numbers are not as many as its axes.
    """
    name, _, sizes = text.partition(":")
    device = next((d for d in DEVICES if d.name == name), None)
    if device is None:
        known = ", ".join(d.name for d in DEVICES)
        raise UserError(f"topology {text!r}: device {name!r} is unknown; use one of {known}")
    shape = tuple(int(s) if s.isascii() and s.isdigit() else 0 for s in sizes.split("x"))
    if len(shape) != device.axes or 0 in shape:
        example = "x".join("4" * device.axes)
        raise UserError(
            f"topology {text!r}: {name} takes {device.axes} positive numbers, as in "
            f"{name}:{example}"
        )
    return device, shape, math.prod(shape)
