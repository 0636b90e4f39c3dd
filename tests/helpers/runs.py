"""Runs of commands in tests: their flags, the rows that they write, and how they end."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from typing import Any

from helpers.compiler import XLA_FLAGS

ROOT = pathlib.Path(__file__).parents[2]
SMOKE_FLAGS = ("--config=configs/sprint.py:smoke",)
# A teacher like the original SANA, which is trained first and then fine-tuned.
OLD_TEACHER_FLAGS = (
    "--config.teacher.base_qk_norm=False",
    "--config.teacher.base_time_scale=1000.0",
    "--config.phases.finetune.steps=4",
)
TINY_FLAGS = (*SMOKE_FLAGS, *OLD_TEACHER_FLAGS)


def free_port() -> int:
    """Return a free TCP port; the port after it is free as well.

    The range lies below the ports that clients are given, and each process of the suite has a range
    of its own.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
    for i in range(750):
        port = 20000 + 1500 * worker + 2 * ((os.getpid() + i) % 750)
        with (
            socket.socket() as first,
            socket.socket() as second,
            contextlib.suppress(OSError),
        ):
            first.bind(("", port))
            second.bind(("", port + 1))
            return port
    raise AssertionError("no free port")


def assert_refused(result: subprocess.CompletedProcess, *words: str) -> None:
    """Assert that a command failed with one `error:` line that contains all of `words`."""
    assert result.returncode not in (0, None)
    lines = result.stderr.strip().splitlines()
    assert "Traceback" not in result.stderr
    assert lines[-1].startswith("error: ")
    for word in words:
        assert word in lines[-1], lines[-1]


def read_rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def wait_for_row(workdir: pathlib.Path, stage: str, step: int, process: subprocess.Popen) -> None:
    """Wait until a row of `stage` at `step` or later is on disk.

    Raises AssertionError if the process ends first or nothing happens for some minutes.
    """
    path = workdir / "metrics.jsonl"
    for _ in range(3000):
        if path.exists():
            rows = map(json.loads, path.read_text().splitlines()[:-1])
            if any(row["stage"] == stage and row["step"] >= step for row in rows):
                return
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.05)
    raise AssertionError("no progress")


def run_on_devices(module: str, *arguments: Any, devices: int = 8) -> str:
    """Run a module as a program on simulated CPU devices and return its standard output.

    Raises AssertionError if it fails.
    """
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "XLA_FLAGS": f"{XLA_FLAGS} --xla_force_host_platform_device_count={devices}",
    }
    result = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout
