"""Combine the weights of students of one teacher, or of one run's checkpoints.

    sprint-jax average --runs=A,B,C --averaged=NEW                        the mean
    sprint-jax average --runs=A,B --weights=.7,.3 --averaged=NEW
    sprint-jax average --runs=A --checkpoints=repair --relative=.1 --averaged=NEW
    sprint-jax average --runs=A --checkpoints=repair --search=10 --averaged=NEW

The result is a folder with a student and a config, like that of a run: every command that takes
--model reads it. See "model soups", arXiv 2203.05482, EDM2's averages after the fact, 2312.02696,
and LCSC, 2404.02241, which searches the weights.
"""

import dataclasses
import pathlib
from typing import Any

from sprint_jax.errors import UserError
from sprint_jax.runtime import cli
from sprint_jax.storage import files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(files.Paths):
    """Options of `sprint-jax average`."""

    runs: tuple[files.LocalPath, ...] = ()
    """Work directories of finished runs, with commas between: two or more, or one with
    --checkpoints.
    """
    averaged: files.LocalPath = ""
    """Folder to make, for the averaged student."""
    weights: tuple[float, ...] = ()
    """Weights of the runs or checkpoints, with commas between. Their sum must be 1; some may be
    negative. Without them it is the mean.
    """
    checkpoints: str = ""
    """Phase of the one run whose checkpoints are combined, such as repair."""
    relative: float = 0.0
    """Average the checkpoints by a power of their step; the standard deviation of the average in
    training time, as a share of the whole, from .05 to .25.
    """
    search: int = 0
    """Rounds of a search for the weights by right images in one step, on the selection half of the
    embedded captions. The run must report the final half.
    """
    prompts: int = 256
    """Prompts for each score of the search."""
    seed: int = 0
    """Seed of the search."""

    def problems(self) -> Any:
        """Yield (option, what to use instead) for each value out of range."""
        if self.weights and abs(sum(self.weights) - 1) > 1e-6:
            yield "weights", f"they sum to {sum(self.weights):g}, use a sum of 1"
        if self.relative and not 0 < self.relative < 0.28:
            yield "relative", "use a number in (0, .28)"
        if self.relative and not self.checkpoints:
            yield "relative", "give --checkpoints=PHASE as well"
        if bool(self.weights) + bool(self.relative) + bool(self.search) > 1:
            yield "weights", "give one of --weights, --relative and --search"
        if self.search < 0 or self.prompts < 16:
            yield "search", "use 0 (none) or more rounds, and 16 or more --prompts"


def run(options: Options) -> pathlib.Path:
    """Write the averaged student and return its folder.

    Raises UserError unless all runs share one network and one given teacher.
    """
    for name, advice in options.problems():
        raise UserError(f"--{name}={getattr(options, name)}: {advice}")
    runs = [pathlib.Path(path) for path in options.runs]
    if options.checkpoints and len(runs) != 1:
        raise UserError(f"--runs={','.join(options.runs)}: name one run with --checkpoints")
    if not options.checkpoints and len(runs) < 2:
        raise UserError(
            f"--runs={','.join(options.runs)}: name two or more runs, with commas between"
        )
    cli.require("averaged", options.averaged, "name the folder to make")
    from sprint_jax.optim import weight_space
    from sprint_jax.training import average

    if options.checkpoints:
        members = average.checkpoints(runs[0], options.checkpoints)
    else:
        members = average.students(runs)
    weights = _weights(options, members)
    average.write(options.averaged, members.source, weight_space.combine(members.params, weights))
    for name, weight in zip(members.names, weights, strict=True):
        print(f"{weight:7.3f}  {name}")
    kind = "checkpoints" if options.checkpoints else "students"
    what = "mean" if _is_mean(options) else "weighted sum"
    print(
        f"wrote {options.averaged}: the {what} of {len(weights)} {kind}. It is a --model for "
        "sprint-jax sample, evaluate and serve"
    )
    return pathlib.Path(options.averaged)


def _is_mean(options):
    return not (options.weights or options.relative or options.search)


def _weights(options: Options, members: Any) -> Any:
    """Return the weight of each member."""
    import numpy as np

    from sprint_jax.optim import weight_space
    from sprint_jax.training import weight_search

    count = len(members.params)
    if options.weights:
        if len(options.weights) != count:
            raise UserError(
                f"--weights: {len(options.weights)} for {count} of {', '.join(members.names)}"
            )
        return np.asarray(options.weights)
    if options.relative:
        return weight_space.profile(members.steps, options.relative)
    if not options.search:
        return np.full(count, 1 / count)
    *winners, plain = weight_search.find(
        members,
        rounds=options.search,
        prompts=options.prompts,
        seed=options.seed,
        say=print,
    )
    for found in (*winners, plain):
        name = "a winner" if found is not plain else "without a search"
        print(
            f"{name}: {1 - found.searched:.1%} right in one step in the search, "
            f"{1 - found.again:.1%} on other prompts"
        )
    return winners[0].weights if winners[0].again < plain.again else plain.weights
