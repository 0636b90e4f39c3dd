"""A command that starts itself again with huge pages: when, how often, and that the C library then asks for them."""

import os
import platform
import subprocess
import sys

import pytest

from helpers.runs import ROOT
from sprint_jax.runtime import huge_pages

MADVISE = "always [madvise] never\n"

# A command's beginning; then flags of the mapping that holds a block of 64 MiB, taken as XLA takes its memory.
PROGRAM = """
import ctypes, os, sys
from sprint_jax import huge_pages
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
    """Lines of PROGRAM in a process of its own, with only these of glibc's variables."""
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
def test_when_it_is_of_use(libc, mode, environment, expected):
    assert huge_pages.of_use(environment, libc, mode) is expected


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_it_starts_again_once_with_the_same_words_and_number():
    if not huge_pages.of_use({}, platform.libc_ver(), huge_pages._mode()):
        pytest.skip("this machine has no huge pages to ask for, or gives them to all")
    first, second, last = start()
    assert first == second and first.endswith(" one --two=a b")
    assert last == "huge glibc.malloc.hugetlb=1"


@linux
def test_a_variable_that_is_set_is_left_alone():
    assert [line.split()[0] for line in start(GLIBC_TUNABLES="glibc.malloc.hugetlb=0")] == [
        "starts",
        "small",
    ]


def test_where_it_cannot_start_again_it_goes_on(monkeypatch):
    calls = []

    def refuse(*words):
        calls.append(words)
        raise PermissionError("not here")

    monkeypatch.setattr(huge_pages, "of_use", lambda *_: True)
    monkeypatch.setattr(os, "execve", refuse)
    huge_pages.restart()
    ((program, words, environment),) = calls
    assert (
        program == words[0] == sys.executable
        and environment["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    )
