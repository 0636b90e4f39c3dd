"""The order of rows in training: all of them in each epoch, shuffled anew."""

import functools
from collections.abc import Callable

import numpy as np


class Order:
    """The rows of the batches of a data set of `count` rows, a function of (seed, step) alone.

    Every epoch takes all rows once; a batch may begin in one epoch and end in the next.
    """

    def __init__(self, count: int, seed: int):
        self.count = count
        # The epoch of a batch, and the next.
        self._epoch: Callable[[int], np.ndarray] = functools.lru_cache(2)(
            functools.partial(_shuffled, count, seed)
        )

    def rows(self, step: int, batch: int, process: int = 0, processes: int = 1) -> np.ndarray:
        """Return the rows of one process's part of the global batch of a step."""
        share = batch // processes
        positions = step * batch + process * share + np.arange(share)
        return np.array([self._epoch(int(p) // self.count)[p % self.count] for p in positions])


def _shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    # `random` alone is stable across versions of NumPy.
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return np.argsort(rng.random(count), kind="stable")
