"""Training batches of `shapes`: batch k is a pure function of (seed, k), made ahead in a thread."""

import queue
import threading

import numpy as np

from sprint_jax.data import shapes


def make_batch(step, *, seed, batch, size, codec, text_encoder, condition=None, process=0, processes=1):
    """Rows of one process of global batch `step`, NumPy float32.

    {"latent" [b, H, W, C], "text" [b, L, D], "mask" [b, L]} with b = batch / processes, and "control" as latent where
    condition: uint8 [b, H, W, 3] -> pictures of a ControlNet's condition alike, is given.
    """
    share = batch // processes
    first = step * batch + process * share
    examples = [shapes.example(seed, first + i, size=size) for i in range(share)]
    text, mask = text_encoder.encode([e.text for e in examples])
    images = np.stack([e.image for e in examples])
    rows = {"latent": codec.encode(images), "text": text, "mask": mask}
    return rows if condition is None else rows | {"control": codec.encode(condition(images))}


class Prefetch:
    """Yields make(start), make(start + 1), ... computed `depth` ahead in a thread. Use as a context.

    An error in the thread is raised by `next`.
    """

    def __init__(self, make, start, stop, depth=4):
        self._queue = queue.Queue(depth)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(make, start, stop), daemon=True)

    def _work(self, make, start, stop):
        for index in range(start, stop):
            try:
                item = (make(index), None)
            except Exception as error:  # handed to the consumer, which raises it
                item = (None, error)
            while not self._stopping.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self._stopping.is_set() or item[1] is not None:
                return

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stopping.set()
        self._thread.join()

    def __next__(self):
        value, error = self._queue.get()
        if error is not None:
            raise error
        return value
