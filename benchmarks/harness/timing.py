"""Times of programs that take turns in one process: a noisy machine then slows all of them alike."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Call:
    """Something to time. start: begins the work and returns its result. wait: returns when a result is there."""

    start: Callable[[], Any]
    wait: Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Program:
    """Calls that run one after the other, by name (one, or the two steps of a training pair).

    result: what it computes, as a NumPy array, to compare with another program's; None where there is nothing.
    note: how it does it, where it had a choice.
    """

    calls: Mapping[str, Call]
    result: Callable[[], Any] | None = None
    note: str | None = None


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of every repeat, by the names of a program's calls."""

    of: Mapping[str, list[float]]

    @property
    def total(self) -> list[float]:
        """Seconds of every repeat of the whole program."""
        return [sum(each) for each in zip(*self.of.values(), strict=True)]


def middle(seconds) -> float:
    return statistics.median(seconds)


def spread(seconds) -> list[float]:
    """[least, most]."""
    return [min(seconds), max(seconds)]


def burst(seconds, shortest) -> int:
    """How many runs back to back last at least `shortest`, when one lasts `seconds`; at most 200."""
    return max(1, min(200, math.ceil(shortest / max(seconds, 1e-9))))


def alternate(
    programs: Mapping[str, Program], repeats, shortest=0.0, warm=True, clock=time.perf_counter
):
    """{name: Times} of programs that take turns, `repeats` times each.

    warm: run each once before; not needed where a result was computed already.

    shortest: a call is repeated back to back until it lasts about this many seconds, and their mean counts: what
      accelerators do in microseconds cannot be timed alone. 0 times single runs, which is what latency is.
    """
    counts = {}
    for name, program in programs.items():
        for label, call in program.calls.items():
            if warm:
                _run(call, 1, clock)
            counts[name, label] = burst(_run(call, 1, clock), shortest) if shortest else 1
    times = {name: {label: [] for label in program.calls} for name, program in programs.items()}
    for _ in range(repeats):
        for name, program in programs.items():
            for label, call in program.calls.items():
                times[name][label].append(_run(call, counts[name, label], clock))
    return {name: Times(of) for name, of in times.items()}


@dataclasses.dataclass(frozen=True)
class Launching:
    """Seconds of one call: `started` until its work is handed to the device, `alone` until it is done, and `in_a_row` of each of
    several that do not wait for each other, as in a busy service. Medians, but for the last, a mean."""

    started: float
    alone: float
    in_a_row: float


def launching(call: Call, repeats, clock=time.perf_counter) -> Launching:
    """Of a call that has run before."""
    started, alone = [], []
    for _ in range(repeats):
        begin = clock()
        result = call.start()
        started.append(clock() - begin)
        call.wait(result)
        alone.append(clock() - begin)
    return Launching(middle(started), middle(alone), _run(call, repeats, clock))


def _run(call, count, clock):
    begin = clock()
    for _ in range(count):
        result = call.start()
    call.wait(result)
    return (clock() - begin) / count
