"""Fixtures of all tests: a way to call commands, and tiny runs that a session shares."""

import os
import subprocess
import sys
import textwrap

import filelock
import pytest

from helpers import shape_checks
from helpers.compiler import XLA_FLAGS
from helpers.runs import OLD_TEACHER_FLAGS, ROOT, TINY_FLAGS

os.environ.setdefault("XLA_FLAGS", XLA_FLAGS)
shape_checks.install()


@pytest.fixture
def no_rank_promotion():
    """Raise an error where arrays of different rank meet.

    This holds for the maths of diffusion. Networks add biases [C] to activations [..., C].
    """
    import jax

    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory):
    """Return a folder of the whole session, the same in all of its processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "common"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def command(session_folder):
    """Return a function run(module, *flags) -> CompletedProcess.

    All calls of a session share a compilation cache. With background=True the function returns a
    Popen. `before` is Python code that the process executes before the module.
    """
    cache = session_folder / "jax_cache"
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
def finished(command, session_folder):
    """Return the work directory of an uninterrupted `smoke` run. Tests must not change it."""
    return _run_once(command, session_folder / "finished", *TINY_FLAGS)


@pytest.fixture(scope="session")
def finished_controlnet(command, session_folder):
    """Return the work directory of a `smoke` run with a ControlNet. Tests must not change it."""
    return _run_once(
        command,
        session_folder / "finished_controlnet",
        "--config=configs/controlnet.py:smoke",
        *OLD_TEACHER_FLAGS,
    )


def _run_once(command, workdir, *flags):
    with filelock.FileLock(f"{workdir}.lock"):  # other processes of the session wait
        if not (workdir / "report.html").exists():
            result = command("sprint_jax.main", *flags, f"--workdir={workdir}")
            assert result.returncode == 0, result.stderr[-3000:]
    return workdir
