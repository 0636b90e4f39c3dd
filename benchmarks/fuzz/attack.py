"""Damage one format many times, and read it each time."""

import collections
import dataclasses
import pathlib
import shutil
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import Phase

from benchmarks.fuzz import damage, formats
from benchmarks.fuzz.formats import Format

SECONDS = 10  # longest call
CHECKS: Any = tuple(hypothesis.HealthCheck)  # they are about strategies, not about damage


class Hang(BaseException):
    """A call that took too long. No reader catches it."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a number of calls ended in.

    counts: {"read" or the name of an expected error: calls}. failure: the traceback of the smallest
    failing example, with the damage that caused it; "" if there was none.
    """

    counts: dict[str, int]
    failure: str


def attack(form: Format, calls: int, seed: int, *, shrink: bool = True) -> Outcome:
    """Make a folder of the format, and read it after each of many damages.

    Stops at the first failure. shrink: whether to look for a smaller damage with the same failure.
    """
    with tempfile.TemporaryDirectory() as place:
        whole, trial = pathlib.Path(place) / "whole", pathlib.Path(place) / "trial"
        whole.mkdir()
        form.make(whole)
        content = {p.relative_to(whole).as_posix(): p.read_bytes() for p in formats.files(whole)}
        form.read(whole)  # raises if the format itself is wrong
        shutil.copytree(whole, trial)
        return _run(form, content, trial, calls, seed, shrink)


def by_name(name: str, calls: int, seed: int) -> Outcome:
    """Return `attack` of the format of this name, without warnings, for a process of its own."""
    warnings.simplefilter("ignore")
    return attack(next(form for form in formats.formats() if form.name == name), calls, seed)


def _run(
    form: Format, content: damage.Files, trial: pathlib.Path, calls: int, seed: int, shrink: bool
) -> Outcome:
    counts: collections.Counter[str] = collections.Counter()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=calls,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        suppress_health_check=CHECKS,
        print_blob=False,
    )
    @hypothesis.given(damage.damages(content))
    def check(damaged: damage.Damage) -> None:
        path = damaged.path
        damaged.apply(trial)
        try:
            counts[within(SECONDS, lambda: _outcome(form, trial))] += 1
        finally:
            (trial / path).write_bytes(content[path])

    try:
        check()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return Outcome(dict(counts), "".join(traceback.format_exception(error)))
    return Outcome(dict(counts), "")


def _outcome(form: Format, trial: pathlib.Path) -> str:
    try:
        form.read(trial)
    except formats.EXPECTED as error:
        formats.check_line(error)
        return type(error).__name__
    return "read"


def within(seconds: float, call: Callable[[], str]) -> str:
    """Return what a call returns. Raises Hang in it after some seconds."""

    def late(*_: object) -> None:
        raise Hang(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
