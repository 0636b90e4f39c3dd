"""Commands restart with huge pages: when, how often, and that the C library then asks for them."""

import os
import platform
import subprocess
import sys

import pytest

from helpers.runs import ROOT
from sprint_jax.runtime import huge_pages

MADVISE = "always [madvise] never\n"

# The start of a command, then the flags of the mapping of a 64 MiB block, allocated as XLA
# allocates.
PROGRAM = """
import ctypes, os, sys
from sprint_jax.runtime import huge_pages
print("starts", os.getpid(), *sys.argv[1:], flush=True)
huge_pages.restart()
malloc = ctypes.CDLL(None).malloc
malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
block, flags = malloc(64 << 20) + (1 << 20), []
for line in open("/proc/self/smaps"):
    first, *rest = line.split()
    if not first.endswith(":"):
        begin, end = (int(a, 16) for a in first.split("-"))
    elif first == "VmFlags:" and begin <= block < end:
        flags = rest
print("huge" if "hg" in flags else "small", os.environ.get("GLIBC_TUNABLES"))
"""


def start(**variables):
    """Return the lines of PROGRAM in a process with only these variables of glibc."""
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | variables
    words = [sys.executable, "-c", PROGRAM, "one", "--two=a b"]
    result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.splitlines()


@pytest.mark.parametrize(
    ("libc", "mode", "environment", "expected"),
    [
        (("glibc", "2.36"), MADVISE, {}, True),
        (("glibc", "2.35"), MADVISE, {"HOME": "/"}, True),
        (("glibc", "3.0"), MADVISE, {}, True),
        (("glibc", "2.35.9000"), MADVISE, {}, True),
        (("glibc", "2.34"), MADVISE, {}, False),
        (("glibc", ""), MADVISE, {}, False),
        (("", ""), MADVISE, {}, False),
        (("glibc", "2.36"), "[always] madvise never\n", {}, False),
        (("glibc", "2.36"), "always madvise [never]\n", {}, False),
        (("glibc", "2.36"), "", {}, False),
        (("glibc", "2.36"), MADVISE, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, False),
        (("glibc", "2.36"), MADVISE, {"GLIBC_TUNABLES": ""}, False),
    ],
)
def test_when_a_restart_helps(libc, mode, environment, expected):
    assert huge_pages.is_useful(environment, libc, mode) is expected


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_it_restarts_once_with_the_same_arguments_and_pid():
    if not huge_pages.is_useful({}, platform.libc_ver(), huge_pages._mode()):
        pytest.skip("this machine has no huge pages to ask for, or gives them to all")
    first, second, last = start()
    assert first == second and first.endswith(" one --two=a b")
    assert last == "huge glibc.malloc.hugetlb=1"


@linux
def test_an_existing_variable_is_kept():
    assert [line.split()[0] for line in start(GLIBC_TUNABLES="glibc.malloc.hugetlb=0")] == [
        "starts",
        "small",
    ]


def test_if_it_cannot_restart_it_continues(monkeypatch):
    calls = []

    def refuse(*words):
        calls.append(words)
        raise PermissionError("not here")

    monkeypatch.setattr(huge_pages, "is_useful", lambda *_: True)
    monkeypatch.setattr(os, "execve", refuse)
    huge_pages.restart()
    ((program, words, environment),) = calls
    assert program == words[0] == sys.executable
    assert environment["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
