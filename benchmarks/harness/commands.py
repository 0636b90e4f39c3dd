"""Whole commands in processes of their own: what a person waits for, imports and compilation included."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import weakref

import jax
import numpy as np

from benchmarks.harness import bench as bench_lib
from benchmarks.harness import subjects, timing, training
from sprint_jax import build
from sprint_jax import config as config_lib
from sprint_jax.storage import run_files, weights


def sample(bench, *, warm, preset="shapes"):
    """`python -m sprint_jax sample` of one embedded picture in one step, by a student of random weights.

    warm: with JAX's compilation cache filled by a run before; otherwise without a cache.
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
        # On a GPU this process has taken the memory: the command's process asks for what it needs alone.
        options = dict(
            capture_output=True,
            text=True,
            env=os.environ | cache | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        )
        result = subprocess.run(
            [*words, f"--out={path / 'pictures'}"], cwd=training.ROOT, **options
        )
        if result.returncode:
            raise RuntimeError(
                f"sprint-jax sample failed: {result.stderr.strip().splitlines()[-1:]}"
            )

    call = timing.Call(run, lambda result: None)
    weakref.finalize(call, folder.cleanup)
    return bench_lib.Subject(
        timing.Program({"": call}),
        None,
        "float32",
        None,
        note="a process of its own, imports included",
    )
