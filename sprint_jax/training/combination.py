"""What `sprint-jax average` makes: members, the weights that were asked for, and a new student."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from sprint_jax.errors import UserError
from sprint_jax.optim import weight_space
from sprint_jax.training import average, weight_search
from sprint_jax.training.average import Members


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """How weights are chosen; see `commands.average.Options`."""

    checkpoints: str
    weights: tuple[float, ...]
    relative: float
    search: int
    prompts: int
    seed: int

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (option, what to use instead) for each value out of range."""
        if not all(map(math.isfinite, self.weights)):
            yield "weights", "use finite numbers"
        elif self.weights and abs(sum(self.weights) - 1) > 1e-6:
            yield "weights", f"they sum to {sum(self.weights):g}, use a sum of 1"
        if self.relative and not 0.01 <= self.relative < 0.28:
            yield "relative", "use a number from .01 to below .28"
        if self.relative and not self.checkpoints:
            yield "relative", "give --checkpoints=PHASE as well"
        if bool(self.weights) + bool(self.relative) + bool(self.search) > 1:
            yield "weights", "give one of --weights, --relative and --search"
        if self.search < 0:
            yield "search", "use 0 (none) or more rounds"
        if self.prompts < 16:
            yield "prompts", "use 16 or more"


def check(choice: Choice, runs: Sequence[str]) -> None:
    """Raise UserError for options that mean nothing together."""
    for name, advice in choice.problems():
        raise UserError(f"--{name}={getattr(choice, name)}: {advice}")
    if choice.checkpoints and len(runs) != 1:
        raise UserError(f"--runs={','.join(runs)}: name one run with --checkpoints")
    if not choice.checkpoints and len(runs) < 2:
        raise UserError(f"--runs={','.join(runs)}: name two or more runs, with commas between")


def write(
    choice: Choice, runs: Sequence[pathlib.Path], target: str, *, say: Callable[[str], None]
) -> None:
    """Write the student that the choice asks for into a new folder."""
    if choice.checkpoints:
        members = average.checkpoints(runs[0], choice.checkpoints)
    else:
        members = average.students(runs)
    weights = weights_of(choice, members, say)
    average.write(target, members.source, weight_space.combine(members.params, weights))
    for name, weight in zip(members.names, weights, strict=True):
        say(f"{weight:7.3f}  {name}")
    kind = "students" if members.steps is None else "checkpoints"
    what = "weighted sum" if choice.weights or choice.relative or choice.search else "mean"
    say(
        f"wrote {target}: the {what} of {len(weights)} {kind}. It is a --model for "
        "sprint-jax sample, evaluate and serve"
    )


def weights_of(choice: Choice, members: Members, say: Callable[[str], None]) -> np.ndarray:
    """Return the weight of each member."""
    count = len(members.params)
    if choice.weights:
        if len(choice.weights) != count:
            raise UserError(
                f"--weights: {len(choice.weights)} for {count}: give one for each of "
                f"{', '.join(members.names)}"
            )
        return np.asarray(choice.weights)
    if choice.relative:
        assert members.steps is not None, "checked before"
        return weight_space.profile(members.steps, choice.relative)
    if not choice.search:
        return np.full(count, 1 / count)
    *winners, plain = weight_search.find(
        members, rounds=choice.search, prompts=choice.prompts, seed=choice.seed
    )
    for found in (*winners, plain):
        name = "a winner" if found is not plain else "without a search"
        say(
            f"{name}: {1 - found.searched:.1%} right in one step in the search, "
            f"{1 - found.again:.1%} on other prompts"
        )
    # A winner may owe its score to the prompts of the search.
    return winners[0].weights if winners[0].again < plain.again else plain.weights
