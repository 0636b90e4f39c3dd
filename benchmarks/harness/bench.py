"""From a case to its rows: build our program and its peers, alternate them, survive failures."""

import dataclasses
import functools
import importlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.harness import floors, machine, operations, rows, timing


class NoPeer(Exception):
    """A reason, as a sentence, why there is no peer to compare with."""


Peers = tuple[tuple[str, Callable[[], timing.Program]], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """One of our programs, ready to run."""

    program: timing.Program  # compiled
    compile_s: float | None  # seconds of tracing and compiling
    dtype: str  # of its arithmetic
    work: floors.Work | None  # for its floor
    peers: Peers = ()  # (label, build); build() returns the peer's program or raises NoPeer
    shortest: float = 0.0  # see `timing.alternate`
    note: str | None = None  # a sentence for the table


@dataclasses.dataclass(frozen=True)
class Case:
    """A name and the function that builds its subject."""

    name: str
    build: Callable[["Bench"], Subject]


class Bench:
    """What the cases of one run share: repeats, the device's rates, and large objects built once.

    operations: number of a program's longest operations that are printed by `say`; 0 for none.
    with_peers: False times only ours.
    """

    def __init__(
        self,
        repeats: int,
        operations: int = 0,
        with_peers: bool = True,
        say: Callable[[str], None] = print,
    ) -> None:
        self.operations, self.with_peers, self.say = operations, with_peers, say
        self.repeats, self.on_cpu = repeats, jax.default_backend() == "cpu"
        self.where = machine.where()
        self._kept: dict[str, tuple[Any, Any]] = {}

    @functools.cache  # noqa: B019 (there is one Bench per process)
    def rates(self, dtype: str) -> floors.Rates:
        """Return the device's rates in a dtype."""
        return machine.rates(dtype)

    def kept(self, kind: str, key: Any, make: Callable[[], Any]) -> Any:
        """Return make(), or the last result of this kind if it has the same key.

        An older result is released first. On a CPU nothing is kept: no two cases share weights
        there, and memory is scarcer.
        """
        if self.on_cpu:
            return make()
        if self._kept.get(kind, (None, None))[0] != key:
            self._kept.pop(kind, None)
            machine.collect()
            self._kept[kind] = key, make()
        return self._kept[kind][1]

    def peers(self, module: str) -> Any:
        """Import a module of the repository's benchmarks/ folder.

        Raises:
          NoPeer: if it or one of its dependencies is missing.
        """
        try:
            return importlib.import_module(f"benchmarks.{module}")
        except ImportError as error:
            if error.name and error.name.split(".")[0] == "benchmarks":
                raise NoPeer(
                    "no peer: the repository's benchmarks/ folder is missing, run this from the "
                    "root of a checkout"
                ) from None
            raise NoPeer(f"no peer: {error}; install requirements-dev.txt") from None


def compiled(function: Callable, *arguments: Any, **options: Any) -> tuple[Any, float]:
    """Compile a function for these arguments. Returns the program and the seconds it took."""
    begin = time.perf_counter()
    program = jax.jit(function, **options).lower(*arguments).compile()
    return program, time.perf_counter() - begin


def program(function: Callable, *arguments: Any) -> timing.Program:
    """Return a compiled function with its arguments on the device as a program to time."""
    start = lambda: function(*arguments)
    result = lambda: np.asarray(jax.tree.leaves(start())[0].astype("float32"))
    return timing.Program({"": timing.Call(start, jax.block_until_ready)}, result)


def relative(value: Any, expected: Any) -> float:
    """Return the Euclidean norm of the difference over that of `expected`."""
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    if value.shape != expected.shape:
        raise ValueError(f"results of shapes {value.shape} and {expected.shape}")
    return float(np.linalg.norm(value - expected) / np.linalg.norm(expected))


def sentence(error: BaseException) -> str:
    """Return an exception as one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _joined(*notes):
    return "; ".join(note for note in notes if note) or None


def _launching(program, repeats):
    """Return how much of each call's time the host needs to start it, as one line."""
    milliseconds = lambda seconds: f"{1e3 * seconds:.3g} ms"
    lines = []
    try:
        for name, call in program.calls.items():
            found = timing.launching(call, repeats)
            lines.append(
                f"{name or 'one run'}: started after {milliseconds(found.started)} of "
                f"{milliseconds(found.alone)}, {repeats} in a row {milliseconds(found.in_a_row)} "
                "each"
            )
    except Exception as error:  # of the program; the times are measured already
        lines.append(sentence(error))
    return "; ".join(lines)


def _operations(program, most):
    def run():
        for call in program.calls.values():
            call.wait(call.start())

    try:
        return operations.table(operations.profile(run), most)
    except Exception as error:  # of the profiler; the times are measured already
        return sentence(error)


def _prepared(row, build, result):
    """Build a peer, run it once, and return its row and its program (None if it failed).

    Failures happen here, not while the others are timed. Afterwards nothing holds a failed peer's
    memory. result: ours, to compare with, or None.
    """
    try:
        peer = build()
        row = dataclasses.replace(row, note=_joined(row.note, peer.note))
        if result is not None and peer.result:
            row = dataclasses.replace(row, difference=relative(result, peer.result()))
        for call in peer.calls.values() if len(peer.calls) > 1 else ():
            call.wait(call.start())
    except NoPeer as reason:
        return dataclasses.replace(row, peer=None, note=_joined(row.note, str(reason))), None
    except Exception as error:  # whatever a library raises; the other programs still run
        return dataclasses.replace(row, error=sentence(error)), None
    return row, peer


def _alternate(programs, repeats, shortest, warm):
    """Return (times, None), or (None, reason) if one of several programs fails after all."""
    try:
        return timing.alternate(programs, repeats, shortest, warm=warm), None
    except Exception as error:
        if len(programs) == 1:
            raise
        return None, sentence(error)


def measure(case: Case, bench: Bench) -> list[rows.Row]:
    """Return the rows of a case, one for each peer or a single one.

    Errors of the case or of a peer become rows.
    """
    row = rows.empty(case.name, bench.where)
    try:
        subject = case.build(bench)
        work = {}
        if subject.work is not None:
            work = dict(
                flop=subject.work.flop,
                floor_s=floors.seconds(subject.work, bench.rates(subject.dtype)),
            )
        row = dataclasses.replace(
            row, dtype=subject.dtype, compile_s=subject.compile_s, note=subject.note, **work
        )
        peers = subject.peers if bench.with_peers else ()
        # Ours runs first, before a peer takes memory.
        result = subject.program.result() if peers and subject.program.result else None
        built = {"ours": subject.program}
        waiting = []  # (row, label of a program that runs, or None)
        for label, build in peers:
            one, peer = _prepared(dataclasses.replace(row, peer=label), build, result)
            waiting.append((one, label if peer else None))
            if peer:
                built[label] = peer
            else:
                machine.collect()
        ran = result is not None and subject.shortest == 0 and len(subject.program.calls) == 1
        times, error = _alternate(built, bench.repeats, subject.shortest, warm=not ran)
        if times is None:
            # One may have had too little memory beside the others; ours alone is worth a row.
            waiting = [
                (one if label is None else dataclasses.replace(one, error=error), None)
                for one, label in waiting
            ]
            built = peer = None
            machine.collect()
            times = timing.alternate({"ours": subject.program}, bench.repeats, subject.shortest)
        if bench.operations:
            if not bench.on_cpu:
                bench.say(f"{case.name}: {_launching(subject.program, bench.repeats)}")
            bench.say(f"{case.name}: {_operations(subject.program, bench.operations)}")
    except Exception as error:
        return [dataclasses.replace(row, error=sentence(error))]
    finally:
        machine.collect()
    finished = [
        rows.filled(one, times["ours"], times.get(label or ""))
        for one, label in waiting or [(row, None)]
    ]
    # Two peers that are missing for the same reason make one row.
    return [one for i, one in enumerate(finished) if one not in finished[:i]]
