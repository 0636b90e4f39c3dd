"""The time of a program by operation of its device, from JAX's profiler."""

import collections
import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Operation:
    """A kernel or operation in one run of the program, as means over several runs."""

    name: str
    seconds: float
    count: float


@dataclasses.dataclass(frozen=True)
class Profile:
    """The operations of one run of a program, and the waits between them."""

    busy: float  # seconds of one run in which the device ran at least one operation
    wall: float  # seconds of one run from the start of the first operation to the end of the last
    waits: tuple[float, ...]  # seconds of each wait in all runs, longest first
    operations: tuple[Operation, ...]  # longest first


def profile(run: Callable[[], None], runs: int = 3) -> Profile:
    """Profile several runs of a program.

    run: one run of a compiled program, complete when it returns. It must have run before.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(runs):
                run()
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        return summary(list(_events(jax.profiler.ProfileData.from_file(str(path)))), runs)


Event = tuple[str, float, float]  # name, start and end in seconds


def _events(data: Any) -> Iterable[Event]:
    """Yield the events of all streams of an accelerator, or the operations of a CPU."""
    devices = [plane for plane in data.planes if plane.name.startswith("/device:")]
    for plane in devices or [plane for plane in data.planes if plane.name == "/host:CPU"]:
        for line in plane.lines:
            for event in line.events:
                # All events of an accelerator count, kernels by their own names, which identify
                # those of libraries.
                if devices or "hlo_op" in dict(event.stats):
                    begin = 1e-9 * event.start_ns
                    yield event.name, begin, begin + 1e-9 * event.duration_ns


def summary(events: Sequence[Event], runs: int) -> Profile:
    """Summarize the events of `runs` runs, in any order.

    Raises:
      ValueError: if there are none.
    """
    if not events:
        raise ValueError("the profiler saw no operation of this device")
    seconds: dict[str, float] = collections.defaultdict(float)
    counts = collections.Counter()
    for name, begin, end in events:
        seconds[name] += end - begin
        counts[name] += 1
    first = reached = min(begin for _, begin, _ in events)
    busy, waits = 0.0, []
    for _, begin, end in sorted(events, key=lambda event: event[1]):
        if begin > reached:
            waits.append(begin - reached)
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    ordered = sorted(seconds.items(), key=lambda item: item[1], reverse=True)
    return Profile(
        busy=busy / runs,
        wall=(reached - first) / runs,
        waits=tuple(sorted(waits, reverse=True)),
        operations=tuple(Operation(n, total / runs, counts[n] / runs) for n, total in ordered),
    )


def table(found: Profile, most: int) -> str:
    """Return the `most` longest operations as markdown, after a line of totals."""
    shown = found.operations[:most]
    longest = ", ".join(f"{1e3 * wait:.3g}" for wait in found.waits[:8])
    lines = [
        f"device busy {1e3 * found.busy:.3g} ms of {1e3 * found.wall:.3g} ms a run, "
        f"{len(found.operations)} kinds of operations; {len(found.waits)} waits in all, the "
        f"longest {longest} ms",
        "",
    ]
    lines += ["| operation | ms | share | runs |", "|---|---|---|---|"]
    lines += [
        f"| {o.name[:90]} | {1e3 * o.seconds:.3g} | {o.seconds / found.busy:.1%} | {o.count:g} |"
        for o in shown
    ]
    return "\n".join(lines)
