"""What a compiled program sends between devices, read from the text of its HLO.

`jax.jit(f).lower(...).compile().as_text()` is the program of one device; so are the bytes here. XLA's own
`cost_analysis` has no collectives and takes a loop's body once.
"""

import collections
import dataclasses
import math
import re

from sprint_jax.planning import hlo

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of one device's program.

    kind: one of KINDS. bytes: of its result (an all-gather's whole array), of a reduce-scatter its operand.
    times: how often it runs, the product of the enclosing loops' trips; known: False where a loop's trips
    could not be read and it was counted once, or where only one branch of a conditional holds it.
    group_size: devices taking part together; 2 for a collective-permute, a sender and a receiver.
    """

    kind: str
    bytes: int
    times: int
    group_size: int
    known: bool = True


def parse(hlo_text) -> list[Collective]:
    """Every collective of compiled.as_text(), in the order of the program; a start-done pair is one."""
    computations, entry = hlo.parse(hlo_text)
    found = []
    if entry is not None:
        _walk(entry, computations, 1, True, _device_count(hlo_text), found)
    return found


def totals(collectives_) -> dict[str, int]:
    """{kind: bytes over all runs}; kinds that do not occur are left out."""
    sums = collections.Counter()
    for c in collectives_:
        sums[c.kind] += c.bytes * c.times
    return dict(sums)


def _walk(name, computations, times, known, devices, found, fused=None):
    """Appends the collectives of a computation and of those it calls, all run `times` times.

    fused: inside a fusion, the channels of its caller's fusions counted so far. TPUs hide a collective behind
    other work as a chain of fusions, each of which holds the same operation on the same channel.
    """
    channels = set() if fused is None else fused
    for i in computations[name]:
        if i.opcode.endswith(("-done", "-update")):  # the rest of a -start
            continue
        kind = i.opcode.removesuffix("-start")
        if kind in KINDS:
            channel = re.search(r"channel_id=\d+", i.rest)
            if fused is not None and channel:
                if (kind, channel[0]) in fused:
                    continue
                fused.add((kind, channel[0]))
            group = _group_size(kind, i.rest, devices)
            if name.startswith("all-reduce-scatter"):
                # TPU: a fusion of the sum and the slice that is kept; the sum is as large as the operand.
                found.append(Collective("reduce-scatter", hlo.size(i.type), times, group, known))
            else:
                found.append(Collective(kind, _bytes(i, kind, group), times, group, known))
            continue
        runs, certain = times, known and i.opcode != "conditional"
        if i.opcode == "while":
            trips = hlo.trips(i, computations)
            runs, certain = times * (1 if trips is None else trips), known and trips is not None
        for called in hlo.called(i.rest):
            if called in computations:
                inside = channels if i.opcode == "fusion" else None
                _walk(called, computations, runs, certain, devices, found, inside)


def _bytes(instruction, kind, group):
    type_ = instruction.type
    # An asynchronous start holds (operands, results, more); only all-reduce's is its result alone, but for GPUs.
    if instruction.opcode.endswith("-start") and (kind != "all-reduce" or type_.startswith("((")):
        type_ = hlo.elements(type_)[1]
    return hlo.size(type_) * (group if kind == "reduce-scatter" else 1)


def _group_size(kind, rest, devices):
    """Devices of one group, from any of the forms XLA writes.

    replica_groups={{0,1},{2,3}}, all devices where that is {}; [groups,size]<=[...]; or the axes of a mesh,
    mesh['data'=2,'fsdp'=4] {'fsdp'}, where an axis may be a part of one, 'fsdp':(stride)size.
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
    """Devices of the program, from the module's first line."""
    counts = (
        re.search(rf"\b{word}=(\d+)", text.partition("\n")[0])
        for word in ("replica_count", "num_partitions")
    )
    return math.prod(int(c[1]) for c in counts if c)
