"""One worker owns the device; the others wait in a bounded line.

A line and not a pool: a device draws one picture at a time, and who comes first is served first. Whoever leaves while
waiting (`future.cancel()`, or a newer request of the same session) frees the place at once. No model is known here.
"""

import collections.abc
import concurrent.futures
import dataclasses
import sys
import threading
import time
import traceback
from typing import Any

from sprint_jax.serving.refused import Refused


@dataclasses.dataclass(frozen=True)
class Answer:
    """result: what `work` returned. waiting, working: seconds in the line and at work."""

    result: Any
    waiting: float
    working: float


@dataclasses.dataclass(eq=False)
class _Job:
    """item: for `work`. session: "" for none. since: when it came. future: of who waits."""

    item: Any
    session: str
    since: float
    future: concurrent.futures.Future


class Queue:
    """A line of at most `capacity` items before one thread that runs `work(item)`.

    prepare: run first by that thread, called with `say(done, total)`; until it returns all is refused. prepared: called
    when it has returned, with None, or with what it raised; then nothing is ever served.
    """

    def __init__(
        self,
        work: collections.abc.Callable,
        capacity: int,
        prepare: collections.abc.Callable = lambda say: None,
        prepared: collections.abc.Callable = lambda error: None,
    ):
        self._work, self._prepare, self._prepared = work, prepare, prepared
        self.capacity = capacity
        self._changed = threading.Condition()
        self._line: list[_Job] = []
        self._closed = False
        self.ready, self.done, self.total = False, 0, 0

    def start(self):
        """Starts the thread. To be called once."""
        threading.Thread(target=self._run, name="worker", daemon=True).start()

    @property
    def length(self) -> int:
        """How many are waiting."""
        return len(self._line)

    def check(self, session: str = ""):
        """Raises Refused where a request could not be taken now: 503 while preparing or closed, 429 when full."""
        with self._changed:
            self._check(session)

    def _check(self, session):
        if self._closed:
            raise Refused(503, "the server is stopping")
        if not self.ready:
            raise Refused(
                503,
                f"the model is being compiled ({self.done} of {self.total} programs): try again soon",
                2,
            )
        if len(self._line) >= self.capacity and self._older(session) is None:
            raise Refused(
                429, f"{self.capacity} requests are waiting already: try again in a second", 1
            )

    def submit(self, item, session: str = "") -> concurrent.futures.Future:
        """Puts an item in the line; the future's result is its `Answer`, or what `work` raised.

        A waiting item of the same session gives up its place to this one, and is told so (Refused, 409).
        """
        job = _Job(item, session, time.perf_counter(), concurrent.futures.Future())
        with self._changed:
            self._check(session)
            older = self._older(session)
            if older is None:
                self._line.append(job)
            else:
                self._line[self._line.index(older)] = job
            self._changed.notify()
        # Outside of the lock: both call back.
        if older is not None and older.future.set_running_or_notify_cancel():
            older.future.set_exception(
                Refused(409, "a newer request of the same session took its place")
            )
        job.future.add_done_callback(lambda future: self._leave(job))
        return job.future

    def close(self):
        """Refuses who waits and whoever comes, and lets the worker end after the item it has."""
        with self._changed:
            self._closed, left, self._line = True, self._line, []
            self._changed.notify()
        for job in left:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(Refused(503, "the server is stopping"))

    def _older(self, session):
        return next((job for job in self._line if session and job.session == session), None)

    def _leave(self, job):
        with self._changed:
            if job in self._line:
                self._line.remove(job)

    def _say(self, done, total):
        self.done, self.total = done, total

    def _run(self):
        try:
            self._prepare(self._say)
        except Exception as error:
            self._prepared(error)
            return
        self.ready = True
        try:
            self._prepared(None)
        except (
            Exception
        ):  # such as nobody reading what it prints: those who ask are served all the same
            traceback.print_exc(file=sys.stderr)
        while (job := self._next()) is not None:
            self._serve(job)
            del job  # or the last picture would stay in memory until the next comes

    def _next(self):
        """The first in the line, waited for; None when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._line or self._closed)
            return self._line.pop(0) if self._line else None

    def _serve(self, job):
        if not job.future.set_running_or_notify_cancel():
            return
        begin = time.perf_counter()
        try:
            result = self._work(job.item)
        except (
            BaseException
        ) as error:  # whatever it is, it belongs to who asked, and the worker lives on
            job.future.set_exception(error)
        else:
            job.future.set_result(Answer(result, begin - job.since, time.perf_counter() - begin))
