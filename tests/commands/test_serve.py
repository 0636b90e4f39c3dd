"""sprint-jax serve from the command line."""

import contextlib
import signal

import httpx
import pytest

from helpers.runs import free_port
from helpers.servers import CLIENT, image_of, send_request, wait_until


def test_serve_starts_answers_and_ends(command, finished):
    """Report progress, draw an image, and end on SIGTERM with status 0. The port is taken."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    process = command(
        "sprint_jax",
        "serve",
        f"--model={finished}",
        f"--port={port}",
        "--max_steps=1",
        background=True,
    )
    try:
        states = []

        def ready():
            assert process.poll() is None, process.stderr.read()
            with contextlib.suppress(httpx.TransportError):
                states.append(CLIENT.get(f"{address}/health").json())
            return states and states[-1]["ready"]

        wait_until(ready, 120)
        assert states[-1]["compiled"] == states[-1]["programs"] == 2
        assert image_of(send_request(address, steps=1)).shape == (32, 32, 3)
        assert send_request(address, steps=2).status_code == 400
        second = command("sprint_jax", "serve", f"--model={finished}", f"--port={port}")
        assert second.returncode == 2 and f"--port={port}" in second.stderr.splitlines()[-1]
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0 and f"ready: {address}" in out and "Traceback" not in err, (
            err
        )
    finally:
        process.kill()


def test_serve_without_a_model_offers_the_shipped_student(command):
    """Serve `assets/shapes`, and say so. Fails when --model is required."""
    port = free_port()
    process = command("sprint_jax", "serve", f"--port={port}", "--max_steps=1", background=True)
    try:
        offered = []

        def answers():
            assert process.poll() is None, process.stderr.read()
            with contextlib.suppress(httpx.TransportError):
                offered.append(CLIENT.get(f"http://127.0.0.1:{port}/options").json())
            return offered

        wait_until(answers, 120)
        assert offered[-1]["model"] == "shapes" and offered[-1]["steps"] == [1]
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0 and "no --model" in err, err
    finally:
        process.kill()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--modle=x"], ["--modle", "--model"]),
        (["--model=/nowhere"], ["/nowhere"]),
        (["--model=x", "--port=70000"], ["--port"]),
        (["--model=x", "--queue=0"], ["--queue"]),
        (["--model=x", "--host=300.1.1.1"], ["--host"]),
        (["--model=x", "--sizes=big"], ["--sizes"]),
    ],
)
def test_serve_refuses(command, flags, words):
    result = (
        command("sprint_jax", "serve", *flags, "--port=0")
        if not any("port" in flag for flag in flags)
        else command("sprint_jax", "serve", *flags)
    )
    line = result.stderr.strip().splitlines()[-1]
    assert (
        result.returncode == 2
        and line.startswith("error: ")
        and all(word in line for word in words)
    ), line


def test_a_missing_package_is_named(command):
    """Run without the extra `app`. Fails when the import's own traceback comes through."""
    missing = "import sys; sys.modules['fastapi'] = None"
    result = command("sprint_jax", "serve", "--model=x", before=missing)
    line = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and "fastapi" in line and "sprint_jax[app]" in line, line
