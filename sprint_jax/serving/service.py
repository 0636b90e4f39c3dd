"""Serve a model: from its path and the options of `sprint-jax serve` to the end of the process."""

import contextlib
import os
import pathlib
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import tqdm
import uvicorn

from sprint_jax.errors import UserError
from sprint_jax.runtime import ending
from sprint_jax.sampling.exported import Exported
from sprint_jax.sampling.opening import open_model
from sprint_jax.sampling.pipeline import Pipeline
from sprint_jax.serving import artist, server
from sprint_jax.serving.app import make_app
from sprint_jax.serving.queue import Queue
from sprint_jax.serving.schema import Limits

_LOCAL = ("127.0.0.1", "::1")


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    sizes: Sequence[str] = (),
    max_steps: int = 4,
    max_prompt: int = 2000,
    queue: int = 64,
    password: str | None = None,
    ready_tokens: int | None = None,
    grace: float = 10.0,
    **options: Any,
) -> None:
    """Load a model and serve it until a signal ends the process.

    model: a folder or an exported file. sizes: texts such as "768x1344". options: keywords of
    `sampling.opening.open_model`. The others are the options of `sprint-jax serve`. Raises
    UserError.
    """
    for name, value, low, high in (
        ("port", port, 0, 65535),
        ("queue", queue, 1, 10_000),
        ("max_steps", max_steps, 1, 50),
        ("max_prompt", max_prompt, 1, 100_000),
        ("grace", grace, 0, 3600),
    ):
        if not low <= value <= high:
            raise UserError(f"--{name}={value}: use {low} to {high}")
    pairs = parse_sizes(sizes)
    listener = server.listen(host, port)  # before the model, whose loading may take minutes
    path = pathlib.Path(model)
    pipe = open_model(path, **options)
    limits = artist.limits_of(pipe, pairs, max_steps, max_prompt)
    run(
        pipe,
        path,
        limits,
        listener,
        capacity=queue,
        password=password,
        ready_tokens=ready_tokens,
        grace=grace,
    )


def parse_sizes(texts: Sequence[str]) -> list[tuple[int, int]] | None:
    """Return (height, width) of texts such as "768x1344", or None for none. Raises UserError."""
    if not texts:
        return None
    try:
        return [
            (int(height), int(width)) for height, width in (t.lower().split("x") for t in texts)
        ]
    except ValueError:
        raise UserError(
            f"--sizes={','.join(texts)}: give HEIGHTxWIDTH, for example 1024x1024,768x1344"
        ) from None


def run(
    pipe: Pipeline | Exported,
    path: pathlib.Path,
    limits: Limits,
    listener: socket.socket,
    *,
    capacity: int = 64,
    password: str | None = None,
    ready_tokens: int | None = None,
    grace: float = 10.0,
) -> None:
    """Serve a model until a signal ends the process. The page answers while the model compiles.

    path: of the model. capacity: requests that may wait. password: None for none. ready_tokens: see
    `artist.rehearsals`. grace: seconds for the image in work at the end. Raises what compiling
    raised.
    """
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    local = host in _LOCAL
    draw = artist.make_artist(pipe, path)
    failures: list[Exception] = []

    def prepare(say: Callable[[int, int], None]) -> None:
        wanted = artist.rehearsals(pipe, limits, ready_tokens)
        say(0, len(wanted))
        for done, request in enumerate(tqdm.tqdm(wanted, unit="program", desc="compile"), 1):
            draw(request)
            say(done, len(wanted))

    def prepared(error: Exception | None) -> None:
        if error is None:
            with contextlib.suppress(BrokenPipeError):  # `| head` has read what it wanted
                print(f"ready: {address}", flush=True)
            return
        failures.append(error)
        uvicorn_server.should_exit = True

    queue = Queue(draw, capacity, prepare, prepared)
    offer = {"name": path.resolve().name, "examples": artist.examples(pipe)}
    app = make_app(queue, limits, password=password, local=local, **offer)
    uvicorn_server = server.Server(server.configure(app))
    if not password and not local:
        warning = f"warning: {address} is open to other machines without a password"
        print(f"{warning}: set --password", file=sys.stderr)
    print(f"{address} (compiling; the page says when it is ready)", flush=True)
    queue.start()
    line = f"finishing the image in work, {grace:g} s at most; a second signal ends at once"
    with ending.asking(line, lambda: _stop(queue, uvicorn_server, grace)):
        uvicorn_server.run(sockets=[listener])
    queue.close()
    if failures:
        raise failures[0]
    if not queue.join(0):
        _leave()


def _stop(queue: Queue, uvicorn_server: uvicorn.Server, grace: float) -> None:
    """End the server, in a thread of its own, when the image in work is done or time is up.

    New requests are answered with 503 meanwhile.
    """

    def stop() -> None:
        queue.finish(grace)
        uvicorn_server.should_exit = True

    threading.Thread(target=stop, daemon=True).start()


def _leave() -> NoReturn:
    """End the process with status 0 while the worker compiles or draws.

    Nothing can stop XLA at work, and Python's own end would free what it works on: a segmentation
    fault, now and then.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(0)
