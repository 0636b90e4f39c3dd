"""The body of a request: its bytes within size and time, and the JSON object in them."""

import asyncio
import json
from typing import Any

from starlette.requests import Request

from sprint_jax.serving import uploads
from sprint_jax.serving.refused import Refused
from sprint_jax.storage import json_files

MOST_BYTES = 3 * uploads.MOST_BYTES  # two images in base64, which makes four bytes of three
READ_SECONDS = 10.0  # for a whole body
_MOST_MARKS = 200_000  # brackets and commas; a prompt may hold some
_REMEDY = 'send an object such as {"prompt": "a red circle"}'


async def read(request: Request) -> bytes:
    """Return the bytes of a request's body.

    Raises Refused with 413 as soon as it is known to be too large, and with 408 when it takes
    longer than `READ_SECONDS`.
    """
    refusal = Refused(413, f"the request has more than {MOST_BYTES} bytes: send smaller images")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > MOST_BYTES:
        raise refusal
    body = bytearray()
    try:
        async with asyncio.timeout(READ_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MOST_BYTES:
                    raise refusal
    except TimeoutError:
        late = f"the request did not arrive within {READ_SECONDS:g} seconds: send it faster"
        raise Refused(408, late) from None
    return bytes(body)


def json_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in the bytes. Raises Refused for a repeated key, NaN and non-JSON."""
    # Parsing blocks all other threads, for seconds with millions of values. Base64 has no marks.
    if sum(body.count(mark) for mark in (b"[", b"{", b",")) > _MOST_MARKS:
        raise Refused(400, f"the body has more than {_MOST_MARKS} values: {_REMEDY}")
    try:
        found = json_files.parse(body.decode(), pairs=_pairs, constant=_constant)
    except UnicodeDecodeError:
        raise Refused(400, "the body is not UTF-8: send a JSON object in UTF-8") from None
    except json.JSONDecodeError as error:
        raise Refused(400, f"the body is not JSON ({error}): {_REMEDY}") from None
    except ValueError:  # integers of thousands of digits too
        reason = "numbers too long or brackets too deep"
        raise Refused(400, f"the body is not JSON ({reason}): {_REMEDY}") from None
    if not isinstance(found, dict):
        raise Refused(400, f"the body is a JSON {kind(found)}: {_REMEDY}")
    return found


def kind(value: Any) -> str:
    """Return JSON's name of a value's type."""
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list"}
    return "null" if value is None else names.get(type(value), "object")


def short(value: Any) -> str:
    """Return a value as one sentence can hold it: printable, and cut."""
    if isinstance(value, list | dict):  # the text may be endless, or nested too deep to print
        return "a list" if isinstance(value, list) else "an object"
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = {}
    for name, value in pairs:  # one pass: there may be many
        if name in fields:
            raise Refused(400, f"key {short(name)} appears twice: give it once")
        fields[name] = value
    return fields


def _constant(name: str) -> None:
    raise Refused(400, f"{name} is not a JSON number: give a finite one")
