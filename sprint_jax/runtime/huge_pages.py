"""A training command starts itself again with the C library asking for huge pages.

Each training step on a CPU takes hundreds of megabytes from the C library and hands them back, and a fifth of its time
is the kernel clearing them again, 4 KiB by 4 KiB (`docs/results/speed.md`). In pages of 2 MiB that is a
five-hundredth of the faults. glibc (2.35 or newer) reads the wish from GLIBC_TUNABLES when a process starts, and at no other
time, so the process replaces itself, under the same number. Nothing happens where the variable is set, even to
nothing, and where the machine gives huge pages to all or to none.
"""

import os
import pathlib
import platform
import sys

_VARIABLE = "GLIBC_TUNABLES"
_WISH = "glibc.malloc.hugetlb=1"
_MODE = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart():
    """Replaces the process by the same command with the wish. Returns where that is not of use, or is refused."""
    if not of_use(os.environ, platform.libc_ver(), _mode()):
        return
    try:
        # The command as Python itself was given it: -m, and any program it runs under, included.
        os.execve(
            sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {_VARIABLE: _WISH}
        )
    except OSError:
        pass  # the command goes on, only slower


def of_use(environment, libc, mode) -> bool:
    """Whether the wish would change anything.

    Args:
      environment: mapping of environment variables.
      libc: (name, version) as platform.libc_ver() gives them.
      mode: text of the kernel's switch, the choice in brackets: "always [madvise] never"; "" where there is none.
    """
    name, version = libc
    numbers = version.split(".")[:2]
    recent = (
        name == "glibc"
        and all(n.isdigit() for n in numbers)
        and tuple(map(int, numbers)) >= (2, 35)
    )
    return recent and "[madvise]" in mode and _VARIABLE not in environment


def _mode():
    try:
        return _MODE.read_text()
    except OSError:
        return ""
