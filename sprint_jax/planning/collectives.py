"""The traffic between devices of a compiled program, read from the text of its HLO.

`jax.jit(f).lower(...).compile().as_text()` is the program of one device, and bytes here are those
of one device. XLA's own `cost_analysis` has no collectives and counts a loop's body once.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

from sprint_jax.planning import hlo

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective operation of one device's program."""

    # One of KINDS.
    kind: str
    # Bytes of its result (an all-gather's whole array); of its operand for a reduce-scatter.
    bytes: int
    # How often it runs: the product of the trips of the loops around it.
    times: int
    # Devices that take part together; 2 for a collective-permute, a sender and a receiver.
    group_size: int
    # False if the trips of a loop could not be read and count as one, or if only one branch of a
    # conditional holds the operation.
    known: bool = True


def parse(hlo_text: str) -> list[Collective]:
    """Return every collective of compiled.as_text(), in the order of the program.

    A pair of start and done is one.
    """
    computations, entry = hlo.parse(hlo_text)
    found: list[Collective] = []
    if entry is not None:
        walk = _Walk(computations=computations, devices=_device_count(hlo_text), found=found)
        walk.computation(entry, times=1, known=True)
    return found


def totals(collectives: Iterable[Collective]) -> dict[str, int]:
    """Return {kind: bytes over all runs} of the kinds that occur."""
    sums: collections.Counter[str] = collections.Counter()
    for collective in collectives:
        sums[collective.kind] += collective.bytes * collective.times
    return dict(sums)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Walk:
    """What does not change while a program is walked. found: grows by each collective."""

    computations: Mapping[str, list[hlo.Instruction]]
    devices: int
    found: list[Collective]

    def computation(
        self, name: str, times: int, known: bool, fused: set[tuple[str, str]] | None = None
    ) -> None:
        """Append the collectives of a computation, and of those it calls, that run `times` times.

        fused: inside a fusion, the (kind, channel) pairs of its caller's fusions counted so far.
        TPUs hide a collective behind other work as a chain of fusions, and each of them holds the
        same operation on the same channel.
        """
        channels = set() if fused is None else fused
        for i in self.computations[name]:
            if i.opcode.endswith(("-done", "-update")):  # the rest of a -start
                continue
            kind = i.opcode.removesuffix("-start")
            if kind in KINDS:
                channel = re.search(r"channel_id=\d+", i.rest)
                if fused is not None and channel:
                    if (kind, channel[0]) in fused:
                        continue
                    fused.add((kind, channel[0]))
                self.found.append(self._collective(name, i, kind, times, known))
                continue
            runs, certain = times, known and i.opcode != "conditional"
            if i.opcode == "while":
                trips = hlo.trips(i, self.computations)
                runs, certain = times * (1 if trips is None else trips), known and trips is not None
            for called in hlo.called(i.rest):
                if called in self.computations:
                    inside = channels if i.opcode == "fusion" else None
                    self.computation(called, runs, certain, inside)

    def _collective(self, computation, instruction, kind, times, known):
        group = _group_size(kind, instruction.rest, self.devices)
        size = _bytes(instruction, kind, group)
        if computation.startswith("all-reduce-scatter"):
            # TPU: a fusion of the sum and the slice that is kept; the sum has the operand's size.
            kind, size = "reduce-scatter", hlo.size(instruction.type)
        return Collective(kind=kind, bytes=size, times=times, group_size=group, known=known)


def _bytes(instruction, kind, group):
    type_ = instruction.type
    # An asynchronous start holds (operands, results, more). Except on GPUs, that of an all-reduce
    # is its result alone.
    if instruction.opcode.endswith("-start") and (kind != "all-reduce" or type_.startswith("((")):
        type_ = hlo.elements(type_)[1]
    return hlo.size(type_) * (group if kind == "reduce-scatter" else 1)


def _group_size(kind, rest, devices):
    """Return the number of devices of one group, from any of the forms that XLA writes.

    The forms are replica_groups={{0,1},{2,3}}, {} for all devices, [groups,size]<=[...], and axes
    of a mesh, mesh['data'=2,'fsdp'=4] {'fsdp'}. An axis may be part of one: 'fsdp':(stride)size.
    """
    if kind == "collective-permute":
        return 2
    if found := re.search(r"replica_groups=\[(?:\d+,)*(\d+)\]<=", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    return devices


def _device_count(text):
    """Return the number of devices of the program, from the module's first line."""
    counts = (
        re.search(rf"\b{word}=(\d+)", text.partition("\n")[0])
        for word in ("replica_count", "num_partitions")
    )
    return math.prod(int(c[1]) for c in counts if c)
