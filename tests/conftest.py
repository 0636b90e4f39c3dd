"""Shared fixtures: one tiny run of the main job, made once per session, and a way to call the commands."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import textwrap

import filelock
import pytest

from sprint_jax.runtime import quick_compile

# Tests compile much and compute little: each of these flags halves XLA's compile time, here and in every subprocess. The second is
# gone from newer versions, which refuse flags that they do not know.
QUICK = quick_compile.flags()
# Compiler options for tests that compare programs bit by bit: without the second flag, which rounds by the program.
SAME_BITS = {"xla_backend_optimization_level": 0}
if "fusion_emitters" in QUICK:
    SAME_BITS |= {"xla_cpu_use_fusion_emitters": True}
os.environ.setdefault("XLA_FLAGS", QUICK)

ROOT = pathlib.Path(__file__).parent.parent
SMOKE = "--config=configs/sprint.py:smoke"
# Of a teacher that is first trained as the original SANA was.
OLD_STYLE = (
    "--config.teacher.base_qk_norm=False",
    "--config.teacher.base_time_scale=1000.0",
    "--config.teacher.finetune_steps=4",
)
TINY = (SMOKE, *OLD_STYLE)


def free_port():
    """Free, with the one behind it: below the ports that clients are given, and apart from those of the suite's other processes."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
    for i in range(750):
        port = 20000 + 1500 * worker + 2 * ((os.getpid() + i) % 750)
        with socket.socket() as one, socket.socket() as two, contextlib.suppress(OSError):
            one.bind(("", port)), two.bind(("", port + 1))
            return port
    raise AssertionError("no free port")


@pytest.fixture(scope="session")
def common(tmp_path_factory):
    """A folder of the whole session, also where several processes share its tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "common"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def command(common):
    """run(module, *flags) -> CompletedProcess; a compilation cache is shared by all calls of a session.

    before: Python that the process runs ahead of the module."""
    cache = common / "jax_cache"
    shared = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def run(module, *flags, background=False, environment=None, before=""):
        if environment is None:
            environment = {}
        after = f"import runpy\nrunpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
        what = ("-c", f"{textwrap.dedent(before)}\n{after}") if before else ("-m", module)
        words = [sys.executable, *what, *map(str, flags)]
        options = dict(
            cwd=ROOT,
            env=shared | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if background:
            return subprocess.Popen(words, **options)
        return subprocess.run(words, **options, timeout=600)

    return run


@pytest.fixture(scope="session")
def finished(command, common):
    """Work directory of an uninterrupted `smoke` run; tests copy it, or leave it as it is."""
    return _run_once(command, common / "finished", *TINY)


@pytest.fixture(scope="session")
def sketched(command, common):
    """As `finished`, of a student with a ControlNet."""
    return _run_once(
        command, common / "sketched", "--config=configs/controlnet.py:smoke", *OLD_STYLE
    )


def _run_once(command, workdir, *flags):
    with filelock.FileLock(f"{workdir}.lock"):  # the next process finds it finished
        if not (workdir / "report.html").exists():
            result = command("sprint_jax.main", *flags, f"--workdir={workdir}")
            assert result.returncode == 0, result.stderr[-3000:]
    return workdir
