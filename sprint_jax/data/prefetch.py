"""Computing items ahead of their use, in a thread."""

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """An iterator over make(start) … make(stop - 1), computed `depth` items ahead in a thread.

    Use it as a context. `next` raises the error of a failed call.
    """

    def __init__(self, make: Callable[[int], T], start: int, stop: int, depth: int = 4):
        self._queue: queue.Queue = queue.Queue(depth)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(make, start, stop), daemon=True)

    def _work(self, make: Callable[[int], T], start: int, stop: int) -> None:
        for index in range(start, stop):
            try:
                item = (make(index), None)
            except Exception as error:  # the consumer raises it
                self._put((None, error))
                return
            if not self._put(item):
                return
        self._put((None, StopIteration()))

    def _put(self, item: tuple[T | None, Exception | None]) -> bool:
        """Queue an item. Returns False if the consumer left meanwhile."""
        while not self._stopping.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __enter__(self) -> "Prefetch[T]":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def __iter__(self) -> "Prefetch[T]":
        return self

    def __next__(self) -> T:
        value, error = self._queue.get()
        if error is not None:
            raise error
        return value
