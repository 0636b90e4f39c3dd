"""Several processes as one program: a roll call that names missing processes, and a watch.

JAX's own start-up ends a process without saying which process it waited for. After a kill, JAX
leaves the other processes in a collective until a heartbeat is missed minutes later. So the
processes first connect on the port after the coordinator's. Process 0 counts them, and the
connections stay open. A connection that closes without a goodbye means that its process died:
process 0 sends its name to all, and every process ends at once.
"""

import atexit
import contextlib
import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator

from sprint_jax.errors import UserError
from sprint_jax.runtime.launchers import Place
from sprint_jax.storage import json_files

DIED = 3  # exit status of the remaining processes after one died
_HELLO = 5.0  # seconds to answer once connected
_LAST = 0.5  # seconds that process 0 stays longer than the others
_GRACE = 2.0  # seconds in which the news of a death arrives


@contextlib.contextmanager
def started(place: Place | None, *, seconds: float, heartbeat: int = 100) -> Iterator[None]:
    """Run JAX's distributed runtime inside the context. Do nothing for a single process.

    seconds: time for all processes to start. heartbeat: seconds until JAX gives up on a host that
    went silent without closing its connections, by a loss of power, say. Raises UserError naming
    the processes that did not start in time.
    """
    if place is None or place.processes == 1:
        yield
        return
    import jax

    watch = _Watch(place, seconds)
    # JAX's handler would take SIGTERM from the training loop, whose processes agree on a stop.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process,
            initialization_timeout=int(seconds) + 1,
            heartbeat_timeout_seconds=heartbeat,
        )
        yield
        watch.leave()
        jax.distributed.shutdown()
    except BaseException as error:
        watch.fail(error)
        # JAX's own shutdown at exit waits for dead processes, and aborts after the error line.
        atexit.register(_exit, place, 2 if isinstance(error, UserError) else 1)
        raise


def _exit(place, status):
    """End this process at once.

    Process 0 hosts JAX's service, so it stays until the others could read the reason.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if place.process == 0:
        time.sleep(_LAST)
    os._exit(status)


class _Watch:
    """Connections between process 0 and each other process, and a thread that reads them.

    Messages are lines of JSON. To process 0: {"hello": process, "host": name, "processes": count}
    and {"bye": process}. From process 0: {"go": names}. Both ways: {"died": text}.
    """

    def __init__(self, place: Place, seconds: float):
        self._place = place
        self._peers = {}  # process -> socket
        self._names = {place.process: f"process {place.process} on {socket.gethostname()}"}
        self._gone = set()
        self._closing = threading.Event()
        host, _, port = place.coordinator.rpartition(":")
        address = (host, int(port) + 1)
        if place.process == 0:
            self._gather(address, seconds)
        else:
            self._join(address, seconds)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _gather(self, address, seconds):
        deadline = time.monotonic() + seconds
        try:
            server = socket.create_server(("", address[1]), backlog=self._place.processes)
        except OSError as error:
            raise UserError(
                f"cannot listen on port {address[1]} ({error.strerror}): give another "
                "--coordinator port"
            ) from None
        with server:
            while len(self._peers) < self._place.processes - 1:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    peer, _ = server.accept()
                    self._welcome(peer)
                except TimeoutError:
                    if time.monotonic() >= deadline:
                        self._refuse(self._missing(seconds))
        for peer in self._peers.values():
            _send(peer, {"go": self._names})

    def _welcome(self, peer):
        _keep_alive(peer)
        peer.settimeout(_HELLO)
        try:
            hello = _receive(peer)
        except (OSError, ValueError):  # silent, or another program that scans ports
            hello = None
        if not isinstance(hello, dict) or "hello" not in hello:
            peer.close()
            return
        process, name = hello["hello"], f"process {hello['hello']} on {hello['host']}"
        if hello["processes"] != self._place.processes:
            self._peers[process] = peer
            self._refuse(
                f"{name} was started with --processes={hello['processes']}, process 0 with "
                f"{self._place.processes}: use one number"
            )
        if process in self._peers or process == 0:
            self._peers[-1 - len(self._peers)] = peer
            self._refuse(
                f"two processes say that they are {process}: {self._names[process]} and {name}; "
                "give each its own --process"
            )
        self._peers[process], self._names[process] = peer, name

    def _missing(self, seconds):
        missing = sorted(set(range(self._place.processes)) - self._names.keys())
        here = ", ".join(self._names[p] for p in sorted(self._names))
        return (
            f"process {', '.join(map(str, missing))} of {self._place.processes} did not come "
            f"within {seconds:.0f} s (here: {here}): start the missing, look at its log, or raise "
            "--startup_seconds"
        )

    def _refuse(self, message):
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                _send(peer, {"died": message})
        raise UserError(message)

    def _join(self, address, seconds):
        deadline = time.monotonic() + seconds
        while True:
            try:
                peer = socket.create_connection(address, timeout=_HELLO)
                break
            except OSError as error:
                if time.monotonic() >= deadline:
                    raise UserError(
                        f"process 0 does not answer at {self._place.coordinator} (port "
                        f"{address[1]}: {error}) within {seconds:.0f} s: start it, open the port, "
                        "or raise --startup_seconds"
                    ) from None
                time.sleep(0.2)
        _keep_alive(peer)
        place = self._place
        try:
            _send(
                peer,
                {
                    "hello": place.process,
                    "host": socket.gethostname(),
                    "processes": place.processes,
                },
            )
            peer.settimeout(max(_HELLO, deadline - time.monotonic()) + _HELLO)
            answer = _receive(peer)
        except OSError:  # silent, or closed before process 0 answered
            answer = None
        if not answer or "go" not in answer:
            raise UserError(
                (answer or {}).get("died", "process 0 ended during the start: see its log")
            )
        self._names = {int(process): name for process, name in answer["go"].items()}
        self._peers[0] = peer

    def _read(self):
        """End this program if a connection closes without a goodbye, or process 0 says so."""
        for peer in self._peers.values():
            peer.settimeout(_HELLO)
        while not self._closing.is_set():
            waiting = {
                peer: process for process, peer in self._peers.items() if process not in self._gone
            }
            if not waiting:
                return
            for peer in select.select(list(waiting), [], [], 0.2)[0]:
                try:
                    message = _receive(peer)
                except OSError:
                    message = None
                if self._closing.is_set():
                    return
                self._handle(waiting[peer], message)

    def _handle(self, process, message):
        if message and "bye" in message:
            self._gone.add(process)
            return
        text = (message or {}).get("died") or (
            f"{self._names[process]} ended unexpectedly: all processes stop. See its log; the same "
            "command resumes from the last checkpoint"
        )
        if self._place.process == 0:
            for other in self._peers.values():
                with contextlib.suppress(OSError):
                    _send(other, {"died": text})
        print(f"error: {text}", file=sys.stderr, flush=True)
        # The main thread may hang in a collective that no exception reaches.
        _exit(self._place, DIED)

    def leave(self) -> None:
        """Say goodbye, after which closed connections mean nothing."""
        self._closing.set()
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                _send(peer, {"bye": self._place.process})

    def fail(self, error: BaseException) -> None:
        """Tell the others why this process ends, so that none waits for it."""
        reason = (
            " ".join(str(error).split())
            if isinstance(error, UserError)
            else f"{type(error).__name__}; see its log"
        )
        if not isinstance(error, UserError):
            # A collective that lost its peer raises here too: first let the thread learn which.
            self._thread.join(_GRACE)
        self._closing.set()
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                _send(peer, {"died": f"{self._names[self._place.process]} stopped: {reason}"})


def _send(peer, message):
    peer.sendall(json.dumps(message).encode() + b"\n")


def _receive(peer):
    """Return one line of JSON, None at the end of the stream."""
    line = b""
    while not line.endswith(b"\n"):
        byte = peer.recv(1)
        if not byte:
            return None
        line += byte
    return json_files.parse(line)


def _keep_alive(peer):
    """Let the system notice within about a minute that a host vanished without closing."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
