"""Runs of commands in tests: their flags, what they leave, and how they end."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

from sprint_jax.runtime import quick_compile

# Tests compile much and compute little: each of these flags halves XLA's compile time, here and in every subprocess. The second is
# gone from newer versions, which refuse flags that they do not know.
QUICK = quick_compile.flags()
# Compiler options for tests that compare programs bit by bit: without the second flag, which rounds by the program.
SAME_BITS = {"xla_backend_optimization_level": 0}
if "fusion_emitters" in QUICK:
    SAME_BITS |= {"xla_cpu_use_fusion_emitters": True}

ROOT = pathlib.Path(__file__).parents[2]
SMOKE = "--config=configs/sprint.py:smoke"
# Of a teacher that is first trained as the original SANA was.
OLD_STYLE = (
    "--config.teacher.base_qk_norm=False",
    "--config.teacher.base_time_scale=1000.0",
    "--config.phases.finetune.steps=4",
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


def refused(result, *words):
    assert result.returncode not in (0, None)
    lines = result.stderr.strip().splitlines()
    assert "Traceback" not in result.stderr
    assert lines[-1].startswith("error: ")
    for word in words:
        assert word in lines[-1], lines[-1]


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def wait_for(workdir, stage, step, process):
    """Returns once a row of `stage` at `step` or later is on disk."""
    for _ in range(3000):
        path = workdir / "metrics.jsonl"
        if path.exists():
            lines = path.read_text().splitlines()
            if any(r["stage"] == stage and r["step"] >= step for r in map(json.loads, lines[:-1])):
                return
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.05)
    raise AssertionError("no progress")


def simulated(program, *arguments, devices=8):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count={devices}",
    }
    result = subprocess.run(
        [sys.executable, *program, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout
