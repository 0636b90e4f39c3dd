"""Scores of images generated for held-out prompts.

They are a Fréchet distance, the shares of the checker of `shapes` for its captions, and with a
ControlNet the agreement of edges.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from sprint_jax.conditioning import sketches
from sprint_jax.evaluation import edges
from sprint_jax.toy import checker, frechet


class HeldOut(Protocol):
    """Held-out examples."""

    @property
    def meanings(self) -> Sequence[Any] | None:
        """The scenes that the prompts describe; None for data sets other than `shapes`."""
        ...

    @property
    def reference(self) -> np.ndarray | None:
        """Real images, uint8 [N, H, W, 3]; None where there are none."""
        ...

    @property
    def edges(self) -> np.ndarray | None:
        """The edges that images should have, [count, H, W]; None without a ControlNet."""
        ...


class Evaluator:
    """Scores sets of images against the same prompts and the same real images."""

    def __init__(self, heldout: HeldOut):
        self._meanings, self._edges = heldout.meanings, heldout.edges
        self._reference = None
        if heldout.reference is not None:
            self._reference = frechet.moments(frechet.features(heldout.reference))

    def __call__(self, images: np.ndarray) -> dict[str, Any]:
        """Return the scores of images, uint8 [count, H, W, 3], one for each prompt.

        They are {"frechet": distance} where there are real images, for `shapes` also {"score":
        share, "tasks": {task: share}}, and with edges also {"agreement": mean of
        `edges.agreement`}.
        """
        scores: dict[str, Any] = {}
        if self._reference is not None:
            moments = frechet.moments(frechet.features(images))
            scores["frechet"] = frechet.distance(moments, self._reference)
        if self._meanings is not None:
            scores["score"], scores["tasks"] = checker.score(images, self._meanings)
        if self._edges is not None:
            scores["agreement"] = float(
                edges.agreement(sketches.gradient_edges(images), self._edges).mean()
            )
        return scores
