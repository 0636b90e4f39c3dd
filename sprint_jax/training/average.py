"""Averages of students' weights.

What a run owes to its own batches and its own discriminator falls against what all runs have
learned ("model soups", arXiv 2203.05482).
"""

import dataclasses
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sprint_jax.config import Config
from sprint_jax.conversion import folder
from sprint_jax.errors import UserError
from sprint_jax.sampling import loading
from sprint_jax.storage import run_files, weights


def write(runs: Sequence[pathlib.Path], target: str | pathlib.Path) -> None:
    """Write the averaged student and the first run's config into a new folder.

    Raises UserError as `average` does, and for a target that exists and is not empty.
    """
    params = average(runs)
    with folder.new_folder(target, "--averaged") as made:
        weights.save(made / run_files.STUDENT, params)
        shutil.copyfile(runs[0] / run_files.CONFIG, made / run_files.CONFIG)


def average(runs: Sequence[pathlib.Path]) -> Any:
    """Return the mean parameters, NumPy float64, of the students of finished runs.

    Raises UserError unless all have one network and one given teacher (and ControlNet, where there
    is one): otherwise their weights have nothing in common. A run that is named twice, perhaps by a
    link, is refused.
    """
    total, first = None, None
    for i, run in enumerate(runs):
        if same := [other for other in runs[:i] if other.resolve() == run.resolve()]:
            raise UserError(
                f"--runs: {run} and {same[0]} are one run, which would count twice: name each once"
            )
        _, params, config = loading.read_student(run)
        _check_given(run, config)
        first = first or _shared(config)
        for name, found in _shared(config).items():
            if found != first[name]:
                raise UserError(
                    f"config.{name} is {found} in {run}, {first[name]} in {runs[0]}: give runs "
                    "with one network and one teacher"
                )
        total = (
            jax.tree.map(np.float64, params)
            if total is None
            else jax.tree.map(np.add, total, params)
        )
    return jax.tree.map(lambda a: a / len(runs), total)


def _check_given(run: pathlib.Path, config: Config) -> None:
    """Raise UserError for a run that trained its own teacher or ControlNet."""
    if not config.teacher.pretrained:
        raise UserError(
            f"{run} trained a teacher of its own: give runs that were given one "
            "(config.teacher.pretrained)"
        )
    if config.control.depth and not config.control.pretrained:
        raise UserError(
            f"{run} trained a ControlNet of its own: give runs that were given one "
            "(config.control.pretrained)"
        )


def _shared(config: Config) -> dict[str, Any]:
    """Return {key: value} of what must be equal.

    Left out is what only says how the network is computed.
    """
    return {
        "teacher.pretrained": config.teacher.pretrained,
        "control.pretrained": config.control.pretrained,
        "control.depth": config.control.depth,
        "text": config.text,
        "codec": config.codec,
        "model": dataclasses.replace(
            config.model, remat="", unroll=0, dtype="", residual_dtype="", attention=""
        ),
    }
