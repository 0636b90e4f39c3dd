"""The JSON API: POST /generate, GET /schema, GET /health, GET /openapi.json; and the guard before all of them.

A request passes three gates. The line must have a place, which is asked before the body is read. At most `_READERS`
bodies are read and decoded at a time, each within `_READ_SECONDS`, so slow senders keep nobody out of the line. Then it
waits in the line, which it leaves as soon as its client goes away.
"""

import asyncio
import base64
import contextlib
import io
import secrets
import sys
import time
import traceback

import numpy as np
from PIL import Image

from sprint_jax.errors import UserError
from sprint_jax.serving import queue as queue_lib
from sprint_jax.serving import requests as requests_lib
from sprint_jax.serving.refused import Refused

SESSION = "x-session"
_READ_SECONDS = 10.0  # for a whole body
SEND_SECONDS = 30.0  # for a client that does not take its answer
_READERS = 64
_DECODERS = 2  # pictures decoded at a time: each may need 200 MB
_MOST_SESSION = 64

# Nothing from elsewhere is loaded, and no other site frames the page. Gradio evaluates code of its own making.
_CONTENT_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self' data: blob:; worker-src 'self' blob:; frame-ancestors 'self'"
)
_HEADERS = [
    (b"content-security-policy", _CONTENT_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


def make(
    queue: queue_lib.Queue,
    limits: requests_lib.Limits,
    password: str | None = None,
    *,
    local: bool = False,
):
    """The FastAPI application without the page (`page.mount` adds it).

    queue: its items are `requests.Request`, its results uint8 [H, W, 3]. password: asked for by HTTP Basic, with any
    user name; None for none. local: whether only this machine may ask; without a password names other than its own are then refused.
    """
    import fastapi

    app = fastapi.FastAPI(
        docs_url=None, redoc_url=None, openapi_url=None
    )  # FastAPI's docs load scripts from elsewhere
    door = _Door(queue, limits)
    answer = lambda content: (
        lambda request: fastapi.responses.JSONResponse(
            content(), headers={"cache-control": "no-store"}
        )
    )
    app.add_route("/generate", door.generate, methods=["POST"])
    app.add_route("/schema", answer(lambda: requests_lib.schema(limits)), methods=["GET"])
    app.add_route("/openapi.json", answer(lambda: openapi(limits, password)), methods=["GET"])
    app.add_route("/health", answer(lambda: health(queue)), methods=["GET"])
    app.add_middleware(Guard, password=password, local=local and not password)
    return app


def health(queue: queue_lib.Queue) -> dict:
    """What GET /health says: ready, programs compiled and to compile, requests waiting and places in the line."""
    return dict(
        ready=queue.ready,
        compiled=queue.done,
        programs=queue.total,
        waiting=queue.length,
        places=queue.capacity,
    )


def openapi(limits: requests_lib.Limits, password: str | None) -> dict:
    """OpenAPI 3.1 description of the API."""
    refusal = {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {"error": {"type": "string"}},
                "required": ["error"],
            }
        }
    }
    told = lambda description: {"description": description, "content": refusal}
    generate = {
        "summary": "Draw one picture",
        "parameters": [
            {
                "name": "X-Session",
                "in": "header",
                "schema": {"type": "string", "maxLength": _MOST_SESSION},
                "description": "Requests of one session replace each other while they wait: the newest wins.",
            }
        ],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": requests_lib.schema(limits)}},
        },
        "responses": {
            "200": {
                "description": "The picture. Server-Timing has the milliseconds of waiting, drawing and encoding.",
                "content": {
                    "image/png": {"schema": {"type": "string", "contentMediaType": "image/png"}}
                },
            },
            "400": told("Wrong input; the sentence names it."),
            "408": told("The body did not come in time."),
            "409": told("A newer request of the same session took this one's place."),
            "413": told("Body or picture too large."),
            "415": told("Not application/json, or not a PNG, JPEG or WebP file."),
            "429": told("The line is full; Retry-After says when to come again."),
            "503": told("The model is being compiled, or the server stops."),
        },
    }
    described = {
        "openapi": "3.1.0",
        "info": {"title": "sprint_jax", "version": "1"},
        "paths": {"/generate": {"post": generate}},
    }
    if password:
        described["components"] = {
            "securitySchemes": {"password": {"type": "http", "scheme": "basic"}}
        }
        described["security"] = [{"password": []}]
    return described


class _Door:
    """POST /generate."""

    def __init__(self, queue, limits):
        self._queue, self._limits = queue, limits
        self._reading = 0
        self._decoding = asyncio.Semaphore(_DECODERS)

    async def generate(self, request):
        from starlette import requests, responses

        try:
            wanted, session = await self._wanted(request)
            future = self._queue.submit(wanted, session)
            answer = await _or_gone(request, future)
            begin = time.perf_counter()
            data = await asyncio.to_thread(png, answer.result)
            stages = {
                "waiting": answer.waiting,
                "drawing": answer.working,
                "encoding": time.perf_counter() - begin,
            }
            timing = ", ".join(
                f"{name};dur={1000 * seconds:.2f}" for name, seconds in stages.items()
            )
            headers = {"server-timing": timing, "cache-control": "no-store"}
            return responses.Response(data, media_type="image/png", headers=headers)
        except Refused as refusal:
            return _refusal(refusal)
        except UserError as error:  # of the model, about the prompt or the schedule
            return _refusal(Refused(400, str(error)))
        except requests.ClientDisconnect:
            return responses.Response(status_code=499)  # nobody reads it
        except Exception:
            traceback.print_exc(file=sys.stderr)
            return _refusal(Refused(500, "drawing failed; the server's log says why"))

    async def _wanted(self, request):
        """(checked request, session) from headers and body."""
        if (
            request.headers.get("content-type", "").partition(";")[0].strip().lower()
            != "application/json"
        ):
            # Other sites' pages can send forms and plain text here unasked, but not this type.
            raise Refused(
                415, "the content type is not application/json: send JSON with that header"
            )
        session = request.headers.get(SESSION, "")
        if len(session) > _MOST_SESSION:
            raise Refused(
                400, f"X-Session has {len(session)} characters: use at most {_MOST_SESSION}"
            )
        self._queue.check(session)
        if self._reading >= _READERS:
            raise Refused(429, "too many requests are being read: try again in a second", 1)
        self._reading += 1
        try:
            async with asyncio.timeout(_READ_SECONDS):
                body = await _body(request)
            async with self._decoding:
                return await asyncio.to_thread(requests_lib.parse, body, self._limits), session
        except TimeoutError:
            raise Refused(
                408, f"the request did not come within {_READ_SECONDS:g} seconds: send it faster"
            ) from None
        finally:
            self._reading -= 1


async def _body(request):
    """The bytes of a body that is not too large, known before all of it has come."""
    most = requests_lib.MOST_BODY
    refusal = Refused(413, f"the request has more than {most} bytes: send smaller pictures")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > most:
        raise refusal
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise refusal
    return bytes(body)


async def _or_gone(request, future):
    """The future's result. When the client goes away first, the future is cancelled and ClientDisconnect raised."""
    from starlette import requests

    answer = asyncio.wrap_future(future)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise requests.ClientDisconnect()
        return answer.result()
    finally:
        answer.cancel()
        gone.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await gone


async def _gone(request):
    while (await request.receive())["type"] != "http.disconnect":
        pass


def png(image: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as a PNG file. Compressed lightly: a millisecond counts more here than a kilobyte."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=2)
    return buffer.getvalue()


def _refusal(refusal):
    from starlette import responses

    headers = {"cache-control": "no-store"}
    if refusal.retry_after is not None:
        headers["retry-after"] = str(refusal.retry_after)
    return responses.JSONResponse(
        {"error": refusal.sentence}, status_code=refusal.status, headers=headers
    )


# What of the page's framework is let through, to read only: its own scripts and styles. It brings much more (uploads,
# files, proxies, queues, editors), none of which this page uses.
_PAGE = ("/", "/theme.css", "/favicon.ico")
_PAGE_FOLDERS = ("/assets/", "/static/")
_LOCAL = ("localhost", "127.0.0.1", "[::1]")
_API = {"/generate": ("POST",), "/schema": ("GET",), "/health": ("GET",), "/openapi.json": ("GET",)}


class Guard:
    """ASGI middleware before everything: the password, other names and other sites' pages, the list of paths."""

    def __init__(self, app, password: str | None, local: bool):
        self._app = app
        self._password = password
        self._local = local

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        refusal = self._refusal(scope["method"], scope["path"], headers)
        app = _refusal(refusal) if refusal else self._app
        if refusal and refusal.status == 401:
            app.headers["www-authenticate"] = 'Basic realm="sprint_jax"'
        if refusal and refusal.status == 405:
            app.headers["allow"] = ", ".join(_methods(scope["path"]))
        await app(scope, receive, _watched(send))

    def _refusal(self, method, path, headers):
        """A Refused, or None where the request may pass."""
        if self._password and not _knows(self._password, headers.get("authorization", "")):
            return Refused(401, "the password is missing or wrong")
        if self._local and _host(headers.get("host", "").lower()) not in _LOCAL:
            # Another site's page whose name was made to lead here. Without a password the name is all that tells it from this server's.
            return Refused(
                403,
                "this server is asked by another name than localhost: use that, or set --password",
            )
        origin = headers.get("origin")
        if origin and method != "GET" and origin.partition("://")[2] != headers.get("host"):
            return Refused(
                403, "another site's page asks: use this server's own page, or a program"
            )
        allowed = _methods(path)
        if not allowed:
            return Refused(
                404,
                "there is nothing here: the API has POST /generate, GET /schema, GET /openapi.json and GET /health",
            )
        return (
            None if method in allowed else Refused(405, f"{path} takes {' or '.join(allowed)} only")
        )


def _host(header):
    """The name in a Host header, without the port."""
    return header.rpartition(":")[0] if header.rpartition(":")[2].isdecimal() else header


def _methods(path):
    """Methods that are let through to a path; none where nothing is."""
    if path in _PAGE or path.startswith(_PAGE_FOLDERS):
        return ("GET", "HEAD")
    return _API.get(path, ())


def _knows(password, authorization):
    """Whether an Authorization header holds the password, in a time that does not tell how much of it."""
    kind, _, token = authorization.partition(" ")
    try:
        given = base64.b64decode(token, validate=True).partition(b":")[2]
    except ValueError:
        return False
    return kind.lower() == "basic" and secrets.compare_digest(given, password.encode())


def _watched(send):
    """The server's `send` with our headers."""

    async def watched(message):
        if message["type"] == "http.response.start":
            message = message | {"headers": [*message.get("headers", []), *_HEADERS]}
        await send(message)

    return watched
