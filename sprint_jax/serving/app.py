"""The web application: a JSON API before one request queue, and the page that uses it.

POST /generate draws one image. A request passes three gates. The queue must have a place, which is
checked before the body is read. At most `READERS` bodies are read and decoded at a time, each with
a deadline, so that slow senders block nobody. Then the request waits in the queue, and leaves it as
soon as its client goes away. GET /schema, /openapi.json and /health describe the API; GET /options
has the values that the page shows. Nothing is stored.
"""

import asyncio
import contextlib
import io
import pathlib
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import fastapi
import numpy as np
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.models import HTTPBase
from fastapi.security.base import SecurityBase
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from sprint_jax.errors import UserError
from sprint_jax.sampling import generation
from sprint_jax.serving import body, schema, uploads
from sprint_jax.serving.guard import Guard
from sprint_jax.serving.queue import Answer, Queue
from sprint_jax.serving.refused import Refused

READERS = 64
_DECODERS = 2  # images decoded at a time: each may need 200 MB
_MOST_SESSION = 64
_PAGE = {"/": "page.html", "/page.js": "page.js", "/page.css": "page.css"}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The image. Server-Timing has the milliseconds of each stage.",
        "content": {"image/png": {"schema": {"type": "string", "contentMediaType": "image/png"}}},
    },
    "default": {"model": schema.Error, "description": "Any other error."},
} | {
    status: {"model": schema.Error, "description": text}
    for status, text in {
        400: "Wrong input; the sentence names it.",
        408: "The body did not arrive in time.",
        409: "A newer request of the same session took this one's place.",
        413: "Body or image too large.",
        415: "Not application/json, or not a PNG, JPEG or WebP file.",
        429: "The queue is full; Retry-After says when to try again.",
        503: "The model is being compiled, or the server is stopping.",
    }.items()
}


def make_app(
    queue: Queue,
    limits: schema.Limits,
    *,
    name: str = "",
    examples: Sequence[str] = (),
    password: str | None = None,
    local: bool = False,
) -> fastapi.FastAPI:
    """Return the application.

    queue: takes `schema.Request` and returns uint8 [H, W, 3]. name: of the model, for the page.
    examples: prompts that the page offers. password: required by HTTP Basic, unless None. local:
    whether only this machine may connect; without a password other host names are then refused.
    """
    app = fastapi.FastAPI(
        title="sprint_jax",
        version="1",
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        routes=[Route(path, _page_file) for path in _PAGE],
        dependencies=[fastapi.Depends(_Basic())] if password else [],
        exception_handlers=_HANDLERS,
    )
    _add_generate(app, queue, limits)

    @app.get("/schema", summary="The JSON Schema of POST /generate")
    def get_schema() -> dict[str, Any]:
        return schema.json_schema(limits)

    @app.get("/health", summary="Whether the model is ready, and how many requests wait")
    async def get_health() -> dict[str, bool | int]:
        progress = {"ready": queue.ready, "compiled": queue.done, "programs": queue.total}
        return progress | {"waiting": queue.length, "places": queue.capacity}

    @app.get("/options", include_in_schema=False)
    def get_options() -> dict[str, Any]:
        return page_options(limits, name, examples)

    app.add_middleware(Guard, password=password, local=local and not password)
    return app


def page_options(limits: schema.Limits, name: str, examples: Sequence[str]) -> dict[str, Any]:
    """Return the values that the page builds its controls from."""
    return {
        "model": name,
        "examples": list(examples),
        "steps": limits.steps,
        "default_steps": limits.default_steps,
        "sizes": limits.sizes,
        "guidance_scale": limits.guidance_scale,
        "fixed_guidance": limits.fixed_guidance,
        "schedules": schema.SCHEDULES,
        "schedule": limits.schedule,
        "strength": generation.STRENGTH,
        "takes_image": limits.takes_image,
        "takes_control": limits.takes_control,
        "most_bytes": uploads.MOST_BYTES,
    }


def _add_generate(app: fastapi.FastAPI, queue: Queue, limits: schema.Limits) -> None:
    intake = _Intake(queue, limits)
    content = {"application/json": {"schema": schema.json_schema(limits)}}

    @app.post(
        "/generate",
        summary="Draw one image",
        response_class=Response,
        responses=_RESPONSES,
        openapi_extra={"requestBody": {"required": True, "content": content}},
    )
    async def generate(
        request: Request, taken: Annotated[tuple[schema.Request, str], fastapi.Depends(intake)]
    ) -> Response:
        answer = await _unless_gone(request, queue.submit(*taken))
        begin = time.perf_counter()
        data = await asyncio.to_thread(png, answer.result)
        stages = {
            "waiting": answer.waiting,
            "drawing": answer.working,
            "encoding": time.perf_counter() - begin,
        }
        timing = ", ".join(f"{name};dur={1000 * seconds:.2f}" for name, seconds in stages.items())
        return Response(data, media_type="image/png", headers={"server-timing": timing})


class _Intake:
    """Take requests in: check a place in the queue, read the body, check it, decode its images."""

    def __init__(self, queue: Queue, limits: schema.Limits):
        self._queue, self._limits = queue, limits
        self._reading = 0
        self._decoding = asyncio.Semaphore(_DECODERS)

    async def __call__(
        self,
        request: Request,
        x_session: Annotated[
            str,
            fastapi.Header(
                max_length=_MOST_SESSION,
                description="Waiting requests of one session replace each other: the newest wins.",
            ),
        ] = "",
    ) -> tuple[schema.Request, str]:
        """Return (request, session). Raises Refused."""
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            # Other sites' pages can send forms and plain text here unasked, but not this type.
            raise Refused(
                415, "the content type is not application/json: send JSON with that header"
            )
        self._queue.check(x_session)
        if self._reading >= READERS:
            raise Refused(429, "too many requests are being read: try again in a second", 1)
        self._reading += 1
        try:
            data = await body.read(request)
            async with self._decoding:
                wanted = await asyncio.to_thread(schema.parse, data, self._limits)
            return wanted, x_session
        finally:
            self._reading -= 1


async def _unless_gone(request: Request, future) -> Answer:
    """Wait for the future. Cancel it and raise ClientDisconnect when the client goes away first."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, leaving = asyncio.wrap_future(future), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({answer, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect()
        return answer.result()
    except (Refused, UserError, ClientDisconnect):  # UserError: of the model, about the request
        raise
    except Exception:
        traceback.print_exc(file=sys.stderr)
        raise Refused(500, "drawing failed; the server's log says why") from None
    finally:
        answer.cancel()
        leaving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await leaving


def png(image: np.ndarray) -> bytes:
    """Encode uint8 [H, W, 3]. Compression is light: a millisecond counts more than a kilobyte."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=2)
    return buffer.getvalue()


async def _page_file(request: Request) -> Response:
    return FileResponse(pathlib.Path(__file__).parent / _PAGE[request.url.path])


class _Basic(SecurityBase):
    """Name the password in OpenAPI. `Guard` asks for it, before the page as well."""

    scheme_name = "password"
    model = HTTPBase(scheme="basic")

    async def __call__(self) -> None:
        """Do nothing."""


async def _refused(request: Request, error: Any) -> Response:
    return error.response()


async def _of_the_model(request: Request, error: Any) -> Response:
    status = 500 if isinstance(error, generation.NotFinite) else 400
    return Refused(status, str(error)).response()


async def _wrong_header(request: Request, error: Any) -> Response:
    described = {"properties": {"X-Session": {"type": "string", "maxLength": _MOST_SESSION}}}
    first = error.errors()[0] | {"loc": ("X-Session",)}  # the one field that FastAPI checks itself
    return Refused(400, schema.sentence(first, described)).response()


async def _no_route(request: Request, error: Any) -> Response:
    sentence = f"{request.url.path} takes {(error.headers or {}).get('Allow')} only"
    if error.status_code != 405:
        sentence = (
            "nothing is here: the API has POST /generate, GET /schema, /openapi.json, /health"
        )
    return Refused(error.status_code, sentence, headers=error.headers).response()


async def _client_gone(request: Request, error: Any) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _fault(request: Request, error: Any) -> Response:
    return Refused(500, "the server failed; its log says why").response()


_HANDLERS: dict[Any, Any] = {
    Refused: _refused,
    UserError: _of_the_model,
    RequestValidationError: _wrong_header,
    HTTPException: _no_route,
    ClientDisconnect: _client_gone,
    Exception: _fault,
}
