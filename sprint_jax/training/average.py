"""Averages of students' weights.

What a run owes to its own batches and its own discriminator falls against what all runs have
learned ("model soups", arXiv 2203.05482).
"""

import dataclasses
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

from sprint_jax import config as config_lib
from sprint_jax.config import Config
from sprint_jax.conversion import folder
from sprint_jax.errors import UserError
from sprint_jax.optim import weight_space
from sprint_jax.sampling import loading
from sprint_jax.storage import run_files, weights
from sprint_jax.training import extract


@dataclasses.dataclass(frozen=True, kw_only=True)
class Members:
    """Weights that may be combined.

    names: for messages. params: one tree for each. steps: of checkpoints, None for students of
    several runs. source: the folder whose config the result gets. config: that config.
    """

    names: tuple[str, ...]
    params: tuple[Any, ...]
    steps: tuple[int, ...] | None
    source: pathlib.Path
    config: Config


def write(target: str | pathlib.Path, source: pathlib.Path, params: Any) -> None:
    """Write a student and the config of the run `source` into a new folder.

    Raises UserError for a target that exists and is not empty.
    """
    with folder.new_folder(target, "--averaged") as made:
        weights.save(made / run_files.STUDENT, params)
        shutil.copyfile(source / run_files.CONFIG, made / run_files.CONFIG)


def students(runs: Sequence[pathlib.Path]) -> Members:
    """Read the students of finished runs.

    Raises UserError unless all have one network and one given teacher (and ControlNet, where there
    is one): otherwise their weights have nothing in common. A run that is named twice, perhaps by a
    link, is refused.
    """
    found, first = [], None
    for i, run in enumerate(runs):
        if same := [other for other in runs[:i] if other.resolve() == run.resolve()]:
            raise UserError(
                f"--runs: {run} and {same[0]} are one run, which would count twice: name each once"
            )
        _, params, config = loading.read_student(run)
        _check_given(run, config)
        first = first or config
        for name, value in _shared(config).items():
            if value != _shared(first)[name]:
                raise UserError(
                    f"config.{name} is {value} in {run}, {_shared(first)[name]} in {runs[0]}: give "
                    "runs with one network and one teacher"
                )
        found.append(params)
    assert first is not None
    names = tuple(map(str, runs))
    return Members(names=names, params=tuple(found), steps=None, source=runs[0], config=first)


def checkpoints(run: pathlib.Path, phase: str) -> Members:
    """Read what a phase of a run would have ended with at each of its checkpoints.

    Raises UserError for a phase that trained no student, and with fewer than two checkpoints.
    """
    _, _, config = loading.read_student(run)
    trained = [n for n in config_lib.active(config) if config.phases[n].network == "student"]
    if phase not in trained:
        raise UserError(
            f"--checkpoints={phase}: {run} trained its student in {' and '.join(trained)}"
        )
    found = extract.extract_all(run, phase, config)
    if len(found) < 2:
        raise UserError(
            f"{run} keeps {len(found)} checkpoints of {phase}: train with a larger config.run.keep "
            "and a smaller config.run.checkpoint_every"
        )
    steps, params = zip(*found, strict=True)
    names = tuple(f"{phase} at {step}" for step in steps)
    return Members(names=names, params=params, steps=steps, source=run, config=config)


def average(runs: Sequence[pathlib.Path]) -> Any:
    """Return the mean parameters, NumPy float64, of finished runs' students; see `students`."""
    members = students(runs)
    return weight_space.combine(members.params, np.full(len(runs), 1 / len(runs)))


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
