"""Servers with a stand-in for the model, which paints the request, and clients for them."""

import base64
import contextlib
import io
import json
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

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
from sprint_jax.serving.schema import Limits, Request

LIMITS = Limits(
    steps=(1, 2, 3, 4),
    sizes=((32, 32), (32, 48)),
    guidance_scale=1.5,
    schedule="code",
    takes_image=True,
    takes_control=False,
)


def paint(request: Request) -> np.ndarray:
    """Return an image uint8 [H, W, 3] that depends on the request alone."""
    if "zebra" in request.prompt:
        raise UserError("word 'zebra' is unknown")
    if "fire" in request.prompt:
        raise RuntimeError("a fault of ours")
    start = 0 if request.image is None else request.image
    rng = np.random.default_rng([request.seed, request.steps, zlib.crc32(request.prompt.encode())])
    noise = rng.integers(0, 256, (request.height, request.width, 3), np.uint8)
    return (noise ^ start).astype(np.uint8)


def wait_until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    """Wait until a condition is true. Raises AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


class Gate:
    """Work that waits until `open` is set. `seen` has the items in the order of work."""

    def __init__(self) -> None:
        self.open, self.seen = threading.Event(), []

    def __call__(self, item: Any) -> Any:
        self.seen.append(item)
        self.open.wait(20)
        return item


def start_queue(work: Callable, capacity: int = 8, **options: Any) -> Queue:
    """Return a started queue that is ready."""
    queue = Queue(work, capacity, **options)
    queue.start()
    wait_until(lambda: queue.ready)
    return queue


@contextlib.contextmanager
def run_server(
    work: Callable = paint,
    capacity: int = 8,
    password: str | None = None,
    limits: Limits = LIMITS,
    prepare: Callable | None = None,
) -> Iterator[tuple[str, Queue]]:
    """Run a server on loopback and yield (address, queue).

    It is ready, unless `prepare` is given.
    """
    queue = Queue(work, capacity, prepare) if prepare else start_queue(work, capacity)
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


def image_file(image: np.ndarray | Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    """Return the bytes of an image file."""
    shown = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    shown.save(buffer, file_format, **options)
    return buffer.getvalue()


def to_base64(data: bytes) -> str:
    """Return bytes as base64."""
    return base64.b64encode(data).decode()


def request_body(**fields: Any) -> bytes:
    """Return the JSON of a request."""
    return json.dumps({"prompt": "a red circle"} | fields).encode()


def refusal_of(function: Callable, *arguments: Any, **options: Any) -> Refused:
    """Return the refusal that a call raises."""
    with pytest.raises(Refused) as caught:
        function(*arguments, **options)
    return caught.value


# Reading the certificates takes longer than all requests of these tests.
CLIENT = httpx.Client(verify=False, timeout=60)


def send_request(
    address: str, headers: dict[str, str] | None = None, **fields: Any
) -> httpx.Response:
    """Return the server's answer to a request."""
    headers = {"content-type": "application/json"} | (headers or {})
    return CLIENT.post(f"{address}/generate", content=request_body(**fields), headers=headers)


def image_of(response: httpx.Response) -> np.ndarray:
    """Return the image of an answer, uint8 [H, W, 3]."""
    assert response.status_code == 200, response.text
    return np.asarray(Image.open(io.BytesIO(response.content)))


def open_connection(address: str, content: bytes, length: int | None = None) -> socket.socket:
    """Return the socket of a client that has sent its request and can go away.

    `length` is the announced length of the content.
    """
    host, port = address.removeprefix("http://").split(":")
    raw = socket.create_connection((host, int(port)), 10)
    length = length or len(content)
    head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    raw.sendall(f"POST /generate HTTP/1.1\r\n{head}".encode() + content)
    return raw
