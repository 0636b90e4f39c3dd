"""Scores of pictures made for held-out prompts: the checker of `shapes` where it reads them, a Fréchet distance."""

from sprint_jax.conditioning import sketches
from sprint_jax.evaluation import edges
from sprint_jax.toy import checker, frechet


class Evaluator:
    """Scores sets of pictures against the same prompts and the same real reference.

    heldout: `inputs.Heldout`, or anything with its `meanings`, `reference` and `edges`.
    """

    def __init__(self, heldout):
        self._meanings, self._edges = heldout.meanings, heldout.edges
        self._reference = frechet.moments(frechet.features(heldout.reference))

    def __call__(self, images):
        """uint8 [count, H, W, 3] -> {"frechet": distance}, and {"score": share, "tasks": {task: share}} for `shapes`.

        With edges that the pictures should follow also {"agreement": mean of `edges.agreement`}.
        """
        scores = {
            "frechet": frechet.distance(frechet.moments(frechet.features(images)), self._reference)
        }
        if self._meanings is not None:
            scores["score"], scores["tasks"] = checker.score(images, self._meanings)
        if self._edges is not None:
            scores["agreement"] = float(
                edges.agreement(sketches.gradient_edges(images), self._edges).mean()
            )
        return scores
