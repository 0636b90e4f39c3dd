"""The end of a process by Ctrl-C (SIGINT), SIGTERM, or a reader of its output that went away.

Python runs signal handlers between two instructions of the main thread, which may be inside XLA's
compiler for minutes. An exception that a handler raises comes out anywhere: in an import, in a
destructor, or in a callback of a library, which ignores it or aborts. So nothing is raised here.
The system's part of a handler writes the signal's number to a pipe at once. A thread reads the pipe
and ends the process: one line on stderr, no unfinished files, status 130 (SIGTERM: 143). A command
that holds unsaved state is asked first, see `asking`.

This module is the first that a command imports, so it imports little itself.
"""

import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
CLOSED_PIPE = 141
_KEPT = "finished files are kept, unfinished ones removed: give the same command to continue"
# One Ctrl-C may arrive twice: from the terminal, and from a launcher that passes it on.
_TOGETHER = 0.25
_SPEAK = 0.5  # seconds that the line may take: a reader may be stuck


class _Asking:
    """What the first signal does instead of ending the process."""

    def __init__(self, line: str, ask: Callable[[], None]):
        self.line, self.ask, self.asked = line, ask, False
        self.said = threading.Event()


class _State:
    """The thread of this process, None before `start`, and what is asked now."""

    thread: threading.Thread | None = None
    asking: _Asking | None = None


_state = _State()


def start() -> None:
    """Let signals end this process from now on; the main thread calls it before anything slow.

    A signal that the process was started to ignore, as in the background of a shell script, stays
    ignored. Text that a stream cannot encode is written with backslashes from now on.
    """
    for stream in _streams():
        if isinstance(stream, io.TextIOWrapper):  # not another kind, as in a notebook
            stream.reconfigure(errors="backslashreplace")
    if _state.thread is not None:
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in STATUS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave_it_to_the_thread)
    _state.thread = threading.Thread(target=_watch, args=(reader,), daemon=True, name="signals")
    _state.thread.start()
    # A child shares the pipe until it forgets it: a signal of its own would end its parent.
    os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_forget)
    _unblock()


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """Hold signals back inside the context, and in a program that replaces this one, until `start`.

    Without it they would meet the first steps of that program, which leave a traceback.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STATUS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def asking(line: str, ask: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Let the first signal inside the context print a line and call `ask`; a second one ends all.

    `ask` runs in another thread than the main one. Nothing changes in a process without `start`.
    """
    now = _Asking(f"interrupted: {line}", ask)
    before, _state.asking = _state.asking, now
    try:
        yield
    finally:
        if now.asked:  # else a process that ends at once says nothing
            now.said.wait(_TOGETHER + _SPEAK)
        _state.asking = before


@contextlib.contextmanager
def quiet_pipes() -> Iterator[None]:
    """End with status 141 and no word if the reader of the output goes away, as `head` does."""
    try:
        try:
            yield
        finally:
            for stream in _streams():
                stream.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in _streams():
            try:
                stream.flush()
            except OSError:  # else Python's own end would complain
                os.dup2(nowhere, stream.fileno())
        raise SystemExit(CLOSED_PIPE) from None


def _streams():
    return [stream for stream in (sys.stdout, sys.stderr) if stream is not None]


def _leave_it_to_the_thread(number, frame):
    """Be a handler, without which Python would not write to the pipe."""


def _block():
    signal.pthread_sigmask(signal.SIG_BLOCK, STATUS)


def _unblock():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STATUS)


def _forget():
    """Give a forked child Python's own handlers."""
    signal.set_wakeup_fd(-1)
    _state.thread = _state.asking = None
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, None)):
        if signal.getsignal(number) is _leave_it_to_the_thread:
            signal.signal(number, handler or signal.SIG_DFL)
    _unblock()


def _watch(reader):
    while True:
        number = os.read(reader, 1)[0]
        if number not in STATUS:
            continue
        asking = _state.asking
        if asking is None or asking.asked:
            _end(number)
        asking.asked = True
        asking.ask()
        time.sleep(_TOGETHER)
        os.set_blocking(reader, False)
        with contextlib.suppress(BlockingIOError):
            os.read(reader, 64)
        os.set_blocking(reader, True)
        _say(asking.line)
        asking.said.set()


def _end(number: int) -> NoReturn:
    """End the process at once, without unfinished files.

    Python's own end would free what XLA's threads work on: a segmentation fault, now and then.
    """
    from sprint_jax.storage import files

    files.stop_writing()
    _say(f"interrupted: {_KEPT}")
    files.remove_unfinished()
    os._exit(STATUS[signal.Signals(number)])


def _say(line):
    """Write a line to stderr, and all that waits in stdout; give up if nobody takes it."""
    speaker = threading.Thread(target=_write, args=(line,), daemon=True)
    speaker.start()
    speaker.join(_SPEAK)


def _write(line):
    text = f"{line}\n"
    with contextlib.suppress(Exception):  # whatever the main thread does to its bars meanwhile
        text = "\n" * _bar_is_shown() + text
    with contextlib.suppress(OSError):
        os.write(2, text.encode(errors="backslashreplace"))
    with contextlib.suppress(Exception):
        sys.stdout.flush()


def _bar_is_shown():
    """Return whether the last line of stderr is a progress bar, which ends without a newline."""
    tqdm = sys.modules.get("tqdm")
    bars = list(getattr(getattr(tqdm, "tqdm", None), "_instances", ()))
    return any(
        not bar.disable and (bar.delay <= 0 or bar.last_print_t > bar.start_t) for bar in bars
    )
