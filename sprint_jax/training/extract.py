"""Weights out of a run's checkpoints."""

import pathlib
from collections.abc import Callable
from typing import Any

from sprint_jax import config as config_lib
from sprint_jax.errors import UserError
from sprint_jax.storage import files, run_files, weights
from sprint_jax.training import checkpoints, run, stages


def write(
    run_dir: pathlib.Path,
    stage: str | None,
    to_file: pathlib.Path,
    *,
    say: Callable[[str], object] = print,
) -> pathlib.Path:
    """Write the weights of a stage's newest checkpoint as safetensors and return the file.

    stage: None for the last one that has a checkpoint. A student that is called
    student.safetensors gets the run's config beside it. Raises UserError as `check_place` and
    `extract` do.
    """
    c = run.read_config(run_dir)
    if stage is None:
        stage = (_there(run_dir, c) or c.order)[-1]
    phase = c.phases.get(stage)
    student = phase is not None and phase.network == "student"
    drawn = student and to_file.name == run_files.STUDENT
    check_place(run_dir, to_file, drawn)
    step, params = extract(run_dir, stage, c)
    _make_folder(to_file)
    weights.save(to_file, params)
    say(f"wrote {to_file}: {stage} after {step} steps")
    if drawn:
        with files.whole(to_file.with_name(run_files.CONFIG)) as partial:
            partial.write_bytes((run_dir / run_files.CONFIG).read_bytes())
        say(
            f"and its {run_files.CONFIG}: python -m sprint_jax sample --model={to_file.parent} "
            "draws with it"
        )
    return to_file


def check_place(run_dir: pathlib.Path, to_file: pathlib.Path, drawn: bool) -> None:
    """Raise UserError if the file would end a stage of the run, or its config replace another's."""
    inside = to_file.resolve().parent == run_dir.resolve()
    if inside and to_file.name in run.FILES.values():
        raise UserError(
            f"--to_file={to_file}: by that file the run would count as trained to its end; name "
            "one in another folder"
        )
    ours, theirs = run_dir / run_files.CONFIG, to_file.with_name(run_files.CONFIG)
    if drawn and theirs.exists() and ours.exists() and theirs.read_bytes() != ours.read_bytes():
        raise UserError(
            f"--to_file={to_file}: {theirs} is another run's; name a file in a folder of its own"
        )


def _make_folder(to_file: pathlib.Path) -> None:
    try:
        to_file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--to_file={to_file}: cannot make its folder ({error.strerror}): choose another"
        ) from None


def _there(run_dir: pathlib.Path, c: config_lib.Config) -> list[str]:
    """Return the phases that have checkpoints, in their order."""
    return [name for name in c.order if (run_dir / "checkpoints" / name).is_dir()]


def extract(run_dir: pathlib.Path, stage: str, c: config_lib.Config) -> tuple[int, Any]:
    """Return (step, parameters as NumPy) of the newest whole checkpoint of a phase.

    c: the run's config. Raises UserError if the run has no checkpoint of this phase.
    """
    return checkpoints.read_part(*_what(run_dir, stage, c, "--stage"))


def extract_all(run_dir: pathlib.Path, phase: str, c: config_lib.Config) -> list[tuple[int, Any]]:
    """Return what `extract` returns of every checkpoint, the oldest first. Raises UserError as it
    does, and for a damaged one.
    """
    return checkpoints.read_parts(*_what(run_dir, phase, c, "--checkpoints"))


def _what(run_dir, stage, c, option):
    """Return the folder of checkpoints, the part of a state that a phase ends with, its shapes."""
    there = _there(run_dir, c)
    if stage not in there:
        raise UserError(
            f"{run_dir} has no checkpoint of {option}={stage}: it has "
            f"{', '.join(there) or 'none of any stage yet'}"
        )
    phase = c.phases[stage]
    main = phase.objective.objective(stages.networks(c, phase)).main
    part = ("roles", main, "ema" if phase.ema else "params")
    abstract = weights.abstract(stages.stored(c, phase))
    return run_dir / "checkpoints" / stage, part, abstract
