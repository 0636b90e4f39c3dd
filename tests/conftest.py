"""Shared fixtures: one tiny run of the main job, made once per session, and a way to call the commands."""

import os
import subprocess
import sys
import textwrap

import filelock
import pytest

from helpers.runs import OLD_STYLE, QUICK, ROOT, TINY

os.environ.setdefault("XLA_FLAGS", QUICK)


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
