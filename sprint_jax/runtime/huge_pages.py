"""Restarts a training command with the C library asking for huge pages.

Each training step on a CPU takes hundreds of megabytes from the C library and gives them back. The
kernel clears that memory again in pages of 4 KiB, which is a fifth of the step's time. Pages of
2 MiB cause a five-hundredth of the faults (`docs/results/speed.md`).

glibc (2.35 or newer) reads this setting from GLIBC_TUNABLES only when a process starts, so the
process replaces itself and keeps its process number. Nothing happens if the variable is set, even
to nothing, or if the machine gives huge pages to all processes or to none.
"""

import os
import pathlib
import platform
import sys
from collections.abc import Mapping

from sprint_jax.runtime import ending

_VARIABLE = "GLIBC_TUNABLES"
_SETTING = "glibc.malloc.hugetlb=1"
_MODE = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart() -> None:
    """Replace the process by the same command with huge pages.

    Return if that is useless here, or if the system refuses it.
    """
    if not is_useful(os.environ, platform.libc_ver(), _mode()):
        return
    try:
        # The command line that Python itself got: with -m, and a program that Python runs under.
        with ending.postponed():
            words = [sys.executable, *sys.orig_argv[1:]]
            os.execve(sys.executable, words, os.environ | {_VARIABLE: _SETTING})
    except OSError:
        pass  # the command runs all the same, only slower


def is_useful(environment: Mapping[str, str], libc: tuple[str, str], mode: str) -> bool:
    """Return whether the setting would change anything.

    environment: environment variables. libc: (name, version) as `platform.libc_ver` returns them.
    mode: text of the kernel's switch with the choice in brackets, "always [madvise] never" for
    example, "" if the kernel has none.
    """
    name, version = libc
    numbers = version.split(".")[:2]
    recent = (
        name == "glibc"
        and all(n.isdigit() for n in numbers)
        and tuple(map(int, numbers)) >= (2, 35)
    )
    return recent and "[madvise]" in mode and _VARIABLE not in environment


def _mode() -> str:
    try:
        return _MODE.read_text()
    except OSError:
        return ""
