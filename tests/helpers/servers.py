"""Servers with a stand-in for the model, which paints its request, and clients for them."""

import base64
import contextlib
import io
import json
import socket
import threading
import time
import zlib

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image

from sprint_jax.errors import UserError
from sprint_jax.serving import server
from sprint_jax.serving.app import make_app
from sprint_jax.serving.queue import Queue
from sprint_jax.serving.refused import Refused
from sprint_jax.serving.schema import Limits

LIMITS = Limits(
    steps=(1, 2, 3, 4),
    sizes=((32, 32), (32, 48)),
    guidance_scale=1.5,
    schedule="code",
    takes_image=True,
    takes_control=False,
)


def paint(request):
    """An image that belongs to its request alone."""
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
    """A started queue, ready."""
    queue = Queue(work, capacity, **options)
    queue.start()
    wait_until(lambda: queue.ready)
    return queue


@contextlib.contextmanager
def served(work=paint, capacity=8, password=None, limits=LIMITS, prepare=None):
    """A server of its own on loopback, ready unless `prepare` is given. Yields (address, queue)."""
    queue = Queue(work, capacity, prepare) if prepare else line(work, capacity)
    if prepare:
        queue.start()
    app = make_app(queue, limits, name="model", examples=["a red circle"], password=password)
    listener = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(server.configure(app))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_until(lambda: running.started)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", queue
    finally:
        running.should_exit = True
        thread.join(10)
        queue.close()


def image_file(array_or_image, file_format="PNG", **options):
    """The bytes of an image file."""
    image = (
        array_or_image
        if isinstance(array_or_image, Image.Image)
        else Image.fromarray(array_or_image)
    )
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def encoded(data):
    """Bytes as base64."""
    return base64.b64encode(data).decode()


def body(**fields):
    """The JSON of a request."""
    return json.dumps({"prompt": "a red circle"} | fields).encode()


def refusal(function, *arguments, **options):
    """What a call is refused with."""
    with pytest.raises(Refused) as caught:
        function(*arguments, **options)
    return caught.value


# Certificates take longer to read than all that these tests do.
CLIENT = httpx.Client(verify=False, timeout=60)


def ask(address, headers=None, **fields):
    headers = {"content-type": "application/json"} | (headers or {})
    return CLIENT.post(f"{address}/generate", content=body(**fields), headers=headers)


def drawn(response):
    """The image of an answer: uint8 [H, W, 3]."""
    assert response.status_code == 200, response.text
    return np.asarray(Image.open(io.BytesIO(response.content)))


def connection(address, content, length=None):
    """A client that has sent its request and can go away."""
    host, port = address.removeprefix("http://").split(":")
    raw = socket.create_connection((host, int(port)), 10)
    length = length or len(content)
    head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    raw.sendall(f"POST /generate HTTP/1.1\r\n{head}".encode() + content)
    return raw
