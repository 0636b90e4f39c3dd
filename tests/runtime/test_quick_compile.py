"""Fast compilation for short runs: its options, and that those of the user take precedence."""

import os
import subprocess
import sys

import pytest

from sprint_jax.runtime import quick_compile


def test_the_users_options_come_last(monkeypatch):
    """XLA takes the last of two values. Fails when ours are appended."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=2")
    quick_compile.start()
    assert os.environ["XLA_FLAGS"] == f"{quick_compile.flags()} --xla_backend_optimization_level=2"
    monkeypatch.delenv("XLA_FLAGS")
    quick_compile.start()
    assert os.environ["XLA_FLAGS"] == quick_compile.flags()


@pytest.mark.parametrize(
    "version, count", [("0.9.2", 2), ("0.10.2", 2), ("0.11.0", 1), ("1.0.0", 1)]
)
def test_options_of_each_version(monkeypatch, version, count):
    """Fails when versions are compared as text."""
    monkeypatch.setattr(quick_compile.importlib.metadata, "version", lambda name: version)
    assert len(quick_compile.flags().split()) == count


def test_this_jaxlib_knows_the_options():
    """XLA ends a process that names an unknown option."""
    start = "from sprint_jax.runtime import quick_compile; quick_compile.start()"
    program = f"{start}; import jax; print(jax.jit(lambda x: 2 * x)(3.0))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, "6.0"), result.stderr[-500:]
