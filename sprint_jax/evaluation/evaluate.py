"""Scores of a run on held-out `shapes` prompts: the checker's six tasks and the Fréchet distance."""

import dataclasses

import numpy as np

from sprint_jax.data import shapes
from sprint_jax.evaluation import checker, frechet

# Real pictures behind the Fréchet distance come from indices far from those of the prompts.
_REFERENCE_START = 1_000_000


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Held-out examples: texts, their meanings and real pictures uint8 [N, S, S, 3]."""

    texts: list[str]
    captions: list[shapes.Caption]
    images: np.ndarray


def heldout(seed, count, size, start=0) -> Prompts:
    """Examples start .. start + count - 1 of the held-out split."""
    examples = [shapes.example(seed, start + i, size=size, split="heldout") for i in range(count)]
    return Prompts(
        [e.text for e in examples], [e.caption for e in examples], np.stack([e.image for e in examples])
    )


class Evaluator:
    """Scores sets of pictures against the same prompts and the same real reference."""

    def __init__(self, *, seed, count, reference, size):
        self.prompts = heldout(seed, count, size)
        real = heldout(seed, reference, size, start=_REFERENCE_START)
        self._reference = frechet.moments(frechet.features(real.images))

    def __call__(self, images):
        """uint8 [count, S, S, 3] -> {"score": share, "tasks": {task: share}, "frechet": distance}."""
        overall, tasks = checker.score(images, self.prompts.captions)
        moments = frechet.moments(frechet.features(images))
        return {
            "score": overall, "tasks": tasks, "frechet": frechet.distance(moments, self._reference)
        }  # fmt: skip
