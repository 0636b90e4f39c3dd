"""Times of programs that alternate in one process, so that noise affects all of them alike."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Clock = Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Call:
    """Something to time."""

    start: Callable[[], Any]  # begins the work and returns its result
    wait: Callable[[Any], Any]  # returns when the result is complete


@dataclasses.dataclass(frozen=True)
class Program:
    """Calls that run one after the other, by name (one, or the two steps of a training pair)."""

    calls: Mapping[str, Call]
    # Computes a NumPy array to compare with another program's; None if there is nothing to compare.
    result: Callable[[], Any] | None = None
    note: str | None = None  # which of several implementations it uses


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of every repeat, by the name of the call."""

    of: Mapping[str, list[float]]

    @property
    def total(self) -> list[float]:
        """The seconds of every repeat of the whole program."""
        return [sum(each) for each in zip(*self.of.values(), strict=True)]


def middle(seconds: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(seconds)


def spread(seconds: Sequence[float]) -> list[float]:
    """Return [least, most]."""
    return [min(seconds), max(seconds)]


def burst(seconds: float, shortest: float) -> int:
    """Return how many runs of `seconds` last at least `shortest`, at most 200."""
    return max(1, min(200, math.ceil(shortest / max(seconds, 1e-9))))


def alternate(
    programs: Mapping[str, Program],
    repeats: int,
    shortest: float = 0.0,
    warm: bool = True,
    clock: Clock = time.perf_counter,
) -> dict[str, Times]:
    """Time programs that alternate, `repeats` times each.

    Args:
      programs: programs by name.
      repeats: runs of each program.
      shortest: repeat a call back to back until it lasts about this many seconds, and use the mean,
        since a call of microseconds cannot be timed alone. 0 times single runs, which is latency.
      warm: run each program once before. Not needed if a result was computed already.
      clock: returns seconds.
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
    """Seconds of one call."""

    started: float  # until its work is handed to the device, a median
    alone: float  # until it is done, a median
    in_a_row: float  # of each of several calls that do not wait for each other, a mean


def launching(call: Call, repeats: int, clock: Clock = time.perf_counter) -> Launching:
    """Time a call that has run before."""
    started, alone = [], []
    for _ in range(repeats):
        begin = clock()
        result = call.start()
        started.append(clock() - begin)
        call.wait(result)
        alone.append(clock() - begin)
    return Launching(middle(started), middle(alone), _run(call, repeats, clock))


def _run(call: Call, count: int, clock: Clock) -> float:
    """Return the mean seconds of `count` calls back to back."""
    begin, result = clock(), None
    for _ in range(count):
        result = call.start()
    call.wait(result)
    return (clock() - begin) / count
