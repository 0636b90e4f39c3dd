"""The text of a compiled program, read into computations and instructions.

The text is that of `jax.jit(f).lower(...).compile().as_text()`.
"""

import dataclasses
import math
import re
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line, `name = type opcode(rest`. root: whether it is its computation's result."""

    name: str
    type: str
    opcode: str
    rest: str
    root: bool = False

    @property
    def operands(self) -> list[str]:
        """The names of its operands."""
        return re.findall(r"%([\w.-]+)", self.rest.split("), ")[0])


def parse(text: str) -> tuple[dict[str, list[Instruction]], str | None]:
    """Return ({name: instructions} of the computations, the name of the entry or None)."""
    computations: dict[str, list[Instruction]] = {}
    entry, body = None, None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$", line)
        if header:
            body = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif body is not None and (found := _instruction(line)):
            body.append(found)
    return computations, entry


def _instruction(line):
    found = re.match(r"\s+(ROOT )?%?([\w.-]+) = ", line)
    if not found:
        return None
    rest = line[found.end() :]
    end = _type_end(rest)
    opcode = re.match(r" ([\w-]+)\(", rest[end:])
    return opcode and Instruction(
        name=found[2],
        type=rest[:end],
        opcode=opcode[1],
        rest=rest[end + opcode.end() :],
        root=bool(found[1]),
    )


def _type_end(text):
    """Return where a type ends: at the first space outside parentheses and braces."""
    depth = 0
    for position, letter in enumerate(text):
        depth += (letter in "({") - (letter in ")}")
        if letter == " " and depth == 0:
            return position
    return len(text)


def elements(type_: str) -> list[str]:
    """Return the types of a tuple's elements, nested tuples whole."""
    parts, depth, start = [], 0, 1
    for position, letter in enumerate(type_):
        depth += (letter in "({[") - (letter in ")}]")
        if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
            parts.append(type_[start:position])
            start = position + 1
    return parts


def size(type_: str) -> int:
    """Return the bytes of an array type or of all arrays of a tuple; layouts add nothing."""
    bits = 0
    for dtype, shape in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", type_):
        bits += _bits(dtype) * math.prod(int(n.lstrip("<=")) for n in shape.split(",") if n)
    return bits // 8


def _bits(dtype):
    """Return the bits of an element: bf16 -> 16, f8e4m3fn -> 8, pred -> 8, tokens -> 0."""
    number = re.match(r"(?:bf|[fscu])(\d+)", dtype)
    return int(number[1]) if number else 8 * (dtype == "pred")


def called(rest: str) -> list[str]:
    """Return the computations that an instruction names.

    Fusions, calls, loops, branches and asynchronous wrappers name some.
    """
    names = []
    words = (
        "calls|to_apply|body|condition|true_computation|false_computation|branch_computations|"
        "called_computations"
    )
    for value in re.findall(rf"\b(?:{words})=(\{{[^}}]*\}}|%?[\w.-]+)", rest):
        names += re.findall(r"[\w.-]+", value)
    return names


def trips(loop: Instruction, computations: Mapping[str, list[Instruction]]) -> int | None:
    """Return how often a loop runs, None if it cannot be read.

    The compiler may note the number. Otherwise it is read from a condition `counter < constant`,
    for a counter that rises from 0 by 1, as in the loops that JAX writes.
    """
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(noted[1])
    condition = re.search(r"\bcondition=%?([\w.-]+)", loop.rest)
    pending, names, instructions = [condition[1]] if condition else [], set(), []
    while pending:
        name = pending.pop()
        if name in computations and name not in names:
            names.add(name)
            instructions += computations[name]
            pending += [c for i in computations[name] for c in called(i.rest)]
    compares = [i for i in instructions if i.opcode == "compare"]
    constants = [
        i for i in instructions if i.opcode == "constant" and re.match(r"[su]\d+\[\]", i.type)
    ]
    if len(compares) != 1 or len(constants) != 1 or "direction=LT" not in compares[0].rest:
        return None
    bound = re.match(r"-?\d+", constants[0].rest)
    return max(0, int(bound[0])) if bound else None
