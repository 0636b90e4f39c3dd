"""Damages every kind of file that is read, and reports what is not answered by one line.

    python -m benchmarks.fuzz [--calls=100000] [--commands=300] [--seed=0] [--only=NAME]

Readers are called in one process after another (--calls), commands as a person runs them
(--commands). A failure is an exception that would be a traceback, an error of several lines, a
call of over 10 s, the end of the process, a status other than 0 and 2, or a half-written output.
Prints a row for each kind, adds all rows to --out as JSON lines, and exits with 1 after a failure.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import pathlib
import sys
import tempfile
import time

import tqdm

from benchmarks.fuzz import attack, commands, formats
from benchmarks.harness import machine
from sprint_jax.runtime import cli
from sprint_jax.storage import json_lines

_BATCH = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `python -m benchmarks.fuzz`."""

    calls: int = 100_000
    """Calls of readers."""
    commands: int = 300
    """Runs of commands."""
    seed: int = 0
    """Selects the damage."""
    only: str = ""
    """Part of the names of the formats and cases to try."""
    out: str = ""
    """File of JSON lines to add the rows to."""


@dataclasses.dataclass(frozen=True)
class _Row:
    """What the calls of one format, or the runs of one command, ended in."""

    kind: str
    name: str
    counts: dict[str, int]
    seconds: float
    failures: list[str]


def run(options: Options) -> None:
    """Try all formats and commands. Exits with 1 after a failure."""
    rows = []
    for form in formats.formats():
        if options.only in form.name and options.calls:
            rows.append(_readers(form.name, options.calls * form.share // 100, options.seed))
            _show(rows[-1])
    for case in commands.cases():
        if options.only in case.name and options.commands:
            rows.append(_commands(case, options.commands * case.share // 100, options.seed))
            _show(rows[-1])
    if options.out:
        shared = machine.where() | {"date": time.strftime("%Y-%m-%d"), "seed": options.seed}
        for row in rows:
            json_lines.append(options.out, dataclasses.asdict(row) | shared)
    if any(row.failures for row in rows):
        raise SystemExit(1)


def _readers(name: str, calls: int, seed: int) -> _Row:
    """Attack one format in batches, in a process of its own that may die."""
    counts: dict[str, int] = {}
    failures, begin = [], time.perf_counter()
    starts = range(0, calls, _BATCH)
    with tqdm.tqdm(total=calls, desc=name, unit="call", leave=False) as bar:
        pool = _pool()
        for batch, start in enumerate(starts):
            size = min(_BATCH, calls - start)
            try:
                outcome = pool.submit(attack.by_name, name, size, seed * 1_000_003 + batch).result()
            except concurrent.futures.process.BrokenProcessPool:
                outcome, pool = attack.Outcome({}, f"the process died in batch {batch}"), _pool()
            for key, count in outcome.counts.items():
                counts[key] = counts.get(key, 0) + count
            failures += [outcome.failure] if outcome.failure else []
            bar.update(size)
        pool.shutdown()
    return _Row("reader", name, counts, time.perf_counter() - begin, failures)


def _pool() -> concurrent.futures.ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(1, mp_context=context)


def _commands(case: commands.Case, runs: int, seed: int) -> _Row:
    begin, place = time.perf_counter(), pathlib.Path(tempfile.mkdtemp(prefix="fuzz-"))
    outcome = commands.attack(case, runs, seed, place)
    failures = [f"{outcome.failure}\n(in {place})"] if outcome.failure else []
    return _Row("command", case.name, outcome.counts, time.perf_counter() - begin, failures)


def _show(row: _Row) -> None:
    counts = ", ".join(f"{count} {name}" for name, count in sorted(row.counts.items()))
    print(f"{row.kind} {row.name}: {counts} ({row.seconds:.0f} s)", flush=True)
    for failure in row.failures:
        print(f"FAILURE\n{failure}\n", flush=True)


if __name__ == "__main__":
    cli.start(Options, run, sys.argv[1:], prog="python -m benchmarks.fuzz", description=__doc__)
