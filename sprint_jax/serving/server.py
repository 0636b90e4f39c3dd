"""uvicorn with limits for slow clients, and the socket that it listens at."""

import contextlib
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from sprint_jax.errors import UserError

HEAD_SECONDS = 10.0  # from a connection's beginning, or its last answer, to the next request
SEND_SECONDS = 30.0  # for a client that takes nothing of its answer


class Impatient(H11Protocol):
    """uvicorn's HTTP protocol with two limits that uvicorn leaves to proxies.

    A connection that brings no request within `HEAD_SECONDS` is closed. One whose client takes
    nothing of its answer for `SEND_SECONDS` is cut.
    """

    _idle = _sending = None  # timers

    def connection_made(self, transport: Any) -> None:
        """Start waiting for the first request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # report every byte that is not taken
        self._wait_for_request()

    def on_response_complete(self) -> None:
        """Start waiting for the next request."""
        super().on_response_complete()
        self._wait_for_request()

    def _wait_for_request(self) -> None:
        if self._idle:
            self._idle.cancel()
        self._idle = self.loop.call_later(HEAD_SECONDS, self._close_if_idle)

    def _close_if_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def pause_writing(self) -> None:
        """Start watching an answer that the client does not take."""
        super().pause_writing()
        if not self._sending:
            self._watch_sending()

    def _watch_sending(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._sending = self.loop.call_later(SEND_SECONDS, self._cut_if_stuck, left)

    def _cut_if_stuck(self, before: int) -> None:
        if self.transport.get_write_buffer_size() >= before:
            self.transport.abort()
        else:  # slow, but it moves
            self._watch_sending()

    def resume_writing(self) -> None:
        """Stop watching: the client has taken everything."""
        super().resume_writing()
        self._stop_watching()

    def _stop_watching(self) -> None:
        if self._sending:
            self._sending.cancel()
            self._sending = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop watching: nobody is there."""
        self._stop_watching()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: `runtime.ending` has the process's own."""

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:
        """Leave the handlers as they are."""
        return contextlib.nullcontext()


def configure(app: Any) -> uvicorn.Config:
    """Return uvicorn's configuration for an application."""
    return uvicorn.Config(
        app,
        http=Impatient,
        loop="asyncio",  # uvloop would take the pipe of `runtime.ending`
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=1000,
        timeout_graceful_shutdown=2,
    )


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises UserError, so a used port is found before a model loads."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # a port that is bound without listening can be bound again
    except OSError as error:
        listener.close()
        reason = error.strerror or error
        raise UserError(
            f"cannot listen at --host={host} --port={port} ({reason}): choose others, or --port=0"
        ) from None
    return listener
