"""The launches of a program compiled for a GPU, and the bytes that each kernel reads and writes.

They are read from the text of its HLO, so no GPU is needed. The text has no times. Bytes over the
memory's bandwidth are a lower bound if caches do not hold the inputs. A launch itself costs a few
microseconds, which dominate small kernels.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable

from sprint_jax.planning import hlo

# Opcodes that launch nothing.
_NOTHING = (
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
)
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel."""

    # "convolution" or "product" by a library, "product by Triton" by the compiler, "kernel" by
    # Pallas, "pass" for everything else.
    kind: str
    bytes: int  # read and written
    times: int  # how often it runs, the product of the trips of enclosing loops
    shape: str  # of its result
    source: str  # the operation of the model, as the compiler names it; may be empty


def parse(hlo_text: str) -> list[Launch]:
    """Return every launch of compiled.as_text(), in the order of the program."""
    computations, entry = hlo.parse(hlo_text)
    found = []
    if entry is not None:
        _walk(entry, computations, 1, found)
    return found


def totals(launches: Iterable[Launch]) -> dict[str, tuple[int, int]]:
    """Return {kind: (launches, bytes)} over all runs, most bytes first."""
    counts, sizes = collections.Counter(), collections.Counter()
    for launch in launches:
        counts[launch.kind] += launch.times
        sizes[launch.kind] += launch.bytes * launch.times
    return {kind: (counts[kind], size) for kind, size in sizes.most_common()}


def _walk(name, computations, times, found):
    types = {i.name: i.type for i in computations[name]}
    for i in computations[name]:
        if i.opcode in _NOTHING or i.opcode.endswith(("-done", "-update")):
            continue
        if i.opcode == "while":
            body = re.search(r"\bbody=%?([\w.-]+)", i.rest)
            assert body is not None
            _walk(body[1], computations, times * (hlo.trips(i, computations) or 1), found)
        elif i.opcode in ("call", "conditional"):
            for called in hlo.called(i.rest):
                _walk(called, computations, times, found)
        else:
            source = re.search(r'op_name="([^"]*)"', i.rest)
            shape = re.search(r"\w+\[[\d,]*\]", i.type)
            found.append(
                Launch(
                    kind=_kind(i),
                    bytes=_bytes(i, types, computations),
                    times=times,
                    shape=shape[0] if shape else "",
                    source=source[1] if source else "",
                )
            )


def _kind(i):
    target = re.search(r'custom_call_target="([^"]+)"', i.rest)
    target = target[1] if target else ""
    if "cudnn$conv" in target:
        return "convolution"
    if "cublas" in target:
        return "product"
    if "triton" in target:
        return "kernel"
    return (
        "product by Triton"
        if i.opcode.startswith("fusion") and re.search(r"__triton\w*_gemm", i.rest)
        else "pass"
    )


def _bytes(i, types, computations):
    """Return the bytes read and written.

    An array that a fusion only slices counts as the slice, and one that it updates in place counts
    as the update.
    """
    inside = (
        [computations[c] for c in hlo.called(i.rest)]
        if i.opcode.startswith(("fusion", "async"))
        else []
    )
    if not inside:
        return hlo.size(i.type) + sum(hlo.size(types.get(name, "")) for name in i.operands)
    (body,) = inside
    return _read(body) + _written(body)


def _read(body):
    known = {i.name: i.type for i in body}
    behind, whole, parts = {}, set(), collections.Counter()
    for i in body:
        if i.opcode == "parameter":
            behind[i.name] = i.name
            continue
        sources = [behind.get(name) for name in i.operands]
        if i.opcode == "bitcast" and sources and sources[0]:
            behind[i.name] = sources[0]
            continue
        for position, source in enumerate(sources):
            if source is None:
                continue
            if position == 0 and i.opcode in _SLICES:
                parts[source] += hlo.size(i.type)
            elif position or i.opcode != "dynamic-update-slice":
                whole.add(source)
    sizes = {name: hlo.size(known[name]) for name in behind.values()}
    return sum(size if name in whole else min(size, parts[name]) for name, size in sizes.items())


def _written(body):
    types = {i.name: i.type for i in body}
    root = next((i for i in body if i.root), body[-1])
    updates = [i for i in body if i.opcode == "dynamic-update-slice"]
    new = sum(hlo.size(types[i.operands[1]]) for i in updates)
    return max(0, hlo.size(root.type) - sum(hlo.size(i.type) for i in updates)) + new
