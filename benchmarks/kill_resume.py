"""Kills a run at random moments of training, restarts it each time, and compares it with an
undisturbed run.

    python -m benchmarks.kill_resume [--kills=20] [--seed=0] [--out=DIR]

The job is the `smoke` preset with longer stages and a checkpoint every few steps, on the CPU. A
kill is SIGKILL; its moment is a step drawn evenly over the training and a part of a second after
that. Exits with 1 when a checkpoint that was on disk is not the one resumed from, when more than
the interval in flight is lost, or when weights, metrics or scores at the end differ in one bit.
"""

import dataclasses
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time

from sprint_jax.runtime import cli
from sprint_jax.storage import files, json_lines, run_files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(files.Paths):
    """Options of `python -m benchmarks.kill_resume`."""

    kills: int = 20
    """How often to kill."""
    seed: int = 0
    """Selects the moments."""
    out: files.LocalPath | None = None
    """Keep both work directories there; default: a directory that is removed."""


_ROOT = pathlib.Path(__file__).parent.parent
_STAGES = {"teacher": 200, "sprint": 200}
_EVERY = 4
_JOB = (
    "--config=configs/sprint.py:smoke",
    "--config.evaluation.teacher_steps=2",
    f"--config.run.checkpoint_every={_EVERY}",
    *(f"--config.phases.{stage}.steps={steps}" for stage, steps in _STAGES.items()),
)


class _Running:
    """The job, started, and the lines it has printed."""

    def __init__(self, workdir, cache):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        words = [sys.executable, "-u", "-m", "sprint_jax.main", *_JOB, f"--workdir={workdir}"]
        self.log = workdir.with_suffix(".log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                words, cwd=_ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    def finish(self):
        if self.process.wait():
            sys.exit(f"the job failed:\n{self.log.read_text()[-3000:]}")


def _reached(workdir):
    """Return (stage, step) of the last whole row. Rows are written a round late."""
    rows = json_lines.rows(workdir / run_files.METRICS)
    row = rows[-1] if rows else {"stage": "teacher", "step": 0}
    return row["stage"], row["step"]


def _on_disk(workdir, stage):
    """Return the newest checkpoint that has its final name; 0 without one."""
    folder = workdir / "checkpoints" / stage
    return max((int(p.name) for p in folder.glob("*") if p.name.isdigit()), default=0)


def _count(stage, step):
    """Return the steps of the whole training up to here."""
    return step + (_STAGES["teacher"] if stage == "sprint" else 0)


def _kill(workdir, cache, at, delay):
    """Run until `at` steps of training are recorded and `delay` seconds more, then kill."""
    job = _Running(workdir, cache)
    # Rows of the run before are still there until this one has begun.
    while "compiled in" not in job.log.read_text() or _count(*_reached(workdir)) < at:
        if job.process.poll() is not None:
            sys.exit(f"the job ended before step {at} of training:\n{job.log.read_text()[-3000:]}")
        time.sleep(0.002)
    time.sleep(delay)
    job.process.kill()
    job.process.wait()


def _differences(one, other):
    """Return what differs in any bit between two finished work directories."""
    files = ("teacher.safetensors", "student.safetensors", "metrics.jsonl")
    found = [name for name in files if (one / name).read_bytes() != (other / name).read_bytes()]
    scores = [json.loads((d / "summary.json").read_text()) for d in (one, other)]
    return found + [
        f"summary.json {part}"
        for part in ("scores", "frechet")
        if scores[0][part] != scores[1][part]
    ]


def _measure(out, options):
    draw = random.Random(options.seed)
    moments = sorted(draw.randint(2, sum(_STAGES.values()) - 10) for _ in range(options.kills))
    cache, whole, killed = out / "cache", out / "whole", out / "killed"
    begin = time.perf_counter()
    _Running(whole, cache).finish()
    print(f"undisturbed: {time.perf_counter() - begin:.0f} s\n", flush=True)
    print(f"{'kill':>4} {'recorded':>14} {'on disk':>8} {'resumed':>8} {'lost':>5}", flush=True)
    faults, lost_in_all, before = [], 0, None
    for number, at in enumerate([*moments, None], 1):
        if at is None:
            _Running(killed, cache).finish()
        else:
            _kill(killed, cache, at, draw.uniform(0, 0.3))
        if before is not None:
            lost_in_all += _judge(number - 1, before, _resumed(killed), faults)
        stage, step = _reached(killed)
        before = stage, step, _on_disk(killed, stage)
    differing = _differences(whole, killed)
    print(
        f"\n{options.kills} kills, {lost_in_all} steps done twice, "
        f"{time.perf_counter() - begin:.0f} s"
    )
    faults += [f"{name} differs from the undisturbed run's" for name in differing]
    print(
        "\n".join(faults)
        or "teacher, student, metrics and scores are bit-equal to the undisturbed run's"
    )
    return not faults


def _resumed(workdir):
    """Return (stage, step) of what a restart found: checkpoints, and stages that had ended."""
    log = workdir.with_suffix(".log").read_text()
    ended = [name for name in re.findall(r"^(\w+): done before", log, re.M) if name in _STAGES]
    return re.findall(r"^(\w+): resumed from checkpoint at step (\d+)", log, re.M) + [
        (name, _STAGES[name]) for name in ended
    ]


def _judge(number, before, resumed, faults):
    """Print the row of a kill once its restart is known.

    Return the steps that had to be done again.
    """
    stage, step, disk = before
    begun = next((int(s) for name, s in resumed if name == stage), 0)
    lost = step - begun
    print(f"{number:4} {stage:>9} {step:4} {disk:8} {begun:8} {lost:5}", flush=True)
    if begun != disk:
        faults.append(f"kill {number}: step {disk} of {stage} was on disk, resumed from {begun}")
    # A checkpoint is written while the next steps run, and the one after it waits for that.
    if lost > 2 * _EVERY:
        faults.append(f"kill {number}: {lost} steps of {stage} lost, saved every {_EVERY}")
    return max(lost, 0)


def run(options: Options) -> None:
    """Print a row for each kill. Exit with status 1 if a resumed run differs."""
    if options.out:
        out = pathlib.Path(options.out).absolute()
        out.mkdir(parents=True)
        sys.exit(not _measure(out, options))
    with tempfile.TemporaryDirectory() as folder:
        good = _measure(pathlib.Path(folder), options)
    sys.exit(not good)


if __name__ == "__main__":
    cli.start(
        Options, run, sys.argv[1:], prog="python -m benchmarks.kill_resume", description=__doc__
    )
