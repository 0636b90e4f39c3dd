"""What accelerators can do at best, for estimates made without one."""

import dataclasses
import math

from sprint_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator at its data sheet's figures.

    name: as `parse_topology` reads it. axes: numbers in its topology (2: "16x16", or nodes x devices per node).
    peak_bf16: dense bfloat16 FLOP/s. memory: bytes. bandwidth: bytes/s of that memory.
    link: bytes/s one device can send to the others of its pod or node, all of its links together.
    outside: bytes/s per device between nodes; = link for TPUs, whose pod is one network.
    """

    name: str
    axes: int
    peak_bf16: float
    memory: int
    bandwidth: float
    link: float
    outside: float


# Vendors' data-sheet figures, none of them measured: expect matrix products to reach well under the peak.
# Sheets give links both ways added; here is one way, half of it. TPU: Google Cloud's "System architecture" pages.
V5E = Device("v5e", 2, 197e12, 16 * 2**30, 819e9, link=200e9, outside=200e9)
V5P = Device("v5p", 3, 459e12, 95 * 2**30, 2765e9, link=600e9, outside=600e9)
V6E = Device("v6e", 2, 918e12, 32 * 2**30, 1600e9, link=400e9, outside=400e9)
# NVIDIA: SXM modules without sparsity, memory in units of 10^9, and a DGX's one network card per GPU
# (400 Gbit/s beside H100 and H200, 200 Gbit/s beside A100).
H100 = Device("h100", 2, 989.5e12, 80 * 10**9, 3.35e12, link=450e9, outside=50e9)
H200 = Device("h200", 2, 989.5e12, 141 * 10**9, 4.8e12, link=450e9, outside=50e9)
A100 = Device("a100", 2, 312e12, 80 * 10**9, 2.039e12, link=300e9, outside=25e9)
DEVICES = (V5E, V5P, V6E, H100, H200, A100)


def parse_topology(text) -> tuple[Device, tuple[int, ...], int]:
    """(device, shape, number of devices) of "v5e:16x16", "v5p:4x4x4" or, nodes x devices per node, "h200:8x8".

    Raises:
      UserError: unknown device, or not as many positive numbers as the device's topology has axes.
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
            f"topology {text!r}: {name} takes {device.axes} positive numbers, as in {name}:{example}"
        )
    return device, shape, math.prod(shape)
