"""The guard before every route: password, host name, other sites' pages, security headers."""

import base64
import re
import secrets

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sprint_jax.serving.refused import Refused

# The page loads nothing from elsewhere, runs no inline scripts, and no other site may frame it.
_CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' "
    "data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
_HEADERS = [
    (b"content-security-policy", _CONTENT_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]
_LOCAL = ("localhost", "127.0.0.1", "[::1]")


class Guard:
    """ASGI middleware. password: required by HTTP Basic, with any user name, unless None.

    local: whether to refuse requests for other names than this machine's (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, password: str | None, local: bool):
        self._app, self._password, self._local = app, password, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 401 or 403. Websockets are closed."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        head = scope["method"] == "HEAD"
        if head:  # answered as GET is, without the body
            scope = {**scope, "method": "GET"}
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        refusal = self._refusal(scope["method"], headers)
        app = refusal.response() if refusal else self._app

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
            elif head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await app(scope, receive, with_headers)

    def _refusal(self, method: str, headers: dict[str, str]) -> Refused | None:
        if self._password and not _matches(self._password, headers.get("authorization", "")):
            ask = {"www-authenticate": 'Basic realm="sprint_jax"'}
            return Refused(401, "the password is missing or wrong", headers=ask)
        if self._local and _host(headers.get("host", "").lower()) not in _LOCAL:
            # Another site may have pointed its own name at this machine. Without a password only
            # the name tells its page from this server's.
            return Refused(
                403, "this server answers to the name localhost only: use that, or set --password"
            )
        origin = headers.get("origin", "")
        asked, here = origin.partition("://")[2], headers.get("host", "")
        if origin and method != "GET" and _without_default(asked) != _without_default(here):
            return Refused(
                403, "another site's page sent this: use this server's own page, or a program"
            )
        return None


def _host(header: str) -> str:
    """Return the name in a Host header, without the port."""
    name, _, port = header.rpartition(":")
    return name if port.isdecimal() or header.endswith(":") else header


def _without_default(header: str) -> str:
    """Return a Host header or an origin's host without a port that browsers leave out.

    Proxies write it: "example.com:443" is the browser's "example.com".
    """
    return re.sub(r":(80|443)?$", "", header.lower())


def _matches(password: str, authorization: str) -> bool:
    """Return whether an Authorization header holds the password. The time taken reveals nothing."""
    kind, _, token = authorization.partition(" ")
    try:
        given = base64.b64decode(token, validate=True).partition(b":")[2]
    except ValueError:
        return False
    return kind.lower() == "basic" and secrets.compare_digest(given, password.encode())
