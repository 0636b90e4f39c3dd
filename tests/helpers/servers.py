"""Servers with a stand-in for the model, which paints its request."""

import contextlib
import socket
import threading
import time
import zlib

import numpy as np

from sprint_jax.commands import serve as door
from sprint_jax.errors import UserError
from sprint_jax.serving import api, page, requests
from sprint_jax.serving import queue as queue_lib

LIMITS = requests.Limits(
    (1, 2, 3, 4), ((32, 32), (32, 48)), 1.5, "code", starts=True, control=False
)


def paint(request):
    """A picture that belongs to its request alone."""
    if "zebra" in request.prompt:
        raise UserError("word 'zebra' is unknown")
    if "fire" in request.prompt:
        raise RuntimeError("a fault of ours")
    start = 0 if request.image is None else request.image
    rng = np.random.default_rng([request.seed, request.steps, zlib.crc32(request.prompt.encode())])
    return (rng.integers(0, 256, (request.height, request.width, 3), np.uint8) ^ start).astype(
        np.uint8
    )


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


class Gate:
    """Work that waits until it is let go. seen: items in the order of work."""

    def __init__(self):
        self.open, self.seen = threading.Event(), []

    def __call__(self, item):
        self.seen.append(item)
        self.open.wait(20)
        return item


def line(work, capacity=8, **options):
    queue = queue_lib.Queue(work, capacity, **options)
    queue.start()
    wait_until(lambda: queue.ready)
    return queue


@contextlib.contextmanager
def served(work=paint, capacity=8, password=None, with_page=False, limits=LIMITS, prepare=None):
    """A server of its own on loopback, ready unless `prepare` is given. Yields (address, its queue)."""
    import uvicorn

    queue = queue_lib.Queue(work, capacity, prepare) if prepare else line(work, capacity)
    if prepare:
        queue.start()
    application = api.make(queue, limits, password)
    if with_page:
        page.mount(application, limits, "model", ["a red circle"])
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(door.server_config(application))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", queue
    finally:
        server.should_exit = True
        thread.join(10)
        queue.close()
