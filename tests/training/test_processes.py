"""Several processes as one: who takes part, what interruptions leave, who is named at a failure."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from helpers.runs import ROOT, SMOKE_FLAGS, TINY_FLAGS, free_port, read_rows, wait_for_row
from sprint_jax.errors import UserError
from sprint_jax.runtime import distributed, launchers
from sprint_jax.runtime.launchers import Place

# Threads of this process stand in for processes that `os._exit` ends.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

HERE = socket.gethostname()
# Nothing compiled is kept between runs of several processes. So the runs of the suite are of a
# teacher alone; the same with the student takes minutes (-m long).
SMALL = (
    *SMOKE_FLAGS,
    "--config.phases.teacher.steps=16",
    "--config.phases.teacher.optimizers.network.kind=adamw",
    "--config.phases.teacher.optimizers.network.lr=1e-3",
    "--config.phases.sprint.steps=16",
    "--config.phases.sprint.optimizers.student.kind=adamw",
    "--config.run.checkpoint_every=4",
    "--config.evaluation.teacher_steps=1",
    "--config.evaluation.batch=8",
)
ALONE = ("--config.phases.sprint.steps=0",)
# These gradients in front of a normalization are zero but for rounding. They are not compared.
ROUNDING = ("disc_grad_norm/conv_in/bias", "disc_grad_norm/conv_mid/bias")


# --- who takes part ---


def gather(*places, seconds=5.0):
    """Return what `_Watch` gives each of the places, all started at once.

    That is the watch itself or the message of its UserError.
    """
    found = [None] * len(places)

    def come(i):
        try:
            found[i] = distributed._Watch(places[i], seconds)
        except UserError as error:
            found[i] = str(error)

    threads = [threading.Thread(target=come, args=(i,)) for i in range(len(places))]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join(30)
    return found


@pytest.fixture
def coordinator():
    """Return the address of a free port."""
    return f"127.0.0.1:{free_port()}"


def leave(watches):
    """End all watches."""
    for watch in watches:
        watch.leave()
        watch._thread.join(5)


def test_all_processes_meet(coordinator):
    watches = gather(*(Place(coordinator, 3, i) for i in (2, 0, 1)))
    assert [w._names[2] for w in watches] == [f"process 2 on {HERE}"] * 3
    leave(watches)


def test_missing_process_is_named(coordinator):
    begin = time.monotonic()
    for message in gather(Place(coordinator, 3, 0), Place(coordinator, 3, 2), seconds=1.0):
        assert "process 1 of 3 did not come within 1 s" in message
        assert f"process 2 on {HERE}" in message
        assert "--startup_seconds" in message
    assert time.monotonic() - begin < 5


def test_wrong_number_of_processes(coordinator):
    for message in gather(Place(coordinator, 2, 0), Place(coordinator, 3, 1)):
        assert f"process 1 on {HERE} was started with --processes=3, process 0 with 2" in message


def test_two_processes_with_one_number(coordinator):
    """A process that is still waiting to be counted also ends with one line."""
    first, *others = gather(*(Place(coordinator, 4, i) for i in (0, 1, 1, 2)))
    assert f"two processes say that they are 1: process 1 on {HERE}" in first
    assert all(m == first for m in others[:2])
    assert (
        others[2] in (first, "process 0 ended during the start: see its log")
        or "does not answer" in others[2]
    )


def test_process_0_absent(coordinator):
    [message] = gather(Place(coordinator, 2, 1), seconds=0.5)
    assert f"process 0 does not answer at {coordinator}" in message
    assert "--startup_seconds" in message


def test_port_in_use(coordinator):
    with socket.create_server(("", int(coordinator.rpartition(":")[2]) + 1)):
        [message] = gather(Place(coordinator, 2, 0), seconds=0.5)
    assert "cannot listen on port" in message and "--coordinator" in message


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"{}\n", b""])
def test_strangers_on_the_port(coordinator, said):
    """A port scanner does not end the job."""
    found = []
    thread = threading.Thread(target=lambda: found.extend(gather(Place(coordinator, 2, 0))))
    thread.start()
    for _ in range(100):
        try:
            stranger = socket.create_connection(
                ("127.0.0.1", int(coordinator.rpartition(":")[2]) + 1), timeout=1
            )
            break
        except OSError:
            time.sleep(0.02)
    stranger.sendall(said)
    stranger.close()
    found += gather(Place(coordinator, 2, 1))
    thread.join(20)
    assert all(isinstance(w, distributed._Watch) for w in found) and len(found) == 2
    leave(found)


@pytest.fixture
def ended(monkeypatch):
    """Return the list of exit statuses of `os._exit`, which ends only the calling thread."""
    statuses = []

    def end(status):
        """Wait for a process and return its output."""
        statuses.append(status)
        raise SystemExit

    monkeypatch.setattr(distributed.os, "_exit", end)
    return statuses


def test_a_closed_connection_ends_all(coordinator, ended, capsys):
    watches = gather(*(Place(coordinator, 3, i) for i in range(3)))
    watches[1]._closing.set()
    watches[1]._thread.join(5)
    watches[1]._peers[0].close()
    for i in (0, 2):
        watches[i]._thread.join(5)
    assert ended == [distributed.DIED] * 2
    assert capsys.readouterr().err.count(f"error: process 1 on {HERE} ended unexpectedly") == 2


def test_a_regular_end_is_no_failure(coordinator, ended):
    watches = gather(*(Place(coordinator, 3, i) for i in range(3)))
    leave(watches[1:2])
    watches[1]._peers[0].close()
    time.sleep(0.6)
    assert not ended
    leave([watches[0], watches[2]])
    assert not ended


def test_the_reason_of_a_failure_is_sent(coordinator, ended, capsys):
    watches = gather(*(Place(coordinator, 2, i) for i in range(2)))
    watches[1].fail(UserError("the disk is full:\nfree some"))
    watches[0]._thread.join(5)
    assert ended == [distributed.DIED]
    assert (
        f"error: process 1 on {HERE} stopped: the disk is full: free some\n"
        in capsys.readouterr().err
    )


def test_a_failed_collective_does_not_hide_who_died(coordinator, ended, capsys):
    """The exception in the main thread may come before the message.

    Fails when `fail` reports its own error at once.
    """
    watches = gather(*(Place(coordinator, 2, i) for i in range(2)))
    watches[1]._closing.set()
    watches[1]._thread.join(5)
    threading.Timer(0.5, watches[1]._peers[0].close).start()
    watches[0].fail(RuntimeError("connection closed by peer"))
    assert f"error: process 1 on {HERE} ended unexpectedly" in capsys.readouterr().err


@pytest.mark.parametrize(
    "environ, expected",
    [
        ({}, None),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "a1"}, None),
        (
            {"SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "a1"},
            None,
        ),  # an allocation, not one of its steps
        (
            {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_JOB_NODELIST": "gpu[03-06]"},
            Place("gpu03:29400", 4, 3),
        ),
        (
            {
                "SLURM_NTASKS": "2",
                "SLURM_PROCID": "1",
                "SLURM_JOB_NODELIST": "a[1-9]",
                "SLURM_STEP_NODELIST": "a[7-8]",
                "SLURM_JOB_ID": "1230005",
            },
            Place("a7:29410", 2, 1),
        ),
        (
            {"JOB_COMPLETION_INDEX": "2", "COORDINATOR": "train-0.train:29400", "PROCESSES": "8"},
            Place("train-0.train:29400", 8, 2),
        ),
        ({"JOB_COMPLETION_INDEX": "2"}, None),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1,t2", "TPU_WORKER_ID": "1"}, Place("t0:29400", 3, 1)),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1"}, None),
    ],
)
def test_place_from_the_environment(environ, expected):
    assert launchers.place(None, None, None, environ) == expected


@pytest.mark.parametrize(
    "environ, words",
    [
        ({"JOB_COMPLETION_INDEX": "0", "COORDINATOR": "h:1"}, "PROCESSES is not set"),
        (
            {"JOB_COMPLETION_INDEX": "zero", "COORDINATOR": "h:1", "PROCESSES": "2"},
            "JOB_COMPLETION_INDEX=zero is no whole number",
        ),
        ({"SLURM_NTASKS": "x"}, "SLURM_NTASKS=x is no whole number"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "SLURM_JOB_NODELIST is not set"),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": ""}, "TPU_WORKER_ID is not set"),
    ],
)
def test_an_incomplete_environment_is_named(environ, words):
    with pytest.raises(UserError, match=f"^{words}.*--coordinator"):
        launchers.place(None, None, None, environ)


def test_flags_override_the_environment():
    environ = {"TPU_WORKER_HOSTNAMES": "t0,t1,t2", "TPU_WORKER_ID": "1"}
    assert launchers.place("h:1", 2, 0, environ) == Place("h:1", 2, 0)


@pytest.mark.parametrize(
    "flags, words",
    [
        (("h:1", None, None), "all three, or none"),
        (("h", 2, 0), "host:port"),
        (("h:65535", 2, 0), "host:port"),
        (("h:1", 2, 2), "use 0 to 1"),
        (("h:1", 2, -1), "use 0 to 1"),
    ],
)
def test_wrong_places(flags, words):
    with pytest.raises(UserError, match=words):
        launchers.place(*flags, {})


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("gpu[003-007,9],login1", "gpu003"),
        ("gpu[9,12-14]", "gpu9"),
        ("login1", "login1"),
        ("a1,b[2-3]", "a1"),
        ("rack2-n[01-04]", "rack2-n01"),
        ("n[5]", "n5"),
        ("n[01-02]-ib,m3", "n01-ib"),
        ("r[1-2]n[3-4]", "r1n3"),
    ],
)
def test_first_node(nodes, first):
    assert launchers.first_node(nodes) == first


# --- the job in several processes ---


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Return start(workdir, processes) -> Popen of launch/local.sh."""
    environment = os.environ | {
        "PYTHON": sys.executable,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("jax_cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def start(workdir, processes, *flags):
        words = [
            "bash",
            ROOT / "launch/local.sh",
            str(processes),
            *SMALL,
            f"--workdir={workdir}",
            *flags,
        ]
        options = dict(
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        return subprocess.Popen(words, **options)

    return start


def end(process, status=0, seconds=400):
    """Wait for a process and return its output."""
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == status, (process.returncode, out[-1000:], err[-3000:])
    return out, err


def pid_of(launcher, process):
    """Return the pid of one process of a job."""
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text().split("\0")
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if parent == str(launcher.pid) and f"--process={process}" in words:
            return int(folder.name)
    raise AssertionError("no such process")


def wait_for_checkpoint(checkpoint, launched):
    """Wait until a checkpoint exists."""
    for _ in range(600):
        if checkpoint.is_dir():
            return
        assert launched.poll() is None
        time.sleep(0.05)
    raise AssertionError(f"no {checkpoint}")


def kill_process_1(launched):
    """Send SIGKILL to process 1. The others must fail soon and name it."""
    begin = time.monotonic()
    os.kill(pid_of(launched, 1), signal.SIGKILL)
    _out, err = launched.communicate(timeout=60)
    assert time.monotonic() - begin < 30
    assert launched.returncode not in (0, None)
    assert f"error: process 1 on {HERE} ended unexpectedly" in err, err[-2000:]


def assert_same_run(one, other, exactly):
    """Assert that two work directories hold the same rows and weights, exactly or to rounding."""
    names = ("teacher.safetensors", "student.safetensors")
    if exactly:
        assert read_rows(one) == read_rows(other)
        made = [name for name in names if (one / name).exists()]
        assert made
        assert all((one / name).read_bytes() == (other / name).read_bytes() for name in made)
        return
    for a, b in zip(read_rows(one), read_rows(other), strict=True):
        assert a.keys() == b.keys()
        assert (a["stage"], a["step"]) == (b["stage"], b["step"])
        for name in a.keys() - {"stage", *ROUNDING}:
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-6), (
                a["stage"],
                a["step"],
                name,
            )
    for name in (name for name in names if (one / name).exists()):
        a, b = load_file(one / name), load_file(other / name)
        for key in a.keys() | b.keys():
            np.testing.assert_allclose(a[key], b[key], rtol=1e-5, atol=1e-5, err_msg=key)


@pytest.fixture(scope="module")
def two_processes(job, tmp_path_factory):
    """Return the work directory of an uninterrupted run of two processes."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    end(job(workdir, 2, *ALONE))
    return workdir


@pytest.fixture(scope="module")
def two_processes_with_student(job, tmp_path_factory):
    """Return the work directory of such a run with a student."""
    workdir = tmp_path_factory.mktemp("two") / "whole"
    end(job(workdir, 2))
    return workdir


@pytest.mark.slow
def test_two_processes_equal_one(two_processes, job, tmp_path):
    end(job(tmp_path / "run", 1, *ALONE))
    assert_same_run(tmp_path / "run", two_processes, exactly=False)
    one, both = (
        json.loads((d / "summary.json").read_text()) for d in (tmp_path / "run", two_processes)
    )
    assert one["scores"] == both["scores"]


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 4])
def test_other_counts_equal_two_with_a_student(
    two_processes_with_student, job, tmp_path, processes
):
    end(job(tmp_path / "run", processes))
    assert_same_run(tmp_path / "run", two_processes_with_student, exactly=False)


@pytest.mark.slow
def test_killed_and_resumed_is_bit_equal(two_processes, job, tmp_path):
    """Process 1 is killed: the other ends soon and names it, and the same command resumes
    the run.
    """
    workdir = tmp_path / "run"
    launched = job(workdir, 2, *ALONE)
    wait_for_row(workdir, "teacher", 6, launched)
    wait_for_checkpoint(workdir / "checkpoints/teacher/4", launched)
    kill_process_1(launched)
    out, _err = end(job(workdir, 2, *ALONE))
    assert "teacher: resumed from checkpoint at step" in out
    assert_same_run(workdir, two_processes, exactly=True)


@pytest.mark.long
def test_interrupted_and_killed_runs_end_bit_equal(two_processes_with_student, job, tmp_path):
    """Process 1 is killed in the teacher's training and interrupted in the sprint, whose rounds
    have two steps.
    """
    workdir = tmp_path / "run"
    launched = job(workdir, 2)
    wait_for_row(workdir, "teacher", 6, launched)
    wait_for_checkpoint(workdir / "checkpoints/teacher/4", launched)
    kill_process_1(launched)

    launched = job(workdir, 2)
    wait_for_row(workdir, "sprint", 4, launched)
    os.kill(pid_of(launched, 1), signal.SIGTERM)
    out, _ = end(launched)
    saved = max(int(p.name) for p in (workdir / "checkpoints/sprint").iterdir() if p.name.isdigit())
    assert "teacher: resumed from checkpoint at step 4 of 16" in out
    assert f"sprint: stopped at step {saved} of 16" in out
    assert "rerun the same command to resume" in out
    assert 4 <= saved < 16 and read_rows(workdir)[-1]["step"] <= saved

    out, _err = end(job(workdir, 2))
    assert f"sprint: resumed from checkpoint at step {saved} of 16" in out
    assert_same_run(workdir, two_processes_with_student, exactly=True)


@pytest.mark.slow
def test_different_configs(job, command, tmp_path):
    """Each process names the key and both values, and all end soon."""
    coordinator = f"--coordinator=127.0.0.1:{free_port()}"
    flags = (*TINY_FLAGS, f"--workdir={tmp_path / 'run'}", coordinator, "--processes=2")
    begin = time.monotonic()
    both = [
        command(
            "sprint_jax.main", *flags, f"--process={i}", f"--config.seed={7 * i}", background=True
        )
        for i in range(2)
    ]
    for process in both:
        _, err = process.communicate(timeout=100)
        assert process.returncode not in (0, None)
        assert "config.seed is 0 at process 0 and 7 at process 1" in err.strip().splitlines()[-1], (
            err[-2000:]
        )
        assert "Traceback" not in err
    assert time.monotonic() - begin < 60
    assert not (tmp_path / "run").exists()


def test_missing_process_ends_the_command(command, tmp_path):
    result = command(
        "sprint_jax.main",
        *TINY_FLAGS,
        f"--workdir={tmp_path / 'run'}",
        f"--coordinator=127.0.0.1:{free_port()}",
        "--processes=2",
        "--process=0",
        "--startup_seconds=1",
    )
    assert result.returncode == 2
    assert (
        result.stderr.strip()
        .splitlines()[-1]
        .startswith("error: process 1 of 2 did not come within 1 s")
    )
