"""From a case to its rows: build our program and its peers, let them take turns, and go on when one fails."""

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
    """Why there is nothing to compare with, as a sentence."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A program of ours, ready to run.

    program: compiled. compile_s: what that took. dtype: of its arithmetic. work: its floor's, or None.
    peers: (label, build); build() gives the peer's `timing.Program`, and raises NoPeer where there is none.
    shortest: see `timing.alternate`. note: a sentence for the table.
    """

    program: timing.Program
    compile_s: float | None
    dtype: str
    work: floors.Work | None
    peers: tuple[tuple[str, Callable[[], timing.Program]], ...] = ()
    shortest: float = 0.0
    note: str | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """A name and how its subject is built."""

    name: str
    build: Callable[["Bench"], Subject]


class Bench:
    """What the cases of one run share: how often to repeat, the device's rates, and large things made once.

    operations: how many of a program's longest operations are told to `say`; 0 for none. with_peers: False times ours alone.
    """

    def __init__(
        self,
        repeats: int,
        operations: int = 0,
        with_peers: bool = True,
        say: Callable[[str], None] = print,
    ):
        self.operations, self.with_peers, self.say = operations, with_peers, say
        self.repeats, self.on_cpu = repeats, jax.default_backend() == "cpu"
        self.where = machine.where()
        self._kept = {}

    @functools.cache  # noqa: B019 one Bench a process
    def rates(self, dtype):
        return machine.rates(dtype)

    def kept(self, kind: str, key, make: Callable[[], Any]):
        """make() for this key. On an accelerator the last one of each kind is kept and an older one let go first.

        On a CPU nothing is: no two cases share weights there, and memory is scarcer.
        """
        if self.on_cpu:
            return make()
        if self._kept.get(kind, (None, None))[0] != key:
            self._kept.pop(kind, None)
            machine.collect()
            self._kept[kind] = key, make()
        return self._kept[kind][1]

    def peers(self, module: str):
        """A module of the repository's benchmarks/ folder. Raises NoPeer where it or what it needs is missing."""
        try:
            return importlib.import_module(f"benchmarks.{module}")
        except ImportError as error:
            if error.name and error.name.split(".")[0] == "benchmarks":
                raise NoPeer(
                    "no peer: the repository's benchmarks/ folder is not here, run it from a checkout's root"
                ) from None
            raise NoPeer(f"no peer: {error}; requirements-dev.txt has what it needs") from None


def compiled(function, *arguments, **options):
    """(program, seconds) of tracing and compiling a function for these arguments."""
    begin = time.perf_counter()
    program = jax.jit(function, **options).lower(*arguments).compile()
    return program, time.perf_counter() - begin


def program(function, *arguments) -> timing.Program:
    """A compiled function and its arguments, on the device, as something to time."""
    start = lambda: function(*arguments)
    result = lambda: np.asarray(jax.tree.leaves(start())[0].astype("float32"))
    return timing.Program({"": timing.Call(start, jax.block_until_ready)}, result)


def relative(value, expected) -> float:
    """Euclidean norm of the difference, by that of `expected`."""
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    if value.shape != expected.shape:
        raise ValueError(f"results of shapes {value.shape} and {expected.shape}")
    return float(np.linalg.norm(value - expected) / np.linalg.norm(expected))


def sentence(error: BaseException) -> str:
    """One line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _joined(*notes):
    return "; ".join(note for note in notes if note) or None


def _launching(program, repeats):
    """A line on each call: how much of its time the host needs to start it."""
    milliseconds = lambda seconds: f"{1e3 * seconds:.3g} ms"
    lines = []
    try:
        for name, call in program.calls.items():
            found = timing.launching(call, repeats)
            lines.append(
                f"{name or 'one run'}: started after {milliseconds(found.started)} of {milliseconds(found.alone)}, "
                f"{repeats} in a row {milliseconds(found.in_a_row)} each"
            )
    except Exception as error:  # the program's: the times are there already
        lines.append(sentence(error))
    return "; ".join(lines)


def _operations(program, most):
    def run():
        for call in program.calls.values():
            call.wait(call.start())

    try:
        return operations.table(operations.profile(run), most)
    except Exception as error:  # the profiler's: the times are there already
        return sentence(error)


def _prepared(row, build, result):
    """(its row, the peer's program or None) of a peer that has run. result: ours, to compare with, or None.

    What fails, fails here, not while the others are timed; when this has returned, nothing holds a failed peer's memory.
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
    except Exception as error:  # whatever a library raises: the rest goes on
        return dataclasses.replace(row, error=sentence(error)), None
    return row, peer


def _in_turns(programs, repeats, shortest, warm):
    """(times, None), or (None, why not) where one of several programs fails after all."""
    try:
        return timing.alternate(programs, repeats, shortest, warm=warm), None
    except Exception as error:
        if len(programs) == 1:
            raise
        return None, sentence(error)


def measure(case: Case, bench: Bench) -> list[rows.Row]:
    """The rows of a case: one for each peer, or one alone. Never raises what the case or a peer raises."""
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
        built, waiting = (
            {"ours": subject.program},
            [],
        )  # waiting: (row, label of a program that runs, or None)
        for label, build in peers:
            one, peer = _prepared(dataclasses.replace(row, peer=label), build, result)
            waiting.append((one, label if peer else None))
            if peer:
                built[label] = peer
            else:
                machine.collect()
        ran = result is not None and subject.shortest == 0 and len(subject.program.calls) == 1
        times, error = _in_turns(built, bench.repeats, subject.shortest, warm=not ran)
        if (
            times is None
        ):  # perhaps one had too little memory beside the others: ours alone is worth a row
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
        rows.filled(one, times["ours"], times.get(label)) for one, label in waiting or [(row, None)]
    ]
    # Two peers missing for one reason are one row.
    return [one for i, one in enumerate(finished) if one not in finished[:i]]
