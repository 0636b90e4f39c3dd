"""The request queue: one worker thread owns the device, requests wait in a bounded line.

The device draws one image at a time, first come, first served. A client that leaves while it waits
(`future.cancel()`, or a newer request of the same session) frees its place at once. The queue knows
no model.
"""

import concurrent.futures
import contextlib
import dataclasses
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from sprint_jax.serving.refused import Refused


@dataclasses.dataclass(frozen=True)
class Answer:
    """result: what `work` returned. waiting, working: seconds in the queue and at work."""

    result: Any
    waiting: float
    working: float


@dataclasses.dataclass(eq=False)
class _Job:
    """item: the argument of `work`. session: "" for none. since: the time of arrival."""

    item: Any
    session: str
    since: float
    future: concurrent.futures.Future


class Queue:
    """At most `capacity` items wait for one thread that runs `work(item)`.

    prepare: runs first in that thread, called with `say(done, total)`. Every request is refused
    until it returns. prepared: called when `prepare` has returned, with None, or with the exception
    that it raised. In that case nothing is ever served.
    """

    def __init__(
        self,
        work: Callable[[Any], Any],
        capacity: int,
        prepare: Callable[[Callable[[int, int], None]], Any] = lambda say: None,
        prepared: Callable[[Exception | None], Any] = lambda error: None,
    ):
        self._work, self._prepare, self._prepared = work, prepare, prepared
        self.capacity = capacity
        self._worker = threading.Thread(target=self._run, name="worker", daemon=True)
        self._changed = threading.Condition()
        self._waiting: list[_Job] = []
        self._current: _Job | None = None
        self._closed = False
        self.ready, self.done, self.total = False, 0, 0

    def start(self) -> None:
        """Start the thread. Call this once."""
        self._worker.start()

    @property
    def length(self) -> int:
        """The number of waiting requests."""
        return len(self._waiting)

    def check(self, session: str = "") -> None:
        """Raise Refused if a request cannot be taken now: 503 unless ready, 429 when full."""
        with self._changed:
            self._check(session)

    def _check(self, session: str) -> None:
        if self._closed:
            raise Refused(503, "the server is stopping")
        if not self.ready:
            progress = f"{self.done} of {self.total} programs"
            raise Refused(503, f"the model is being compiled ({progress}): try again soon", 2)
        if len(self._waiting) >= self.capacity and self._older(session) is None:
            raise Refused(
                429, f"{self.capacity} requests are waiting already: try again in a second", 1
            )

    def submit(self, item: Any, session: str = "") -> concurrent.futures.Future:
        """Add an item. The future's result is its `Answer`, or the exception of `work`.

        A waiting item of the same session loses its place to this one: its future raises Refused
        (409).
        """
        job = _Job(item, session, time.perf_counter(), concurrent.futures.Future())
        with self._changed:
            self._check(session)
            older = self._older(session)
            if older is None:
                self._waiting.append(job)
            else:
                self._waiting[self._waiting.index(older)] = job
            self._changed.notify()
        # Outside of the lock, because both call back.
        if older is not None and older.future.set_running_or_notify_cancel():
            older.future.set_exception(
                Refused(409, "a newer request of the same session took its place")
            )
        job.future.add_done_callback(lambda future: self._leave(job))
        return job.future

    def close(self) -> None:
        """Refuse waiting and new requests. The worker ends after its current item."""
        with self._changed:
            self._closed, left, self._waiting = True, self._waiting, []
            self._changed.notify()
        for job in left:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(Refused(503, "the server is stopping"))

    def finish(self, seconds: float) -> None:
        """Close, and give the item in work this long; then its request is refused like the others.

        The work itself cannot be stopped.
        """
        self.close()
        job = self._current
        if job is not None and not self.join(seconds):
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                job.future.set_exception(Refused(503, "the server is stopping"))

    def join(self, seconds: float) -> bool:
        """Wait for the worker's end, at most this long. Return whether it has ended."""
        self._worker.join(seconds)
        return not self._worker.is_alive()

    def _older(self, session: str) -> _Job | None:
        return next((job for job in self._waiting if session and job.session == session), None)

    def _leave(self, job: _Job) -> None:
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def _say(self, done: int, total: int) -> None:
        self.done, self.total = done, total

    def _run(self) -> None:
        try:
            self._prepare(self._say)
        except Exception as error:
            self._prepared(error)
            return
        self.ready = True
        try:
            self._prepared(None)
        except Exception:  # a closed stdout, say, is no reason to serve nobody
            traceback.print_exc(file=sys.stderr)
        while (job := self._next()) is not None:
            self._serve(job)
            del job  # or the last image stays in memory until the next request

    def _next(self) -> _Job | None:
        """Wait for the first in the queue. None when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return self._waiting.pop(0) if self._waiting else None

    def _serve(self, job: _Job) -> None:
        if not job.future.set_running_or_notify_cancel():
            return
        self._current, begin = job, time.perf_counter()
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # `finish` has refused it
            try:
                result = self._work(job.item)
            except BaseException as error:  # the requester gets any error; the worker keeps running
                job.future.set_exception(error)
            else:
                seconds = time.perf_counter() - begin
                job.future.set_result(Answer(result, begin - job.since, seconds))
        self._current = None
