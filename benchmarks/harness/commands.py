"""Whole commands in separate processes, including imports and compilation."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import weakref
from typing import Any

import jax
import numpy as np

from benchmarks.harness import bench as bench_lib
from benchmarks.harness import subjects, timing, training
from sprint_jax import build
from sprint_jax import config as config_lib
from sprint_jax.storage import run_files, weights


def sample(bench: bench_lib.Bench, *, warm: bool, preset: str = "shapes") -> bench_lib.Subject:
    """Build the subject of `python -m sprint_jax sample`, for one embedded image in one step.

    The student has random weights. warm: whether a previous run filled JAX's compilation cache;
    otherwise the command runs without a cache.
    """
    c = training.card(preset)
    folder = tempfile.TemporaryDirectory()
    path = pathlib.Path(folder.name)
    student = path / "student"
    student.mkdir()
    (student / run_files.CONFIG).write_text(json.dumps(config_lib.to_dict(c)))
    weights.save(
        student / run_files.STUDENT,
        jax.tree.map(np.asarray, subjects.drawn(build.student(c), "float32")),
    )
    cache = (
        {"JAX_COMPILATION_CACHE_DIR": str(path / "cache")}
        if warm
        else {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    )
    words = [
        sys.executable,
        "-m",
        "sprint_jax",
        "sample",
        f"--model={student}",
        "--prompt=a red circle",
        "--steps=1",
    ]

    def run():
        # On a GPU this process holds memory, so the command's process must not preallocate.
        options: dict[str, Any] = dict(
            capture_output=True,
            text=True,
            env=os.environ | cache | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        )
        result = subprocess.run([*words, f"--out={path / 'images'}"], cwd=training.ROOT, **options)
        if result.returncode:
            raise RuntimeError(
                f"sprint-jax sample failed: {result.stderr.strip().splitlines()[-1:]}"
            )

    call = timing.Call(run, lambda result: None)
    weakref.finalize(call, folder.cleanup)
    return bench_lib.Subject(
        program=timing.Program({"": call}),
        compile_s=None,
        dtype="float32",
        work=None,
        note="a separate process, imports included",
    )
