"""Where a program's time goes: what its device did, by name, from JAX's own profiler."""

import collections
import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Iterable

import jax


@dataclasses.dataclass(frozen=True)
class Operation:
    """name: of a kernel or an operation. seconds, count: in one run of the program, means of several."""

    name: str
    seconds: float
    count: float


@dataclasses.dataclass(frozen=True)
class Profile:
    """busy: seconds of one run in which the device ran at least one operation. wall: from the first operation's start to
    the last one's end, by run; what lies between the two is waiting. waits: how long it waited each time, in all of the runs,
    longest first. operations: longest first."""

    busy: float
    wall: float
    waits: tuple[float, ...]
    operations: tuple[Operation, ...]


def profile(run: Callable[[], None], runs=3) -> Profile:
    """run: one run of a compiled program, ended when it returns. It must have run before."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(runs):
                run()
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        return summary(list(_events(jax.profiler.ProfileData.from_file(str(path)))), runs)


def _events(data) -> Iterable[tuple[str, float, float]]:
    """(name, start, end) in seconds of what a device did: all of an accelerator's streams, or a CPU's operations."""
    devices = [plane for plane in data.planes if plane.name.startswith("/device:")]
    for plane in devices or [plane for plane in data.planes if plane.name == "/host:CPU"]:
        for line in plane.lines:
            for event in line.events:
                # Of a CPU only operations; of an accelerator all, kernels by their own names: those of libraries tell which.
                if devices or "hlo_op" in dict(event.stats):
                    begin = 1e-9 * event.start_ns
                    yield event.name, begin, begin + 1e-9 * event.duration_ns


def summary(events, runs) -> Profile:
    """events: (name, start, end) of `runs` runs, in any order."""
    if not events:
        raise ValueError("the profiler saw no operation of this device")
    seconds, counts = collections.Counter(), collections.Counter()
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
    ordered = (
        Operation(name, total / runs, counts[name] / runs) for name, total in seconds.most_common()
    )
    return Profile(
        busy / runs, (reached - first) / runs, tuple(sorted(waits, reverse=True)), tuple(ordered)
    )


def table(found: Profile, most: int) -> str:
    """The `most` longest operations as markdown, under a line on the whole."""
    shown = found.operations[:most]
    longest = ", ".join(f"{1e3 * wait:.3g}" for wait in found.waits[:8])
    lines = [
        f"device busy {1e3 * found.busy:.3g} ms of {1e3 * found.wall:.3g} ms a run, {len(found.operations)} kinds of operations; "
        f"{len(found.waits)} waits in all, the longest {longest} ms",
        "",
    ]
    lines += ["| operation | ms | share | runs |", "|---|---|---|---|"]
    lines += [
        f"| {o.name[:90]} | {1e3 * o.seconds:.3g} | {o.seconds / found.busy:.1%} | {o.count:g} |"
        for o in shown
    ]
    return "\n".join(lines)
