"""The search for weights of members by a score on the selection half of the embedded captions.

Scores of the candidates steer the search and flatter its winner. So the winners are scored once
more, on other prompts and noise of the same half, and the best of these is taken. The final half,
which reports are about, is never seen.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tqdm

from sprint_jax.config import Config
from sprint_jax.errors import UserError
from sprint_jax.evaluation.heldout import Evaluator
from sprint_jax.optim import weight_space
from sprint_jax.training import datasets, drawing
from sprint_jax.training.average import Members

LENGTHS = (0.05, 0.1, 0.15, 0.2, 0.25)
CHILDREN = 14
WINNERS = 5


class Found(NamedTuple):
    """A candidate with the score that chose it and that on other prompts: shares of wrong images
    in one step.
    """

    weights: np.ndarray
    searched: float
    again: float


def check(config: Config) -> None:
    """Raise UserError where a search would see what the run reports, or nothing can score."""
    if config.text.vocabulary != "shapes" or config.data.encoded:
        raise UserError(
            "--search needs the embedded data: other data sets have no half of prompts for "
            "choosing; give --weights or --relative"
        )
    if config.evaluation.split != "final":
        raise UserError(
            f"--search: the run reports scores on config.evaluation.split="
            f"{config.evaluation.split}, which the search would see: give runs with final"
        )


def find(members: Members, *, rounds: int, prompts: int, seed: int) -> list[Found]:
    """Return the winners, the best first, and last what they are compared with: the mean of
    students, or the last checkpoint.

    rounds, seed: of `weight_space.search`. prompts: for each score.
    """
    check(members.config)
    count, rng = len(members.params), np.random.default_rng(seed)
    plain = np.full(count, 1 / count) if members.steps is None else np.eye(count)[-1]
    starts = [plain, *_starts(members)]
    here, again = (_scorer(members, prompts, shift) for shift in (0, 1))
    with tqdm.tqdm(total=len(starts) + rounds * CHILDREN, unit="candidate", desc="search") as bar:

        def score(weights: np.ndarray) -> float:
            bar.update()
            return here(weights)

        found = weight_space.search(score, starts, rng, rounds=rounds, children=CHILDREN)
        for i, alive in enumerate(found):
            bar.set_postfix_str(f"round {i}, {1 - alive[0].score:.1%} right in one step")
    winners = [Found(one.weights, one.score, again(one.weights)) for one in alive[:WINNERS]]
    return [*sorted(winners, key=lambda one: one.again), Found(plain, here(plain), again(plain))]


def _starts(members: Members) -> list[np.ndarray]:
    """Return the first candidates: each member alone, and averages of several lengths."""
    alone = list(np.eye(len(members.params)))
    if members.steps is None:
        return alone
    return [*alone[:-1], *(weight_space.profile(members.steps, s) for s in LENGTHS)]


def _scorer(members: Members, prompts: int, shift: int) -> Callable[[np.ndarray], float]:
    """Return weights -> share of wrong images in one step.

    shift: of the seed of prompts and noise.
    """
    c = members.config
    c = dataclasses.replace(
        c,
        evaluation=dataclasses.replace(c.evaluation, split="selection", prompts=prompts),
        data=dataclasses.replace(c.data, eval_seed=c.data.eval_seed + shift),
    )
    data: Any = datasets.open_dataset(c, lambda message: None)
    heldout = data.heldout(prompts, 2)
    evaluator, draw = Evaluator(heldout), drawing.of_students(c, data, heldout.cond, steps=1)

    def score(weights: np.ndarray) -> float:
        params = weight_space.combine(members.params, weights)
        return 1 - evaluator(draw(params))["score"]

    return score
