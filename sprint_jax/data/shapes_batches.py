"""Training batches of `shapes`: batch k is a pure function of (seed, k), made ahead in a thread."""

import queue
import threading

import numpy as np

from sprint_jax.conditioning import sketches
from sprint_jax.toy import freehand as freehand_lib
from sprint_jax.toy import shapes


def make_batch(
    step,
    *,
    seed,
    batch,
    size,
    codec,
    text_encoder,
    condition=None,
    freehand=0.0,
    process=0,
    processes=1,
):
    """Rows of one process of global batch `step`, NumPy float32.

    {"latent" [b, H, W, C], "text" [b, L, D], "mask" [b, L]} with b = batch / processes, and "control" as latent where
    condition: uint8 [b, H, W, 3] -> pictures of a ControlNet's condition alike, is given. freehand: probability that an
    example is a composition anywhere, which is shown by its rough sketch instead; not looked at without a condition.
    """
    share = batch // processes
    first = step * batch + process * share
    indices = range(first, first + share)
    rough = [condition is not None and freehand_lib.is_rough(seed, i, freehand) for i in indices]
    examples = [
        shapes.example(seed, i, size=size, anywhere=r) for i, r in zip(indices, rough, strict=True)
    ]
    text, mask = text_encoder.encode([e.text for e in examples])
    images = np.stack([e.image for e in examples])
    rows = {"latent": codec.encode(images), "text": text, "mask": mask}
    if condition is None:
        return rows
    shown = condition(images)
    for row in np.flatnonzero(rough):
        drawn = freehand_lib.sketch(
            seed, indices[row], examples[row].objects, size=size, split="train"
        )
        shown[row] = sketches.to_rgb(drawn)
    return rows | {"control": codec.encode(shown)}


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
