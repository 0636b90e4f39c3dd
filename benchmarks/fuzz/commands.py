"""Damaged inputs given to commands: status, one error line, and nothing half-written."""

import collections
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable

import hypothesis
from hypothesis import Phase

from benchmarks.fuzz import damage, formats
from benchmarks.fuzz.attack import CHECKS, SECONDS, Outcome


@dataclasses.dataclass(frozen=True)
class Case:
    """A command that reads a folder.

    make: writes whole files into an empty folder. arguments: (input, output) -> the command's
    words. share: runs of it in a hundred.
    """

    name: str
    make: Callable[[pathlib.Path], None]
    arguments: Callable[[pathlib.Path, pathlib.Path], list[str]]
    share: int


def cases() -> Iterable[Case]:
    """Return all cases."""
    made = {form.name: form.make for form in formats.formats()}
    images, tar, run = made["folder of captioned images"], made["tar"], made["run directory"]
    shapes = ["--encoder=sprint:smoke", "--sizes=32x32", "--heldout=0"]
    encode = lambda i, o: ["encode", f"--source={i}", f"--encoded={o}", *shapes]
    drawing = ["--prompt=a red circle", "--steps=1", "--batch_size=1"]
    return (
        Case("report", run, lambda i, o: ["report", f"--run_dir={i}"], 15),
        Case(
            "convert",
            made["diffusers folder"],
            lambda i, o: ["convert", f"--from={i}", f"--to={o}", "--instruction="],
            20,
        ),
        Case("average", _two_runs, _average, 10),
        Case(
            "condition",
            images,
            lambda i, o: ["condition", f"--images={i}", "--kind=edges", f"--out={o}"],
            15,
        ),
        Case("encode a folder", images, encode, 10),
        Case("encode a tar", tar, encode, 15),
        Case(
            "sample from a file",
            made["exported file"],
            lambda i, o: ["sample", f"--model={i}/a.sprint", f"--out={o}", *drawing],
            15,
        ),
    )  # fmt: skip


def _two_runs(out: pathlib.Path) -> None:
    for name in ("one", "two"):
        (out / name).mkdir()
        formats.make_run(out / name)


def _average(given: pathlib.Path, out: pathlib.Path) -> list[str]:
    return ["average", f"--runs={given / 'one'},{given / 'two'}", f"--averaged={out}"]


def attack(case: Case, runs: int, seed: int, place: pathlib.Path) -> Outcome:
    """Give a command damaged inputs. Stops at the first failure, whose folders stay in `place`."""
    whole, trial, out = (place / name for name in ("whole", "trial", "out"))
    whole.mkdir(parents=True)
    case.make(whole)
    content = {p.relative_to(whole).as_posix(): p.read_bytes() for p in formats.files(whole)}
    cache = place / "programs"
    begin = time.perf_counter()
    first = _run(case.arguments(whole, out), cache, 300)
    if first.returncode:
        return Outcome({}, f"the whole input is refused: {first.stderr[-2000:]}")
    limit = time.perf_counter() - begin + SECONDS
    counts: collections.Counter[str] = collections.Counter()
    failures: list[str] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=runs,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=CHECKS,
    )
    @hypothesis.given(damage.damages(content))
    def check(damaged: damage.Damage) -> None:
        for folder in (trial, out):
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink(missing_ok=True)
        shutil.copytree(whole, trial)
        damaged.apply(trial)
        result = _run(case.arguments(trial, out), cache, limit)
        counts[f"status {result.returncode}"] += 1
        if wrong := _wrong(result, place):
            failures.append(f"{wrong}\n{damaged!r}\n{result.stderr[-2000:]}")
            raise AssertionError(wrong)

    try:
        check()
    except AssertionError:
        return Outcome(dict(counts), failures[0])
    return Outcome(dict(counts), "")


def _run(words: list[str], cache: pathlib.Path, seconds: float) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "sprint_jax", *words]
    try:
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, -1, "", f"no end within {seconds:.0f} s")


def _wrong(result: subprocess.CompletedProcess[str], place: pathlib.Path) -> str:
    """Return what is wrong with the end of a command, "" if nothing is."""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    if result.returncode not in (0, 2):
        return f"status {result.returncode}"
    if "Traceback" in result.stderr:
        return "a traceback"
    if len(errors) != (result.returncode == 2):
        return f"status {result.returncode} with {len(errors)} error lines"
    partial = [path for path in place.rglob("*partial*") if "programs" not in path.parts]
    return f"half-written: {partial[0]}" if partial else ""
