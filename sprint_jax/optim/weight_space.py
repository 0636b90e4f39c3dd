"""Combinations of weights: means of students, averages over a run, and a search for better ones.

    theta = sum_i a_i theta_i,   sum_i a_i = 1

Students that began from one teacher and checkpoints of one run lie close enough for that: "model
soups" (Wortsman et al. 2022), power-function averages after the fact (Karras et al. 2024, EDM2),
and LCSC (Liu et al. 2024), which searches the a_i by evolution. They may be negative.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from scipy import optimize

Weights = Float[np.ndarray, " k"]


def combine(members: Sequence[Any], weights: Weights) -> Any:
    """Return sum_i a_i theta_i as NumPy float64."""
    total = jax.tree.map(lambda a: weights[0] * np.float64(a), members[0])
    for weight, member in zip(weights[1:], members[1:], strict=True):
        total = jax.tree.map(lambda t, a, w=weight: t + w * np.float64(a), total, member)
    return total


def profile(steps: Sequence[int], relative: float) -> Weights:
    """Return the weights of checkpoints at these steps in an average of a power function.

    The average over all t up to the last step T weighs t^gamma, gamma so that the standard
    deviation of t is `relative` T (EDM2 uses .05 to .2). A checkpoint stands for the time since the
    one before it.

    Raises:
      ValueError: for a relative length outside (0, .28); a plain mean has .289.
    """
    if not 0 < relative < 0.28:
        raise ValueError(f"relative length {relative}: use a number in (0, .28)")
    spread = lambda g: np.sqrt((g + 1) / ((g + 2) ** 2 * (g + 3))) - relative
    gamma: Any = optimize.brentq(spread, 0.0, 1e5)
    ends = np.concatenate([[0.0], np.asarray(steps, np.float64) / steps[-1]])
    return np.diff(ends ** (gamma + 1))


class Candidate(NamedTuple):
    """Weights and their score; lower is better."""

    weights: Weights
    score: float


def search(
    score: Callable[[Weights], float],
    starts: Sequence[Weights],
    rng: np.random.Generator,
    *,
    rounds: int,
    children: int = 14,
    parents: int = 6,
    spread: float = 0.15,
) -> Iterator[list[Candidate]]:
    """Yield the candidates of each round of LCSC's evolution, the best first.

    A child takes each weight from one of two parents, moves by noise of one of three sizes, and is
    divided by its sum. The score of each candidate is asked once.

    Args:
      score: weights -> a number to make small. The winner's own score is optimistic: ask again on
        other prompts.
      starts: candidates of the first round, such as averages of several lengths.
      rng: of the draws.
      rounds: after the first, which scores the starts.
      children: new candidates of a round.
      parents: candidates that survive a round.
      spread: of the noise, times 1, .3 or .05.
    """
    alive = [Candidate(a, score(a)) for a in starts]
    for i in range(rounds + 1):
        alive = sorted(alive, key=lambda one: one.score)[:parents]
        yield list(alive)
        if i == rounds:
            return
        for _ in range(children):
            one, other = (alive[rng.integers(len(alive))].weights for _ in range(2))
            child = np.where(rng.random(len(one)) < 0.5, one, other)
            child = child + spread * rng.choice([0.05, 0.3, 1.0]) * rng.standard_normal(len(one))
            if abs(child.sum()) > 0.1:  # else dividing would blow the weights up
                alive.append(Candidate(child / child.sum(), score(child / child.sum())))
