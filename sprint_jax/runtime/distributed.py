"""Several processes as one program: who takes part, a roll call that names who is missing, and a watch.

JAX's own start-up ends a process without saying whom it waited for, and a process that is killed leaves
the others in a collective until a heartbeat is missed minutes later. So the processes first meet on the
port after the coordinator's: process 0 counts them, and the connections stay open. One that closes
without a goodbye is a process that died; its name goes to all and everybody ends at once.
"""

import atexit
import contextlib
import dataclasses
import json
import os
import re
import select
import socket
import sys
import threading
import time

from sprint_jax.errors import UserError

DIED = 3  # exit status of the processes that are left when one dies
_PORT = 29400
_HELLO = 5.0  # seconds to answer once connected
_LAST = 0.5  # seconds that process 0 stays longer than the others
_GRACE = 2.0  # seconds in which the news of a death arrives


@dataclasses.dataclass(frozen=True)
class Place:
    """coordinator: "host:port" of process 0; the next port is used too. process: this one, of `processes`."""

    coordinator: str
    processes: int
    process: int


def place(coordinator, processes, process, environ) -> Place | None:
    """Where this process stands: from flags, SLURM, a GKE JobSet or GKE's TPU variables; None if alone.

    coordinator, processes, process: flags, each None when not given; all or none. Raises UserError for flags or variables
    that say half, naming what is missing or is no number.
    """
    given = [coordinator is not None, processes is not None, process is not None]
    if all(given):
        return _checked(Place(coordinator, processes, process))
    if any(given):
        raise UserError(
            "--coordinator, --processes and --process belong together: give all three, or none"
        )
    found = _slurm(environ) or _jobset(environ) or _tpu(environ)
    return _checked(found) if found else None


def _checked(place):
    host, _, port = place.coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65535:
        raise UserError(
            f"--coordinator={place.coordinator}: use host:port, for example 10.0.0.1:{_PORT}"
        )
    if not 0 <= place.process < place.processes:
        raise UserError(
            f"--process={place.process} with --processes={place.processes}: use 0 to {place.processes - 1}"
        )
    return place


def _told(environ, name):
    """What a launcher said in a variable. Raises UserError where it said the rest and not this."""
    if not environ.get(name):
        raise UserError(
            f"{name} is not set, where other variables of its launcher are: set it, or give --coordinator, --processes and --process"
        )
    return environ[name]


def _number(environ, name):
    value = _told(environ, name)
    if not value.isdecimal():
        raise UserError(
            f"{name}={value} is no whole number: mend or unset it, or give --coordinator, --processes and --process"
        )
    return int(value)


def _slurm(environ):
    if (
        "SLURM_NTASKS" not in environ
        or _number(environ, "SLURM_NTASKS") < 2
        or "SLURM_PROCID" not in environ
    ):
        return None
    nodes = environ.get("SLURM_STEP_NODELIST") or _told(environ, "SLURM_JOB_NODELIST")
    # Jobs that share a node get ports of their own.
    port = _PORT + 2 * (
        _number(environ, "SLURM_JOB_ID") % 10000 if "SLURM_JOB_ID" in environ else 0
    )
    return Place(
        f"{first_node(nodes)}:{port}",
        _number(environ, "SLURM_NTASKS"),
        _number(environ, "SLURM_PROCID"),
    )


def first_node(nodes):
    """First host of a SLURM list: "gpu[003-007,9],login1" -> "gpu003"."""
    host = re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodes).group()
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", host)


def _jobset(environ):
    """Indexed jobs of a JobSet: the manifest in launch/ sets PROCESSES and COORDINATOR."""
    if "JOB_COMPLETION_INDEX" not in environ or "COORDINATOR" not in environ:
        return None
    return Place(
        environ["COORDINATOR"],
        _number(environ, "PROCESSES"),
        _number(environ, "JOB_COMPLETION_INDEX"),
    )


def _tpu(environ):
    hosts = environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    if len(hosts) < 2 or "TPU_WORKER_ID" not in environ:
        return None
    return Place(f"{hosts[0]}:{_PORT}", len(hosts), _number(environ, "TPU_WORKER_ID"))


@contextlib.contextmanager
def started(place: Place | None, *, seconds, heartbeat=100):
    """Starts JAX's distributed runtime for as long as the context lasts; nothing for a single process.

    seconds: until a process that has not come is named in a UserError. heartbeat: seconds until JAX
    itself gives up on a host that went silent without closing its connections (a loss of power).
    """
    if place is None or place.processes == 1:
        yield
        return
    import jax

    watch = _Watch(place, seconds)
    # It would take SIGTERM from the training loop, which has an agreement of its own.
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
        # JAX's own goodbye at exit waits for processes that are gone, and aborts over them after the error was told.
        atexit.register(_exit, place, 2 if isinstance(error, UserError) else 1)
        raise


def _exit(place, status):
    """Ends this process at once; process 0, with which JAX's service goes, after the others could read why."""
    sys.stdout.flush(), sys.stderr.flush()
    if place.process == 0:
        time.sleep(_LAST)
    os._exit(status)


class _Watch:
    """Connections between process 0 and every other, and a thread that reads them.

    Lines of JSON: {"hello": process, "host": name} up, {"go": names} down, {"bye": process} up,
    {"died": text} down.
    """

    def __init__(self, place, seconds):
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
                f"cannot listen on port {address[1]} ({error.strerror}): give another --coordinator port"
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
        except (OSError, ValueError):  # silent, or something else that tries ports
            hello = None
        if not isinstance(hello, dict) or "hello" not in hello:
            peer.close()
            return
        process, name = hello["hello"], f"process {hello['hello']} on {hello['host']}"
        if hello["processes"] != self._place.processes:
            self._peers[process] = peer
            self._refuse(
                f"{name} was started with --processes={hello['processes']}, process 0 with {self._place.processes}: use one number"
            )
        if process in self._peers or process == 0:
            self._peers[-1 - len(self._peers)] = peer
            self._refuse(
                f"two processes say that they are {process}: {self._names[process]} and {name}; give each its own --process"
            )
        self._peers[process], self._names[process] = peer, name

    def _missing(self, seconds):
        missing = sorted(set(range(self._place.processes)) - self._names.keys())
        here = ", ".join(self._names[p] for p in sorted(self._names))
        return (
            f"process {', '.join(map(str, missing))} of {self._place.processes} did not come within {seconds:.0f} s "
            f"(here: {here}): start the missing, look at its log, or raise --startup_seconds"
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
                        f"process 0 does not answer at {self._place.coordinator} (port {address[1]}: {error}) within "
                        f"{seconds:.0f} s: start it, open the port, or raise --startup_seconds"
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
        except OSError:  # silent, or closed while this process still waited to be counted
            answer = None
        if not answer or "go" not in answer:
            raise UserError(
                (answer or {}).get("died", "process 0 ended during the start: see its log")
            )
        self._names = {int(process): name for process, name in answer["go"].items()}
        self._peers[0] = peer

    def _read(self):
        """Ends this program when a peer's connection closes without a goodbye, or process 0 says so."""
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
                self._heard(waiting[peer], message)

    def _heard(self, process, message):
        if message and "bye" in message:
            self._gone.add(process)
            return
        text = (message or {}).get("died") or (
            f"{self._names[process]} ended unexpectedly: all processes stop. See its log; the same command goes on "
            "from the last checkpoint"
        )
        if self._place.process == 0:
            for other in self._peers.values():
                with contextlib.suppress(OSError):
                    _send(other, {"died": text})
        print(f"error: {text}", file=sys.stderr, flush=True)
        # The main thread may hang in a collective that no exception reaches.
        _exit(self._place, DIED)

    def leave(self):
        """Says goodbye: from now on a closed connection is no news."""
        self._closing.set()
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                _send(peer, {"bye": self._place.process})

    def fail(self, error):
        """Tells the others why this process ends, so that none waits for it."""
        reason = (
            " ".join(str(error).split())
            if isinstance(error, UserError)
            else f"{type(error).__name__}; see its log"
        )
        if not isinstance(error, UserError):
            # A collective that lost its peer raises here too: first let the thread hear who that was.
            self._thread.join(_GRACE)
        self._closing.set()
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                _send(peer, {"died": f"{self._names[self._place.process]} stopped: {reason}"})


def _send(peer, message):
    peer.sendall(json.dumps(message).encode() + b"\n")


def _receive(peer):
    """One line of JSON, or None at the end of the stream."""
    line = b""
    while not line.endswith(b"\n"):
        byte = peer.recv(1)
        if not byte:
            return None
        line += byte
    return json.loads(line)


def _keep_alive(peer):
    """A host that vanished without closing is noticed by the system within about a minute."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
